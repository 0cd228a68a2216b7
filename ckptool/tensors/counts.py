"""What kernels count: losses of a cast, NaN and infinity; loads no numpy."""

from __future__ import annotations

from ckptool.records import dataclass


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
