"""Counts in the elements of tensors: `check --finite` and `check --as` read them for that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from typing import Protocol, Self, TypeVar

from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.tree import Node
from ckptool.records import grouped
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.counts import Tally
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import FLOATS, load, tally
from ckptool.tensors.tensor import CompositeTensor, TensorInfo, without_repeats

BLOCK = 1 << 19
MAX_REPEATS = 4  # times the bytes of the storages, that overlapping views may add up to
SMALL = 1 << 20


def floating(tree: Node) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of a tree that can hold NaN or infinity, with their paths."""
    for path, info in walk.named(tree):
        parts = info.parts if isinstance(info, CompositeTensor) else (info,)
        for part in parts:
            if part.dtype in FLOATS:
                yield path, part


class Count(Protocol):
    """What is counted in blocks of elements."""

    def __add__(self, other: Self, /) -> Self: ...

    def times(self, count: int, /) -> Self:
        """Return what so many repetitions hold."""
        ...


_Count = TypeVar("_Count", bound=Count)


def not_finite(
    checkpoint: Checkpoint, progress: Callable[[int], None]
) -> tuple[dict[str, Tally], tuple[str, ...]]:
    """Count NaN and infinity by the path of what holds any; return what `count_in` skips, too."""
    tallies, skipped = count_in(floating(checkpoint.tree), tally, Tally(), progress)
    return {path: here for path, here in tallies.items() if here != Tally()}, skipped


def count_in(
    tensors: Iterable[tuple[str, TensorInfo]],
    count: Callable[[memoryview, DType], _Count],
    nothing: _Count,
    progress: Callable[[int], None],
) -> tuple[dict[str, _Count], tuple[str, ...]]:
    """Count in the elements of tensors, those of one storage together; each view is read once.

    Returns the counts by name, and the names of views that would take for ever.
    """
    by_storage = grouped((info.storage, (path, info)) for path, info in tensors)
    left = MAX_REPEATS * max(SMALL, sum(storage.nbytes for storage in by_storage))
    known: dict[tuple[object, ...], _Count] = {}
    counts: dict[str, _Count] = {}
    skipped: list[str] = []
    if by_storage:
        load()
    with closing(Readers()) as readers:
        for path, info in (tensor for tensors in by_storage.values() for tensor in tensors):
            once, times = without_repeats(info)
            if once.view not in known:
                cost = max(once.nbytes, info.storage.packed_nbytes and info.storage.nbytes)
                if cost > left:
                    skipped.append(path)
                    continue
                left -= cost
                found = (count(block, info.dtype) for block in blocks(once, readers, BLOCK))
                known[once.view] = sum(found, start=nothing)
                progress(once.nbytes)
            counts[path] = counts.get(path, nothing) + known[once.view].times(times)
    return counts, tuple(skipped)
