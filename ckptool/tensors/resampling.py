"""Kernels of interpolation and of other channels, in the single precision and the order of torch.

`F.interpolate(mode="bicubic", antialias=True)` is separable, the last dimension first. Its weights
and sums are as its compilers make them of aten/src/ATen/native/cpu/UpSampleKernel.cpp: products
are fused with sums, but for those that are computed four at a time. That is torch 2.14's and 2.15's
on x86-64 with AVX2 or AVX512; 2.6 fuses all, which makes another number of five terms or more.
"""

from __future__ import annotations

from math import ceil
from typing import Any

from ckptool.records import dataclass
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import Block, block_floats, mean, rounded

FOUR = 4  # products that are not fused: a vector of doubles
SUPPORT = 2.0  # of a cubic, on each side
A = -0.5  # Keys's, as PIL has it (UpSampleKernel.cpp, `HelperInterpCubic::aa_filter`)


def bicubic(size: int, wanted: int) -> list[tuple[int, tuple[float, ...]]]:
    """Return for each of `wanted` elements the first of `size` that it is made of, and weights."""
    import numpy as np

    one = np.float32
    scale = one(size) / one(wanted)
    support = one(SUPPORT * max(float(scale), 1.0))
    inverse = 1.0 / float(scale) if scale >= 1 else 1.0
    found = []
    for index in range(wanted):
        center = one(float(scale) * (index + 0.5))
        first = max(int(float(center - support) + 0.5), 0)
        count = min(int(float(center + support) + 0.5), size) - first
        count = min(count, ceil(support) * 2 + 1)
        gaps = (np.arange(first, first + count).astype("f4") - center).astype("f8") + 0.5
        weights = _cubic((gaps * float(one(inverse))).astype("f4"))
        total = one(0)
        for weight in weights:
            total += weight
        found.append((first, tuple(map(float, weights / total if total else weights))))
    return found


def _cubic(x: Any) -> Any:
    """Return the weights of a cubic at distances from its middle."""
    import numpy as np

    x, a = np.abs(x), np.full_like(x, A)
    near = _fused(_fused(a + 2, x, -(a + 3)) * x, x, np.ones_like(x))
    far = _fused(_fused(_fused(a, x, -5 * a), x, 8 * a), x, -4 * a)
    return np.where(x < 1, near, np.where(x < 2, far, np.float32(0)))


def _fused(one: Any, other: Any, added: Any) -> Any:
    """Return `one * other + added` rounded once, as a fused operation does it.

    A product of single precision is exact in double. The sum is rounded to odd there, so that it
    can be rounded again (Boldo, Melquiond: Emulation of a FMA and correctly rounded sums).
    """
    import numpy as np

    product, added = one.astype("f8") * other, added.astype("f8")
    total = product + added
    part = total - product
    lost = (product - (total - part)) + (added - part)
    bits = total.view("i8")
    step = np.where((lost > 0) == (total > 0), 1, -1)
    inexact = (lost < 0) | (lost > 0)  # which no NaN is
    bits += np.where(inexact & (bits & 1 == 0), step, 0)
    return total.astype("f4")


@dataclass(frozen=True, slots=True, eq=False)
class Interpolation:
    """Sum blocks of floats, a row of them after the other, times weights of columns and of rows.

    Doubles are summed in double precision.
    """

    rows: tuple[float, ...]
    columns: tuple[float, ...]
    dtype: DType

    def __call__(self, out: memoryview, *blocks: Block) -> None:
        """Fill a view with the sum of as many elements of each."""
        import numpy as np

        with np.errstate(all="ignore"):
            floats = [block_floats(block, self.dtype) for block in blocks]
            width = len(self.columns)
            starts = range(0, len(floats), width)
            across = [_weighted(floats[at : at + width], self.columns) for at in starts]
            out[:] = rounded(_weighted(across, self.rows), self.dtype)


def _weighted(floats: list[Any], weights: tuple[float, ...]) -> Any:
    """Return the sum of floats times a weight each, in the order of torch."""
    kind = floats[0].dtype.type
    total = floats[0] * kind(weights[0])
    apart = len(floats) if total.itemsize == 8 else (len(floats) - 1) // FOUR * FOUR + 1
    for at in range(1, len(floats)):
        weight = kind(weights[at])
        total = total + floats[at] * weight if at < apart else _fused(floats[at], weight, total)
    return total


@dataclass(frozen=True, slots=True, eq=False)
class Channels:
    """Sum blocks of floats of one dtype, one after the other, and scale the sum."""

    dtype: DType
    factor: float = 1.0

    def __call__(self, out: memoryview, *blocks: Block) -> None:
        """Fill a view with the sum of as many elements of each."""
        import numpy as np

        with np.errstate(all="ignore"):
            first, *others = (block_floats(block, self.dtype) for block in blocks)
            total = first + first.dtype.type(0) if others else first
            for floats in others:
                total = total + floats
            out[:] = rounded(total * first.dtype.type(self.factor), self.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Total:
    """Sum blocks of floats in double precision, scale the sum, and round it once to a dtype."""

    source: DType
    target: DType
    factor: float = 1.0

    def __call__(self, out: memoryview, *blocks: Block) -> None:
        """Fill a view with the sum of as many elements of each."""
        count = len(blocks)
        mean(out, blocks, [self.source] * count, [self.factor] * count, self.target)
