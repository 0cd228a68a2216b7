"""A treemap: boxes in boxes whose areas are their sizes, as close to squares as can be.

The layout is that of Bruls, Huizing, van Wijk, Squarified Treemaps (2000). Boxes have no margins:
all areas are exactly proportional, whatever is inside of what.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from itertools import accumulate

from ckptool.records import NamedTuple, dataclass

DEEP = 64  # modules in each other: those further in are one name
NARROW = 1.5  # a side in which no box can be told from another
LEAST = 1e-9  # of a side: what is left of the smallest may round to nothing


class Box(NamedTuple):
    """A rectangle, from its upper left corner."""

    x: float
    y: float
    width: float
    height: float


@dataclass(slots=True)
class Branch:
    """A module: those inside of it, or its own size where it is a leaf."""

    name: str
    size: float = 0.0
    inside: dict[str, Branch] = field(default_factory=dict)


class Placed(NamedTuple):
    """Where a branch is drawn, and the names of what it is in and its own.

    In a `leaf` nothing is drawn: there is no module in it, or no room.
    """

    branch: Branch
    box: Box
    names: tuple[str, ...]
    leaf: bool


def tree(leaves: Iterable[tuple[Sequence[str], str, float]]) -> Branch:
    """Make a tree of leaves: path, what names it where other modules are inside, and size.

    A module with one module inside is one with it.
    """
    root = Branch("")
    for path, own, size in leaves:
        here = root
        if len(path) > DEEP:
            path = (*path[:DEEP], ".".join(path[DEEP:]))
        for name in path:
            here = here.inside.setdefault(name, Branch(name))
        here.inside[f"\0{own}"] = Branch(own, size)
    return _folded(root)


def _folded(branch: Branch) -> Branch:
    inside = [_folded(each) for each in branch.inside.values()]
    if len(inside) == 1 and branch.name:
        (only,) = inside
        own = next(iter(branch.inside)).startswith("\0")
        return Branch(branch.name if own else f"{branch.name}.{only.name}", only.size, only.inside)
    size = branch.size + sum(each.size for each in inside)
    return Branch(branch.name, size, {str(at): each for at, each in enumerate(inside)})


def placed(branch: Branch, box: Box, names: tuple[str, ...] = ()) -> Iterator[Placed]:
    """Place a tree in a box: each branch before what is in it."""
    inside = [each for each in branch.inside.values() if each.size > 0]
    leaf = not inside or min(box.width, box.height) < NARROW
    yield Placed(branch, box, names, leaf)
    if leaf:
        return
    inside.sort(key=lambda each: -each.size)
    places = squarified([each.size for each in inside], box)
    for each, place in zip(inside, places, strict=True):
        yield from placed(each, place, (*names, each.name))


def squarified(sizes: Sequence[float], box: Box) -> Iterator[Box]:
    """Cut a box into boxes of these sizes, the largest first: row by row along its shorter side."""
    x, y, width, height = box
    left, start = [*accumulate(reversed(sizes))][::-1], 0  # of each on, what is left
    while start < len(sizes):
        side = max(min(width, height), LEAST)
        unit = max(width, LEAST) * max(height, LEAST) / left[start]  # of area, for each of size
        end, row, worst = start, 0.0, float("inf")
        while end < len(sizes):
            longer = row + sizes[end]
            thick = longer * unit / side
            first, last = (sizes[at] * unit / thick for at in (start, end))
            ratio = max(first / thick, thick / last)
            if ratio > worst:
                break
            end, row, worst = end + 1, longer, ratio
        thick, along = row * unit / side, 0.0
        for size in sizes[start:end]:
            length = size / row * side
            if width >= height:
                yield Box(x, y + along, thick, length)
            else:
                yield Box(x + along, y, length, thick)
            along += length
        if width >= height:
            x, width = x + thick, width - thick
        else:
            y, height = y + thick, height - thick
        start = end
