"""How the values of two tensors differ: how many, where first, and how far apart.

Works on elements that lie contiguous and little-endian. A distance in ulp is that of two bit
patterns read as sign and magnitude. Layouts of the eight-bit floats: `torch/headeronly/util/`
(`Float8_*.h`).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import compress, count
from math import inf, isfinite, isnan, nan
from operator import ne, not_, sub
from typing import NamedTuple, TypeVar

from ckptool.tensors.dtype import DType


@dataclass(slots=True)
class Values:
    """What differs between two tensors, in elements (in bytes, of a dtype smaller than a byte).

    `count` of `of` differ by more than the tolerance, and `within` by no more; `first` is the
    index of the first that counts, in contiguous order. `max_abs` and `max_ulp` are of finite
    numbers (of complex ones, of their parts), None where no such differ. The rest counts numbers
    that differ in a way of their own: NaN against another NaN, NaN against a number, 0.0 against
    -0.0, an infinity against anything.
    """

    of: int
    count: int = 0
    within: int = 0
    first: int | None = None
    max_abs: float | None = None
    max_ulp: int | None = None
    nan_payloads: int = 0
    nan_one_side: int = 0
    zero_signs: int = 0
    infinities: int = 0

    def add(self, part: Values) -> None:
        """Count in a part of the same tensors, its `first` counted from the start of the whole."""
        if part.first is not None and (self.first is None or part.first < self.first):
            self.first = part.first
        self.max_abs = _larger(self.max_abs, part.max_abs)
        self.max_ulp = _larger(self.max_ulp, part.max_ulp)
        self.count += part.count
        self.within += part.within
        self.nan_payloads += part.nan_payloads
        self.nan_one_side += part.nan_one_side
        self.zero_signs += part.zero_signs
        self.infinities += part.infinities


_Number = TypeVar("_Number", int, float)


def _larger(one: _Number | None, other: _Number | None) -> _Number | None:
    return max((each for each in (one, other) if each is not None), default=None)


class Tolerance(NamedTuple):
    """What may differ and still be equal: `atol + rtol * |left|`, of floats and integers."""

    atol: float = 0.0
    rtol: float = 0.0

    @property
    def given(self) -> bool:
        """Tell whether it forgives anything."""
        return bool(self.atol or self.rtol)


NO_TOLERANCE = Tolerance()


class Numbers(NamedTuple):
    """How the elements of a dtype are numbers: `parts` of `width` bytes, each decoded as `code`.

    `code` is one of struct's, or the name of a float that struct has not; empty for bit patterns
    that are not compared as numbers.
    """

    code: str
    width: int
    parts: int = 1

    @property
    def is_float(self) -> bool:
        """Tell whether the parts are floats."""
        return self.code != "" and self.code not in "bBhHiIqQ"


_CODES = {
    **dict.fromkeys((DType.F64, DType.C128), "d"),
    **dict.fromkeys((DType.F32, DType.C64), "f"),
    **dict.fromkeys((DType.F16, DType.C32), "e"),
    **dict.fromkeys((DType.BF16, DType.BC32), "bfloat16"),
    DType.F8_E5M2FNUZ: "e5m2fnuz",
    DType.F8_E4M3FNUZ: "e4m3fnuz",
    DType.F8_E8M0: "e8m0",
    DType.F8_E4M3: "e4m3",
    DType.F8_E5M2: "e5m2",
    DType.U64: "Q",
    DType.I64: "q",
    DType.U32: "I",
    DType.I32: "i",
    DType.U16: "H",
    DType.I16: "h",
    DType.U8: "B",
    DType.I8: "b",
    # Of quantized tensors, the integers that are stored.
    DType.QI8: "b",
    DType.QU8: "B",
    DType.QI32: "i",
}
_COMPLEX = (DType.C128, DType.C64, DType.C32, DType.BC32)
_UNSIGNED = {1: "B", 2: "H", 4: "I", 8: "Q"}
_SIGNED = {1: "b", 2: "h", 4: "i", 8: "q"}


def numbers(dtype: DType) -> Numbers:
    """Say how the elements of a dtype are numbers."""
    parts = 2 if dtype in _COMPLEX else 1
    return Numbers(_CODES.get(dtype, ""), dtype.itemsize // parts, parts)


# Exponent bits, mantissa bits, bias; whether the highest exponent is for infinity and NaN.
_SMALL = {"e5m2": (5, 2, 15, True), "e4m3": (4, 3, 7, False)}
_NO_NEGATIVE_ZERO = {"e5m2fnuz": (5, 2, 16), "e4m3fnuz": (4, 3, 8)}


@cache
def eight_bit_floats(code: str) -> tuple[float, ...]:
    """Give the values of the 256 bit patterns of an eight-bit float."""
    if code == "e8m0":
        return (*(2.0 ** (pattern - 127) for pattern in range(255)), nan)
    if code in _NO_NEGATIVE_ZERO:
        values = [_float(pattern, *_NO_NEGATIVE_ZERO[code]) for pattern in range(256)]
        values[0x80] = nan
        return tuple(values)
    *layout, has_infinity = _SMALL[code]
    values = [_float(pattern, *layout) for pattern in range(256)]
    for sign, infinity in ((0, inf), (0x80, -inf)):
        if has_infinity:
            values[sign | 0x7C : sign | 0x7F] = [infinity, nan, nan]
        values[sign | 0x7F] = nan
    return tuple(values)


def _float(pattern: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    exponent = pattern >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = pattern & (1 << mantissa_bits) - 1
    if exponent:
        mantissa |= 1 << mantissa_bits
    size = mantissa * 2.0 ** (max(exponent, 1) - bias - mantissa_bits)
    return -size if pattern & 0x80 else size


def count_values(dtype: DType, left: bytes, right: bytes, tolerance: Tolerance) -> Values:
    """Count what differs between as many elements of two tensors of one dtype."""
    kind = numbers(dtype)
    found = Values(len(left) // (kind.width * kind.parts))
    code = _UNSIGNED[kind.width] if kind.code in ("", "e8m0") else _SIGNED[kind.width]
    bits = [_unpacked(code, data) for data in (left, right)]
    differs = list(map(ne, *bits))
    places = list(compress(count(), differs))
    beyond: list[bool] | None = None
    if kind.code:
        values = [_where(decoded(kind, data), differs, places) for data in (left, right)]
        if kind.is_float:
            patterns = [_where(each, differs, places) for each in bits]
            beyond = _compare_floats(found, values, patterns, kind.width, tolerance)
        else:
            beyond = _compare_integers(found, values, tolerance)
    _count_elements(found, places, beyond, kind.parts)
    return found


def _where(every: Sequence[_Number], differs: list[bool], places: list[int]) -> Sequence[_Number]:
    return every if len(places) == len(every) else list(compress(every, differs))


def _count_elements(
    found: Values, places: list[int], beyond: list[bool] | None, parts: int
) -> None:
    """Count elements of which a part differs; `beyond` tells which by too much, None for all."""
    far = places if beyond is None else list(compress(places, beyond))
    if parts > 1:
        places, far = (list(dict.fromkeys(at // parts for at in each)) for each in (places, far))
    found.count, found.within = len(far), len(places) - len(far)
    found.first = far[0] if far else None


def _unpacked(code: str, data: bytes | bytearray) -> tuple[int, ...]:
    return struct.unpack(f"<{len(data) // struct.calcsize(code)}{code}", data)


def decoded(kind: Numbers, data: bytes) -> Sequence[float]:
    """Give the numbers that the parts of elements stand for."""
    if kind.code == "bfloat16":  # the upper half of a float32
        wide = bytearray(2 * len(data))
        wide[2::4], wide[3::4] = data[::2], data[1::2]
        return _unpacked("f", wide)
    if len(kind.code) > 1:
        return list(map(eight_bit_floats(kind.code).__getitem__, data))
    return _unpacked(kind.code, data)


def _ordered(patterns: Iterable[int], width: int) -> list[int]:
    """Number floats as they follow each other: neighbours are one apart."""
    lowest = -1 << 8 * width - 1
    return [pattern if pattern >= 0 else lowest - pattern for pattern in patterns]


def _compare_floats(
    found: Values,
    values: Sequence[Sequence[float]],
    patterns: Sequence[Sequence[int]],
    width: int,
    tolerance: Tolerance,
) -> list[bool] | None:
    """Measure floats of which each pair differs; say which are beyond the tolerance."""
    left, right = values
    gaps = list(map(abs, map(sub, left, right)))
    beyond = [True] * len(left)
    finite: Iterable[int] = range(len(left))
    if not isfinite(sum(gaps)):
        kept = [isfinite(a) and isfinite(b) for a, b in zip(left, right, strict=True)]
        for place in compress(count(), map(not_, kept)):
            beyond[place] = _special(found, left[place], right[place], tolerance)
        finite = list(compress(count(), kept))
        left, gaps = list(compress(left, kept)), list(compress(gaps, kept))
        patterns = [list(compress(each, kept)) for each in patterns]
    zeros = gaps.count(0.0)
    found.zero_signs += zeros
    if len(gaps) > zeros:
        found.max_abs = max(gaps)
        found.max_ulp = max(map(abs, map(sub, *(_ordered(each, width) for each in patterns))))
    if not tolerance.given:
        return None
    for place, number, gap in zip(finite, left, gaps, strict=True):
        beyond[place] = gap > tolerance.atol + tolerance.rtol * abs(number)
    return beyond


def _special(found: Values, left: float, right: float, tolerance: Tolerance) -> bool:
    """Count a pair that is not finite; a tolerance makes all NaNs equal."""
    if isnan(left) and isnan(right):
        found.nan_payloads += 1
        return not tolerance.given
    if isnan(left) or isnan(right):
        found.nan_one_side += 1
    else:
        found.infinities += 1
    return True


def _compare_integers(
    found: Values, values: Sequence[Sequence[float]], tolerance: Tolerance
) -> list[bool] | None:
    gaps = list(map(abs, map(sub, *values)))
    found.max_abs = max(gaps, default=None)
    if not tolerance.given:
        return None
    return [
        float(gap) > tolerance.atol + tolerance.rtol * abs(float(number))
        for gap, number in zip(gaps, values[0], strict=True)
    ]
