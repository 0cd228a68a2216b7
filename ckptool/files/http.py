"""Request a file from a web server: proxies, timeouts, retries, redirects, and what is no file.

urllib3 speaks HTTP and TLS and retries. Redirects are followed here: urllib3 goes from https to
http, keeps the proxy of the first host for all others, and reads a Location in UTF-8 as latin-1.
Bodies are read here: a timeout of urllib3 is for one `recv`, so that a byte a minute never ends,
and it takes chunks of -5 or 1_000 bytes (RFC 9112, 7.1, has hexadecimal digits alone).
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from ckptool.errors import DownloadFailed
from ckptool.text import length, readable

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from socket import socket

    from urllib3 import BaseHTTPResponse, PoolManager, Retry

AGAIN = (429, 500, 502, 503, 504)
MAX_REDIRECTS = 10
SHOWN = 200  # characters of what a server says
HEAD = 512  # bytes that show what a body is
CHUNK = 1 << 17
PACE = 1 << 10  # bytes of a file that a server must send in a second
IDLE = 1 << 20  # bytes that it may send before the next byte of the file: headers, chunk sizes
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "ckptool"}
_CHUNK = re.compile(rb"([^\s;]*)(?:[ \t]*;[^\n]*)?\r\n")  # white space is allowed before extensions
_HINTS = {
    401: "the server wants a login; it goes before the host: https://USER:PASSWORD@HOST/...",
    403: "the link needs a login or a token, or has expired; get a new link",
    404: "check the link",
    410: "the file was taken away; look for another link",
    429: "the server has had too many requests; wait and run it again",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait in seconds, how often to retry, how much to take.

    `timeout` bounds how long a server may send less than `PACE`, over redirects and retries.
    """

    connect: float = 10.0  # to one address, and for TLS
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 0.5
    longest_wait: float = 30.0
    nbytes: int = 1 << 40  # of a body whose length the server does not say


@dataclass(slots=True)
class _Patience:
    """How long a server has kept us waiting; `reader` has what it sends on the last connection.

    Bytes of the file alone are progress: no `100 Continue`, header, chunk extension or trailer is.
    """

    url: str
    timeout: float
    waited: float = 0.0  # seconds for the bytes in `came`
    came: int = 0
    idle: int = 0  # bytes since the last one of the file
    reader: io.BufferedReader = field(init=False)

    def respond(self, sock: socket, *args: Any, **kwargs: Any) -> HTTPResponse:
        """Return a response of `http.client` that reads from its socket under these rules."""
        from http.client import HTTPResponse

        class Final(HTTPResponse):
            def begin(self) -> None:
                super().begin()
                while 101 < self.status < 200:  # `http.client` takes 100 alone for no answer yet
                    self.headers = None  # type: ignore[assignment]  # so that it reads on
                    super().begin()

        response = Final(sock, *args, **kwargs)
        self.reader = io.BufferedReader(_Received(response.fp.detach(), sock, self))
        response.fp = self.reader
        return response

    def left(self) -> float:
        """Return the seconds that are left; raises `DownloadFailed`."""
        if self.idle > IDLE:
            what = ": the server sends headers or padding without end"
            raise failed(self.url, what, _HINTS[404])
        if self.waited >= self.timeout:
            pace = f"less than {readable(PACE)}/s for {self.timeout:g} s"
            what = f": {parsed(self.url).hostname} stopped sending, or sent {pace}"
            raise failed(self.url, what, "run it again; --timeout SECONDS waits longer")
        return self.timeout - self.waited

    def progress(self, nbytes: int) -> None:
        """Count bytes of the file; as many as a whole timeout asks for begin another one."""
        self.came, self.idle = self.came + nbytes, 0
        if self.came >= PACE * self.timeout:
            self.came, self.waited = 0, 0.0


class _Received(io.RawIOBase):
    """What a socket receives, as long as there is patience."""

    def __init__(self, raw: io.RawIOBase, sock: socket, patience: _Patience) -> None:
        self._raw, self._socket, self._patience = raw, sock, patience

    def readable(self) -> bool:
        """Return True: `BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; raises `DownloadFailed`."""
        patience = self._patience
        self._socket.settimeout(patience.left())
        began, nbytes = time.monotonic(), 0
        try:
            nbytes = self._raw.readinto(buffer) or 0
        except TimeoutError:
            patience.waited = patience.timeout
            patience.left()
        patience.waited += time.monotonic() - began
        patience.idle += nbytes
        return nbytes

    def close(self) -> None:
        """Close the socket too."""
        self._raw.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer with its body unread; `url` is where redirects ended.

    `linked` is the size that a model hub stated on the way there (X-Linked-Size).
    """

    url: str
    body: BaseHTTPResponse
    patience: _Patience
    linked: int | None = None

    def header(self, name: str) -> str:
        """Return a header, an empty string for none."""
        return self.body.headers.get(name, "").strip()

    @property
    def nbytes(self) -> int | None:
        """Return the length of the body as it was announced."""
        stated = length(self.header("Content-Length"), 10)
        return self.linked if stated is None and self.body.status == 200 else stated

    def chunks(self) -> Iterator[bytes]:
        """Iterate over the body as it comes; raises `DownloadFailed` where it breaks off."""
        reader = self.patience.reader
        stated = length(self.header("Content-Length"), 10)
        try:
            for size in self._sizes() if self._chunked else [1 << 63 if stated is None else stated]:
                left = size
                while left and (data := reader.read1(min(left, CHUNK))):
                    self.patience.progress(len(data))
                    left -= len(data)
                    yield data
                if self._chunked and left:
                    raise ConnectionError("the body ended inside a chunk")
                if self._chunked and reader.read(2) != b"\r\n":
                    what = ": a chunk is longer than the server states"
                    raise failed(self.url, what, "look for another link")
        except OSError as error:
            raise _failure(self.url, error) from error

    @property
    def _chunked(self) -> bool:
        return self.header("Transfer-Encoding").lower() == "chunked"

    def _sizes(self) -> Iterator[int]:
        """Iterate over the sizes of chunks; what follows the last one is never read."""
        while line := self.patience.reader.readline(IDLE):
            found = _CHUNK.fullmatch(line)
            size = length(found[1], 16) if found else None
            if size is None:
                raise _no_length(self.url, "of a chunk", line.decode("latin-1"))
            if not size:
                return
            yield size
        raise ConnectionError("the body ended before its last chunk")


def shown(url: str) -> str:
    """Return a URL without what may be a secret: user, password, query, fragment."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", url)[0].rpartition("@")[2][:SHOWN]
    return _without_login(parts._replace(query=""))


def _without_login(parts: SplitResult) -> str:
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment="").geturl()


def failed(url: str, what: str, hint: str = "", *, evidence: Sequence[str] = ()) -> DownloadFailed:
    """Return the error of a download; its message begins with the URL as it may be shown."""
    return DownloadFailed(f"{shown(url)}{what}", hint=hint, evidence=evidence)


def parsed(url: str) -> SplitResult:
    """Split a URL that can be downloaded; raises `DownloadFailed`."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise failed(url, f" is not a URL: {error}") from None
    if parts.scheme not in ("http", "https"):
        what = f" is not a web address: `{parts.scheme}` is neither http nor https"
        raise failed(url, what, "give a URL that starts with https://")
    if not host:
        raise failed(url, " names no host", _HINTS[404])
    return parts


@contextmanager
def asked(url: str, headers: Mapping[str, str], limits: Limits) -> Iterator[Answer]:
    """Request a URL and yield an answer that may hold its file; redirects are followed.

    The status is 200, after a `Range` also 206 or 416. Raises `DownloadFailed`, also for what
    goes wrong while the block reads the body.
    """
    from urllib3.exceptions import HTTPError

    try:
        answer = _followed(url, headers, limits)
        with closing(answer.body):
            _refuse(url, answer, ranged="Range" in headers)
            yield answer
    except (HTTPError, UnicodeError) as error:
        raise _failure(url, error) from error


def _followed(url: str, headers: Mapping[str, str], limits: Limits) -> Answer:
    from urllib3.util import make_headers

    parts = parsed(url)
    login = unquote(parts.netloc.rpartition("@")[0])
    headers = {**HEADERS, **headers, **make_headers(basic_auth=login or None)}
    patience, retries = _Patience(url, limits.timeout), _retry(limits)
    url = _without_login(parts)
    seen, linked = [url], None
    while True:
        response = _requested(url, headers, limits, patience, retries)
        retries = response.retries or retries
        linked = linked or length(response.headers.get("X-Linked-Size"), 10)
        location = response.get_redirect_location()
        if location is False:
            return Answer(url, response, patience, linked)
        response.close()
        target = redirected(url, (location or "").strip())
        if target in seen or len(seen) > MAX_REDIRECTS:
            why = "in a circle" if target in seen else f"more than {MAX_REDIRECTS} times"
            raise failed(url, f": the server redirects {why}", _HINTS[404])
        if urlsplit(target)[:2] != urlsplit(url)[:2]:  # another scheme, host or port
            headers.pop("authorization", None)
        url = target
        seen.append(url)


def redirected(url: str, location: str) -> str:
    """Return where a redirect leads; raises `DownloadFailed` where it must not be followed."""
    if not location:
        raise failed(url, ": the server redirects to nowhere", _HINTS[404])
    try:
        target = urljoin(url, location.encode("latin-1", "replace").decode("utf-8", "replace"))
    except ValueError as error:
        raise failed(url, f" redirects to no URL: {error}") from None
    parts = parsed(target)
    if urlsplit(url).scheme == "https" and parts.scheme != "https":
        raise failed(
            url,
            f" redirects from https to http: {shown(target)}",
            "what comes over http may have been changed on the way; "
            "give that URL itself if that is what you want",
        )
    return _without_login(parts)


def _requested(
    url: str, headers: Mapping[str, str], limits: Limits, patience: _Patience, retries: Retry
) -> BaseHTTPResponse:
    from urllib3 import Timeout

    connect = min(limits.connect, limits.timeout)
    return _pool(url, patience).urlopen(
        "GET",
        url,
        headers=headers,
        timeout=Timeout(connect=connect, read=limits.timeout),
        retries=retries,
        redirect=False,
        preload_content=False,
        decode_content=False,
        enforce_content_length=False,  # the caller counts
    )


def _retry(limits: Limits) -> Retry:
    """Return urllib3's rules for retries, bounded against a server that never ends."""
    from urllib3 import Retry, exceptions as known

    class Bounded(Retry):
        def increment(self, *args: Any, **kwargs: Any) -> Self:
            error = kwargs.get("error")
            cause = getattr(error, "original_error", error)  # of a proxy's
            refused = isinstance(cause, known.NewConnectionError)
            if error and isinstance(cause, known.TimeoutError) and not refused:
                raise error  # that was the time there is
            if response := kwargs.get("response"):
                response.close()  # urllib3 reads it to its end, which may never come
            return super().increment(*args, **kwargs)

        def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
            try:
                return min(super().get_retry_after(response) or 0.0, self.backoff_max)
            except (known.InvalidHeader, ValueError, OverflowError):
                return None

    return Bounded(
        total=limits.retries,
        other=0,  # a certificate does not become right
        status_forcelist=AGAIN,
        backoff_factor=limits.backoff,
        backoff_jitter=limits.backoff,
        backoff_max=limits.longest_wait,
        raise_on_status=False,
    )


def _pool(url: str, patience: _Patience) -> PoolManager:
    """Return connections by way of the proxy that the environment names for a URL, if any."""
    manager = _proxied(url)
    pool = manager.connection_from_url(url)
    make: Any = pool.ConnectionCls

    def connection(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        made.response_class = patience.respond  # what `http.client` makes of a connection
        return made

    pool.ConnectionCls = connection  # type: ignore[assignment]
    return manager


def _proxied(url: str) -> PoolManager:
    from urllib.request import getproxies, proxy_bypass

    from urllib3 import PoolManager, ProxyManager
    from urllib3.util import make_headers

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return PoolManager()
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    login = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    return ProxyManager(proxy, proxy_headers=make_headers(proxy_basic_auth=login or None))


def _failure(url: str, error: Exception) -> DownloadFailed:
    """Return what urllib3 raised as an error for users."""
    from http.client import HTTPException

    from urllib3 import exceptions as known

    host = parsed(url).hostname
    hint = "check the link and the network"
    match error:
        case known.MaxRetryError(reason=Exception() as reason):
            return _failure(url, reason)
        case known.ProxyError() | known.ProxySchemeUnknown():
            what, hint = "the proxy does not work", "look at HTTPS_PROXY, HTTP_PROXY and NO_PROXY"
        case known.SSLError():
            what = f"no trusted connection to {host}"
            hint = "SSL_CERT_FILE names certificates to trust"
        case known.NameResolutionError():
            what = f"the host {host} is not found"
        case known.ConnectTimeoutError():  # refused, too
            what = f"{host} does not answer"
        case known.ReadTimeoutError():  # of TLS: of all else `_Patience` judges
            what, hint = f"{host} stopped sending", "run it again"
        case known.InvalidHeader():
            what = f"the headers of {host} contradict one another"
        case known.ProtocolError(args=(_, HTTPException() as inner)) if (
            not isinstance(inner, OSError)  # a server that hangs up is both
        ):
            what = f"the answer of {host} is not HTTP"
        case known.LocationValueError() | UnicodeError():
            what, hint = "this is not a URL", _HINTS[404]
        case _:
            what, hint = f"the connection to {host} was lost", "run it again"
    return failed(url, f": {what}", hint, evidence=[_reason(error)])


def _reason(error: Exception) -> str:
    """Return the innermost reason that urllib3 knows, without addresses of objects."""
    known = (getattr(error, "original_error", None), *error.args[1:])
    inner = next((each for each in known if isinstance(each, Exception)), error)
    text = re.sub(r"<[^<>]* object at 0x[0-9a-f]+>:? ?", "", str(inner) or type(inner).__name__)
    return re.sub(r"^\w*Connection\w*\([^()]*\): ", "", text)[:SHOWN]


def _refuse(url: str, answer: Answer, *, ranged: bool) -> None:
    """Raise `DownloadFailed` for an answer that holds no file, or packs it."""
    status = answer.body.status
    if status in (200, 206):
        _refuse_framing(url, answer)
    if status == 200 or (ranged and status in (206, 416)):
        return
    if status == 206:
        raise failed(url, ": the server sends a part where all was asked for")
    reason = f" {answer.body.reason}"[:SHOWN] if answer.body.reason else ""
    hint = "the server is in trouble; run it again later" if status >= 500 else ""
    raise failed(url, f": the server says {status}{reason}", hint or _HINTS.get(status, ""))


def _refuse_framing(url: str, answer: Answer) -> None:
    """Raise `DownloadFailed` for a body that is packed, or whose length is stated as no number."""
    for name, plain in (("Content-Encoding", ""), ("Transfer-Encoding", "chunked")):
        encoding = answer.header(name).lower()
        if encoding not in ("", "identity", plain):
            what = f": the server packs the file ({encoding[:SHOWN]}), which was not asked for"
            raise failed(url, what, "look for another link")
    stated = answer.body.headers.get("Content-Length")
    if stated is not None and length(stated.strip(), 10) is None:
        raise _no_length(url, "of the body", stated)


def _no_length(url: str, of: str, stated: str) -> DownloadFailed:
    evidence = [f"the length {of} is {stated[:SHOWN]!r}"]
    what = ": the server states a length that is not a number"
    return failed(url, what, "look for another link", evidence=evidence)


def refuse_page(url: str, answer: Answer, head: bytes) -> None:
    """Raise `DownloadFailed` where a body begins as a page, a pointer or nothing."""
    start = head[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    html = answer.header("Content-Type").lower().startswith(("text/html", "application/xhtml"))
    if start.startswith((b"<!doctype", b"<html", b"<head")) or (html and b"\0" not in head):
        raise failed(
            url,
            " is an HTML page, not a file; nothing was kept",
            "a server sends this when a link is wrong or needs a login; "
            "look for the link of the file itself",
        )
    if start.startswith(b"version https://git-lfs.github.com/"):
        raise failed(
            url,
            " is a git-LFS pointer, not the file itself; nothing was kept",
            "use the link behind `download` on the file's page "
            "(/resolve/ or media.githubusercontent.com, not /raw/), or git lfs pull",
        )
    if not head and not answer.nbytes:
        raise failed(url, ": the server sends an empty file")
    if answer.linked not in (None, answer.nbytes):
        what = f": {answer.linked} bytes were announced, and {answer.nbytes} come"
        raise failed(url, what, "look for another link")
