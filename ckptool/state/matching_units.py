"""What `match` compares: modules with the shapes of their leaves, and the tree that they are in.

A module's leaves have one name each in all libraries (`gamma` and `kernel` are weights), and shapes
are compared without dimensions of 1 and with all after the first as one. A parameter of a module
that has other names for them (`cls_token`) is a module of its own.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from math import prod

from ckptool.records import dataclass
from ckptool.state.matching_names import FUSED

Shape = tuple[int, ...]
Kind = tuple[tuple[str, Shape], ...]  # of the leaves: name and shape
MAX_DEPTH = 24  # components of a key that are told apart

LEAVES = {
    "weight": "weight",
    "kernel": "weight",
    "bias": "bias",
    "running_mean": "running_mean",
    "moving_mean": "running_mean",
    "running_var": "running_var",
    "moving_variance": "running_var",
    "num_batches_tracked": "num_batches_tracked",
}
_NORM = {"gamma": "weight", "beta": "bias"}  # where a module has both
_COUNTER = "num_batches_tracked"  # which older files lack
_ENDS = re.compile(r"(.+)_(weight|bias)", re.DOTALL)


@dataclass(slots=True)
class Unit:
    """A module with leaves of its own: key and shape by name; `bare` is a parameter alone."""

    path: tuple[str, ...]
    bare: bool = False
    keys: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """Return what it is of: itself, or the equal parts of a fused projection."""
        count = len(self.part_names) or 1
        kind = tuple(
            sorted(
                (name, _compared(shape, count))
                for name, shape in self.shapes.items()
                if name != _COUNTER
            )
        )
        return (kind,) * count

    @property
    def part_names(self) -> tuple[str, ...]:
        """Return what the parts of a fused projection are, none for any other module."""
        names = FUSED.get(self.path[-1].lower() if self.path else "", ())
        whole = all(shape and shape[0] % len(names) == 0 for shape in self.shapes.values() if names)
        return names if whole else ()


def _compared(shape: Shape, parts: int) -> Shape:
    """Return a shape as it is compared, of one of equal parts."""
    shape = (shape[0] // parts, *shape[1:]) if parts > 1 else shape
    sizes = [size for size in shape if size != 1]
    return (sizes[0], prod(sizes[1:])) if len(sizes) > 1 else tuple(sizes)


def units(shapes: Mapping[str, Shape]) -> list[Unit]:
    """Return the modules of keys with shapes, in their order."""
    places: dict[tuple[str, ...], dict[str, str]] = {}
    for key in shapes:
        *around, leaf = key.split(".", MAX_DEPTH)
        places.setdefault(tuple(around), {})[leaf] = key
    found: list[Unit] = []
    for path, leaves in places.items():
        names = LEAVES | (_NORM if leaves.keys() >= _NORM.keys() else {})
        own: dict[tuple[str, ...], Unit] = {}
        for leaf, key in leaves.items():
            name, place, ends = names.get(leaf), path, _ENDS.fullmatch(leaf)
            if name is None and ends and f"{ends[1]}_weight" in leaves:
                name, place = ends[2], (*path, ends[1])
            bare = name is None
            unit = own.setdefault((*path, leaf) if bare else place, Unit((), bare))
            unit.path = (*path, leaf) if bare else place
            unit.keys[name or "weight"] = key
            unit.shapes[name or "weight"] = tuple(shapes[key])
        found += own.values()
    return [unit for unit in found if unit.shapes.keys() != {_COUNTER}]


@dataclass(slots=True)
class Node:
    """A module with those in it, or one unit; `first` counts its first unit.

    `kinds` are numbers for what its units are, sorted.
    """

    path: tuple[str, ...]
    first: int
    kinds: tuple[int, ...]
    unit: Unit | None = None
    children: tuple[Node, ...] = ()

    def below(self) -> Iterator[Node]:
        """Iterate over all nodes in this one, without itself."""
        waiting = list(reversed(self.children))
        while waiting:
            node = waiting.pop()
            yield node
            waiting += reversed(node.children)

    @property
    def all_units(self) -> list[Unit]:
        """List the units that it holds."""
        nodes = [self] if self.unit else self.below()
        return [node.unit for node in nodes if node.unit]


def trees(here: Sequence[Unit], there: Sequence[Unit]) -> tuple[Node, Node]:
    """Return the two trees of units of which the other side has the kind."""
    counts = [Counter(kind for unit in side for kind in unit.kinds) for side in (here, there)]
    shared = {kind: number for number, kind in enumerate(counts[0].keys() & counts[1].keys())}
    one, other = (
        _tree([unit for unit in side if unit.kinds[0] in shared], shared) for side in (here, there)
    )
    return one, other


def _tree(side: Sequence[Unit], numbers: Mapping[Kind, int]) -> Node:
    nested: dict[str, object] = {}
    for unit in side:
        place = nested
        for component in unit.path:
            place = place.setdefault(f".{component}", {})  # type: ignore[assignment]
        place[""] = unit
    counter = iter(range(len(side)))
    return _node((), nested, numbers, counter)


def _node(
    path: tuple[str, ...],
    nested: dict[str, object],
    numbers: Mapping[Kind, int],
    count: Iterator[int],
) -> Node:
    """Make a node; one that holds a single other is that one."""
    children = []
    for name, inner in nested.items():
        if isinstance(inner, Unit):
            kinds = tuple(numbers[kind] for kind in inner.kinds)
            children.append(Node(inner.path, next(count), kinds, inner))
        else:
            children.append(_node((*path, name[1:]), inner, numbers, count))  # type: ignore[arg-type]
    if len(children) == 1:
        return children[0]
    kinds = tuple(sorted(kind for child in children for kind in child.kinds))
    first = children[0].first if children else 0
    return Node(path, first, kinds, None, tuple(children))
