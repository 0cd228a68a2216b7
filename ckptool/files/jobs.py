"""The jobs of the copy engine, and the parts of them that one thread does at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptool.files.blocks import grain
from ckptool.files.fileio import CHUNK
from ckptool.files.gathering import Band, Portion
from ckptool.records import NamedTuple, dataclass
from ckptool.tensors.tensor import Packing, Storage

AT_ONCE = 8  # two threads wait for the interpreter and for each other less
TASK = AT_ONCE * CHUNK
ALONE = 8  # of what all threads gather together, one does so small a part alone
SHARES = 2  # in which they turn it
SMALL = CHUNK // 8  # parts up to this size are read many at a time
NEAR = 4096  # between two of them, where headers and padding are


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


class Task(NamedTuple):
    """A part of a job for one thread: `nbytes` from `start` in what it moves, `grain` at once."""

    number: int
    job: Copy
    start: int
    nbytes: int
    place: int  # in the output; of what is only read, in a row of all that is
    grain: int = CHUNK
    rows: bool = False  # whether it is whole rows of what is gathered

    @property
    def source(self) -> int:
        """Where the part begins in its file."""
        return self.job.storage.start + self.job.start + self.start

    @property
    def end(self) -> int:
        """Where in the output the part ends."""
        return self.place + self.nbytes


Block = list[Task]  # parts in order and close together in one chunk of the output


class Together:
    """A place between tasks: those before it are done by all threads before one begins the next."""


def tasks(jobs: Sequence[Copy], band: Band) -> Iterator[Task | list[Block] | Portion | Together]:
    """Cut jobs into what one thread does at once.

    What is copied just so, to places in order, makes blocks of the output; each is written by one
    call, wherever its parts are read. What is turned is read into the `band` before.
    """
    in_order, blocks = _are_in_order(jobs), list[Block]()
    for number, job in enumerate(jobs):
        if in_order and job.storage.packing is Packing.PLAIN:
            for task in _parts(number, job, blocks[-1][-1] if blocks else None):
                if blocks and _fits(task, blocks[-1]):
                    blocks[-1].append(task)
                    continue
                if sum(map(len, blocks)) >= AT_ONCE:
                    yield blocks
                    blocks = []
                blocks.append([task])
            continue
        if blocks:
            yield blocks
            blocks = []
        place = job.target or 0
        if job.storage.packing is Packing.DEFLATED:
            yield Task(number, job, 0, job.nbytes, place)
        else:
            many, size, rows = grain(job.storage)
            if not rows:
                many = max(TASK, many)
            for start, end in cuts(job, 0, job.nbytes, many, rows=rows):
                if not rows or end - start <= many // ALONE:
                    yield Task(number, job, start, end - start, place + start, size, rows)
                    continue
                yield Together()
                yield from band.begin(job.storage, job.start + start, end - start)
                yield Together()
                share = -(-(end - start) // (SHARES * CHUNK)) * CHUNK
                for first in range(start, end, share):
                    nbytes = min(share, end - first)
                    yield Task(number, job, first, nbytes, place + first, size, rows)
    if blocks:
        yield blocks


def _parts(number: int, job: Copy, last: Task | None) -> Iterator[Task]:
    """Cut a job where the output has a multiple of a chunk.

    What is only read is in a row behind the `last`, as far from it as in their file if it is near.
    """
    place = job.target
    if place is None:
        place = last.end if last else 0
        source = job.storage.start + job.start
        if last and last.job.storage.path == job.storage.path:
            gap = source - last.source - last.nbytes
            place += gap if 0 <= gap <= NEAR else 0
    if 0 < job.nbytes <= CHUNK - place % CHUNK and job.target is not None:  # as nearly all of many
        yield Task(number, job, 0, job.nbytes, place)
        return
    for start, end in cuts(job, 0, job.nbytes, CHUNK):
        yield Task(number, job, start, end - start, place + start)


def _fits(task: Task, block: Block) -> bool:
    """Return whether a part is close behind the last of a block, in the same chunk."""
    near = task.place - block[-1].end <= NEAR
    return near and task.end <= (block[0].place // CHUNK + 1) * CHUNK


def near(block: Block) -> Iterator[tuple[int, int]]:
    """Yield the first and the end of small parts that are close together where they are read."""
    first = 0
    for at in range(1, len(block) + 1):
        if at == len(block) or not _follows(block[at], block[at - 1], block[first]):
            yield first, at
            first = at


def _follows(task: Task, last: Task, first: Task) -> bool:
    """Return whether a part can be read together with others, from the first to the last."""
    if max(task.nbytes, last.nbytes) > SMALL or task.job.storage.path != last.job.storage.path:
        return False
    near = 0 <= task.source - last.source - last.nbytes <= NEAR
    return near and task.source + task.nbytes - first.source <= CHUNK


def _are_in_order(jobs: Sequence[Copy]) -> bool:
    """Return whether each job writes behind the one before: no third writes between the two."""
    end = 0
    for job in jobs:
        if job.target is not None:
            if job.target < end:
                return False
            end = job.target + job.nbytes
    return True


def cuts(
    job: Copy, start: int, end: int, nbytes: int, *, rows: bool = False
) -> Iterator[tuple[int, int]]:
    """Cut a range of a job where the output has a multiple of so many bytes.

    Pages of the output are then written once, in large folios. What is computed or in chunks is
    cut at whole elements; with `rows`, so many bytes are whole rows of what is gathered.
    """
    made = job.storage.chunked or job.storage.computed
    offset = job.start if rows else job.target or 0
    if made and (offset - job.start) % made.itemsize:
        offset = job.start
    while start < end:
        cut = min(start + nbytes - (offset + start) % nbytes, end)
        yield start, cut
        start = cut
