"""Kernels over blocks of elements: casts, means, what is not finite, byte order and sign.

A block holds whole elements, contiguous and little-endian unless said otherwise. The arithmetic is
numpy's and ml_dtypes', which load only where there are numbers to compute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from math import fsum
from typing import Any

from ckptool.tensors.counts import Losses, Tally
from ckptool.tensors.dtype import DType

Block = bytes | bytearray | memoryview  # of bytes
Box = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride, offset; in elements

# The dtype of the parts of a complex number, and of the integers that a quantized tensor stores.
_PARTS = {
    DType.C128: DType.F64,
    DType.C64: DType.F32,
    DType.C32: DType.F16,
    DType.BC32: DType.BF16,
    DType.QI8: DType.I8,
    DType.QU8: DType.U8,
    DType.QI32: DType.I32,
}
COMPLEX = (DType.C128, DType.C64, DType.C32, DType.BC32)
# Which bit patterns of a float are not finite: those that equal the second number under the mask.
# An exponent of ones alone (IEEE 754, bfloat16), or the few NaNs of torch/headeronly/util/Float8_*.
_NOT_FINITE = {
    DType.F64: (0x7FF0_0000_0000_0000, 0x7FF0_0000_0000_0000),
    DType.F32: (0x7F80_0000, 0x7F80_0000),
    DType.BF16: (0x7F80, 0x7F80),
    DType.F16: (0x7C00, 0x7C00),
    DType.F8_E5M2: (0x7C, 0x7C),
    DType.F8_E4M3: (0x7F, 0x7F),
    DType.F8_E8M0: (0xFF, 0xFF),
    DType.F8_E4M3FNUZ: (0xFF, 0x80),
    DType.F8_E5M2FNUZ: (0xFF, 0x80),
}
INTEGERS = {dtype for dtype in DType if dtype.torch_name.removeprefix("u").startswith("int")}
ROOM, ROOM_OF_A_CORE = 64 << 20, 40 << 20  # what loading numpy takes of the address space
LINE = 64  # bytes of a line of the cache
LARGEST = 8 << 20  # what glibc keeps for the next block, and twice as much in all
FLOATS = frozenset(dtype for dtype in DType if _PARTS.get(dtype, dtype) in _NOT_FINITE)
REAL_FLOATS = FLOATS.difference(COMPLEX)
ROUNDED = REAL_FLOATS - {DType.F8_E8M0}  # that has neither zero nor sign: it holds scales
CASTS = (DType.BF16, DType.F16, DType.F32, DType.F64, DType.F8_E4M3, DType.F8_E5M2)


def load() -> None:
    """Load numpy; raises `OSError` where memory is too short for it.

    OpenBLAS, which comes with it, then ends the process, and whatever was begun stays behind
    (memory.c there: "Memory allocation still failed after 10 retries, giving up"). Blocks are
    allocated and freed all the time: glibc gives them back to the system, and clears their pages
    anew, unless a larger one was freed before (malloc.c: "dynamic mmap threshold").
    """
    if "numpy" not in sys.modules:
        from mmap import mmap

        mmap(-1, ROOM + (os.cpu_count() or 1) * ROOM_OF_A_CORE).close()
    import numpy as np

    np.empty(LARGEST, "u1")


def allocated(nbytes: int) -> memoryview:
    """Allocate memory; for much of it, numpy asks for large pages.

    It begins with a line of the cache: the kernel takes up to twice as long to copy elsewhere.
    """
    import numpy as np

    memory = np.empty(nbytes + LINE, "u1")
    start = -memory.__array_interface__["data"][0] % LINE
    return memory[start : start + nbytes].data


def array(memory: memoryview | bytearray, box: Box, itemsize: int) -> Any:
    """Return the elements of a box in memory as an array of any dtype of that size."""
    import numpy as np

    dtype = np.dtype(f"u{itemsize}" if itemsize <= 8 else f"c{itemsize}")
    shape, stride, offset = box
    steps = [step * itemsize for step in stride]
    return np.ndarray(shape, dtype, memory, offset * itemsize, steps)


def part_of(dtype: DType) -> DType:
    """Return the dtype of the parts of complex numbers, or of the integers of quantized ones."""
    return _PARTS.get(dtype, dtype)


def bits_of(block: Block, dtype: DType) -> Any:
    """Return the bit patterns of numbers, those of the parts of complex ones, as integers."""
    import numpy as np

    return np.frombuffer(block, f"<u{part_of(dtype).itemsize}")


@cache
def _kind(dtype: DType) -> Any:
    """Return the dtype of numpy or ml_dtypes for a real float."""
    import numpy as np

    if dtype in (DType.F64, DType.F32, DType.F16):
        return np.dtype(f"<f{dtype.itemsize}")
    import ml_dtypes

    return np.dtype(getattr(ml_dtypes, dtype.torch_name))


def _widened(bits: Any, dtype: DType) -> Any:
    """Return the floats that bit patterns stand for: in double precision F64, in single others."""
    import numpy as np

    dtype = part_of(dtype)
    kind = _kind(dtype)
    if dtype.itemsize == 1:
        return np.arange(256, dtype="u1").view(kind).astype("f4")[bits]
    floats = bits.view(kind)
    return floats if dtype is DType.F64 else floats.astype("f4", copy=False)


def block_floats(block: Block, dtype: DType) -> Any:
    """Return the real floats of a block: in double precision F64, in single others."""
    return _widened(bits_of(block, dtype), dtype)


def floats_of(bits: Any, dtype: DType) -> Any:
    """Return the floats that bit patterns stand for, in double precision, which holds all."""
    import numpy as np

    part = part_of(dtype)
    if part.itemsize == 1:
        return np.arange(256, dtype="u1").view(_kind(part)).astype("f8")[bits]
    return bits.view(_kind(part)).astype("f8")


def rounded(floats: Any, dtype: DType) -> memoryview:
    """Return floats in double or single precision as the bytes of a dtype, rounded once to even.

    What is beyond the largest number becomes infinite, or NaN where there is no infinity.
    """
    import numpy as np

    made = np.empty_like(floats, _kind(dtype))
    _round_into(made, floats, dtype)
    return memoryview(made.view("u1"))


def _round_into(made: Any, floats: Any, dtype: DType) -> None:
    """Round floats into an array of a dtype."""
    import numpy as np

    if floats.itemsize == 8 and dtype.itemsize < 4:
        floats = _to_odd(floats)
    np.copyto(made, floats, casting="unsafe")


def _to_odd(floats: Any) -> Any:
    """Return doubles in single precision: of two neighbours of a double, the one that is odd.

    Rounded to nearest in two bits less, that is what the double itself would be (Boldo, Melquiond:
    Emulation of a FMA and correctly rounded sums). ml_dtypes and torch round a double to nearest
    twice (ml_dtypes/include/float8.h, torch/headeronly/util/BFloat16.h).
    """
    single = floats.astype("f4")
    bits = single.view("u4")
    gaps = single.astype("f8").view("i8") - floats.view("i8")  # of magnitudes: signs are equal
    bits -= gaps > 0
    bits |= gaps != 0
    return single


# Values made from others: kernels over blocks of as many elements.


def cast(out: Block, block: Block, source: DType, target: DType, *, clamp: bool = False) -> Losses:
    """Round real floats of one dtype to another, and count what becomes another kind of number.

    With `clamp`, what overflows becomes the largest finite number.
    """
    import numpy as np

    edges, bits = _edges(source, target), bits_of(out, target)
    with np.errstate(all="ignore"):
        floats = block_floats(block, source)
        _round_into(bits.view(_kind(target)), floats, target)
        if edges is None:
            return Losses()
        top, bottom = edges
        sign = 1 << 8 * bits.itemsize - 1
        largest, least = _sizes(bits, sign)
        overflow = zero = small = 0
        if largest > top:
            finite = ~np.isnan(floats) if target is DType.F8_E4M3 else np.isfinite(floats)
            signs = bits & bits.dtype.type(sign)
            beyond = (bits ^ signs > top) & finite
            overflow = int(np.count_nonzero(beyond))
            if clamp:
                bits[beyond] = signs[beyond] | bits.dtype.type(top)
        if least < max(bottom, 1):
            sizes = bits & bits.dtype.type(sign - 1)
            zero = int(np.count_nonzero(sizes == 0) - np.count_nonzero(floats == 0))
            if bottom:
                normal = np.abs(floats) >= _least(source)
                small = int(np.count_nonzero((sizes < bottom) & (sizes > 0) & normal))
    return Losses(overflow, zero, small)


def _sizes(bits: Any, sign: int) -> tuple[int, int]:
    """Return the largest and the least of the patterns of numbers without their sign.

    Of negative ones, as unsigned integers they are above the sign, as signed ones above minus it.
    """
    import numpy as np

    if not len(bits):
        return 0, sign
    signed, most, least = bits.view(f"<i{bits.itemsize}"), np.maximum.reduce, np.minimum.reduce
    largest = max(int(most(signed)), int(most(bits)) - sign)
    return largest, min(int(least(bits)), int(least(signed)) + sign)


@cache
def _edges(source: DType, target: DType) -> tuple[int, int] | None:
    """Return the patterns of the largest number and the least normal one that a cast makes.

    None where the target holds all of the source; the second is 0 where it has its normal numbers.
    """
    import numpy as np

    edges = np.array([largest(target), _least(target)])
    held = _least(target) <= _least(source)
    if held and largest(target) >= largest(source):
        return None
    top, bottom = map(int, bits_of(rounded(edges, target), target))
    return top, 0 if held else bottom


def largest(dtype: DType) -> float:
    """Return the largest finite number of a real float."""
    return float(_about(dtype).max)


def _least(dtype: DType) -> float:
    """Return the least number of a real float that is not subnormal."""
    return float(_about(dtype).smallest_normal)


def _about(dtype: DType) -> Any:
    """Return what numpy and ml_dtypes say of the numbers of a real float."""
    import ml_dtypes

    finfo: Any = ml_dtypes.finfo
    return finfo(_kind(dtype))


SLICE = 1 << 17  # numbers that are computed at once: more outgrow the cache, fewer are more calls
_PRODUCTS = 8192  # OpenBLAS starts threads for more than 10 000 (kernel/x86_64/ddot.c)


def dot(one: Any, other: Any) -> float:
    """Sum the products of doubles."""
    parts = (slice(at, at + _PRODUCTS) for at in range(0, len(one), _PRODUCTS))
    return sum(float(one[part].dot(other[part])) for part in parts)


def mean(
    out: Block,
    blocks: Sequence[Block],
    dtypes: Sequence[DType],
    weights: Sequence[float],
    target: DType,
) -> int:
    """Sum weighted floats in double precision, in their order, and round the sum to a dtype.

    What has the same bits in all stays as it is where the weights sum to 1. Returns how many finite
    numbers made another than that.
    """
    import numpy as np

    part = part_of(target)
    bits = [bits_of(*pair) for pair in zip(blocks, dtypes, strict=True)]
    made = bits_of(out, part)
    room = np.empty((2, min(SLICE, len(made))))
    kept = sums_to_one(weights) and {*dtypes} == {target}
    # arithmetic makes 0.0 of -0.0 - -0.0
    inexact = kept and (part is DType.F64 or min(weights) < 0)
    mask, pattern = map(made.dtype.type, _NOT_FINITE[part])
    overflow = 0
    with np.errstate(all="ignore"):
        for start in range(0, len(made), SLICE):
            here = slice(start, start + SLICE)
            parts, summed = [each[here] for each in bits], made[here]
            total = _sum(parts, dtypes, weights, room[:, : len(summed)])
            _round_into(summed.view(_kind(part)), total, part)
            masked = summed & mask
            if not inexact and mask == pattern and masked.max() < mask:
                continue  # all are finite, as of nearly all slices
            odd = masked == pattern
            if kept and (inexact or odd.any()):
                same = np.logical_and.reduce([parts[0] == each for each in parts])
                np.copyto(summed, parts[0], where=same)
                odd &= ~same
            if odd.any():
                pairs = zip(parts, dtypes, strict=True)
                finite = [np.isfinite(_widened(*pair)) for pair in pairs]
                overflow += int(np.count_nonzero(odd & np.logical_and.reduce(finite)))
    return overflow


def _sum(parts: Sequence[Any], dtypes: Sequence[DType], weights: Sequence[float], room: Any) -> Any:
    """Return the sum of weighted floats, in the first of two rows of doubles."""
    import numpy as np

    total, further = room
    for number, (bits, dtype, weight) in enumerate(zip(parts, dtypes, weights, strict=True)):
        floats = further if number else total
        np.copyto(floats, _widened(bits, dtype))
        floats *= weight
        if number:
            total += floats
    return total


def sums_to_one(weights: Sequence[float]) -> bool:
    """Check whether weights sum to 1, but for what rounding makes of 1/3."""
    return abs(fsum(weights) - 1) <= 2**-52


# NaN and infinity.


def tally(block: Block, dtype: DType) -> Tally:
    """Count NaN and infinity in elements of one of `FLOATS`."""
    import numpy as np

    mask, pattern = _NOT_FINITE[part_of(dtype)]
    bits = bits_of(block, dtype)
    masked = bits & bits.dtype.type(mask)
    if mask == pattern and masked.max(initial=0) < mask:  # the quick way out of nearly all blocks
        return Tally()
    with np.errstate(invalid="ignore"):  # signalling NaNs
        values = floats_of(bits[masked == pattern], dtype)
    nan = int(np.isnan(values).sum())
    return Tally(nan, len(values) - nan)


# Byte order and sign, changed in place.

# What torch negates by its sign and conjugates (aten/src/ATen/native/cpu/UnaryOpsKernel.cpp).
_SIGNED = {DType.F64, DType.F32, DType.BF16, DType.F16, DType.C128, DType.C64, DType.C32}
_NEGATED = _SIGNED | {DType.I64, DType.I32, DType.I16, DType.I8, DType.U8}


def _integers(block: Block, dtype: DType) -> Any:
    import numpy as np

    return np.frombuffer(block, f"<i{dtype.itemsize}")


def are_within(block: Block, dtype: DType, end: int) -> bool:
    """Check that signed integers are from 0 on and before `end`."""
    values = _integers(block, dtype)
    return bool(values.min() >= 0 and values.max() < end)


def ascends(
    block: Block, dtype: DType, before: tuple[int, int], width: int, count: int, most: int
) -> tuple[int, int] | None:
    """Check that rows of `width` integers go from 0 to `count` in steps of 0 to `most`.

    A block goes on where the one `before` ended: the place in its row, and the last integer.
    Returns the same for the next, None for integers that do something else.
    """
    import numpy as np

    values = _integers(block, dtype).astype(np.int64)
    places = (np.arange(len(values)) + before[0]) % width
    steps = np.diff(values, prepend=before[1])
    steps[places == 0] = 0
    sound = (values >= 0) & (values <= count) & (steps >= 0) & (steps <= most)
    sound &= (places > 0) | (values == 0)
    sound &= (places < width - 1) | (values == count)
    return ((int(places[-1]) + 1) % width, int(values[-1])) if sound.all() else None


def lie_within(sizes: Block, strides: Block, offsets: Block, end: int) -> bool:
    """Check that views lie before the element `end`: a row of sizes and of strides for each."""
    import numpy as np

    starts = _integers(offsets, DType.I64).astype(np.float64)  # which do not wrap
    shape = (len(starts), -1)
    sides = _integers(sizes, DType.I64).astype(np.float64).reshape(shape)
    steps = _integers(strides, DType.I64).astype(np.float64).reshape(shape)
    last = starts + ((sides - 1) * steps).sum(axis=1)
    sound = (sides >= 0).all() and (steps >= 0).all() and (starts >= 0).all()
    return bool(sound and ((last < end) | (sides == 0).any(axis=1)).all())


def can_resolve(dtype: DType, pending: frozenset[str]) -> bool:
    """Check whether torch could do the pending operations of a tensor of this dtype."""
    conjugated = "conj" not in pending or (dtype in COMPLEX and dtype in _SIGNED)
    return conjugated and ("neg" not in pending or dtype in _NEGATED)


def swap(block: bytearray | memoryview, width: int) -> None:
    """Reverse the bytes of every number of `width` bytes."""
    import numpy as np

    np.frombuffer(block, f"u{width}").byteswap(inplace=True)


def resolve(block: bytearray | memoryview, dtype: DType, pending: frozenset[str]) -> None:
    """Do torch's pending conjugation and negation."""
    import numpy as np

    bits = bits_of(block, dtype)
    sign = bits.dtype.type(1 << 8 * bits.itemsize - 1)
    if "neg" in pending and dtype in _SIGNED:
        bits ^= sign
    elif "neg" in pending:
        np.negative(bits, out=bits)
    if "conj" in pending:
        bits[1::2] ^= sign
