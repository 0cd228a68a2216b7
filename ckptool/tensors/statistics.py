"""Elements as numbers of Python, and what they are on the whole: numpy's arithmetic, in blocks."""

from __future__ import annotations

from math import isfinite
from typing import Any

from ckptool.tensors.counts import Statistics
from ckptool.tensors.dtype import PACKED, DType
from ckptool.tensors.numbers import COMPLEX, FLOATS, SLICE, Block, bits_of, dot, floats_of

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
    found, size = Statistics(), SLICE * dtype.itemsize
    for start in range(0, len(block), size):
        found += _of_slice(_array(block[start : start + size], dtype), cells)
    return found


def _of_slice(values: Any, cells: bool) -> Statistics:
    import numpy as np

    total, nan, inf = float(values.sum(dtype="f8")), 0, 0
    if not isfinite(total):
        nan = int(np.isnan(values).sum())
        finite = values[np.isfinite(values)]
        inf, values = len(values) - nan - len(finite), finite
        total = float(values.sum(dtype="f8"))
    if not len(values):
        return Statistics(nan=nan, inf=inf)
    mean = total / len(values)
    apart = values - mean
    return Statistics(
        count=len(values),
        least=values.min().item(),
        largest=values.max().item(),
        mean=mean,
        squares=dot(apart, apart),
        zeros=int(np.count_nonzero(values == 0)),
        nan=nan,
        inf=inf,
        cells=_cells(values) if cells else None,
    )


def _cells(values: Any) -> Any:
    import numpy as np

    with np.errstate(over="ignore"):
        single = values.astype("f4")
    return np.bincount(single.view("u4") >> _SHIFT, minlength=CELLS)


def histogram(found: Statistics, count: int) -> list[int]:
    """Return how many finite elements are in each of `count` equal ranges, of least to largest."""
    import numpy as np

    if found.cells is None or not found.count:
        return []
    cells = np.nonzero(found.cells)[0]
    middles = ((cells.astype("u4") << _SHIFT) + (1 << _SHIFT - 1)).view("f4").astype("f8")
    middles[(cells & 0x7FF) == 0] = 0.0  # zero and the smallest
    width = (float(found.largest) - float(found.least)) or 1.0
    places = ((middles - float(found.least)) / width * count).clip(0, count - 1).astype(int)
    return [*np.bincount(places, found.cells[cells], count).astype(int).tolist()]
