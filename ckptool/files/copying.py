"""Byte ranges copied with checksums, as a file planned to the last byte.

Copies run on a few threads, a chunk at a time through a small buffer: while one thread waits for
the kernel, another computes a CRC-32, so that checking costs little beside copying.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

from ckptool.errors import Malformed
from ckptool.files.blocks import Part, fill
from ckptool.files.crc import join_crc32
from ckptool.files.fileio import CHUNK, Readers, unpacked, write_at
from ckptool.tensors.tensor import Chunked, Packing, Storage, contiguous_stride

FLUSH_EVERY = 32 << 20
WORKERS = 2

Progress = Callable[[int], None]  # bytes copied since the last call
Begin = Callable[[int], Progress]  # how many bytes there will be -> what counts them

Block = bytes | bytearray | memoryview  # of bytes
Blocks = Callable[[Readers], Iterator[Block]]


def no_progress(total: int) -> Progress:
    """Draw nothing."""
    return lambda nbytes: None


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
    _chunk_parts: list[Part] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.nbytes < 0:
            self.nbytes = self.storage.nbytes - self.start

    @property
    def whole(self) -> bool:
        """Tell whether the copy covers its storage."""
        return self.nbytes == self.storage.nbytes


@dataclass(slots=True)
class Compute:
    """Write what `block` makes of a storage to `target`: `nbytes` of them."""

    storage: Storage
    block: Blocks
    target: int
    nbytes: int
    crc32: int = 0


Job = Copy | Compute


@dataclass(slots=True)
class Layout:
    """A file planned to the last byte before the first is written.

    `literals` are `(offset, bytes)` known beforehand; `finish` gives the ones that need the
    checksums of the copies. `name` is that in the folder that is written, empty for a file alone.
    """

    nbytes: int
    jobs: list[Job]
    literals: list[tuple[int, bytes]]
    finish: Callable[[], Iterable[tuple[int, bytes]]] = tuple
    name: str = ""

    @property
    def job_nbytes(self) -> int:
        """Count the bytes that the jobs move, for a progress bar."""
        return sum(job.nbytes for job in self.jobs)


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
    if isinstance(job, Compute):
        job.crc32 = _stream(job.block(readers), target, job.target)
    elif job.storage.packing is Packing.DEFLATED:
        reader = readers[job.storage.path]
        parts = _clipped(unpacked(job.storage, reader), job.start, job.nbytes)
        job.crc32 = _stream(parts, target, job.target)
    else:
        view = buffer[:nbytes]
        job._chunk_parts += fill(view, job.storage, job.start + start, readers)
        job._parts[start] = (zlib.crc32(view), nbytes)
        if target is not None and job.target is not None:
            write_at(target, view, job.target + start)
    return nbytes


def _stream(
    parts: Iterable[bytes | bytearray | memoryview], target: int | None, position: int | None
) -> int:
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
    if copy.storage.packing is not Packing.DEFLATED:
        copy.crc32 = join_crc32(part for _, part in sorted(copy._parts.items()))
    if copy.storage.chunked is not None:
        _check_chunks(copy.storage.chunked, copy._chunk_parts)
    if copy.whole:
        _compare(copy.storage, copy.crc32)


def _check_chunks(chunked: Chunked, parts: list[Part]) -> None:
    """Compare the checksums of those chunks that were read whole."""
    read: dict[int, list[tuple[int, int]]] = {}
    for index, _, nbytes, crc32 in sorted(parts):
        read.setdefault(index, []).append((crc32, nbytes))
    for index, found in read.items():
        source = chunked.chunks[index].source
        whole = sum(nbytes for _, nbytes in found) == source.storage.nbytes
        if whole and source.stride == contiguous_stride(source.shape):
            _compare(source.storage, join_crc32(found))


def _compare(storage: Storage, crc32: int) -> None:
    recorded = storage.crc32
    if recorded is not None and recorded != crc32:
        raise Malformed(
            f"{storage.path}: the bytes of storage {storage.key} do not match their checksum",
            path=storage.path,
            offset=storage.start,
            evidence=[f"CRC-32 recorded {recorded:08x}, found {crc32:08x}"],
            hint="the file is damaged; get it again from where it came",
        )


def write_layout(fd: int, layout: Layout, progress: Progress, *, sync: bool = False) -> None:
    """Write a planned file through an open descriptor; `sync` says that it will be flushed."""
    os.ftruncate(fd, layout.nbytes)
    for offset, data in layout.literals:
        write_at(fd, data, offset)
    run_jobs(layout.jobs, fd, progress, sync=sync)
    for offset, data in layout.finish():
        write_at(fd, data, offset)
