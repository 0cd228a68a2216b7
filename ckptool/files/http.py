"""Request a file from a web server: proxies, timeouts, retries, redirects, and what is no file.

urllib3 speaks HTTP and TLS and retries. Redirects are followed here: urllib3 goes from https to
http, keeps the proxy of the first host for all others, and reads a Location in UTF-8 as latin-1.
Bodies are read here: a timeout of urllib3 is for one `recv`, so that a byte a minute never ends,
and it takes chunks of -5 or 1_000 bytes (RFC 9112, 7.1, has hexadecimal digits alone).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import SplitResult, quote as quote, unquote as unquote, urljoin, urlsplit

from ckptool.errors import DownloadFailed
from ckptool.files.connections import Connections
from ckptool.files.patience import IDLE, Patience
from ckptool.records import NamedTuple, dataclass
from ckptool.text import HIDDEN, length

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, Retry

AGAIN = (429, 500, 502, 503, 504)
MAX_REDIRECTS = 10
SHOWN = 200  # characters of what a server says
HEAD = 512  # bytes that show what a body is
CHUNK = 1 << 17
OF_HUB = ("X-Linked-Size", "X-Linked-Etag", "X-Repo-Commit")
HEADERS = {"Accept-Encoding": "identity", "User-Agent": "ckptool"}
_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", re.IGNORECASE | re.ASCII)
_CHUNK = re.compile(rb"([^\s;]*)(?:[ \t]*;[^\n]*)?\r\n")  # white space is allowed before extensions
_HINTS = {
    401: "the server wants a login; it goes before the host: https://USER:PASSWORD@HOST/...",
    403: "the link needs a login or a token, or has expired; get a new link",
    404: "check the link",
    410: "the file was removed; look for another link",
    429: "the server has had too many requests; wait and run it again",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """How long to wait in seconds, how often to retry, how much to take.

    `timeout` bounds how long a server may send less than 1 KiB/s, over redirects and retries.
    """

    connect: float = 10.0  # to one address, and for TLS
    timeout: float = 60.0
    retries: int = 3
    backoff: float = 0.5
    longest_wait: float = 30.0
    nbytes: int = 1 << 40  # of a body whose length the server does not say


class Range(NamedTuple):
    """The bytes of an answer, from `start` to before `stop`, of so many in the whole file."""

    start: int
    stop: int
    whole: int


@dataclass(frozen=True, slots=True)
class Answer:
    """A server's answer with its body unread; `url` is where redirects ended.

    `said` is what a model hub said on the way there, of the headers in `OF_HUB`.
    """

    url: str
    body: BaseHTTPResponse
    patience: Patience
    said: Mapping[str, str]

    @property
    def range(self) -> Range | None:
        """Return which bytes the body holds, None where it does not say, or what cannot be."""
        match = _RANGE.fullmatch(self.header("Content-Range"))
        if match is None or self.body.status != 206:
            return None
        start, last, whole = (length(text, 10) or 0 for text in match.groups())
        stated = length(self.header("Content-Length"), 10)
        if not start <= last < whole or stated not in (None, last + 1 - start):
            return None
        return Range(start, last + 1, whole)

    def header(self, name: str) -> str:
        """Return a header, an empty string for none."""
        return self.body.headers.get(name, "").strip()

    @property
    def linked(self) -> int | None:
        """Return the size of the file that a model hub stated, None for none."""
        return length(self.said.get("X-Linked-Size"), 10)

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
                if not left and not self._chunked:
                    self._release()
                if self._chunked and left:
                    raise ConnectionError("the body ended inside a chunk")
                if self._chunked and reader.read(2) != b"\r\n":
                    what = ": a chunk is longer than the server states"
                    raise failed(self.url, what, "look for another link")
        except OSError as error:
            raise _failure(self.url, error) from None  # whose words may hold the query

    def _release(self) -> None:
        """Give the connection back, for the next request."""
        self.patience.response.close()
        self.body.release_conn()

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
    """Return a URL with `?...` for what may be a secret: user, password, query."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return re.split(r"[?#]", url)[0].rpartition("@")[2][:SHOWN]
    hidden = HIDDEN if parts.query or "@" in parts.netloc else ""
    return _without_login(parts._replace(query="")) + hidden


def without_login(url: str) -> str:
    """Return a URL that can be downloaded without user, password and fragment."""
    return _without_login(parsed(url))


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


class Client:
    """What requests files; its connections are kept from one request to the next."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits, self._connections = limits or Limits(), Connections()

    @contextmanager
    def asked(self, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Request a URL and yield an answer that may hold its file; redirects are followed.

        The status is 200, after a `Range` also 206 or 416. Raises `DownloadFailed`, also for what
        goes wrong while the block reads the body.
        """
        from urllib3.exceptions import HTTPError

        try:
            answer = self._followed(url, {**HEADERS, **headers, **login(url)})
            with closing(answer.body):
                _refuse(url, answer, ranged="Range" in headers)
                yield answer
        except (HTTPError, UnicodeError) as error:
            raise _failure(url, error) from None

    def _followed(self, url: str, headers: dict[str, str]) -> Answer:
        patience = Patience(self.limits.timeout, partial(failed, url))
        retries = _retry(self.limits)
        url = without_login(url)
        seen, said = [url], dict[str, str]()
        while True:
            response = self._requested(url, headers, retries, patience)
            retries = response.retries or retries
            said |= {name: response.headers.get(name, "") for name in OF_HUB if not said.get(name)}
            location = response.get_redirect_location()
            if location is False:
                return Answer(url, response, patience, said)
            response.close()
            target = redirected(url, (location or "").strip())
            if target in seen or len(seen) > MAX_REDIRECTS:
                why = "in a circle" if target in seen else f"more than {MAX_REDIRECTS} times"
                raise failed(url, f": the server redirects {why}", _HINTS[404])
            headers = for_server(target, url, headers)
            url = target
            seen.append(url)

    def _requested(
        self, url: str, headers: Mapping[str, str], retries: Retry, patience: Patience
    ) -> BaseHTTPResponse:
        from urllib3 import Timeout

        connect = min(self.limits.connect, self.limits.timeout)
        return self._connections.manager(url, patience).urlopen(
            "GET",
            url,
            headers=headers,
            timeout=Timeout(connect=connect, read=self.limits.timeout),
            retries=retries,
            redirect=False,
            preload_content=False,
            decode_content=False,
            enforce_content_length=False,  # the caller counts
        )


def login(url: str) -> dict[str, str]:
    """Return the header for the user and the password in a URL."""
    from urllib3.util import make_headers

    return dict(make_headers(basic_auth=unquote(parsed(url).netloc.rpartition("@")[0]) or None))


def for_server(target: str, url: str, headers: Mapping[str, str]) -> dict[str, str]:
    """Return the headers for a URL as another one may get them: a login stays with its server."""
    same = urlsplit(target)[:2] == urlsplit(url)[:2]  # scheme, host and port
    return {name: value for name, value in headers.items() if same or name != "authorization"}


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


def _failure(url: str, error: Exception) -> DownloadFailed:
    """Return what urllib3 raised as an error for users."""
    from http.client import HTTPException

    from urllib3 import exceptions as known

    host = parsed(url).hostname
    hint, lost = "check the link and the network", False
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
        case known.ReadTimeoutError():  # of TLS: of all else `Patience` judges
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
            what, hint, lost = f"the connection to {host} was lost", "run it again", True
    raised = failed(url, f": {what}", hint, evidence=[_reason(error)])
    raised.lost = lost
    return raised


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
    hint = "the server has a problem; run it again later" if status >= 500 else ""
    error = failed(url, f": the server says {status}{reason}", hint or _HINTS.get(status, ""))
    error.status = status
    raise error


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


def refuse_page(url: str, answer: Answer, head: bytes | bytearray, nbytes: int | None) -> None:
    """Raise `DownloadFailed` where a file of that size begins as a page, a pointer or nothing."""
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
    if not head and not nbytes:
        raise failed(url, ": the server sends an empty file")
    if answer.linked not in (None, nbytes):
        what = f": {answer.linked} bytes were announced, and {nbytes} come"
        raise failed(url, what, "look for another link")
