"""The copy engine: byte ranges of storages into a file planned to the last byte.

Two threads work through the jobs a chunk at a time: while one waits for the kernel, the other
computes a CRC-32, so that checking costs little beside copying. Nothing counts as done because no
thread complained: every job has to answer for its bytes (`Done`), and each block that was written
is read back and has to have the CRC-32 of what was to be written.
"""

from __future__ import annotations

import errno
import os
from _thread import LockType, allocate_lock, start_new_thread
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from mmap import mmap
from typing import NamedTuple

from zlib_ng.zlib_ng import crc32, crc32_combine

from ckptool.errors import Malformed
from ckptool.files import checksums
from ckptool.files.blocks import Ahead, fill, grain, runs
from ckptool.files.checksums import Part
from ckptool.files.fileio import CHUNK, Readers, read_back, unpacked, write_at
from ckptool.files.stream import Stream
from ckptool.records import dataclass
from ckptool.tensors.tensor import Packing, Storage
from ckptool.tensors.values import stored

FLUSH_EVERY = 32 << 20
TASK = 8 * CHUNK  # of many chunks: two threads wait for the interpreter and for each other less
WORKERS = 2
SMALL = CHUNK // 8  # copies up to this size are moved many at a time
NEAR = 4096  # between two of them, where headers and padding are

Progress = Callable[[int], None]  # bytes copied since the last call
Begin = Callable[[int], Progress]  # how many bytes there will be -> what counts them

Bytes = bytes | bytearray | memoryview
Sink = int | Stream  # a descriptor that is written to anywhere, or in order


def no_progress(total: int) -> Progress:
    """Draw nothing."""
    return lambda nbytes: None


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy `nbytes` of a storage, from `start` in it, to `target` in the output.

    `target` None reads and checks without writing. The recorded CRC-32 of a storage of which
    copies leave nothing out is checked.
    """

    storage: Storage
    target: int | None
    start: int = 0
    nbytes: int = -1

    def __post_init__(self) -> None:
        if self.nbytes < 0:
            object.__setattr__(self, "nbytes", self.storage.nbytes - self.start)

    @property
    def whole(self) -> bool:
        """Whether the copy covers its storage."""
        return self.nbytes == self.storage.nbytes


class Done(NamedTuple):
    """The bytes that a job has moved: their CRC-32, and how many."""

    crc32: int
    nbytes: int

    def followed_by(self, other: Done) -> Done:
        """Return the sum of these bytes and those that come next."""
        if not self.nbytes:
            return other
        joined = crc32_combine(self.crc32, other.crc32, other.nbytes)
        return Done(joined, self.nbytes + other.nbytes)


NOTHING = Done(0, 0)
Moved = dict[str, dict[int, Done]]  # by the name of a file and the offset in it


def no_bytes(done: Sequence[Done]) -> Iterable[tuple[int, bytes]]:
    """Need no checksums."""
    return ()


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file planned to the last byte before the first is written; `name` is its place in a set.

    `literals` are `(offset, bytes)` known beforehand; `finish` returns the ones that need the
    checksums of the jobs.
    """

    name: str
    nbytes: int
    literals: Sequence[tuple[int, bytes]] = ()
    jobs: Sequence[Copy] = ()
    finish: Callable[[Sequence[Done]], Iterable[tuple[int, bytes]]] = no_bytes

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
        self._lock = allocate_lock()

    def reached(self, position: int) -> None:
        """Note that bytes up to about `position` are written; a window behind it is flushed."""
        if self._next is None or position < self._next:
            return
        with self._lock:
            start = max(0, self._next - 2 * FLUSH_EVERY)
            self._next = position + FLUSH_EVERY
        os.posix_fadvise(self._target, start, position - start, os.POSIX_FADV_DONTNEED)


class _Task(NamedTuple):
    """A part of a job for one thread: `nbytes` from `start` in what it moves, `grain` at once."""

    number: int
    job: Copy
    start: int
    nbytes: int
    grain: int = CHUNK


class _Batch(NamedTuple):
    """Small copies that are close together and in order, both where they are read and written.

    `first` is the number of the first of them.
    """

    first: int
    jobs: list[Copy]


def run_jobs(
    jobs: Sequence[Copy], target: Sink | None, progress: Progress, *, sync: bool = False
) -> list[Done]:
    """Do all jobs on two threads and return what each has moved; the first error ends all.

    Where their targets are in order, the small gaps between small jobs may be filled with zeros.
    What is only to be read comes last: what the others have read all of is not read again. With
    `sync` the output will be flushed: its write-back starts early.
    """
    done, parts, known = [NOTHING] * len(jobs), list[Part](), dict[Storage, int]()
    for reading in (False, True):
        left = []
        for number, job in enumerate(jobs):
            if (job.target is None) is not reading:
                continue
            if job.whole and job.storage in known:
                done[number] = Done(known[job.storage], job.nbytes)
                progress(job.nbytes)
            else:
                left.append(number)
        moved, found = move([jobs[number] for number in left], target, progress, sync=sync)
        parts += found
        for number, each in zip(left, moved, strict=True):
            done[number] = each
        if reading or all(job.target is not None for job in jobs):
            break
        known = checksums.checksums(parts)
    checksums.compare(parts)
    return done


def move(
    jobs: Sequence[Copy], target: Sink | None, progress: Progress, *, sync: bool = False
) -> tuple[list[Done], list[Part]]:
    """Do jobs in any order; return what each has moved, and what that was of recorded storages.

    Of those that a job copies whole, what agrees with their checksum is left out.
    """
    numbers, plain = list[int](), list[Copy]()
    for number, job in enumerate(jobs):
        for piece in _taken_apart(job):
            numbers.append(number)
            plain.append(piece)
    run = _Run(plain, target, progress, sync=sync)
    parts, done = run.finished() if jobs else [], [NOTHING] * len(jobs)
    for number, piece, moved in zip(numbers, plain, run.done, strict=True):
        done[number] = done[number].followed_by(moved)
        if piece.storage is not jobs[number].storage and piece.whole:
            found = checksums.part(piece.storage, 0, piece.nbytes)
            parts += [found._replace(crc32=moved.crc32)] if found else []
    return done, parts


def _taken_apart(job: Copy) -> Iterator[Copy]:
    """Yield copies of the pieces that a storage is put together of, where they are in order."""
    target = job.target
    for storage, start, nbytes in runs(job.storage, job.start, job.nbytes):
        yield Copy(storage, target, start, nbytes)
        target = None if target is None else target + nbytes


class _Run:
    """Jobs under way on the calling thread and on helpers.

    The state is allocated here, before any thread starts, and `_thread` is used as it is: where
    memory is short, a new thread can end before its first instruction, and `threading.Thread.start`
    would wait for it forever. A helper counts once it has entered `_help`; whatever it leaves
    undone, the caller does, or `run_jobs` finds missing.
    """

    def __init__(
        self, jobs: Sequence[Copy], target: Sink | None, progress: Progress, *, sync: bool
    ) -> None:
        self.done = [NOTHING] * len(jobs)
        self.parts: list[Part] = []
        self.readers = Readers(lambda: (each for job in jobs for each in stored(job.storage)))
        self._target, self._progress = target, progress
        fd = None if isinstance(target, Stream) else target
        self._write_back = _WriteBack(fd or 0, wanted=sync and fd is not None)
        self._jobs, self._tasks = jobs, _tasks(jobs)
        self._lock = allocate_lock()
        self._ahead: dict[tuple[int, int], Done] = {}  # parts whose predecessors are not done
        self._error: BaseException | None = None
        self._ended = False
        workers = 1 if isinstance(target, Stream) else WORKERS
        self._helpers = [allocate_lock() for _ in range(workers - 1)]  # each locked while it works

    def all(self) -> None:
        """Do all tasks; raises the first error once no thread works any more."""
        try:
            for lock in self._helpers:
                _start(self._help, lock)
            self._work()
        except BaseException as error:
            self._error = self._error or error
        try:
            self._wait()
        except BaseException as error:  # Ctrl-C: the threads end before the file goes away
            self._error = self._error or error
            self._wait()
        if self._error is not None:
            raise self._error

    def finished(self) -> list[Part]:
        """Do all tasks and close all files; return what was read of recorded storages in order."""
        try:
            self.all()
        except Malformed:
            self.readers.close()  # raises where one was changed: that is why, then
            raise
        except BaseException:
            with suppress(Malformed):
                self.readers.close()
            raise
        self.readers.close()
        for job, done in zip(self._jobs, self.done, strict=True):
            if done.nbytes != job.nbytes:
                raise RuntimeError(f"{done.nbytes} of {job.nbytes} bytes of a job were moved")
            agrees = job.whole and job.storage.crc32 == done.crc32  # as nearly all of many do
            if not agrees and job.storage.chunked is None:
                found = checksums.part(job.storage, job.start, job.nbytes)
                self.parts += [found._replace(crc32=done.crc32)] if found else []
        return self.parts

    def _wait(self) -> None:
        self._ended = True
        for lock in self._helpers:
            with lock:
                pass

    def _help(self, lock: LockType) -> None:
        with lock:
            try:
                if not self._ended:
                    self._work()
            except BaseException as error:
                self._error = self._error or error

    def _work(self) -> None:
        # Of whole pages: the kernel copies them faster. The second half is for batches alone.
        buffer = memoryview(mmap(-1, 2 * CHUNK))
        ahead = Ahead()
        while self._error is None:
            with self._lock:
                task = next(self._tasks, None)
            if task is None:
                return
            if isinstance(task, _Batch):
                self._copy(task.jobs, task.first, buffer)
                continue
            self._account(task, self._do(task, buffer, ahead))
            self._progress(task.nbytes)
            self._write_back.reached((task.job.target or 0) + task.start + task.nbytes)

    def _account(self, task: _Task, part: Done) -> None:
        """Add a part to what its job has done, as soon as all before it is done."""
        with self._lock:
            self._ahead[task.number, task.start] = part
            done = self.done[task.number]
            while following := self._ahead.pop((task.number, done.nbytes), None):
                done = done.followed_by(following)
            self.done[task.number] = done

    def _copy(self, jobs: list[Copy], first: int, buffer: memoryview[int]) -> None:
        """Read and write a batch as a whole; each of its jobs answers for its own bytes."""
        begin, place = _source(jobs[0]), jobs[0].target
        source = buffer[: _source(jobs[-1]) + jobs[-1].nbytes - begin]
        self.readers[jobs[0].storage.path].read_into(source, begin)
        starts = [_source(job) - begin for job in jobs]
        parts = [source[at : at + job.nbytes] for at, job in zip(starts, jobs, strict=True)]
        done = [Done(crc32(part), len(part)) for part in parts]
        if place is not None and self._target is not None:
            self._write_batch(self._target, place, jobs, parts, done, buffer[CHUNK:])
        self.done[first : first + len(jobs)] = done
        self._progress(sum(map(len, parts)))
        self._write_back.reached((place or 0) + len(source))

    def _write_batch(
        self,
        target: Sink,
        place: int,
        jobs: list[Copy],
        parts: list[memoryview[int]],
        done: list[Done],
        buffer: memoryview[int],
    ) -> None:
        """Write the parts with zeros between them; each of them is read back, where it can be."""
        if isinstance(target, Stream):
            for job, part in zip(jobs, parts, strict=True):
                target.write(part, job.target or 0)
            return
        ranges = [slice(start := (job.target or 0) - place, start + job.nbytes) for job in jobs]
        written = buffer[: ranges[-1].stop]
        written[:] = bytes(len(written))
        for where, part in zip(ranges, parts, strict=True):
            written[where] = part
        write_at(target, written, place)
        read_back(target, written, place)
        if [crc32(written[where]) for where in ranges] != [each.crc32 for each in done]:
            raise OSError(errno.EIO, _READS_OTHERWISE)

    def _do(self, task: _Task, buffer: memoryview[int], ahead: Ahead) -> Done:
        job = task.job
        blocks: Iterable[Bytes]
        if job.storage.packing is Packing.DEFLATED:
            data = unpacked(job.storage, self.readers[job.storage.path])
            blocks = _clipped(data, job.start, job.nbytes)
        else:
            blocks = self._read(task, buffer, ahead)
        return self._write(blocks, None if job.target is None else job.target + task.start, buffer)

    def _read(self, task: _Task, buffer: memoryview[int], ahead: Ahead) -> Iterator[Bytes]:
        """Yield what is read into the buffer, a grain after the other."""
        job = task.job
        made = job.storage.chunked or job.storage.computed
        size = made.itemsize if made else 1
        for start, end in _cuts(job, task.start, task.start + task.nbytes, task.grain):
            before, behind = (job.start + start) % size, -(job.start + end) % size
            view = buffer[: before + end - start + behind]  # elements that a job has a part of
            self.parts += fill(view, job.storage, job.start + start - before, self.readers, ahead)
            yield view[before : before + end - start]
        self.parts += ahead.parts
        ahead.parts.clear()

    def _write(
        self, blocks: Iterable[Bytes], position: int | None, buffer: memoryview[int]
    ) -> Done:
        """Write blocks one after the other; each is read back into the buffer, where it may be."""
        target = None if position is None else self._target
        checksum = written = nbytes = 0
        for block in blocks:
            for data in _cut(memoryview(block), (position or 0) + nbytes):
                checksum = crc32(data, checksum)
                if isinstance(target, Stream):
                    target.write(data, (position or 0) + nbytes)
                    written = checksum
                elif target is not None and position is not None:
                    write_at(target, data, position + nbytes)
                    view = buffer[: len(data)]
                    read_back(target, view, position + nbytes)
                    written = crc32(view, written)
                nbytes += len(data)
        if target is not None and written != checksum:
            raise OSError(errno.EIO, _READS_OTHERWISE)
        return Done(checksum, nbytes)


_READS_OTHERWISE = "what was written reads back differently"


def _start(work: Callable[[LockType], None], lock: LockType) -> None:
    try:
        start_new_thread(work, (lock,))
    except RuntimeError as error:  # pthread_create: EAGAIN, for lack of memory or of processes
        raise MemoryError(str(error)) from error


def _tasks(jobs: Sequence[Copy]) -> Iterator[_Task | _Batch]:
    batches, batch = _are_in_order(jobs), list[Copy]()
    for index, job in enumerate(jobs):
        if batch and not _follows(job, batch):
            yield _Batch(index - len(batch), batch)
            batch = []
        if batches and _is_small(job):
            batch.append(job)
        elif job.storage.packing is Packing.DEFLATED:
            yield _Task(index, job, 0, job.nbytes)
        else:
            task, size = grain(job.storage)
            for start, end in _cuts(job, 0, job.nbytes, max(TASK, task) if size == CHUNK else task):
                yield _Task(index, job, start, end - start, size)
    if batch:
        yield _Batch(len(jobs) - len(batch), batch)


def _are_in_order(jobs: Sequence[Copy]) -> bool:
    """Return whether each job writes behind the one before: no third writes between the two."""
    end = 0
    for job in jobs:
        if job.target is not None:
            if job.target < end:
                return False
            end = job.target + job.nbytes
    return True


def _is_small(job: Copy) -> bool:
    return job.storage.packing is Packing.PLAIN and 0 < job.nbytes <= SMALL


def _source(job: Copy) -> int:
    return job.storage.start + job.start


def _follows(job: Copy, batch: list[Copy]) -> bool:
    """Return whether a job is close behind the last of a batch, which is not full with it."""
    head, last = batch[0], batch[-1]
    if not _is_small(job) or job.storage.path != head.storage.path:
        return False
    start, end = _source(job), _source(last) + last.nbytes
    near = 0 <= start - end <= NEAR and start + job.nbytes - _source(head) <= CHUNK
    if job.target is None or last.target is None or head.target is None:
        return near and job.target is last.target
    gap, whole = job.target - last.target - last.nbytes, job.target + job.nbytes - head.target
    return near and gap <= NEAR and whole <= CHUNK


def _cuts(job: Copy, start: int, end: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """Cut a range of a job where the output has a multiple of so many bytes.

    Pages of the output are then written once, in large folios. What is computed or in chunks is
    cut at whole elements, what is gathered at whole rows of it.
    """
    made = job.storage.chunked or job.storage.computed
    offset = (job.target or 0) if nbytes <= TASK else job.start
    if made and (offset - job.start) % made.itemsize:
        offset = job.start
    while start < end:
        cut = min(start + nbytes - (offset + start) % nbytes, end)
        yield start, cut
        start = cut


def _cut(data: memoryview, position: int) -> Iterator[memoryview]:
    """Cut what goes to a position of the output at the multiples of a chunk there."""
    start = 0
    while start < len(data):
        cut = start + CHUNK - (position + start) % CHUNK
        yield data[start:cut]
        start = cut


def _clipped(parts: Iterable[bytes], start: int, nbytes: int) -> Iterator[bytes]:
    """Yield the part of a stream from `start`, `nbytes` long; the stream is read to its end."""
    position = 0
    for data in parts:
        wanted = data[max(0, start - position) : max(0, start + nbytes - position)]
        position += len(data)
        if wanted:
            yield wanted
