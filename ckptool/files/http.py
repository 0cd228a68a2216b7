"""Ask a web server for a file: proxies, timeouts, retries, redirects, and headers made sense of.

urllib3 speaks HTTP and TLS. Retries and redirects are walked by hand: urllib3 reads the body of
every answer that it does not hand out to the end, which a server may never let come, and follows
a redirect from https to http.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from ckptool.errors import DownloadFailed

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

REDIRECTS = frozenset({301, 302, 303, 307, 308})
AGAIN = frozenset({429, 500, 502, 503, 504})
MAX_REDIRECTS = 10
SHOWN = 200  # characters of what a server says
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "ckptool"}
_HINTS = {
    401: "the server wants a login; it goes before the host: https://USER:PASSWORD@HOST/...",
    403: "the link needs a login or a token, or has expired; get a new link",
    404: "check the link",
    410: "the file was taken away; look for another link",
    429: "the server has had too many requests; wait and run it again",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait in seconds, how often to ask again, how much to take."""

    connect: float = 10.0
    read: float = 30.0
    retries: int = 3
    backoff: float = 0.5
    longest_wait: float = 30.0
    nbytes: int = 1 << 40  # of a body whose length the server does not say


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer with its body unread; `url` is where redirects ended."""

    url: str
    body: BaseHTTPResponse

    @property
    def status(self) -> int:
        """Give the status code."""
        return self.body.status

    def header(self, name: str) -> str:
        """Give a header, an empty string for none."""
        return self.body.headers.get(name, "").strip()

    @property
    def nbytes(self) -> int | None:
        """Give the length of the body as declared."""
        text = self.header("Content-Length")
        return int(text) if re.fullmatch(r"\d{1,18}", text) else None


@dataclass(frozen=True, slots=True)
class Range:
    """The part of a file that an answer holds: `total` is None where the server does not know."""

    start: int
    end: int
    total: int | None


def content_range(text: str) -> Range | None:
    """Read a Content-Range header; None where it makes no sense."""
    found = re.fullmatch(r"bytes\s+(\d{1,18})-(\d{1,18})/(\d{1,18}|\*)", text, re.IGNORECASE)
    if found is None:
        return None
    start, last = int(found[1]), int(found[2])
    total = None if found[3] == "*" else int(found[3])
    if last < start or (total is not None and last >= total):
        return None
    return Range(start, last + 1, total)


def shown(url: str) -> str:
    """Give a URL without what may be a secret: user, password, query, fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", url)[0].rpartition("@")[2][:SHOWN]
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def parsed(url: str) -> SplitResult:
    """Split a URL that can be downloaded; raises `DownloadFailed`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise DownloadFailed(f"{shown(url)} is not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        raise DownloadFailed(
            f"{shown(url)} is not a web address: `{parts.scheme}` is neither http nor https",
            hint="give a URL that starts with https://",
        )
    if not host:
        raise DownloadFailed(f"{shown(url)} names no host", hint="check the link")
    return parts


@contextmanager
def asked(url: str, headers: Mapping[str, str], limits: Limits) -> Iterator[Answer]:
    """Ask for a URL, and give the answer, whatever its status; redirects are followed.

    Raises `DownloadFailed`, also for what goes wrong while the block reads the body.
    """
    answer = None
    with explained(url):
        try:
            answer = _followed(url, headers, limits)
            yield answer
        finally:
            if answer is not None:
                answer.body.close()


def _followed(url: str, headers: Mapping[str, str], limits: Limits) -> Answer:
    seen = [url]
    login = _login(url)
    origin = _origin(url)
    while True:
        own = {**HEADERS, **headers, **(login if _origin(url) == origin else {})}
        answer = Answer(url, _answered(url, own, limits))
        if answer.status not in REDIRECTS:
            return answer
        answer.body.close()
        url = redirected(url, answer.header("Location"))
        if url in seen or len(seen) > MAX_REDIRECTS:
            why = "in a circle" if url in seen else f"more than {MAX_REDIRECTS} times"
            raise DownloadFailed(f"{shown(url)}: the server redirects {why}", hint=_HINTS[404])
        seen.append(url)


def redirected(url: str, location: str) -> str:
    """Say where a redirect leads; raises `DownloadFailed` where following it is not right."""
    if not location:
        raise DownloadFailed(f"{shown(url)}: the server redirects to nowhere", hint=_HINTS[404])
    try:
        there = urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except ValueError as error:
        raise DownloadFailed(f"{shown(url)} redirects to no URL: {error}") from None
    parts = parsed(there)
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise DownloadFailed(
            f"{shown(url)} redirects from https to http: {shown(there)}",
            hint="what comes over http may have been changed on the way; "
            "give that URL itself if that is what you want",
        )
    return parts._replace(fragment="").geturl()


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = parsed(url)
    return parts.scheme, parts.hostname, parts.port


def _login(url: str) -> dict[str, str]:
    from urllib3.util import make_headers

    name, at, _ = urlsplit(url).netloc.rpartition("@")
    return make_headers(basic_auth=unquote(name)) if at else {}


def _answered(url: str, headers: Mapping[str, str], limits: Limits) -> BaseHTTPResponse:
    """Ask one server, again after errors that pass."""
    from urllib3 import Timeout, exceptions

    timeout = Timeout(connect=limits.connect, read=limits.read)
    pool = _pool(url)
    address = parsed(url)
    address = address._replace(netloc=address.netloc.rpartition("@")[2], fragment="")
    for attempt in range(limits.retries + 1):
        wait = limits.backoff * 2**attempt
        last = attempt == limits.retries
        try:
            body = pool.urlopen(
                "GET",
                address.geturl(),
                headers=headers,
                timeout=timeout,
                retries=False,
                redirect=False,
                preload_content=False,
                decode_content=False,
                enforce_content_length=False,  # the caller counts
            )
        except (exceptions.ConnectTimeoutError, exceptions.ProtocolError, exceptions.ProxyError):
            if last:
                raise
        else:
            if last or body.status not in AGAIN:
                return body
            wait = _retry_after(body.headers.get("Retry-After", "")) or wait
            body.close()
        time.sleep(min(wait, limits.longest_wait))
    raise AssertionError("the last attempt returns or raises")


def _retry_after(text: str) -> float:
    """Read a Retry-After header, seconds or a date; 0 where it says neither."""
    from email.utils import parsedate_to_datetime

    if re.fullmatch(r"\s*\d{1,9}\s*", text):
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _pool(url: str) -> PoolManager:
    """Go through the proxy that the environment names for a URL, if any."""
    from urllib.request import getproxies, proxy_bypass

    from urllib3 import PoolManager, ProxyManager
    from urllib3.util import make_headers

    parts = parsed(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return PoolManager()
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    login, at, _ = urlsplit(proxy).netloc.rpartition("@")
    headers = make_headers(proxy_basic_auth=unquote(login)) if at else None
    return ProxyManager(proxy, proxy_headers=headers)


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what urllib3 raises into `DownloadFailed`."""
    from http.client import HTTPException

    from urllib3.exceptions import HTTPError, ProxySchemeUnsupported

    try:
        yield
    except (HTTPError, HTTPException, ProxySchemeUnsupported, UnicodeError) as error:
        raise _failure(url, error) from error


def _failure(url: str, error: Exception) -> DownloadFailed:
    from urllib3 import exceptions as known

    host = parsed(url).hostname
    match error:
        case known.ProxyError() | known.ProxySchemeUnknown() | known.ProxySchemeUnsupported():
            what, hint = "the proxy does not work", "look at HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        case known.SSLError():
            what, hint = (
                f"no trusted connection to {host}",
                "SSL_CERT_FILE names certificates to trust",
            )
        case known.NameResolutionError():
            what, hint = f"the host {host} is not found", "check the link and the network"
        case known.NewConnectionError() | known.ConnectTimeoutError():
            what, hint = f"{host} does not answer", "check the link and the network"
        case known.ReadTimeoutError():
            what, hint = f"{host} stopped sending", "run it again"
        case known.LocationValueError() | UnicodeError():
            what, hint = "this is not a URL", "check the link"
        case _:
            what, hint = f"the connection to {host} was lost", "run it again"
    return DownloadFailed(f"{shown(url)}: {what}", evidence=[_said(error)], hint=hint)


def _said(error: Exception) -> str:
    """Give the innermost reason that urllib3 knows, without addresses of objects."""
    inner = getattr(error, "original_error", None) or error
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", str(inner) or type(inner).__name__)
    return re.sub(r"^\w*Connection\w*\([^()]*\): ", "", text)[:SHOWN]


def refuse_status(url: str, answer: Answer) -> None:
    """Raise `DownloadFailed` for an answer that holds no file."""
    if answer.status in (200, 206):
        return
    reason = f" {answer.body.reason}" if answer.body.reason else ""
    hint = _HINTS.get(answer.status, "")
    if answer.status >= 500:
        hint = "the server is in trouble; run it again later"
    raise DownloadFailed(
        f"{shown(url)}: the server says {answer.status}{reason[:SHOWN]}", hint=hint
    )
