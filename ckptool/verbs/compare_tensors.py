"""Two tensors compared block by block: equal ones as bytes, others as numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

from ckptool.errors import LimitExceeded, Unsupported
from ckptool.files import fileio
from ckptool.files.blocks import blocks, equal
from ckptool.files.copying import Begin
from ckptool.files.fileio import Readers
from ckptool.records import dataclass
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.differences import differences, norm, rounded_differences
from ckptool.tensors.numbers import SLICE, load
from ckptool.tensors.statistics import is_counted
from ckptool.tensors.summaries import NO_TOLERANCE, NOWHERE, Tolerance, Values
from ckptool.tensors.tensor import (
    Packing,
    TensorInfo,
    is_contiguous,
    needs_swap,
    span,
    without_repeats,
)
from ckptool.text import readable

MAX_EXPANSION = 64  # bytes to compare for each byte of the files: views may repeat themselves
SMALL = 64 << 20  # below this, they may
BLOCK = 1 << 19  # two of them and what is computed of them: a few times that in memory
GATHER_BLOCK = 4 << 20  # rows of a transposed tensor are short: the more at once the better


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of one shape, and how they are compared.

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
    """Check how two tensors of one shape are stored.

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
    if left.dtype is not right.dtype:
        return None
    if left.stride != right.stride or left.lazy != right.lazy or swapped != other:
        return None
    count = span(left.shape, left.stride)
    if count > 2 * left.numel and left.dtype.bits >= 8:
        return None
    one, two = (replace(each, shape=(count,), stride=(1,)) for each in (left, right))
    return one, two


Sides = tuple[Checkpoint, Checkpoint]


def compare(
    pairs: Sequence[Pair], sides: Sides, progress: Begin, tolerance: Tolerance | None = None
) -> dict[tuple[object, ...], Values]:
    """Compare pairs of tensors, each pair of views once; return the results by `views`.

    How far two are is told of those that differ, or without a `tolerance` of all. Raises
    `LimitExceeded` for views that repeat themselves beyond measure.
    """
    distinct = {both.views: both for both in pairs}
    limit = _refuse_repeats([*distinct.values()], *sides)
    step = progress(2 * sum(both.nbytes for both in distinct.values()))
    with closing(Readers()) as readers:
        comparison = _Comparison(readers, step, limit, tolerance or NO_TOLERANCE, tolerance is None)
        return {views: comparison.compare(both) for views, both in distinct.items()}


def refuse_changed(sides: Sides) -> None:
    """Raise `Malformed` for a file that was written to since it was read."""
    for path, _ in (file for checkpoint in sides for file in checkpoint.files):
        fileio.refuse_changed(path)


def _refuse_repeats(pairs: Sequence[Pair], left: Checkpoint, right: Checkpoint) -> int:
    """Return how many bytes may be compared; raises `LimitExceeded` for views that repeat more."""
    limit = max(MAX_EXPANSION * (left.nbytes + right.nbytes), SMALL)
    work = sum(both.nbytes for both in pairs) + _inflated(pairs)
    if work > limit:
        raise LimitExceeded(
            f"{readable(work)} would be compared of files of {readable(left.nbytes)} "
            f"and {readable(right.nbytes)}",
            option="--structure",
            hint="compares no values, --select some",
        )
    return limit


def _inflated(pairs: Sequence[Pair]) -> int:
    """Count what deflated storages come to, each as often as it is taken up."""
    nbytes = 0
    for storages in ([both.left.storage for both in pairs], [both.right.storage for both in pairs]):
        for before, storage in zip([None, *storages], storages, strict=False):
            if storage.packing is Packing.DEFLATED and storage != before:
                nbytes += storage.nbytes
    return nbytes


@dataclass(frozen=True, slots=True)
class _Comparison:
    """How tensors are compared; with `measured` it is told of equal ones, too, how far they are."""

    readers: Readers
    progress: Callable[[int], None]
    limit: int
    tolerance: Tolerance
    measured: bool

    def compare(self, both: Pair) -> Values:
        """Compare two tensors; raises `LimitExceeded` for what repeats itself beyond measure.

        Of two dtypes, what differs is what does where one is rounded to the other's.
        """
        left, right = both.left, both.right
        total = Values(left.numel if left.dtype.bits >= 8 else left.nbytes)
        if both.as_stored is None or self.measured or any(self._unequal(*both.as_stored)):
            if left.nbytes > self.limit:
                raise LimitExceeded(
                    f"a tensor of {left.nbytes} bytes in a file that is much smaller",
                    option="--structure",
                    hint="compares no values",
                )
            alike = left.dtype is right.dtype
            total = self._differences(both, total) if alike else self._rounded(both)
        total.repeat(both.times)
        return total

    def _differences(self, both: Pair, total: Values) -> Values:
        """Compare two tensors of one dtype; how far they are takes the norm of what is equal, too.

        So the equal blocks before the first that differs are read again.
        """
        left, dtype, size = both.left, both.left.dtype, 0
        measured = self.measured or both.as_stored is not None or not is_counted(dtype)
        for start, one, other in self._paired(left, both.right):
            size = size or len(one)
            same = equal(one, other)
            if same and not measured:
                continue
            load()
            if not measured and start:
                before = islice(blocks(left, self.readers, size), start // size)
                total.distance = sum((norm(block, dtype) for block in before), NOWHERE)
            measured = True
            if same:
                total.distance += norm(one, dtype)
                continue
            for at in _slices(one, dtype.itemsize):
                part = differences(dtype, one[at], other[at], self.tolerance)
                total.add(part, (start + at.start) // dtype.itemsize)
        return total

    def _rounded(self, both: Pair) -> Values:
        """Compare two tensors of two dtypes: the one of more bits is rounded to the other's.

        Of two with as many, the way that fewer differ by counts.
        """
        dtypes = both.left.dtype, both.right.dtype
        few = min(each.bits for each in dtypes)
        ways = {onto: Values(both.left.numel) for onto in (0, 1) if dtypes[onto].bits == few}
        load()
        for start, *pair in self._paired(both.left, both.right):
            cuts = (_slices(*each) for each in zip(pair, (d.itemsize for d in dtypes), strict=True))
            for one, other in zip(*cuts, strict=True):
                first = (start + one.start) // dtypes[0].itemsize
                for onto, way in ways.items():
                    part = rounded_differences(pair[0][one], pair[1][other], dtypes, onto)
                    way.add(part, first)
        return min(ways.values(), key=lambda way: way.count)

    def _unequal(self, left: TensorInfo, right: TensorInfo) -> Iterator[bool]:
        """Tell of each block whether it differs."""
        return (not equal(one, other) for _, one, other in self._paired(left, right))

    def _paired(
        self, left: TensorInfo, right: TensorInfo
    ) -> Iterator[tuple[int, memoryview, memoryview]]:
        """Iterate over blocks of as many elements of both, and where the left's start."""
        contiguous = all(is_contiguous(each.shape, each.stride) for each in (left, right))
        if not contiguous:
            load()
        largest = max(left.dtype.itemsize, right.dtype.itemsize)
        count = (BLOCK if contiguous else GATHER_BLOCK) // largest
        sides = (blocks(each, self.readers, count * each.dtype.itemsize) for each in (left, right))
        start = 0
        for one, other in zip(*sides, strict=True):
            yield start, one, other
            start += len(one)
            self.progress(2 * len(one))


def _slices(block: memoryview, itemsize: int) -> Iterator[slice]:
    step = SLICE * itemsize
    return (slice(at, at + step) for at in range(0, len(block), step))
