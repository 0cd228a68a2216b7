"""Elements as numbers of Python, and what they are on the whole: numpy's arithmetic, in blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from struct import unpack
from typing import Any

from ckptool.tensors.dtype import PACKED, DType
from ckptool.tensors.numbers import (
    COMPLEX,
    FLOATS,
    SLICE,
    Block,
    bits_of,
    block_floats,
    dot,
    floats_of,
    part_of,
)
from ckptool.tensors.summaries import Cells, Statistics, packed

Number = int | float | complex | bool
CELLS, _SHIFT = 4096, 20  # of a histogram: sign, exponent and three more bits of single precision
_SIGNED = (DType.I64, DType.I32, DType.I16, DType.I8, DType.QI8, DType.QI32)


def is_counted(dtype: DType) -> bool:
    """Return whether elements are numbers, one each."""
    return dtype not in PACKED and dtype.bits >= 8


def elements(block: Block, dtype: DType) -> list[Number]:
    """Return elements as numbers of Python; the bits of a dtype that is no number, as integers."""
    values = _array(block, dtype)
    if dtype is DType.BOOL:
        return [*map(bool, values.tolist())]
    return [*(values.view("c16") if dtype in COMPLEX else values).tolist()]


def doubles(block: Block, dtype: DType) -> Any:
    """Return elements in double precision: a complex number is two, truth 0 or 1."""
    return _array(block, dtype).astype("f8", copy=False)


def _array(block: Block, dtype: DType) -> Any:
    """Return elements as integers, or as floats in double precision."""
    import numpy as np

    if dtype in FLOATS:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            return floats_of(bits_of(block, dtype), dtype)
    values = np.frombuffer(block, f"<{'i' if dtype in _SIGNED else 'u'}{dtype.itemsize}")
    return (values != 0).view("u1") if dtype is DType.BOOL else values


def statistics(block: Block, dtype: DType, *, cells: bool = False) -> Statistics:
    """Return what elements are on the whole, with `cells` a histogram too."""
    import numpy as np

    size = SLICE * dtype.itemsize
    slices = (block[start : start + size] for start in range(0, len(block), size))
    if dtype.itemsize == 1:
        counts = np.zeros(256, "i8")
        for part in slices:
            counts += np.bincount(np.frombuffer(part, "u1"), minlength=256)
        return _of_patterns(counts, dtype, cells)
    # numpy makes doubles of float16 in half the time that it needs for singles
    numbers = block_floats if dtype in FLOATS and part_of(dtype) is not DType.F16 else _array
    found = Statistics()
    with np.errstate(over="ignore", invalid="ignore"):  # squares of the largest doubles
        for part in slices:
            found += _of_slice(numbers(part, dtype), cells)
    return found


def _of_patterns(counts: Any, dtype: DType, cells: bool) -> Statistics:
    """Return what bytes are on the whole, of which there are so many of each."""
    import numpy as np

    held = np.nonzero(counts)[0].astype("u1")
    values, counts = _array(held.tobytes(), dtype), counts[held]
    finite = np.isfinite(values)
    nan, inf = (int(counts[odd].sum()) for odd in (np.isnan(values), np.isinf(values)))
    values, counts = values[finite], counts[finite]
    if not len(values):
        return Statistics(nan=nan, inf=inf)
    count = int(counts.sum())
    mean = float((counts * values.astype("f8")).sum()) / count
    apart = values - mean
    return Statistics(
        count=count,
        least=values.min().item(),
        largest=values.max().item(),
        mean=mean,
        squares=float((counts * apart * apart).sum()),
        zeros=int(counts[values == 0].sum()),
        nan=nan,
        inf=inf,
        cells=_cells(values, counts) if cells else packed({}),
    )


def _of_slice(values: Any, cells: bool) -> Statistics:
    """Return what integers or floats are on the whole: of singles, sums are of doubles."""
    import numpy as np

    exact = values.astype("f8") if values.dtype == "f4" else values
    total, nan, inf = float(exact.sum(dtype="f8")), 0, 0
    if not isfinite(total):
        nan = int(np.isnan(values).sum())
        finite = np.isfinite(values)
        values, exact = values[finite], exact[finite]
        inf = len(finite) - nan - len(values)
        total = float(exact.sum(dtype="f8"))
    if not len(values):
        return Statistics(nan=nan, inf=inf)
    mean = total / len(values)
    return Statistics(
        count=len(values),
        least=values.min().item(),
        largest=values.max().item(),
        mean=mean,
        squares=_squares(exact, total),
        zeros=int(np.count_nonzero(values == 0)),
        nan=nan,
        inf=inf,
        cells=_cells(values) if cells else packed({}),
    )


def _squares(values: Any, total: float) -> float:
    """Sum the squares of how far numbers are from their mean.

    Nothing is lost in the difference of two sums where it is not small, as of weights, whose mean
    is near zero.
    """
    mean = total / len(values)
    if values.dtype == "f8":
        squares = dot(values, values)
        if 2 * total * mean < squares:
            return squares - total * mean
    apart = values - mean
    return dot(apart, apart)


def _cells(values: Any, counts: Any = None) -> Cells:
    """Return a histogram of numbers, of each of which there are so many."""
    import numpy as np

    with np.errstate(over="ignore"):
        single = values.astype("f4")
    found = np.bincount(single.view("u4") >> _SHIFT, counts, CELLS)
    held = np.nonzero(found)[0]
    return packed(dict(zip(held.tolist(), found[held].tolist(), strict=True)))


def histogram(found: Statistics, count: int) -> list[int]:
    """Return how many finite elements are in each of `count` equal ranges, of least to largest."""
    import numpy as np

    if not found.cells[0]:
        return []
    middles = [sum(_edges(cell)) / 2 for cell in found.cells[0]]
    width = (float(found.largest) - float(found.least)) or 1.0
    places = (np.array(middles) - float(found.least)) / width * count
    weights = np.array(found.cells[1])
    return [
        *np.bincount(places.clip(0, count - 1).astype(int), weights, count).astype(int).tolist()
    ]


def quantiles(found: Statistics, shares: Sequence[float]) -> tuple[float, ...]:
    """Return below which numbers these shares of the finite elements are.

    They are as exact as the cells of the histogram are narrow, an eighth of a power of two.
    """
    import numpy as np

    if not found.cells[0]:
        return ()
    ordered = sorted((*_edges(cell), count) for cell, count in zip(*found.cells, strict=True))
    least, largest = float(found.least), float(found.largest)
    ends, below = [least], [0.0]
    for low, high, count in ordered:
        ends += [min(max(low, ends[-1]), largest), min(max(high, least), largest)]
        below += [below[-1], below[-1] + count]
    wanted = [share * below[-1] for share in shares]
    return (*np.interp(wanted, below, ends).tolist(),)


def _edges(cell: int) -> tuple[float, float]:
    """Return the ends of the range of numbers that a cell counts, the lesser first."""
    magnitude = cell % (CELLS // 2)
    first, end = (
        unpack("<f", (at << _SHIFT).to_bytes(4, "little"))[0] for at in (magnitude, magnitude + 1)
    )
    if not isfinite(end):  # beyond the largest of single precision
        end = first
    first = first if magnitude else 0.0
    return (-end, -first) if cell >= CELLS // 2 else (first, end)
