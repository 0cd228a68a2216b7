"""Bytes on disk: positioned reads, byte-range copies with checksums, and output that is atomic.

The only room that opens a file for writing. A file is written beside its target under a
temporary name and published by one link or rename, so that the target is old or new, never
partial. Copies run on a few threads, a chunk at a time through a small buffer: while one thread
waits for the kernel, another computes a CRC-32, so that checking costs little beside copying.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptool.crc import join_crc32
from ckptool.errors import (
    Malformed,
    NoSpace,
    NoSuchFile,
    NotACheckpoint,
    OutputExists,
    SameFile,
    WriteError,
)
from ckptool.tensor import Packing, Storage
from ckptool.text import quoted

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

CHUNK = 1 << 20
FLUSH_EVERY = 32 << 20
WORKERS = 2

Stamp = tuple[int, int, int]  # which file it is, its size, and when it was written to
Progress = Callable[[int], None]  # bytes copied since the last call
Begin = Callable[[int], Progress]  # how many bytes there will be -> what counts them


class Reader:
    """A file open for positioned reads; safe to share between threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self._lock = threading.Lock()
        self._fd = _open_regular(self.path)
        self.stamp = _stamp(os.fstat(self._fd))
        self.nbytes = self.stamp[1]

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
            count = self._read_once(view[done:], start + done)
            if count == 0:
                raise Malformed(
                    "the file became shorter while it was read", path=self.path, offset=start + done
                )
            done += count

    def _read_once(self, view: memoryview[int], start: int) -> int:
        try:
            return self._read_at(view, start)
        except OSError as error:
            reason = f"{self.path} cannot be read: {_reason(error)}"
            raise Malformed(reason, path=self.path, offset=start) from error

    def _read_at(self, view: memoryview[int], start: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._fd, [view], start)
        with self._lock:  # Windows
            os.lseek(self._fd, start, os.SEEK_SET)
            data = os.read(self._fd, len(view))
        view[: len(data)] = data
        return len(data)

    def refuse_change(self) -> None:
        """Raise `Malformed` if the file was written to since it was opened."""
        if _stamp(os.fstat(self._fd)) != self.stamp:
            raise Malformed(f"{self.path} was changed while it was read", path=self.path)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
        raise NoSuchFile(f"{path} does not exist", path=path) from None
    except (OSError, ValueError) as error:
        raise NoSuchFile(f"{path} cannot be opened: {_reason(error)}", path=path) from None
    if stat.S_ISDIR(mode):
        raise NotACheckpoint(f"{path} is a folder", path=path)
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFIFO: "pipe", stat.S_IFSOCK: "socket"}
        kind = kinds.get(stat.S_IFMT(mode), "device")
        raise NotACheckpoint(f"{path} is a {kind}, not a file", path=path)
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
    except OSError as error:
        raise NoSuchFile(f"{path} cannot be opened: {_reason(error)}", path=path) from None


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error)).lower()


Block = Callable[[Reader], Iterator[bytes | bytearray]]


@dataclass(slots=True)
class Copy:
    """Copy `nbytes` of a storage, from `start` in it, to `target` in the output.

    `target` None reads and checks without writing. With `whole`, the storage's recorded CRC-32 is
    checked; `crc32` is that of the bytes copied, once they are.
    """

    storage: Storage
    target: int | None
    start: int = 0
    nbytes: int = -1
    crc32: int = 0
    _parts: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.nbytes < 0:
            self.nbytes = self.storage.nbytes - self.start

    @property
    def whole(self) -> bool:
        """Tell whether the copy covers its storage."""
        return self.nbytes == self.storage.nbytes


@dataclass(slots=True)
class Compute:
    """Write what `block` makes of a storage's file to `target`: `nbytes` of them."""

    storage: Storage
    block: Block
    target: int
    nbytes: int


Job = Copy | Compute


@dataclass(slots=True)
class Layout:
    """A file planned to the last byte before the first is written.

    `literals` are `(offset, bytes)` known beforehand; `finish` gives the ones that need the
    checksums of the copies.
    """

    nbytes: int
    jobs: list[Job]
    literals: list[tuple[int, bytes]]
    finish: Callable[[], Iterable[tuple[int, bytes]]] = tuple

    @property
    def job_nbytes(self) -> int:
        """Count the bytes that the jobs move, for a progress bar."""
        return sum(job.nbytes for job in self.jobs)


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


@contextmanager
def seekable(storage: Storage, reader: Reader) -> Iterator[Callable[[int, int], bytes]]:
    """Give a function that reads `(start, nbytes)` of a storage; a deflated one is spooled."""
    if storage.packing is Packing.PLAIN:
        yield lambda start, nbytes: reader.read(storage.start + start, nbytes)
        return
    from tempfile import TemporaryFile

    with TemporaryFile() as spool:
        for data in unpacked(storage, reader):
            spool.write(data)

        def fetch(start: int, nbytes: int) -> bytes:
            spool.seek(start)
            return spool.read(nbytes)

        yield fetch


class Readers:
    """The open files of a run, by path."""

    def __init__(self) -> None:
        self._open: dict[str, Reader] = {}
        self._lock = threading.Lock()

    def __getitem__(self, path: str) -> Reader:
        with self._lock:
            if path not in self._open:
                self._open[path] = Reader(path)
            return self._open[path]

    def close(self) -> None:
        """Close all files, after a last look whether one was changed meanwhile."""
        try:
            for reader in self._open.values():
                reader.refuse_change()
        finally:
            for reader in self._open.values():
                reader.close()


class _WriteBack:
    """Start the write-back of what was written while the rest is copied.

    The flush at the end then finds little left to wait for. On dirty pages,
    POSIX_FADV_DONTNEED starts write-back without waiting and drops nothing (Linux, mm/fadvise.c).
    """

    def __init__(self, target: int, *, wanted: bool) -> None:
        self._target = target
        self._next = FLUSH_EVERY if wanted and hasattr(os, "posix_fadvise") else None
        self._lock = threading.Lock()

    def reached(self, position: int) -> None:
        """Note that bytes up to about `position` are written; a window behind it is flushed."""
        if self._next is None or position < self._next:
            return
        with self._lock:
            start = max(0, self._next - 2 * FLUSH_EVERY)
            self._next = position + FLUSH_EVERY
        os.posix_fadvise(self._target, start, position - start, os.POSIX_FADV_DONTNEED)


def run_jobs(
    jobs: list[Job], target: int | None, progress: Progress, *, sync: bool = False
) -> None:
    """Do all jobs on a few threads; the first error ends all and is raised.

    With `sync` the output will be flushed: its write-back starts early.
    """
    readers = Readers()
    write_back = _WriteBack(-1 if target is None else target, wanted=sync and target is not None)
    tasks = _tasks(jobs)
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        buffer = memoryview(bytearray(CHUNK))
        while not errors:
            with lock:
                task = next(tasks, None)
            if task is None:
                return
            try:
                progress(_do(task, readers, target, buffer))
                job, start, nbytes = task
                write_back.reached((job.target or 0) + start + nbytes)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(WORKERS)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException as error:  # Ctrl-C: let the threads end before the file goes away
        errors.append(error)
        for thread in threads:
            thread.join()
        raise
    finally:
        if errors:
            with suppress(Malformed):
                readers.close()
    if errors:
        raise errors[0]
    readers.close()
    for job in jobs:
        if isinstance(job, Copy):
            _check(job)


_Task = tuple[Job, int, int]  # a job, and the part of it: start and length


def _tasks(jobs: list[Job]) -> Iterator[_Task]:
    for job in jobs:
        if isinstance(job, Compute) or job.storage.packing is Packing.DEFLATED:
            yield job, 0, job.nbytes
        else:
            for start in range(0, job.nbytes, CHUNK):
                yield job, start, min(CHUNK, job.nbytes - start)


def _do(task: _Task, readers: Readers, target: int | None, buffer: memoryview[int]) -> int:
    job, start, nbytes = task
    reader = readers[job.storage.path]
    if isinstance(job, Compute):
        _stream(job.block(reader), target, job.target)
    elif job.storage.packing is Packing.DEFLATED:
        parts = _clipped(unpacked(job.storage, reader), job.start, job.nbytes)
        job.crc32 = _stream(parts, target, job.target)
    else:
        view = buffer[:nbytes]
        reader.read_into(view, job.storage.start + job.start + start)
        job._parts[start] = (zlib.crc32(view), nbytes)
        if target is not None and job.target is not None:
            write_at(target, view, job.target + start)
    return nbytes


def _stream(parts: Iterable[bytes | bytearray], target: int | None, position: int | None) -> int:
    crc32 = 0
    for data in parts:
        crc32 = zlib.crc32(data, crc32)
        if target is not None and position is not None:
            write_at(target, memoryview(data), position)
            position += len(data)
    return crc32


def _clipped(parts: Iterable[bytes], start: int, nbytes: int) -> Iterator[bytes]:
    """Give the part of a stream from `start`, `nbytes` long; the stream is read to its end."""
    position = 0
    for data in parts:
        wanted = data[max(0, start - position) : max(0, start + nbytes - position)]
        position += len(data)
        if wanted:
            yield wanted


def _check(copy: Copy) -> None:
    if copy.storage.packing is Packing.PLAIN:
        copy.crc32 = join_crc32(part for _, part in sorted(copy._parts.items()))
    recorded = copy.storage.crc32
    if copy.whole and recorded is not None and recorded != copy.crc32:
        raise Malformed(
            f"{copy.storage.path}: the bytes of storage {copy.storage.key} do not match their "
            "checksum",
            path=copy.storage.path,
            offset=copy.storage.start,
            evidence=[f"CRC-32 recorded {recorded:08x}, found {copy.crc32:08x}"],
            hint="the file is damaged; get it again from where it came",
        )


def write_at(target: int, view: memoryview[int] | bytes, position: int) -> None:
    """Write all of `view` at `position`."""
    view = memoryview(view)
    while view:
        count = _write_once(target, view, position)
        view = view[count:]
        position += count


_write_lock = threading.Lock()


def _write_once(target: int, view: memoryview[int], position: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(target, view, position)
    with _write_lock:  # Windows
        os.lseek(target, position, os.SEEK_SET)
        return os.write(target, view)


@dataclass(frozen=True, slots=True)
class Target:
    """A place for output: the file behind any symlink, and whether it may be replaced."""

    path: str
    force: bool = False
    sync: bool = True

    @property
    def folder(self) -> str:
        """Name the folder that the file, and the temporary one beside it, lie in."""
        return os.path.dirname(self.path) or "."


def refuse_target(path: str | Path, sources: Iterable[str], *, force: bool, sync: bool) -> Target:
    """Say where output goes, or why it cannot go there, before a byte is written.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if os.path.exists(real):
        if any(os.path.exists(source) and os.path.samefile(source, real) for source in sources):
            raise SameFile(
                f"{shown} is the input itself", hint="name another output, or use --in-place"
            )
        if not os.path.isfile(real):
            raise WriteError(f"{shown} is not a regular file", hint="name a file as the output")
        if not force:
            raise OutputExists(f"{shown} exists", hint="name another output, or use --force")
    target = Target(real, force, sync)
    if not os.path.isdir(target.folder):
        raise WriteError(
            f"the folder of {shown} does not exist", hint=f"mkdir -p {quoted(target.folder)}"
        )
    if not os.access(target.folder, os.W_OK):
        raise WriteError(f"the folder of {shown} cannot be written to")
    return target


def free_space(target: Target) -> int | None:
    """Count the bytes free for output, None where the system does not tell."""
    if not hasattr(os, "statvfs"):
        return None
    found = os.statvfs(target.folder)
    return found.f_bavail * found.f_frsize


def refuse_full(target: Target, nbytes: int) -> None:
    """Raise `NoSpace` where the file cannot fit."""
    free = free_space(target)
    if free is not None and nbytes > free:
        raise NoSpace(
            f"{target.path} needs {nbytes} bytes; {free} are free",
            hint="make room, or name an output on another file system",
        )


def write_layout(fd: int, layout: Layout, progress: Progress, *, sync: bool = False) -> None:
    """Write a planned file through an open descriptor; `sync` says that it will be flushed."""
    os.ftruncate(fd, layout.nbytes)
    for offset, data in layout.literals:
        write_at(fd, data, offset)
    run_jobs(layout.jobs, fd, progress, sync=sync)
    for offset, data in layout.finish():
        write_at(fd, data, offset)


@contextmanager
def atomic_output(target: Target) -> Iterator[tuple[int, str]]:
    """Open a temporary file beside the target; publish it when the block ends well.

    Yields its descriptor and path. Whatever fails, the target stays as it was and the temporary
    file goes. Raises `NoSpace`, `OutputExists` or `WriteError`.
    """
    name = os.path.basename(target.path)[:40]  # of up to four bytes each; 255 are allowed
    temporary = os.path.join(target.folder, f".{name}.{os.urandom(6).hex()}.tmp")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        try:  # before the file is made: a signal may come right after
            fd = os.open(temporary, flags, 0o666)
            try:
                yield fd, temporary
                _finish(fd, target)
            finally:
                os.close(fd)
            _publish(temporary, target)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise _write_error(error, target) from error


def _write_error(error: OSError, target: Target) -> WriteError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(
            f"no space left while writing {target.path}; nothing was kept",
            hint="make room, or name an output on another file system",
        )
    return WriteError(f"{target.path} cannot be written: {_reason(error)}; nothing was kept")


def _finish(fd: int, target: Target) -> None:
    """Give the file the mode of the one it replaces, and bring it to the disk."""
    if hasattr(os, "fchmod") and os.path.exists(target.path):
        os.fchmod(fd, stat.S_IMODE(os.stat(target.path).st_mode))
    if target.sync:
        os.fsync(fd)


def _publish(temporary: str, target: Target) -> None:
    if target.force:
        os.replace(temporary, target.path)
    else:
        _publish_new(temporary, target.path)
    if target.sync and hasattr(os, "O_DIRECTORY"):
        _flush_folder(target)


def _flush_folder(target: Target) -> None:
    """Flush the folder, where its file system knows how to and it may be opened."""
    try:
        folder = os.open(target.folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise WriteError(
                f"{target.path} was written, but its folder could not be flushed: {_reason(error)}",
                hint="look whether the disk is sound before you rely on the file",
            ) from error
    finally:
        os.close(folder)


def _publish_new(temporary: str, path: str) -> None:
    """Publish without replacing: a link fails where a file has appeared meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise OutputExists(
            f"{path} was made by someone else meanwhile; it was left alone",
            hint="name another output, or use --force",
        ) from None
    except OSError:  # a file system without hard links
        if os.path.exists(path):
            raise OutputExists(f"{path} exists", hint="use --force") from None
        os.rename(temporary, path)


WINDOWS = os.name == "nt"


@dataclass(slots=True)
class Part:
    """The growing part of a target, which a later run may go on with.

    `kept` says whether it stays when this run fails. What a later run must know of it lies beside
    it, in `record`.
    """

    fd: int
    path: str
    kept: bool = False

    @property
    def record(self) -> str:
        """Name the file beside the part."""
        return f"{self.path}.json"

    def note(self, text: str) -> None:
        """Write the record."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self.record, flags, 0o666)
        try:
            write_at(fd, text.encode(), 0)
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Remove the part and its record."""
        for path in (self.path, self.record):
            with suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Close the part, and give up its lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextmanager
def part_output(path: str, target: Target) -> Iterator[Part | None]:
    """Open the part of a target for this process alone; publish it when the block ends well.

    Yields None where another process has it. Whatever fails, the target stays as it was. The lock
    is held until the part is gone, so that nobody grows a file that is published already.
    Raises `NoSpace`, `OutputExists` or `WriteError`.
    """
    try:
        part = _open_alone(path)
        if part is None:
            yield None
            return
        try:
            yield part
            part.kept = False
            _finish(part.fd, target)
            if WINDOWS:  # where an open file can be neither renamed nor removed
                part.close()
            _publish(path, target)
        except OSError:  # a full disk is given back
            part.kept = False
            raise
        finally:
            if WINDOWS:
                part.close()
            if not part.kept:
                part.remove()
            part.close()
    except OSError as error:
        raise _write_error(error, target) from error


def _open_alone(path: str) -> Part | None:
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    while True:
        part = Part(os.open(path, flags, 0o666), path)
        try:
            if not stat.S_ISREG(os.fstat(part.fd).st_mode):
                raise FileExistsError(errno.EEXIST, f"{path} is not a regular file")
            if not _locked(part.fd):
                part.close()
                return None
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(part.fd)):
                return part
        except BaseException:
            part.close()
            raise
        part.close()  # published or removed by another process between the open and the lock


def _locked(fd: int) -> bool:
    """Lock a file without waiting; a file system that knows no locks is taken as it is."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 1 << 40, os.SEEK_SET)  # beyond the data: a locked byte cannot be read
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True
