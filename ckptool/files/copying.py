"""The copy engine: byte ranges of storages into a file planned to the last byte.

Two threads work through the jobs a chunk at a time: while one waits for the kernel, the other
computes a CRC-32, so that checking costs little beside copying. Nothing counts as done because no
thread complained: every job has to answer for its bytes (`Done`), and each block that was written
is read back and has to have the CRC-32 of what was to be written.
"""

from __future__ import annotations

import errno
import os
from _thread import LockType, allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import pairwise

from zlib_ng.zlib_ng import crc32, crc32_combine

from ckptool.errors import Malformed
from ckptool.files import checksums
from ckptool.files.blocks import fill, read_portion, runs
from ckptool.files.checksums import Part
from ckptool.files.fileio import CHUNK, OpenFile, Readers, read_back, unpacked, write_at
from ckptool.files.gathering import MADE, Ahead, Band, Portion, large_pages
from ckptool.files.jobs import Block, Copy, Task, Together, cuts, near, tasks
from ckptool.files.stream import Stream
from ckptool.records import NamedTuple, dataclass
from ckptool.tensors.numbers import LINE
from ckptool.tensors.tensor import Packing, Storage
from ckptool.tensors.values import stored

FLUSH_EVERY = 32 << 20
WORKERS = 2
LOST = 1  # second, after which a thread that waits for others looks whether one has failed

Progress = Callable[[int], None]  # bytes copied since the last call
Begin = Callable[[int], Progress]  # how many bytes there will be -> what counts them

Bytes = bytes | bytearray | memoryview
Sink = int | Stream  # a descriptor that is written to anywhere, or in order


def no_progress(total: int) -> Progress:
    """Draw nothing."""
    return lambda nbytes: None


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
            if known and job.whole and job.storage in known:
                done[number] = Done(known[job.storage], job.nbytes)
                progress(job.nbytes)
            else:
                left.append(number)
        moved, found = move([jobs[number] for number in left], target, progress, sync=sync)
        for number, each in zip(left, moved, strict=True):
            done[number] = each
        if found:
            parts += found
            known = checksums.checksums(parts)
        if all(job.target is not None for job in jobs):
            break
    checksums.compare(known)
    return done


def move(
    jobs: Sequence[Copy], target: Sink | None, progress: Progress, *, sync: bool = False
) -> tuple[list[Done], list[Part]]:
    """Do jobs in any order; return what each has moved, and what that was of recorded storages.

    Of those that a job copies whole, what agrees with their checksum is left out.
    """
    numbers, plain = list[int](), list[Copy]()
    for number, job in enumerate(jobs):
        pieces = [job] if job.storage.chunked is None else [*_taken_apart(job)]
        numbers += [number] * len(pieces)
        plain += pieces
    run = _Run(plain, target, progress, sync=sync)
    parts, done = run.finished() if jobs else [], [NOTHING] * len(jobs)
    for number, piece, moved in zip(numbers, plain, run.done, strict=True):
        done[number] = done[number].followed_by(moved)
        if piece.storage is not jobs[number].storage and piece.whole:
            found = checksums.part(piece.storage, 0, piece.nbytes)
            parts += [found.read(moved.crc32)] if found else []
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
        self._jobs, self._band = jobs, Band()
        self._tasks = tasks(jobs, self._band)
        # Locks of C, which `with` takes and leaves at once: a Condition does it in Python, where
        # Ctrl-C may come in between, and the lock is held for ever.
        self._turn, self._at_work, self._together = allocate_lock(), set[int](), False
        self._gate = allocate_lock()  # held where nobody has left what others wait for
        self._gate.acquire()
        self._lock = allocate_lock()
        self._ahead: dict[tuple[int, int], Done] = {}  # parts whose predecessors are not done
        self._error: BaseException | None = None
        self._ended = False
        workers = 1 if isinstance(target, Stream) or _share_a_core(jobs) else WORKERS
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
                self.parts += [found.read(done.crc32)] if found else []
        # A helper that has let go of its lock may hold this object for a moment yet.
        parts, self.parts, self._jobs, self.readers = self.parts, [], (), Readers()
        self._tasks, self._band = iter(()), Band()
        return parts

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
        buffer = large_pages(CHUNK + LINE + MADE)
        ahead = Ahead(parts=self.parts, band=self._band)
        try:
            while (task := self._next_task()) is not None:
                if isinstance(task, Portion):
                    read_portion(task, self.readers, ahead)
                    continue
                if isinstance(task, Task):
                    self._account(task, self._do(task, buffer, ahead))
                    nbytes, end = task.nbytes, task.end
                else:
                    nbytes = sum(self._copy(block, buffer) for block in task)
                    end = task[-1][-1].end
                self._progress(nbytes)
                self._write_back.reached(end)
        except BaseException as error:
            self._error = self._error or error
            raise
        finally:
            with self._turn:
                self._pause()

    def _pause(self) -> None:
        """Note that this thread works on nothing; what waits for it may go on."""
        if get_ident() in self._at_work:
            self._at_work.remove(get_ident())
            if self._gate.locked():
                self._gate.release()

    def _next_task(self) -> Task | list[Block] | Portion | None:
        """Return what to do next, None once all is done, or something went wrong.

        Where the tasks before must be done by all, that is waited for.
        """
        while self._error is None:
            with self._turn:
                self._pause()
                while not (self._together and self._at_work):
                    task = next(self._tasks, None)
                    self._together = isinstance(task, Together)
                    if not isinstance(task, Together):
                        if task is not None:
                            self._at_work.add(get_ident())
                        return task
            self._gate.acquire(timeout=LOST)
        return None

    def _account(self, task: Task, part: Done) -> None:
        """Add a part to what its job has done, as soon as all before it is done."""
        if part.nbytes == task.job.nbytes:
            self.done[task.number] = part
            return
        with self._lock:
            self._ahead[task.number, task.start] = part
            done = self.done[task.number]
            while following := self._ahead.pop((task.number, done.nbytes), None):
                done = done.followed_by(following)
            self.done[task.number] = done

    def _copy(self, block: Block, buffer: memoryview[int]) -> int:
        """Read the parts of a block, and write it as a whole; each answers for its own bytes.

        Returns how many those are.
        """
        begin = block[0].place
        data, spare = buffer[: block[-1].end - begin], buffer[CHUNK:]
        parts = [data[task.place - begin : task.end - begin] for task in block]
        for first, end in near(block):
            self._read_near(block[first:end], parts[first:end], spare)
        done = [Done(crc32(part), len(part)) for part in parts]
        if self._target is not None and block[0].job.target is not None:
            self._write_block(self._target, block, parts, done, data, spare)
        for task, each in zip(block, done, strict=True):
            self._account(task, each)
        return sum(map(len, parts))

    def _read_near(self, run: Block, parts: list[memoryview[int]], spare: memoryview[int]) -> None:
        """Fill parts of a block that are close together in their file, by one call."""
        reader, begin = self.readers[run[0].job.storage.path], run[0].source
        if len(run) == 1:
            reader.read_into(parts[0], begin)
            return
        source = spare[: run[-1].source + run[-1].nbytes - begin]
        reader.read_into(source, begin)
        for task, part in zip(run, parts, strict=True):
            part[:] = source[task.source - begin :][: len(part)]

    def _write_block(
        self,
        target: Sink,
        block: Block,
        parts: list[memoryview[int]],
        done: list[Done],
        data: memoryview[int],
        spare: memoryview[int],
    ) -> None:
        """Write the parts with zeros between them; each of them is read back, where it can be."""
        if isinstance(target, Stream):
            for task, part in zip(block, parts, strict=True):
                target.write(part, task.place)
            return
        begin = block[0].place
        for task, following in pairwise(block):
            data[task.end - begin : following.place - begin] = bytes(following.place - task.end)
        write_at(target, data, begin)
        written = spare[: len(data)]
        read_back(target, written, begin)
        for task, each in zip(block, done, strict=True):
            if crc32(written[task.place - begin : task.end - begin]) != each.crc32:
                raise OSError(errno.EIO, READS_OTHERWISE)

    def _do(self, task: Task, buffer: memoryview[int], ahead: Ahead) -> Done:
        job = task.job
        blocks: Iterable[Bytes]
        if job.storage.packing is Packing.DEFLATED:
            data = unpacked(job.storage, self.readers[job.storage.path])
            blocks = _clipped(data, job.start, job.nbytes)
        else:
            blocks = self._read(task, buffer, ahead)
        return self._write(blocks, None if job.target is None else task.place, buffer)

    def _read(self, task: Task, buffer: memoryview[int], ahead: Ahead) -> Iterator[Bytes]:
        """Yield what is read into the buffer, a grain after the other.

        Of rows, what does not fill a chunk of the output waits for the next.
        """
        job = task.job
        made = job.storage.chunked or job.storage.computed
        size = made.itemsize if made else 1
        begin, stop, kept = task.start, task.start + task.nbytes, 0
        for start, end in cuts(job, begin, stop, task.grain, rows=task.rows):
            before, behind = (job.start + start) % size, -(job.start + end) % size
            first = _spot(task.place + start - begin - before, size)
            # The elements that a job has a part of, behind what is kept.
            view = buffer[first : first + before + end - start + behind]
            self.parts += fill(view, job.storage, job.start + start - before, self.readers, ahead)
            first, ready = first + before - kept, first + before + end - start
            place, kept = task.place + end - begin, 0
            if task.rows and end < stop:
                kept = min(place % CHUNK, ready - first)
            yield buffer[first : ready - kept]
            first = _spot(place, size)
            buffer[first - kept : first] = buffer[ready - kept : ready]

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
            raise OSError(errno.EIO, READS_OTHERWISE)
        return Done(checksum, nbytes)


READS_OTHERWISE = "what was written reads back differently"


def _share_a_core(jobs: Sequence[Copy]) -> bool:
    """Return whether two threads would share a core, and no server would be waited for."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    read = (each.path for job in jobs for each in stored(job.storage))
    return cores == 1 and not any(isinstance(path, OpenFile) and path.far for path in read)


def _start(work: Callable[[LockType], None], lock: LockType) -> None:
    try:
        start_new_thread(work, (lock,))
    except RuntimeError as error:  # pthread_create: EAGAIN, for lack of memory or of processes
        raise MemoryError(str(error)) from error


def _spot(place: int, itemsize: int) -> int:
    """Return where in a buffer, behind a chunk, to make elements that go to a place in the output.

    Where both are as far from a line of the cache, the kernel copies faster.
    """
    return CHUNK + (0 if place % LINE % itemsize else place % LINE)


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
