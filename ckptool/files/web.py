"""Files on the web, read by ranges of one version of each (RFC 9110, 13 and 14).

The version is that of the first answer: its ETag, else Last-Modified, and the size. Every later
answer has to be of it. Where redirects led is asked directly, and the start of them again when
that has expired.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ckptool.errors import DownloadFailed, Malformed
from ckptool.files import download, http, remote
from ckptool.files.http import Answer, Client, Limits, Range, shown
from ckptool.text import readable

if TYPE_CHECKING:
    from ckptool.files.paths import Entry, Url
    from ckptool.files.remote import Source

FIRST = 1 << 14  # bytes that are asked for first
ENOUGH = 1 << 16  # that an answer may break off after as often as it likes
GONE = (404, 410)  # what servers say of a file that is not there
EXPIRED = (400, 401, 403, 404, 410)  # what servers say of a link that was good for a while
Say = Callable[[str], None]
Shown = Callable[[str], AbstractContextManager[Any]]
_NO_VERSION = (
    "the server gives neither ETag nor Last-Modified: a file of the same size that replaces this "
    "one while it is read would not be noticed"
)


class Web:
    """What is asked of web servers in one run."""

    is_web = True

    def __init__(self, timeout: float, say: Say | None, progress: Shown) -> None:
        self.client = Client(Limits(timeout=timeout))
        self.opened = remote.Opened(self.open)
        self._say, self._progress = say, progress

    def open(self, url: Url) -> Source:
        """Open a file; raises `DownloadFailed`."""
        return self.ranged(url.full, {})

    def is_file(self, url: Url) -> bool:
        """Check whether there is a file; nothing can be listed, so it is opened."""
        try:
            self.opened(url)
        except DownloadFailed as error:
            if error.status in GONE:
                return False
            raise
        return True

    def is_folder(self, url: Url) -> bool:
        """Return False: there are files alone."""
        return False

    def listing(self, url: Url) -> list[Entry]:
        """Return nothing: no server lists its files."""
        return []

    def ranged(self, url: str, headers: Mapping[str, str], name: str = "") -> Source:
        """Open the file at a URL, as it is called in messages: its ranges, or all of it."""
        name, headers = name or shown(url), {**headers, **http.login(url)}
        url = http.without_login(url)
        asked = {**headers, "Range": f"bytes=0-{FIRST - 1}"}
        with self.client.asked(url, asked) as answer:
            if answer.body.status == 416:  # nothing begins at 0
                http.refuse_page(url, answer, b"", 0)
            found = answer.range
            if found is not None and found.start == 0:
                ranges = Ranges(self, url, headers, name, answer, found)
                http.refuse_page(url, answer, ranges.head, ranges.nbytes)
                return ranges
            nbytes = answer.nbytes
        size = "" if nbytes is None else f" ({readable(nbytes)})"
        note = f"the server sends no ranges: the whole file{size} is fetched to a temporary place"
        return self._whole(url, headers, name, note)

    def _whole(self, url: str, headers: Mapping[str, str], name: str, note: str) -> Source:
        """Fetch a file to a temporary place, from which it goes with what reads it."""
        if self._say:
            self._say(f"{name}: {note}")
        with self._progress(name) as bar:
            reached = getattr(bar, "reached", None)
            file, sha256 = download.unnamed(url, self.client, headers, reached)
        identity = int.from_bytes(bytes.fromhex(sha256)[:8], "big")
        return remote.Copy(file, identity, "" if self._say else note)


class Ranges:
    """One version of a file on a server, begun with an answer that holds its first bytes."""

    def __init__(
        self, web: Web, url: str, headers: Mapping[str, str], name: str, answer: Answer, part: Range
    ) -> None:
        self._client, self._url, self._headers, self._name = web.client, url, headers, name
        self._at = answer.url  # where redirects led
        self._etag, self._modified = answer.header("ETag"), answer.header("Last-Modified")
        self.nbytes = part.whole
        self.note = "" if self._etag or self._modified else _NO_VERSION
        self.said = answer.said
        version = "\n".join((url, self._etag, self._modified, str(self.nbytes)))
        self.identity = int.from_bytes(hashlib.sha256(version.encode()).digest()[:8], "big")
        head = bytearray(min(FIRST, self.nbytes))
        self._fill(head, 0, self._taken(answer, part, memoryview(head)))
        self.head: bytes | bytearray = head

    def fetch(self, start: int, stop: int) -> bytearray:
        """Return exactly these bytes of this version.

        Raises `DownloadFailed`, and `Malformed` where the server has another version by now.
        """
        data = bytearray(stop - start)
        self._fill(data, start, 0)
        return data

    def _fill(self, data: bytearray, start: int, done: int) -> None:
        """Ask for what is missing until all is there, or too many answers broke off."""
        limits, failures = self._client.limits, 0
        error: DownloadFailed | None
        while done < len(data):
            error, before = None, done
            try:
                done += self._part(memoryview(data)[done:], start + done)
            except DownloadFailed as raised:
                if not raised.lost:
                    raise
                error = raised
            if done < len(data):
                failures = 0 if done - before >= ENOUGH else failures + 1
                if failures > limits.retries:
                    what = f": the answer ended after {done} of {len(data)} bytes"
                    raise error or http.failed(self._url, what, "run it again")
                time.sleep(min(limits.backoff * (2**failures - 1), limits.longest_wait))

    def _part(self, view: memoryview[int], start: int) -> int:
        """Fill a view from `start` as far as one answer goes; return how far."""
        if self._at != self._url:
            try:
                return self._asked(self._at, view, start)
            except DownloadFailed as error:
                if error.status not in EXPIRED:
                    raise
        return self._asked(self._url, view, start)

    def _asked(self, url: str, view: memoryview[int], start: int) -> int:
        headers = http.for_server(url, self._url, self._headers)
        headers["Range"] = f"bytes={start}-{start + len(view) - 1}"
        if self._etag.startswith('"'):
            headers["If-Range"] = self._etag
        with self._client.asked(url, headers) as answer:
            self._refuse_change(answer)
            found = answer.range
            if found is None or found.start != start or found.stop > start + len(view):
                said = answer.header("Content-Range") or f"status {answer.body.status}"
                what = f": bytes {start}-{start + len(view) - 1} were asked for, and {said} came"
                raise http.failed(self._url, what, f"ckptool download {shown(self._url)}")
            self._at = answer.url
            return self._taken(answer, found, view)

    def _taken(self, answer: Answer, found: Range, view: memoryview[int]) -> int:
        """Fill a view with the body of an answer, as far as it comes."""
        done, most = 0, found.stop - found.start
        try:
            for data in answer.chunks():
                if done + len(data) > most:
                    what = f": more than the {most} bytes came that were announced"
                    raise http.failed(self._url, what, "look for another link")
                view[done : done + len(data)] = data
                done += len(data)
        except DownloadFailed as error:
            if not error.lost or not done:
                raise
        return done

    def _refuse_change(self, answer: Answer) -> None:
        """Raise `Malformed` for an answer of another version."""
        found = answer.range
        etag, modified = answer.header("ETag"), answer.header("Last-Modified")
        is_strong = self._etag.startswith('"')
        if self._etag:
            same = etag == self._etag or (is_strong and not etag and found is not None)
        else:
            same = modified == self._modified
        if answer.body.status == 416 or (found and found.whole != self.nbytes) or not same:
            raise Malformed(f"{self._name} was changed while it was read", path=self._name)
