"""How two blocks of elements differ: which, by how much, and how far they are on the whole."""

from __future__ import annotations

from math import isfinite
from typing import Any

from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import (
    COMPLEX,
    FLOATS,
    INTEGERS,
    ROUNDED,
    SLICE,
    Block,
    bits_of,
    dot,
    part_of,
    rounded,
)
from ckptool.tensors.statistics import doubles, is_counted
from ckptool.tensors.summaries import NOWHERE, Distance, Tolerance, Values


def differences(dtype: DType, left: Block, right: Block, tolerance: Tolerance) -> Values:
    """Count what differs between as many elements of two tensors of one dtype.

    A distance in ulp is that of two bit patterns read as sign and magnitude.
    """
    import numpy as np

    found = Values(len(left) // dtype.itemsize)
    one, other = bits_of(left, dtype), bits_of(right, dtype)
    differs = far = one != other
    if not differs.any():
        found.distance = norm(left, dtype)
        return found
    with np.errstate(over="ignore", invalid="ignore"):  # signalling NaNs, infinite tolerances
        if is_counted(dtype):
            numbers = doubles(left, dtype), doubles(right, dtype)
            apart = numbers[0] - numbers[1]
            found.distance = _distance(*numbers, apart)
        if dtype in FLOATS:
            gaps = np.abs(apart, out=apart)
            measured = _compare_floats(found, differs, *numbers, gaps)
            if found.max_abs is not None:
                steps = _distances(_ordered(one, dtype), _ordered(other, dtype))
                found.max_ulp = int(steps.max(where=measured, initial=0))
            if tolerance.given:
                far = gaps > tolerance.atol + tolerance.rtol * np.abs(numbers[0])
                far |= ~(measured | (np.isnan(numbers[0]) & np.isnan(numbers[1])))
                far &= differs
        elif part_of(dtype) in INTEGERS:
            name = part_of(dtype).torch_name
            steps = _distances(one.view(name), other.view(name))
            found.max_abs = int(steps.max())
            if tolerance.given:
                far = steps > tolerance.atol + tolerance.rtol * np.abs(numbers[0])
    if dtype in COMPLEX:
        differs, far = (each.reshape(-1, 2).any(axis=1) for each in (differs, far))
    found.count = int(np.count_nonzero(far))
    found.within = int(np.count_nonzero(differs)) - found.count
    found.first = int(far.argmax()) if found.count else None
    return found


def _compare_floats(found: Values, differs: Any, left: Any, right: Any, gaps: Any) -> Any:
    """Measure floats, and count those that differ in a way of their own; say which are finite."""
    import numpy as np

    most, finite = float(gaps.max()), True
    if not isfinite(most):
        finite = np.isfinite(left) & np.isfinite(right)
        nan_left, nan_right = (np.isnan(each) & differs for each in (left, right))
        found.nan_payloads = int(np.count_nonzero(nan_left & nan_right))
        found.nan_one_side = int(np.count_nonzero(nan_left ^ nan_right))
        found.infinities = int(np.count_nonzero(differs & ~finite))
        found.infinities -= found.nan_payloads + found.nan_one_side
        most = float(gaps.max(where=finite, initial=0))
    found.zero_signs = int(np.count_nonzero((gaps == 0) & differs))
    found.max_abs = most or None
    return finite


def _ordered(bits: Any, dtype: DType) -> Any:
    """Number floats as they follow each other: neighbours are one apart, and zeros equal."""
    if dtype is DType.F8_E8M0:  # no sign
        return bits
    signed = bits.view(f"i{bits.itemsize}")
    sign = signed >> 8 * bits.itemsize - 1  # -1 for a negative number, 0 for others
    numbered = sign & ((1 << 8 * bits.itemsize - 1) - 1)
    numbered ^= signed
    numbered -= sign
    return numbered


def _distances(left: Any, right: Any) -> Any:
    """Return the distances of integers, which as unsigned ones take no more bits than they do."""
    import numpy as np

    return (np.maximum(left, right) - np.minimum(left, right)).view(f"u{left.itemsize}")


# How far numbers are on the whole.


def norm(block: Block, dtype: DType) -> Distance:
    """Return how far elements are from themselves; nothing of a dtype that is no number."""
    import numpy as np

    found, size = NOWHERE, SLICE * dtype.itemsize
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(block) if is_counted(dtype) else 0, size):
            values = doubles(block[start : start + size], dtype)
            squares = dot(values, values)
            if not isfinite(squares):
                values, _ = _finite(values, values)
                squares = dot(values, values)
            found += Distance(len(values), squares, squares, squares)
    return found


def _distance(left: Any, right: Any, apart: Any) -> Distance:
    """Sum what a distance is made of, over the numbers that are finite on both sides."""
    squares = dot(apart, apart)
    if not isfinite(squares):
        left, right = _finite(left, right)
        apart = left - right
        squares = dot(apart, apart)
    return Distance(len(left), dot(left, left), dot(right, right), dot(left, right), squares)


def _finite(left: Any, right: Any) -> tuple[Any, Any]:
    import numpy as np

    finite = np.isfinite(left) & np.isfinite(right)
    return left[finite], right[finite]


def comparable(left: DType, right: DType) -> bool:
    """Return whether numbers of two dtypes can be compared: scales are not known here."""
    kinds = [(each in COMPLEX, is_counted(each), each.quantized) for each in (left, right)]
    return kinds[0] == kinds[1] == (left in COMPLEX, True, False)


def rounded_differences(
    left: Block, right: Block, dtypes: tuple[DType, DType], onto: int
) -> Values:
    """Count what differs where the numbers of one side are rounded to the dtype of the other.

    `onto` is the other: 0 for the left. A NaN is any NaN. The distance, and the largest difference,
    are those of what is not rounded.
    """
    import numpy as np

    blocks, dtype = (left, right), dtypes[onto]
    with np.errstate(all="ignore"):
        sides = [doubles(*pair) for pair in zip(blocks, dtypes, strict=True)]
        apart = sides[0] - sides[1]
        distance = _distance(sides[0], sides[1], apart)
        gaps = np.abs(apart, out=apart)
        if part_of(dtype) in ROUNDED:
            made = rounded(sides[1 - onto], part_of(dtype))
            differs = bits_of(made, dtype) != bits_of(blocks[onto], dtype)
        else:
            differs = sides[0] != sides[1]
        most = float(gaps.max())
        if not isfinite(most):
            most = float(gaps.max(where=np.isfinite(gaps), initial=0))
            differs &= ~(np.isnan(sides[0]) & np.isnan(sides[1]))
    if dtype in COMPLEX:
        differs = differs.reshape(-1, 2).any(axis=1)
    count = int(np.count_nonzero(differs))
    first = int(differs.argmax()) if count else None
    return Values(len(differs), count, first=first, max_abs=most or None, distance=distance)
