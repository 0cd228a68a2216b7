"""Write the bytes of planned files: a file at once, or all files with a group of ranks.

Each rank of a group has a range of the bytes of all files behind each other, whatever lies in it:
tensors, parts of them, headers. Ranges end at multiples of large powers of two in a file, or with
it, as no two machines may write to one page: a client of NFS writes back whole pages, with zeros
where the bytes of another are to come (linux/fs/nfs/write.c, `nfs_can_extend_write`).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import accumulate, chain, pairwise
from typing import TypedDict

from ckptool.files import checksums
from ckptool.files.checksums import Part
from ckptool.files.copying import (
    NOTHING,
    READS_OTHERWISE,
    Done,
    PlannedFile,
    Progress,
    move,
    run_jobs,
)
from ckptool.files.fileio import CHUNK, read_back, write_at
from ckptool.files.group import Group
from ckptool.files.jobs import NEAR as BETWEEN, Copy
from ckptool.files.target import Output
from ckptool.tensors.casting import roundings
from ckptool.tensors.tensor import Packing

LEAST_CUT, LARGEST_CUT = 1 << 16, 1 << 22  # pages of some machines; stripes of Lustre
PIECES = 64  # a rank has about so many: ranks differ by a few per cent at most
NEAR = 50  # a file that ends within this part of a range ends the range


def write_file(
    fd: int, planned: PlannedFile, progress: Progress, *, sync: bool = False
) -> list[Done]:
    """Write a planned file through an open descriptor and return what its jobs have moved.

    `sync` says that it will be flushed.
    """
    reserve(fd, planned.nbytes)
    done = run_jobs(planned.jobs, fd, progress, sync=sync)
    _write_pieces(fd, chain(planned.literals, planned.finish(done)))  # some are between jobs
    return done


def _write_pieces(fd: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Write pieces of a file, those that are close together by one call."""
    block: list[tuple[int, bytes]] = []
    end = 0
    for offset, data in pieces:
        if block and not (0 <= offset - end <= BETWEEN and offset - block[0][0] <= CHUNK):
            _write_block(fd, block, end)
            block = []
        block.append((offset, data))
        end = offset + len(data)
    if block:
        _write_block(fd, block, end)


def _write_block(fd: int, block: Sequence[tuple[int, bytes]], end: int) -> None:
    """Write pieces in order, and what is between them again as it is; that is read back."""
    begin = block[0][0]
    if len(block) == 1:
        write_at(fd, block[0][1], begin)
        return
    written = bytearray(end - begin)
    read_back(fd, memoryview(written), begin)
    for offset, data in block:
        written[offset - begin : offset - begin + len(data)] = data
    write_at(fd, written, begin)
    again = bytearray(len(written))
    read_back(fd, memoryview(again), begin)
    if again != written:
        raise OSError(errno.EIO, READS_OTHERWISE)


def reserve(fd: int, nbytes: int) -> None:
    """Give a file its size, and its space where its file system does that without writing.

    A full disk then refuses before the first byte, and the bytes come faster. Where there is no
    fallocate (NFS 3, some FUSE), glibc imitates it with a write for each block, but not for a
    descriptor that appends (sysdeps/posix/posix_fallocate.c: EBADF).
    """
    os.ftruncate(fd, nbytes)
    if not nbytes or not hasattr(os, "posix_fallocate"):
        return
    from fcntl import F_GETFL, F_SETFL, fcntl

    flags = fcntl(fd, F_GETFL)
    fcntl(fd, F_SETFL, flags | os.O_APPEND)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno not in _NOT_RESERVED:
            raise
    finally:
        fcntl(fd, F_SETFL, flags)


_NOT_RESERVED = (errno.EBADF, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM)


class _Moved(TypedDict):
    """What a rank has moved: by the number of a file, that of a job, a CRC-32, how many bytes, ...

    `parts` are of storages with a recorded checksum, `counted` is what its kernels have.
    """

    jobs: dict[str, list[int]]
    parts: list[list[int]]
    counted: list[list[int]]


class _Merged(TypedDict):
    """The CRC-32 of all jobs of all files, and those that only read and have to be done yet."""

    checksums: list[list[int]]
    left: list[tuple[int, int]]


class Work:
    """What a rank does with others to write files that are there; `path` tells where.

    Files without jobs are left to who publishes.
    """

    def __init__(
        self,
        group: Group,
        output: Output,
        path: Callable[[PlannedFile], str],
        progress: Progress,
        *,
        sync: bool,
    ) -> None:
        self._group, self._files, self._path = group, output.files, path
        self._progress, self._sync = group.counting(progress), sync
        self._mine = shares(output.files, group.size)[group.rank]
        jobs = output.jobs
        self._kernels = list(dict.fromkeys(each for job in jobs for each in roundings(job.storage)))
        found = (each for job in jobs for each in checksums.recorded(job.storage))
        self._recorded = {each: number for number, each in enumerate(dict.fromkeys(found))}
        self._parts: list[Part] = []

    def done(self) -> list[list[Done]]:
        """Write; return what all ranks have moved by the jobs of each file."""
        answers = self._group.gather(self._copy)
        merged = self._group.share(lambda: self._merge(answers))
        done = [
            [Done(each, job.nbytes) for each, job in zip(found, file.jobs, strict=True)]
            for found, file in zip(merged["checksums"], self._files, strict=True)
        ]
        parts = self._group.gather(lambda: self._finish(done, merged["left"]))
        self._group.share(lambda: self._compare(parts))
        return done

    def _copy(self) -> _Moved:
        """Do the jobs, or parts of jobs, that write to the range of this rank."""
        made: _Moved = {"jobs": {}, "parts": [], "counted": []}
        for number, start, end in self._mine:
            file = self._files[number]
            pairs = list(_within(file.jobs, start, end))
            fd = os.open(self._path(file), WRITING)
            try:
                jobs = [job for _, job in pairs]
                done, parts = move(jobs, fd, self._progress, sync=self._sync)
            finally:
                os.close(fd)
            answers = ((job, *moved) for (job, _), moved in zip(pairs, done, strict=True))
            made["jobs"][str(number)] = list(chain.from_iterable(answers))
            made["parts"] += self._numbered(parts)
        made["counted"] = [kernel.counted() for kernel in self._kernels]
        return made

    def _merge(self, answers: Sequence[_Moved]) -> _Merged:
        """Account for all jobs that write; on rank 0, which has the answers of all."""
        merged: _Merged = {"checksums": [], "left": []}
        for number, file in enumerate(self._files):
            done = [NOTHING] * len(file.jobs)
            for answer in answers:
                flat = iter(answer["jobs"].get(str(number), ()))
                for place, checksum, nbytes in zip(flat, flat, flat, strict=True):
                    done[place] = done[place].followed_by(Done(checksum, nbytes))
            for job, moved in zip(file.jobs, done, strict=True):
                if job.target is not None and job.nbytes != moved.nbytes:
                    raise RuntimeError(f"{moved.nbytes} of {job.nbytes} bytes of a job were moved")
            merged["checksums"].append([each.crc32 for each in done])
        for answer in answers[1:]:
            for kernel, counted in zip(self._kernels, answer["counted"], strict=True):
                kernel.add(*counted)
        self._parts = self._named(chain.from_iterable(answer["parts"] for answer in answers))
        known = checksums.checksums(self._parts)
        merged["left"] = [
            (number, place)
            for number, file in enumerate(self._files)
            for place, job in enumerate(file.jobs)
            if job.target is None and job.storage not in known
        ]
        return merged

    def _finish(
        self, done: Sequence[Sequence[Done]], left: Sequence[Sequence[int]]
    ) -> list[list[int]]:
        """Write what is between jobs in the range of this rank, and flush it; read what is left."""
        for number, start, end in self._mine:
            file = self._files[number]
            fd = os.open(self._path(file), WRITING)
            try:
                for offset, data in chain(file.literals, file.finish(done[number])):
                    piece = data[max(0, start - offset) : max(0, end - offset)]
                    write_at(fd, piece, max(offset, start))
                if self._sync:
                    os.fsync(fd)
            finally:
                os.close(fd)
        jobs = [self._files[number].jobs[place] for number, place in left]
        mine = _read_by(jobs, self._group.rank, self._group.size)
        return self._numbered(move(mine, None, self._progress)[1])

    def _compare(self, answers: Iterable[Iterable[Sequence[int]]]) -> None:
        parts = [*self._parts, *self._named(chain.from_iterable(answers))]
        checksums.compare(checksums.checksums(parts))

    def _numbered(self, parts: Iterable[Part]) -> list[list[int]]:
        return [[self._recorded[each.storage], *each[1:]] for each in parts]

    def _named(self, parts: Iterable[Sequence[int]]) -> list[Part]:
        storages = list(self._recorded)
        return [Part(storages[number], *place) for number, *place in parts]


WRITING = os.O_RDWR | getattr(os, "O_BINARY", 0)


def shares(files: Sequence[PlannedFile], size: int) -> list[list[tuple[int, int, int]]]:
    """Return for each rank the ranges that it writes: the number of a file, start and end in it."""
    ends = list(accumulate(file.nbytes if file.jobs else 0 for file in files))
    total = ends[-1]
    ranks: list[list[tuple[int, int, int]]] = []
    for low, high in pairwise([*(_cut(ends, size, rank) for rank in range(size)), total]):
        inside = ((max(low, start), min(high, end), start) for start, end in pairwise([0, *ends]))
        ranges = enumerate(inside)
        ranks.append([(at, one - base, two - base) for at, (one, two, base) in ranges if one < two])
    return ranks


def _cut(ends: Sequence[int], size: int, rank: int) -> int:
    """Return where the range of a rank begins, in files that end there."""
    ideal, total = ends[-1] * rank // size, ends[-1]
    start, end = next(
        ((start, end) for start, end in pairwise([0, *ends]) if ideal < end), (total, total)
    )
    for edge in (start, end):
        if abs(edge - ideal) <= total // size // NEAR:
            return edge
    step = 1 << (total // size // PIECES).bit_length()
    step = max(LEAST_CUT, min(step, LARGEST_CUT))
    return min(start + (ideal - start + step // 2) // step * step, end)


def _within(jobs: Iterable[Copy], start: int, end: int) -> Iterator[tuple[int, Copy]]:
    """Iterate over the jobs that write to a range of a file, and their numbers; cut at its ends."""
    for number, job in enumerate(jobs):
        if job.target is None:
            continue
        low, high = max(job.target, start), min(job.target + job.nbytes, end)
        if high - low == job.nbytes > 0:
            yield number, job
        elif low < high:
            yield number, Copy(job.storage, low, job.start + low - job.target, high - low)


def _read_by(jobs: Sequence[Copy], rank: int, size: int) -> list[Copy]:
    """Return what a rank reads of what is to be read alone; what is deflated has no parts."""
    ends = list(accumulate((job.nbytes for job in jobs), initial=0))
    first, last = (ends[-1] * each // size for each in (rank, rank + 1))
    mine = []
    for job, (start, end) in zip(jobs, pairwise(ends), strict=True):
        low, high = max(start, first), min(end, last)
        if job.storage.packing is Packing.DEFLATED:
            low, high = (start, end) if first <= start < last else (start, start)
        if low < high:
            mine.append(Copy(job.storage, None, job.start + low - start, high - low))
    return mine
