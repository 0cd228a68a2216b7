"""Bytes on disk: positioned reads and writes, and what is stored deflated."""

from __future__ import annotations

import errno
import io
import os
import stat
import threading
import zlib
from collections.abc import Iterator
from contextlib import suppress
from copy import copy
from typing import TYPE_CHECKING
from weakref import finalize

from ckptool.errors import (
    Malformed,
    NoSuchFile,
    NotACheckpoint,
    is_out_of_memory,
)
from ckptool.tensors.tensor import Storage

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from _typeshed import WriteableBuffer

CHUNK = 1 << 19  # fits the second-level cache of a core, with what the kernel needs of it
MARK = "::"  # between an archive and the name of a member in it

Stamp = tuple[int, int, int]  # which file it is, its size, and when it was written to


class Reader:
    """A file open for positioned reads; safe to share between threads.

    `path` is what it is called in messages and `file` what is opened. A part of a file has its
    own `base` in it: positions count from there, those of a `Storage` from the file's start.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = self.file = str(path)
        self.base = 0
        self._fd = _open_regular(self.path)
        self.stamp = _stamp(os.fstat(self._fd))
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
                raise Malformed(
                    "the file became shorter while it was read", path=self.path, offset=start + done
                )
            done += count

    def _read_once(self, view: memoryview[int], start: int) -> int:
        try:
            return _read_at(self._fd, view, start)
        except OSError as error:
            if is_out_of_memory(error):
                raise
            what = f"{self.path} cannot be read: {reason(error)}"
            raise Malformed(what, path=self.path, offset=start) from error

    def refuse_change(self) -> None:
        """Raise `Malformed` if the file was written to since it was opened."""
        if _stamp(os.fstat(self._fd)) != self.stamp:
            raise Malformed(f"{self.path} was changed while it was read", path=self.path)

    def close(self) -> None:
        """Close the file; nothing can be lost by that, whatever the system says."""
        with suppress(OSError):
            os.close(self._fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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


def refuse_changed(path: str, stamp: Stamp) -> None:
    """Raise `Malformed` if there is another file now, or the file was written to."""
    try:
        changed = _stamp(os.stat(path)) != stamp
    except OSError:
        changed = True
    if changed:
        raise Malformed(f"{path} was changed while it was read", path=path)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns


def _open_regular(path: str) -> int:
    """Open a regular file; a pipe, a socket or a device would block or never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        if path.lower().startswith(("http://", "https://")):
            hint = f"ckptool download {path}"
            raise NoSuchFile(f"{path} is a URL; a file is needed", hint=hint) from None
        raise NoSuchFile(f"{path or repr(path)} does not exist", path=path) from None
    except (OSError, ValueError) as error:
        if is_out_of_memory(error):
            raise
        raise NoSuchFile(f"{path} cannot be opened: {reason(error)}", path=path) from None
    if stat.S_ISDIR(mode):
        raise NotACheckpoint(f"{path} is a folder", path=path)
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise NotACheckpoint(f"{path} is a {kind}, not a file", path=path)
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        if is_out_of_memory(error):
            raise
        many = error.errno in (errno.EMFILE, errno.ENFILE)
        hint = "ulimit -n 65536   lets it have all files of a checkpoint open" if many else ""
        what = f"{path} cannot be opened: {reason(error)}"
        raise NoSuchFile(what, path=path, hint=hint) from None


def spelled_like(path: str) -> str:
    """Return a question that names a file spelled like a missing one, empty where there is none."""
    from difflib import get_close_matches

    folder, name = os.path.split(path)
    with suppress(OSError, ValueError):
        close = get_close_matches(name, os.listdir(folder or "."), n=1, cutoff=0.7)
        if close and close[0] != name:
            return f"did you mean {os.path.join(folder, close[0])}?"
    return ""


def reason(error: Exception) -> str:
    """Return the system's words for an error."""
    return (getattr(error, "strerror", None) or str(error)).lower()


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
    """The open files of a run, by path, and what of them was unpacked last."""

    def __init__(self) -> None:
        self._open: dict[str, Reader] = {}
        self._unpacked: dict[Storage, Reader] = {}
        self._lock = threading.Lock()
        self._unpacking = threading.Lock()

    def __getitem__(self, path: str) -> Reader:
        with self._lock:
            if path not in self._open:
                self._open[path] = Reader(path)
            return self._open[path]

    def unpacked(self, storage: Storage) -> Reader:
        """Return a reader of the bytes of a deflated storage; the last few are kept."""
        with self._unpacking:
            reader = self._unpacked.pop(storage, None) or _spooled(storage, self[storage.path])
            self._unpacked[storage] = reader
            if len(self._unpacked) > KEPT_UNPACKED:
                del self._unpacked[next(iter(self._unpacked))]
        return reader

    def close(self) -> None:
        """Close all files, after a last look whether one was changed meanwhile."""
        try:
            for reader in self._open.values():
                reader.refuse_change()
        finally:
            self._unpacked.clear()
            for reader in self._open.values():
                reader.close()


def _spooled(storage: Storage, packed: Reader) -> Reader:
    """Unpack a storage into a temporary file, which goes with its reader."""
    from tempfile import TemporaryFile

    reader = copy(packed)
    with TemporaryFile() as file:
        for data in unpacked(storage, packed):
            file.write(data)
        file.flush()
        reader._fd = os.dup(file.fileno())
    finalize(reader, os.close, reader._fd)
    reader.base, reader.nbytes = 0, storage.nbytes
    return reader


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


_seek_lock = threading.Lock()  # Windows has no positioned reads and writes


def _read_at(fd: int, view: memoryview[int], position: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], position)
    with _seek_lock:
        os.lseek(fd, position, os.SEEK_SET)
        data = os.read(fd, len(view))
    view[: len(data)] = data
    return len(data)


def _write_once(target: int, view: memoryview[int], position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(target, view, position)
    with _seek_lock:
        os.lseek(target, position, os.SEEK_SET)
        return os.write(target, view)
