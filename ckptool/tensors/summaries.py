"""What numbers are on the whole, and how two tensors differ; loads no numpy."""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from dataclasses import field
from math import inf, isfinite, sqrt
from typing import TypeVar

from ckptool.records import NamedTuple, dataclass

Cells = tuple["array[int]", "array[float]"]  # their numbers, and how many are in each


@dataclass(frozen=True, slots=True)
class Statistics:
    """What numbers are on the whole: the finite ones, of which there are `count`.

    `squares` is the sum of the squared distances from their `mean`. `cells` is a histogram of their
    signs, exponents and three more bits; a complex number is two.
    """

    count: int = 0
    least: float = inf
    largest: float = -inf
    mean: float = 0.0
    squares: float = 0.0
    zeros: int = 0
    nan: int = 0
    inf: int = 0
    cells: Cells = field(default_factory=lambda: packed({}))

    @property
    def std(self) -> float:
        """Return the standard deviation, without a correction for the mean of a sample."""
        return sqrt(self.squares / self.count)

    @property
    def numbers(self) -> dict[str, float | None]:
        """Return what JSON has of them: None where there are none, or doubles are too small."""
        if not self.count:
            return dict.fromkeys(("min", "max", "mean", "std"))
        found = {"min": self.least, "max": self.largest, "mean": self.mean, "std": self.std}
        return {name: each if isfinite(each) else None for name, each in found.items()}

    @property
    def absmax(self) -> float:
        """Return the largest magnitude."""
        return max(abs(self.least), abs(self.largest))

    def __add__(self, other: Statistics) -> Statistics:
        """Join two parts (Chan, Golub, LeVeque: Updating Formulae and a Pairwise Algorithm)."""
        count = self.count + other.count
        apart, share = other.mean - self.mean, other.count / count if count else 0.0
        between = apart * apart * self.count * share
        return Statistics(
            count,
            min(self.least, other.least),
            max(self.largest, other.largest),
            self.mean + apart * share,
            self.squares + other.squares + between,
            self.zeros + other.zeros,
            self.nan + other.nan,
            self.inf + other.inf,
            _summed(self.cells, other.cells),
        )

    def times(self, count: int) -> Statistics:
        """Return what so many repetitions are."""
        return Statistics(
            self.count * count,
            self.least,
            self.largest,
            self.mean,
            self.squares * count,
            self.zeros * count,
            self.nan * count,
            self.inf * count,
            (self.cells[0], array("d", (found * count for found in self.cells[1]))),
        )


def _summed(one: Cells, other: Cells) -> Cells:
    if not one[0] or not other[0]:
        return one if one[0] else other
    found = dict(zip(*one, strict=True))
    for cell, count in zip(*other, strict=True):
        found[cell] = found.get(cell, 0) + count
    return packed(found)


def packed(cells: Mapping[int, float]) -> Cells:
    """Return a histogram as it takes little memory: a file may have many tensors."""
    return array("H", cells), array("d", cells.values())


@dataclass(frozen=True, slots=True)
class Distance:
    """How far numbers are from others: sums over the `count` pairs that are finite on both sides.

    Those are of the squares of the left ones, of the right ones, of the products of both, and of
    the squares of their differences; a complex number is two.
    """

    count: int = 0
    left: float = 0.0
    right: float = 0.0
    products: float = 0.0
    apart: float = 0.0

    def __add__(self, other: Distance) -> Distance:
        return Distance(
            self.count + other.count,
            self.left + other.left,
            self.right + other.right,
            self.products + other.products,
            self.apart + other.apart,
        )

    def times(self, count: int) -> Distance:
        """Return what so many repetitions are."""
        sums = (self.left, self.right, self.products, self.apart)
        return Distance(self.count * count, *(each * count for each in sums))

    @property
    def relative(self) -> float | None:
        """Return the norm of the difference by that of the left: infinite where only that is 0.

        None where nothing was finite, or a square is not.
        """
        if not self.count or not isfinite(self.apart + self.left):
            return None
        if not self.apart:
            return 0.0
        return sqrt(self.apart) / sqrt(self.left) if self.left else inf

    @property
    def cosine(self) -> float | None:
        """Return the cosine similarity; None where one is 0, or a square infinite."""
        norms = sqrt(self.left) * sqrt(self.right)
        if not norms or not isfinite(norms):
            return None
        return max(-1.0, min(1.0, self.products / norms)) if self.apart else 1.0


NOWHERE = Distance()


@dataclass(slots=True)
class Values:
    """What differs between two tensors, in elements (in bytes, of a dtype smaller than a byte).

    `count` of `of` differ by more than the tolerance, and `within` by no more; `first` is the
    index of the first that counts, in contiguous order. `max_abs` and `max_ulp` are of finite
    numbers (of complex ones, of their parts), None where no such differ. The rest counts numbers
    that differ in a way of their own: NaN against another NaN, NaN against a number, 0.0 against
    -0.0, an infinity against anything. `distance` is of all that differ and all that do not.
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
    distance: Distance = NOWHERE

    def add(self, part: Values, start: int) -> None:
        """Count in a part of the same tensors, whose first element is `start` of the whole."""
        if part.first is not None and self.first is None:
            self.first = start + part.first
        self.max_abs = _larger(self.max_abs, part.max_abs)
        self.max_ulp = _larger(self.max_ulp, part.max_ulp)
        self.distance += part.distance
        for name in _COUNTS:
            setattr(self, name, getattr(self, name) + getattr(part, name))

    def repeat(self, times: int) -> None:
        """Count everything so many times."""
        self.of *= times
        self.distance = self.distance.times(times)
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
