"""What kernels count: losses of a cast, NaN and infinity, differences; loads no numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, TypeVar


@dataclass(frozen=True, slots=True)
class Losses:
    """How many finite numbers become infinite in a cast, and how many others zero or subnormal.

    For a dtype without infinity, an infinite number is one of those that overflow.
    """

    overflow: int = 0
    zero: int = 0
    subnormal: int = 0

    def __add__(self, other: Losses) -> Losses:
        zero, subnormal = self.zero + other.zero, self.subnormal + other.subnormal
        return Losses(self.overflow + other.overflow, zero, subnormal)

    def times(self, count: int) -> Losses:
        """Return what so many repetitions lose."""
        return Losses(self.overflow * count, self.zero * count, self.subnormal * count)


@dataclass(frozen=True, slots=True)
class Tally:
    """How many numbers are NaN, and how many are infinite; a complex number is two."""

    nan: int = 0
    inf: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.nan + other.nan, self.inf + other.inf)

    def times(self, count: int) -> Tally:
        """Return what so many repetitions hold."""
        return Tally(self.nan * count, self.inf * count)


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

    def add(self, part: Values, start: int) -> None:
        """Count in a part of the same tensors, whose first element is `start` of the whole."""
        if part.first is not None and self.first is None:
            self.first = start + part.first
        self.max_abs = _larger(self.max_abs, part.max_abs)
        self.max_ulp = _larger(self.max_ulp, part.max_ulp)
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def repeat(self, times: int) -> None:
        """Count everything so many times."""
        self.of *= times
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) * times)


_COUNTS = ("count", "within", "nan_payloads", "nan_one_side", "zero_signs", "infinities")


_Number = TypeVar("_Number", int, float)


def _larger(one: _Number | None, other: _Number | None) -> _Number | None:
    return max((each for each in (one, other) if each is not None), default=None)


class Tolerance(NamedTuple):
    """What may differ and still be equal: `atol + rtol * |left|`, of floats and integers."""

    atol: float = 0.0
    rtol: float = 0.0

    @property
    def given(self) -> bool:
        """Check whether it forgives anything."""
        return bool(self.atol or self.rtol)


NO_TOLERANCE = Tolerance()
