"""`check --finite`: which tensors of a checkpoint hold NaN or infinity, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass

from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.tree import Node
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.numbers import FLOATS, Tally, load, tally
from ckptool.tensors.tensor import CompositeTensor, Storage, TensorInfo, without_repeats

BLOCK = 1 << 19
MAX_REPEATS = 4  # times the bytes of the storages, that overlapping views may add up to
SMALL = 1 << 20


@dataclass(frozen=True, slots=True)
class Floats:
    """What the floats of a checkpoint hold: tensors, by path, with NaN or infinity.

    `skipped` are views that overlap so often that to count in them would take for ever.
    """

    found: tuple[tuple[str, Tally], ...]
    skipped: tuple[str, ...]


def floating(tree: Node) -> Iterator[tuple[str, TensorInfo]]:
    """Yield the tensors of a tree that can hold NaN or infinity, with their paths."""
    for path, info in walk.named(tree):
        parts = info.parts if isinstance(info, CompositeTensor) else (info,)
        for part in parts:
            if part.dtype in FLOATS:
                yield path, part


def not_finite(checkpoint: Checkpoint, progress: Callable[[int], None]) -> Floats:
    """Count NaN and infinity in every tensor, those of one storage together; ties once."""
    by_storage: dict[Storage, list[tuple[str, TensorInfo]]] = {}
    for path, info in floating(checkpoint.tree):
        by_storage.setdefault(info.storage, []).append((path, info))
    left = MAX_REPEATS * max(SMALL, sum(storage.nbytes for storage in by_storage))
    known: dict[tuple[object, ...], Tally] = {}
    tallies: dict[str, Tally] = {}
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
                counts = (tally(block, info.dtype) for block in blocks(once, readers, BLOCK))
                known[once.view] = sum(counts, start=Tally())
                progress(once.nbytes)
            tallies[path] = tallies.get(path, Tally()) + known[once.view].times(times)
    found = [(path, here) for path, here in tallies.items() if here != Tally()]
    return Floats(tuple(found), tuple(skipped))
