"""What `compare_values` counts, sooner: numpy, where it is installed, for all that differs much."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from ckptool.tensors.dtype import DType
from ckptool.verbs.compare_values import Numbers, Tolerance, Values, eight_bit_floats, numbers


def available() -> bool:
    """Tell whether numpy is installed."""
    return find_spec("numpy") is not None


def count_values(dtype: DType, left: bytes, right: bytes, tolerance: Tolerance) -> Values:
    """Count what differs between as many elements of two tensors of one dtype."""
    import numpy as np

    kind = numbers(dtype)
    found = Values(len(left) // (kind.width * kind.parts))
    one, other = (np.frombuffer(data, f"<u{kind.width}") for data in (left, right))
    places = np.flatnonzero(one != other)
    one, other = one[places], other[places]
    beyond = np.ones(len(places), bool)
    with np.errstate(over="ignore", invalid="ignore"):  # signalling NaNs, infinite tolerances
        if kind.is_float:
            beyond = _compare_floats(found, kind, one, other, tolerance)
        elif kind.code and len(places):
            beyond = _compare_integers(found, kind, one, other, tolerance)
    elements, far = (_elements(each, kind.parts) for each in (places, places[beyond]))
    found.count, found.within = len(far), len(elements) - len(far)
    found.first = int(far[0]) if len(far) else None
    return found


def _elements(places: Any, parts: int) -> Any:
    """Give the elements that parts in ascending order belong to, each once."""
    import numpy as np

    return places if parts == 1 else np.unique(places // parts)


def _compare_floats(
    found: Values, kind: Numbers, one: Any, other: Any, tolerance: Tolerance
) -> Any:
    import numpy as np

    with np.errstate(invalid="ignore"):  # signalling NaNs, of which there are many in raw bytes
        left, right = _floats(kind, one), _floats(kind, other)
    nan_left, nan_right = np.isnan(left), np.isnan(right)
    finite = np.isfinite(left) & np.isfinite(right)
    found.nan_payloads = int((nan_left & nan_right).sum())
    found.nan_one_side = int((nan_left ^ nan_right).sum())
    found.infinities = int((~finite).sum()) - found.nan_payloads - found.nan_one_side
    gaps = np.abs(left - right)
    unequal = finite & (gaps != 0)
    found.zero_signs = int(finite.sum()) - int(unequal.sum())
    if unequal.any():
        found.max_abs = float(gaps[unequal].max())
        found.max_ulp = _distance(_ordered(kind, one[unequal]), _ordered(kind, other[unequal]))
    if not tolerance.given:
        return np.ones(len(one), bool)
    far = gaps > tolerance.atol + tolerance.rtol * np.abs(left)
    return np.where(finite, far, ~(nan_left & nan_right))


def _floats(kind: Numbers, bits: Any) -> Any:
    """Give the numbers that bit patterns stand for, in double precision, which holds all."""
    import numpy as np

    if kind.code == "bfloat16":  # the upper half of a float32
        return (bits.astype("<u4") << 16).view("<f4").astype("<f8")
    if len(kind.code) > 1:
        return np.array(eight_bit_floats(kind.code))[bits]
    return bits.view(f"<f{kind.width}").astype("<f8")


def _ordered(kind: Numbers, bits: Any) -> Any:
    """Number floats as they follow each other: neighbours are one apart."""
    import numpy as np

    if kind.code == "e8m0":  # no sign
        return bits.astype("<i8")
    signed = bits.view(f"<i{kind.width}").astype("<i8")
    return np.where(signed >= 0, signed, (-1 << 8 * kind.width - 1) - signed)


def _distance(left: Any, right: Any) -> int:
    """Give the largest distance of integers, which may take one bit more than they do."""
    return int(_gaps(left, right).max())


def _gaps(left: Any, right: Any) -> Any:
    import numpy as np

    one, other = left.view("<u8"), right.view("<u8")
    return np.where(left >= right, one - other, other - one)


def _compare_integers(
    found: Values, kind: Numbers, one: Any, other: Any, tolerance: Tolerance
) -> Any:
    import numpy as np

    signed = kind.code.islower()
    wide = "<i8" if signed else "<u8"
    left, right = (
        bits.view(f"<{'iu'[not signed]}{kind.width}").astype(wide) for bits in (one, other)
    )
    gaps = _gaps(left, right)
    found.max_abs = int(gaps.max())
    if not tolerance.given:
        return np.ones(len(one), bool)
    bound = tolerance.atol + tolerance.rtol * np.abs(left.astype("<f8"))
    return gaps.astype("<f8") > bound
