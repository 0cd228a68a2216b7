"""Files that are read from far away, a few of their bytes at a time.

Small reads fetch a little more than was asked for, reads in a row ever more, and the engine says
beforehand what it will read: then whole blocks are fetched, and nothing between them. The bytes
that were fetched last are kept in memory, none of them on disk.
"""

from __future__ import annotations

import os
import threading
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from operator import itemgetter
from typing import IO, Protocol

from ckptool.files import fileio
from ckptool.files.fileio import OpenFile
from ckptool.files.paths import Url
from ckptool.records import NamedTuple

BLOCK = 4 << 20  # as much as one of the two threads of a copy moves at once
NEAR = 1 << 16  # bytes between two ranges that are fetched rather than asked for anew
KEPT = 3 * BLOCK  # bytes of a site: of both threads, and what is read between
PAGE = 1 << 12  # what is fetched begins at one, for there is a header before what is read
MOST = 1 << 16  # bytes that are fetched for a small read, or of a smaller file
SHARE = 13  # a 2 ** 13th of it, but a page


class Source(Protocol):
    """A version of a file on a site; `identity` differs between versions."""

    nbytes: int
    identity: int
    note: str
    head: bytes | bytearray  # that came with the first answer

    def fetch(self, start: int, stop: int) -> bytes | bytearray:
        """Return exactly these bytes of the same version."""


class Copy:
    """A temporary copy of a file whose ranges cannot be had, or that others are to read."""

    head: bytes | bytearray = b""

    def __init__(self, file: IO[bytes], identity: int, note: str = "") -> None:
        self.file, self.identity, self.note = file, identity, note
        self.nbytes = os.fstat(file.fileno()).st_size
        weakref.finalize(self, file.close)

    def fetch(self, start: int, stop: int) -> bytearray:
        """Return bytes of the copy."""
        data = bytearray(stop - start)
        fileio.read_back(self.file.fileno(), memoryview(data), start)
        return data


def _copied(source: Source) -> Copy:
    from ckptool.files.temporary import unnamed

    file = unnamed()
    for start in range(0, source.nbytes, BLOCK):
        file.write(source.fetch(start, min(start + BLOCK, source.nbytes)))
    file.flush()
    return Copy(file, source.identity, source.note)


class Opened:
    """The files of a site, each opened once, and the bytes that were fetched last."""

    def __init__(self, open: Callable[[Url], Source]) -> None:
        self._open, self._kept = open, Kept()
        self._files: dict[str, RemoteFile] = {}

    def __contains__(self, url: Url) -> bool:
        return url.full in self._files

    def __call__(self, url: Url) -> RemoteFile:
        """Open a file once; raises what says why it cannot be."""
        if url not in self:
            self._files[url.full] = RemoteFile(url, self._open(url), self._kept)
        return self._files[url.full]


class Held(NamedTuple):
    """Bytes of a file from `start`."""

    file: int
    start: int
    data: bytes | bytearray

    @property
    def stop(self) -> int:
        """Return where they end."""
        return self.start + len(self.data)


class Kept:
    """The bytes that were fetched last, of all files of a site, and what is on its way."""

    def __init__(self) -> None:
        self._held: OrderedDict[tuple[int, int], Held] = OrderedDict()
        self._nbytes = 0
        self._coming: list[tuple[int, int, int]] = []
        self._changed = threading.Condition()

    def get(
        self, file: int, start: int, window: Callable[[int], tuple[int, int]], fetch: Fetch
    ) -> Held:
        """Return bytes of a file that begin at or before `start`, fetched where they are not here.

        `window` says which to fetch. What another thread fetches is waited for.
        """
        with self._changed:
            while True:
                if held := self._find(file, start):
                    return held
                if not any(of == file and a <= start < b for of, a, b in self._coming):
                    break
                self._changed.wait()
            begun = [
                *((of, at) for of, at in self._held),
                *((of, at) for of, at, _ in self._coming),
            ]
            following = (at for of, at in begun if of == file and at > start)
            first, stop = window(min(following, default=1 << 63))
            coming = (file, first, stop)
            self._coming.append(coming)
        try:
            held = Held(file, first, fetch(first, stop))
            with self._changed:
                self.put(held)
        finally:
            with self._changed:
                self._coming.remove(coming)
                self._changed.notify_all()
        return held

    def _find(self, file: int, start: int) -> Held | None:
        for key, held in reversed(self._held.items()):
            if held.file == file and held.start <= start < held.stop:
                self._held.move_to_end(key)
                return held
        return None

    def put(self, held: Held) -> None:
        """Keep bytes, and let go of those that were not used for long."""
        old = self._held.pop((held.file, held.start), None)
        self._held[held.file, held.start] = held
        self._nbytes += len(held.data) - (len(old.data) if old else 0)
        while self._nbytes > KEPT and len(self._held) > 1:
            self._nbytes -= len(self._held.popitem(last=False)[1].data)


Fetch = Callable[[int, int], "bytes | bytearray"]


class RemoteFile(OpenFile):
    """A file on a site that is open: all reads are of the version that was there then."""

    url: Url
    far = True
    _source: Source
    _expected: Sequence[tuple[int, int]]
    _pending: list[tuple[int, int, Callable[[], None]]]  # checks, by the range that they are of
    _lock: threading.Lock
    _stop: int  # of what was fetched last
    _step: int  # how much it was

    _kept: Kept

    def __new__(cls, url: Url, source: Source, kept: Kept) -> RemoteFile:
        """Take what a site opened."""
        self = str.__new__(cls, url)
        self.url, self._fd = url, -1
        self._expected, self._pending = (), []
        self._stop, self._step = -1, 0
        self._lock = threading.Lock()
        self._source, self._kept, self.note = source, kept, source.note
        self.stamp = (source.identity, source.nbytes, 0)
        kept.put(Held(source.identity, 0, source.head))
        return self

    def read_into(self, view: memoryview[int], start: int) -> int:
        """Fill a view from `start`, as far as one block goes."""
        stop = min(start + len(view), self._source.nbytes)
        if start >= stop:
            return 0
        self._settle(start, stop)
        window = partial(self._window, start, stop)
        held = self._kept.get(self._source.identity, start, window, self._source.fetch)
        count = min(stop, held.stop) - start
        view[:count] = memoryview(held.data)[start - held.start :][:count]
        return count

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Learn what will be read, so that nothing else is fetched and all of it in blocks."""
        merged: list[tuple[int, int]] = []
        for start, stop in sorted(ranges):
            if merged and start <= merged[-1][1] + NEAR:
                merged[-1] = merged[-1][0], max(stop, merged[-1][1])
            else:
                merged.append((start, stop))
        self._expected = merged

    def later(self, start: int, stop: int, check: Callable[[], None]) -> None:
        """Do a check once bytes of a range are read, not before."""
        with self._lock:
            self._pending.insert(
                bisect_right(self._pending, start, key=itemgetter(0)), (start, stop, check)
            )

    def _settle(self, start: int, stop: int) -> None:
        if not self._pending:
            return
        with self._lock:
            end = bisect_right(self._pending, stop - 1, key=itemgetter(0))
            begin = end
            while begin and self._pending[begin - 1][1] > start:
                begin -= 1
            due = self._pending[begin:end]
            del self._pending[begin:end]
        for _, _, check in due:
            check()

    def _window(self, start: int, stop: int, limit: int) -> tuple[int, int]:
        """Return what to fetch so that the bytes from `start` to `stop` are here; up to `limit`."""
        nbytes, first = self._source.nbytes, start // PAGE * PAGE
        at = bisect_right(self._expected, start, key=itemgetter(0)) - 1
        if at >= 0 and start < self._expected[at][1]:
            last = min(first + BLOCK, self._expected[at][1])
        else:
            least = max(PAGE, min(MOST, nbytes >> SHARE))
            self._step = min(max(2 * self._step, least), BLOCK) if start == self._stop else least
            self._stop = last = min(first + BLOCK, max(stop, first + self._step), nbytes)
            if last == nbytes:  # the directory of an archive is before its end
                first = max(0, min(first, nbytes - least))
        return first, min(last, limit)

    def fileno(self) -> int:
        """Return the descriptor of a temporary copy of the whole file, for other libraries."""
        with self._lock:
            copy = self._source if isinstance(self._source, Copy) else _copied(self._source)
            self._source = copy
            return copy.file.fileno()

    def changed(self) -> bool:
        """Return False: a fetch of another version raises by itself."""
        return False

    def replaced(self) -> bool:
        """Return False: whatever is at the URL now, this version is read, or none."""
        return False

    def close(self) -> None:
        """Keep nothing open that another file could need."""

    __del__ = close
