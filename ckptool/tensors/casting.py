"""The kernel of a cast, which counts while it computes, and sizes as they were before casts."""

from __future__ import annotations

from _thread import LockType, allocate_lock
from collections.abc import Iterator
from dataclasses import astuple, field

from ckptool.records import dataclass
from ckptool.tensors import numbers
from ckptool.tensors.counts import Losses
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import Block
from ckptool.tensors.tensor import Storage
from ckptool.tensors.values import arguments


@dataclass(slots=True, eq=False)
class Rounding:
    """Round floats of one dtype to another, in a byte order; two threads may.

    `count` elements were given, and `losses` are theirs: those of a storage, once all of it was
    computed and none twice.
    """

    source: DType
    target: DType
    clamp: bool = False
    byteorder: str = "little"
    count: int = 0
    losses: Losses = field(default_factory=Losses)
    _lock: LockType = field(default_factory=allocate_lock, repr=False)

    def __call__(self, out: memoryview, block: Block) -> None:
        """Fill a view with the elements of a block in the new dtype."""
        losses = numbers.cast(out, block, self.source, self.target, clamp=self.clamp)
        if self.byteorder != "little" and self.target.swap > 1:
            numbers.swap(out, self.target.swap)
        with self._lock:
            self.count += len(block) // self.source.itemsize
            self.losses += losses

    def counted(self) -> list[int]:
        """Return what was counted, as `add` takes it."""
        return [self.count, *astuple(self.losses)]

    def add(self, count: int, *losses: int) -> None:
        """Count what another process has computed."""
        self.count += count
        self.losses += Losses(*losses)


def roundings(storage: Storage) -> Iterator[Rounding]:
    """Iterate over the casts on the way to a storage."""
    kernel = storage.computed.kernel if storage.computed else None
    if isinstance(kernel, Rounding):
        yield kernel
    for value in arguments(storage):
        yield from roundings(value.storage)


def growth(storage: Storage) -> float:
    """Return how many bytes a byte of a storage was, before casts on the way to it."""
    if storage.chunked is not None:
        parts = [(chunk.source.nbytes, chunk.source.storage) for chunk in storage.chunked.chunks]
        whole = sum(nbytes for nbytes, _ in parts)
        return sum(nbytes * growth(part) for nbytes, part in parts) / whole if whole else 1
    if storage.computed is None or not storage.computed.args:
        return 1
    before = max(growth(value.storage) for value in storage.computed.args)
    kernel = storage.computed.kernel
    if isinstance(kernel, Rounding):
        return before * kernel.source.itemsize / kernel.target.itemsize
    return before
