"""Bytes on disk: positioned reads and writes, and what is stored deflated."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING

from ckptool.errors import (
    Malformed,
    NoSuchFile,
    NotACheckpoint,
    is_out_of_memory,
    of_system,
)
from ckptool.files import paths
from ckptool.files.paths import MARK as MARK
from ckptool.tensors.tensor import Storage

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from mmap import mmap
    from pathlib import Path

    from _typeshed import WriteableBuffer

CHUNK = 1 << 19  # fits the second-level cache of a core, with what the kernel needs of it

Stamp = tuple[int, int, int]  # which file it is, its size, and when it was written to


class OpenFile(str):
    """The path of a file that is open: who keeps it reads the file that the path named then.

    A `Storage`, and the `files` of a `Checkpoint`, keep it: a file is opened once, and one that is
    replaced by a rename meanwhile is read to its end as it was. The descriptor goes with the last
    of them.
    """

    stamp: Stamp
    far = False  # each read is a request to a server
    note = ""  # what is odd about how it is had
    _fd: int

    def __new__(cls, path: str, fd: int = -1) -> OpenFile:
        """Open a regular file, or take a descriptor; raises what says why it cannot be opened."""
        self = super().__new__(cls, path)
        self._fd = fd
        self._fd = fd if fd >= 0 else _open_regular(path)
        self.stamp = _stamp(os.fstat(self._fd))
        return self

    def __eq__(self, other: object) -> bool:
        same_file = not isinstance(other, OpenFile) or self.stamp == other.stamp
        return str.__eq__(self, other) and same_file

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = str.__hash__

    def read_into(self, view: memoryview[int], start: int) -> int:
        """Fill a view from `start`, as far as one call does."""
        return _read_at(self.fileno(), view, start)

    def mapped(self) -> mmap:
        """Map the file, privately: what is written to the map never reaches it."""
        from mmap import ACCESS_COPY, mmap

        return mmap(self.fileno(), 0, access=ACCESS_COPY)

    def fileno(self) -> int:
        """Return the descriptor, of the file opened anew where it was closed."""
        with _lock:
            if self._fd < 0:
                again = OpenFile(str(self))
                if again.stamp != self.stamp:
                    raise Malformed(f"{self} was replaced while it was read", path=self)
                self._fd, again._fd = again._fd, -1
            return self._fd

    def expect(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Learn which bytes will be read."""

    def later(self, start: int, stop: int, check: Callable[[], None]) -> None:
        """Do a check of what is beside a range of bytes, at the latest when they are read."""
        check()

    def changed(self) -> bool:
        """Return whether the file was written to since it was opened."""
        return self._fd >= 0 and _stamp(os.fstat(self._fd)) != self.stamp

    def replaced(self) -> bool:
        """Return whether the path names another file now, or none."""
        try:
            return os.stat(self).st_ino != self.stamp[0]
        except OSError as error:  # where the system does not say, it is the one that is open
            return isinstance(error, FileNotFoundError | NotADirectoryError)

    def close(self) -> None:
        """Give the descriptor back; the path is opened again where it still names the file."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):  # nothing can be lost by that, whatever the system says
                os.close(fd)

    __del__ = close


def opened(path: str | Path) -> OpenFile:
    """Open a file, of this machine or of a URL."""
    if isinstance(path, paths.Url):
        far: OpenFile = path.site.opened(path)
        return far
    return OpenFile(str(path))


class Reader:
    """A file open for positioned reads; safe to share between threads.

    `path` is what it is called in messages and `file` what is open. A part of a file has its own
    `base` in it: positions count from there, those of a `Storage` from the file's start.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.file = path if isinstance(path, OpenFile) else opened(path)
        self.base = 0
        self.stamp = self.file.stamp
        self.nbytes = self.stamp[1]
        self.held: tuple[object, ...] = ()  # what must live as long as the bytes are read

    def part(self, start: int, nbytes: int, path: str) -> Reader:
        """Return a reader of `nbytes` from `start`; it shares the open file and is not closed."""
        if min(start, nbytes) < 0 or start + nbytes > self.nbytes:
            raise Malformed("the file ends too early", path=self.path, offset=self.nbytes)
        part = copy(self)
        part.path, part.base, part.nbytes = path, self.base + start, nbytes
        return part

    def read(self, start: int, nbytes: int) -> bytes:
        """Read exactly `nbytes` from `start`; raises `Malformed` where the file ends before."""
        if start + nbytes > self.nbytes:
            raise Malformed("the file ends too early", path=self.path, offset=self.nbytes)
        data = bytearray(nbytes)
        self.read_into(memoryview(data), start)
        return bytes(data)

    def read_into(self, view: memoryview[int], start: int) -> None:
        """Fill `view` from `start`."""
        done = 0
        while done < len(view):
            count = self._read_once(view[done:], self.base + start + done)
            if count == 0:
                what = f"{self.path} became shorter while it was read"
                raise Malformed(what, path=self.path, offset=start + done)
            done += count

    def _read_once(self, view: memoryview[int], start: int) -> int:
        try:
            return self.file.read_into(view, start)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            raise of_system(error, self.path, "read", offset=start) from error

    def refuse_change(self) -> None:
        """Raise `Malformed` if the file was written to since it was opened."""
        refuse_changed(self.file)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the file to those who keep its path."""


class ReaderFile(io.RawIOBase):
    """What a `Reader` reads, as a file for the standard library."""

    def __init__(self, reader: Reader) -> None:
        self._reader, self._position = reader, 0

    def readable(self) -> bool:
        """Return whether `io` may read."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to `offset` from the start, or from where it is: all that its users ask for."""
        self._position = offset + (self._position if whence == os.SEEK_CUR else 0)
        return self._position

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill `buffer`, as far as there are bytes."""
        view = memoryview(buffer)[: max(0, self._reader.nbytes - self._position)]
        self._reader.read_into(view, self._position)
        self._position += len(view)
        return len(view)


def opened_again(path: str) -> str:
    """Return the path by which another library opens the same file, where there is one."""
    if isinstance(path, OpenFile) and os.path.isdir("/proc/self/fd"):
        return f"/proc/self/fd/{path.fileno()}"
    return path


def close(path: str) -> None:
    """Close a file, to be opened again if it is read again."""
    if isinstance(path, OpenFile):
        path.close()


def refuse_changed(path: str) -> None:
    """Raise `Malformed` if an open file was written to since it was opened."""
    if isinstance(path, OpenFile) and path.changed():
        raise Malformed(f"{path} was changed while it was read", path=path)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def spare(file: OpenFile, before: int) -> None:
    """Close a file of a set, to be opened again, if so many before it are kept open."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    except ImportError:
        limit = 512  # of the C library of Windows
    if before > limit // 2:
        file.close()


def _open_regular(path: str) -> int:
    """Open a regular file; a pipe, a socket or a device would block or never end."""
    try:
        _refuse_irregular(path, os.stat(path).st_mode)
        fd = _open(path)
    except FileNotFoundError:
        raise NoSuchFile(f"{path or repr(path)} does not exist", path=path) from None
    except ValueError as error:
        raise NoSuchFile(f"{path} cannot be opened: {error}", path=path) from None
    except OSError as error:
        if is_out_of_memory(error):
            raise
        raise of_system(error, path, "opened") from None
    try:
        _refuse_irregular(path, os.fstat(fd).st_mode)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _refuse_irregular(path: str, mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise NotACheckpoint(f"{path} is a folder", path=path)
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise NotACheckpoint(f"{path} is a {kind}, not a file", path=path)


def _open(path: str) -> int:
    """Open a file for reading; more at once than the soft limit, which is for select(2) alone."""
    flags = os.O_RDONLY
    for name in ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK"):  # a pipe may take its place meanwhile
        flags |= getattr(os, name, 0)
    try:
        return os.open(path, flags)
    except OSError as error:
        if error.errno != errno.EMFILE or not _raise_limit():
            raise
    return os.open(path, flags)


def _raise_limit() -> bool:
    """Raise the limit of open files to the hard one; return whether there is room now."""
    import gc

    gc.collect()  # files of trees that hold themselves
    try:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (ImportError, OSError, ValueError):  # Windows; macOS where the hard one is infinite
        return False
    return True


def spelled_like(path: str) -> str:
    """Return a question that names a file spelled like a missing one, empty where there is none."""
    from difflib import get_close_matches

    folder, name = os.path.split(path)
    with suppress(OSError, ValueError):
        close = get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.7)
        if close and close[0] != name:
            return f"did you mean {os.path.join(folder, close[0])}?"
    return ""


def unpacked(storage: Storage, reader: Reader) -> Iterator[bytes]:
    """Yield the bytes of a deflated storage; never more than it declares."""
    inflater = zlib.decompressobj(-15)
    left, position, end = storage.nbytes, storage.start, storage.start + storage.packed_nbytes
    while left > 0:
        packed = inflater.unconsumed_tail
        if not packed and position < end:
            packed = reader.read(position, min(CHUNK, end - position))
            position += len(packed)
        try:
            data = inflater.decompress(packed, min(left, CHUNK))
        except zlib.error:
            data = b""
        if not data and (inflater.eof or position >= end or not packed):
            raise Malformed(
                f"{storage.path}: the deflated record of storage {storage.key} is damaged",
                path=storage.path,
                offset=storage.start,
            )
        left -= len(data)
        if data:
            yield data
    if inflater.decompress(inflater.unconsumed_tail, 1):
        raise Malformed(
            f"{storage.path}: the deflated record of storage {storage.key} is longer than declared",
            path=storage.path,
            offset=storage.start,
        )


KEPT_UNPACKED = 2  # the two sides of a comparison, or one for each worker of a copy


class Readers:
    """The readers of a run, by path, and what of them was unpacked last.

    `planned` are the storages that will be read, where that is known: asked for files far away.
    """

    def __init__(self, planned: Callable[[], Iterable[Storage]] = tuple) -> None:
        self._planned = planned
        self._ranges: dict[str, list[tuple[int, int]]] | None = None
        self._open: dict[str, Reader] = {}
        self._unpacked: dict[Storage, Reader] = {}
        self._lock = threading.Lock()
        self._unpacking = threading.Lock()

    def __getitem__(self, path: str) -> Reader:
        with self._lock:
            if path not in self._open:
                self._open[path] = Reader(path)
                if self._open[path].file.far:
                    self._expect(path)
            return self._open[path]

    def _expect(self, path: str) -> None:
        if self._ranges is None:
            self._ranges = {}
            for each in self._planned():
                stop = each.start + (each.packed_nbytes or each.nbytes)
                self._ranges.setdefault(each.path, []).append((each.start, stop))
        self._open[path].file.expect(self._ranges.get(path, ()))

    def unpacked(self, storage: Storage) -> Reader:
        """Return a reader of the bytes of a deflated storage; the last few are kept."""
        with self._unpacking:
            reader = self._unpacked.pop(storage, None) or spooled(storage, self[storage.path])
            self._unpacked[storage] = reader
            if len(self._unpacked) > KEPT_UNPACKED:
                del self._unpacked[next(iter(self._unpacked))]
        return reader

    def close(self) -> None:
        """Let go of all files, after a last look whether one was changed meanwhile."""
        readers = [*self._open.values()]
        self._open.clear()
        self._unpacked.clear()
        for reader in readers:
            reader.refuse_change()


def spooled(storage: Storage, packed: Reader) -> Reader:
    """Unpack a storage into a temporary file, which goes with its reader."""
    from ckptool.files.temporary import temporary_file

    with temporary_file() as file:
        for data in unpacked(storage, packed):
            file.write(data)
        file.flush()
        return Reader(OpenFile(packed.path, os.dup(file.fileno())))


def write_at(target: int, data: bytes | bytearray | memoryview, position: int) -> None:
    """Write all of `view` at `position`."""
    view = memoryview(data)
    while view:
        count = _write_once(target, view, position)
        view = view[count:]
        position += count


def read_back(target: int, view: memoryview[int], position: int) -> None:
    """Fill `view` from what was written at `position`; raises `OSError` where that is too short."""
    while view:
        count = _read_at(target, view, position)
        if not count:
            raise OSError(errno.EIO, "what was written is cut off")
        view = view[count:]
        position += count


_lock = threading.Lock()  # Windows has no positioned reads and writes


def _read_at(fd: int, view: memoryview[int], position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], position)
    with _lock:
        os.lseek(fd, position, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def _write_once(target: int, view: memoryview[int], position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(target, view, position)
    with _lock:
        os.lseek(target, position, os.SEEK_SET)
        return os.write(target, view)
