"""Two tensors compared block by block; only blocks that differ are taken for numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from ckptool.errors import LimitExceeded, Unsupported
from ckptool.files.blocks import blocks, equal
from ckptool.files.fileio import Readers
from ckptool.records import dataclass
from ckptool.tensors.counts import Tolerance, Values
from ckptool.tensors.numbers import differences, load
from ckptool.tensors.tensor import TensorInfo, is_contiguous, needs_swap, span, without_repeats

BLOCK = 1 << 19  # two of them and what is computed of them: a few times that in memory
GATHER_BLOCK = 4 << 20  # rows of a transposed tensor are short: the more at once the better
PART = 1 << 17  # of a block that differs: numbers in double precision take up to eight times it


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of one dtype and shape, and how they are compared.

    Elements that both repeat along a dimension are in them once; `times` counts the repetitions.
    `as_stored` are the bytes of both from the first element to the last, where those of two
    strided tensors mean the same: if they are equal, nothing needs to be gathered.
    """

    left: TensorInfo
    right: TensorInfo
    times: int
    as_stored: tuple[TensorInfo, TensorInfo] | None

    @property
    def views(self) -> tuple[object, ...]:
        """Identify what is compared: pairs of equal views have equal results."""
        return (self.left.view, self.right.view, self.times)

    @property
    def nbytes(self) -> int:
        """Count the bytes of one side that are read first."""
        return (self.as_stored[0] if self.as_stored else self.left).nbytes


def pair(left: TensorInfo, right: TensorInfo) -> Pair:
    """Check how two tensors of one dtype and shape are stored.

    Raises `Unsupported` for elements that share bytes and have different strides.
    """
    repeated = [not (one or other) for one, other in zip(left.stride, right.stride, strict=True)]
    (left, times), (right, _) = (without_repeats(each, repeated) for each in (left, right))
    if all(is_contiguous(each.shape, each.stride) for each in (left, right)):
        return Pair(left, right, times, None)
    stored = _as_stored(left, right)
    if left.dtype.bits >= 8:
        return Pair(left, right, times, stored)
    if stored is None:
        raise Unsupported(f"{left.dtype.label} in two layouts cannot be compared")
    return Pair(*stored, times, None)


def _as_stored(left: TensorInfo, right: TensorInfo) -> tuple[TensorInfo, TensorInfo] | None:
    swapped, other = (needs_swap(each.storage, each.dtype.swap) for each in (left, right))
    if left.stride != right.stride or left.lazy != right.lazy or swapped != other:
        return None
    count = span(left.shape, left.stride)
    if count > 2 * left.numel and left.dtype.bits >= 8:
        return None
    one, two = (replace(each, shape=(count,), stride=(1,)) for each in (left, right))
    return one, two


def compare(
    both: Pair,
    readers: Readers,
    tolerance: Tolerance,
    limit: int,
    progress: Callable[[int], None],
) -> Values:
    """Compare two tensors; raises `LimitExceeded` for what repeats itself beyond measure."""
    left, right = both.left, both.right
    dtype = left.dtype
    total = Values(left.numel if dtype.bits >= 8 else left.nbytes)
    if both.as_stored is None or any(_differing(*both.as_stored, readers, progress)):
        if left.nbytes > limit:
            raise LimitExceeded(
                f"a tensor of {left.nbytes} bytes in a file that is much smaller",
                option="--structure",
                hint="compares no values",
            )
        for start, one, other in _differing(left, right, readers, progress):
            load()
            for at in range(0, len(one), PART):
                part = differences(dtype, one[at : at + PART], other[at : at + PART], tolerance)
                total.add(part, (start + at) // dtype.itemsize)
    total.repeat(both.times)
    return total


def _differing(
    left: TensorInfo, right: TensorInfo, readers: Readers, progress: Callable[[int], None]
) -> Iterator[tuple[int, memoryview, memoryview]]:
    """Iterate over the blocks that differ, and where they start."""
    contiguous = all(is_contiguous(each.shape, each.stride) for each in (left, right))
    if not contiguous:
        load()
    size = BLOCK if contiguous else GATHER_BLOCK
    start = 0
    sides = (blocks(each, readers, size) for each in (left, right))
    for one, other in zip(*sides, strict=True):
        if not equal(one, other):
            yield start, one, other
        start += len(one)
        progress(2 * len(one))
