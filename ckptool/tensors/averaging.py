"""The kernel of a weighted sum, which counts what overflows while it computes."""

from __future__ import annotations

from _thread import LockType, allocate_lock
from dataclasses import field

from ckptool.records import dataclass
from ckptool.tensors import numbers
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import Block


@dataclass(slots=True, eq=False)
class Mean:
    """Sum weighted blocks of floats, each of its own dtype, in the dtype of the first.

    Two threads may. `overflow` counts finite numbers that made another than that.
    """

    dtypes: tuple[DType, ...]
    weights: tuple[float, ...]
    overflow: int = 0
    _lock: LockType = field(default_factory=allocate_lock, repr=False)

    def __call__(self, out: memoryview, *blocks: Block) -> None:
        """Fill a view with the sum of as many elements of each."""
        overflow = numbers.mean(out, blocks, self.dtypes, self.weights, self.dtypes[0])
        with self._lock:
            self.overflow += overflow
