"""Pair the modules of two checkpoints of one architecture under different names.

What pairs with what is decided from the outside in: in two modules that are a pair, those of equal
contents are looked at, the largest first. One that could be no other is its pair; several are told
apart by words of their names, or by numbers in order. Shape or order in the file alone decides
nothing: what neither names, numbers nor the pair around it tell apart is ambiguous.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from itertools import groupby

from ckptool.records import dataclass, grouped
from ckptool.state.matching_names import agree, numberless, numbers, words
from ckptool.state.matching_units import Node, Shape, Unit, trees, units

STRUCTURED = 4  # units by which a module is known, whatever else is around it
MANY = 64  # modules that are told apart by each with each

ALONE = "nothing else of these shapes"
NAMES = "names"
NUMBERS = "numbers in order"
REST = "the only one left"


Path = tuple[str, ...]
Around = tuple[tuple[Path, Path], ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two units, why they are one, and the pairs of modules around them from the outside in."""

    here: Unit
    there: Unit
    why: str
    around: Around


@dataclass(frozen=True, slots=True)
class Ambiguous:
    """Units or modules of equal shapes, of which nothing says which is which."""

    here: tuple[Node, ...]
    there: tuple[Node, ...]


@dataclass(frozen=True, slots=True)
class Fused:
    """A unit that is several of the other side in one: a fuse if `back`."""

    whole: Unit
    parts: tuple[Unit, ...]
    back: bool = False


@dataclass(slots=True)
class Matching:
    """What was found; a unit of neither list has no partner."""

    pairs: list[Pair] = field(default_factory=list)
    ambiguous: list[Ambiguous] = field(default_factory=list)
    fused: list[Fused] = field(default_factory=list)


def match(here: Mapping[str, Shape], there: Mapping[str, Shape]) -> Matching:
    """Pair the modules of two sides, given as keys with shapes."""
    one, other = trees(units(here), units(there))
    return resolve(one, other)


def resolve(one: Node, other: Node, why: str = ALONE) -> Matching:
    """Pair what is in two nodes, and in what they hold."""
    found = Matching()
    waiting: list[tuple[Node, Node, str, Around]] = [(one, other, why, ())]
    while waiting:
        here, there, why, around = waiting.pop()
        if here.unit and there.unit:
            found.pairs.append(Pair(here.unit, there.unit, why, around))
        elif here.unit or there.unit:
            found.fused += _fused(here.all_units, there.all_units)
        else:
            scope = _Scope(here, there)
            inner = (*around, (here.path, there.path))
            waiting += [(*pair, inner) for pair in reversed(scope.pairs)]
            found.ambiguous += scope.ambiguous
            found.fused += scope.fused
    return found


Both = tuple[Node, Node, str]  # two nodes and why they are a pair


class _Scope:
    """Two nodes that are a pair, and what is decided about those in them."""

    def __init__(self, here: Node, there: Node) -> None:
        self.pairs: list[Both] = []
        self.ambiguous: list[Ambiguous] = []
        self.fused: list[Fused] = []
        self._roots = here, there
        self._taken: tuple[set[int], set[int]] = set(), set()
        self._complete = here.kinds == there.kinds
        one, other = _by_kinds(here), _by_kinds(there)
        both = sorted(one.keys() & other.keys(), key=len, reverse=True)
        singles = [kinds for kinds in both if len(kinds) == 1]
        for kinds in both[: len(both) - len(singles)]:
            self._decide(self._free(one[kinds], 0), self._free(other[kinds], 1))
        self._part()
        for kinds in singles:
            self._decide(self._free(one[kinds], 0), self._free(other[kinds], 1))

    def _free(self, nodes: Sequence[Node], side: int) -> list[Node]:
        return [node for node in nodes if node.first not in self._taken[side]]

    def _take(self, node: Node, side: int) -> None:
        self._taken[side].update(range(node.first, node.first + len(node.all_units)))

    def _part(self) -> None:
        """Find fused projections and their parts among the units that are free."""
        sides = [
            self._free([node for node in root.below() if node.unit], side)
            for side, root in enumerate(self._roots)
        ]
        named = [{id(node.unit): node for node in nodes} for nodes in sides]
        for each in _fused(*([node.unit for node in nodes if node.unit] for nodes in sides)):
            self.fused.append(each)
            self._take(named[each.back][id(each.whole)], int(each.back))
            for part in each.parts:
                self._take(named[not each.back][id(part)], int(not each.back))

    def _decide(self, here: list[Node], there: list[Node]) -> None:
        """Pair nodes of equal contents, or say that they are ambiguous."""
        if not here or not there:
            return
        done = self._alone(here, there) or self._equal(here, there)
        done = done or self._in_order(here, there) or self._by_names(here, there)
        for one, other, why in done:
            self._take(one, 0)
            self._take(other, 1)
            self.pairs.append((one, other, why))
        here, there = self._free(here, 0), self._free(there, 1)
        if here and there:
            for node in here:
                self._take(node, 0)
            for node in there:
                self._take(node, 1)
            self.ambiguous.append(Ambiguous(tuple(here), tuple(there)))

    def _alone(self, here: list[Node], there: list[Node]) -> list[Both]:
        """Pair two that could be no others, where more than their shape says so."""
        if len(here) > 1 or len(there) > 1:
            return []
        one, other = here[0], there[0]
        if agree(*self._names(one, other)):
            return [(one, other, NAMES)]
        bare = any(node.unit and node.unit.bare for node in (one, other))
        sure = len(one.kinds) >= STRUCTURED or (self._complete and not bare)
        return [(one, other, ALONE)] if sure else []

    def _names(self, one: Node, other: Node) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self._name(one, 0), self._name(other, 1)

    def _name(self, node: Node, side: int) -> tuple[str, ...]:
        """Return the components of a path beyond that of the node around it."""
        return node.path[len(self._roots[side].path) :]

    def _equal(self, here: list[Node], there: list[Node]) -> list[Both]:
        """Pair nodes of one name, where all of a side have their name on the other."""
        one, other = (
            {self._name(node, side): node for node in nodes}
            for side, nodes in enumerate((here, there))
        )
        if not (one.keys() <= other.keys() or other.keys() <= one.keys()):
            return []
        return [(one[name], other[name], NAMES) for name in one if name in other]

    def _in_order(self, here: list[Node], there: list[Node]) -> list[Both]:
        """Pair nodes whose names differ in numbers alone, on both sides, in their order."""
        if len(here) != len(there) or len(here) < 2:
            return []
        sides = [_Numbered.of(nodes) for nodes in (here, there)]
        one, other = sides
        if one is None or other is None or not one.like(other):
            return []
        return [(a, b, NUMBERS) for a, b in zip(one.nodes, other.nodes, strict=True)]

    def _by_names(self, here: list[Node], there: list[Node]) -> list[Both]:
        """Pair groups of numbered nodes by the words of their names, then those in them."""
        groups = [_grouped(nodes) for nodes in (here, there)]
        if min(map(len, groups)) == 1 and max(map(len, groups)) > 1:
            groups = [[[node] for node in nodes] for nodes in (here, there)]
        names = [[words(self._name(group[0], side)) for group in groups[side]] for side in (0, 1)]
        if len(here) == len(there) == 2 == len(groups[0]):
            pass
        else:
            names = [[_worded(each) for each in side] for side in names]
        done: list[Both] = []
        pairs = _told_apart(names[0], names[1], complete=self._complete)
        for (a, b), why in pairs.items():
            one, other = groups[0][a], groups[1][b]
            if len(one) == len(other) == 1:
                done.append((one[0], other[0], why))
            else:
                done += self._equal(one, other) or self._in_order(one, other)
        return done


def _by_kinds(root: Node) -> dict[tuple[int, ...], list[Node]]:
    return grouped((node.kinds, node) for node in root.below())


def _grouped(nodes: Iterable[Node]) -> list[list[Node]]:
    """Return groups of nodes whose names differ in numbers alone."""
    return list(grouped((numberless(".".join(node.path)), node) for node in nodes).values())


def _worded(said: frozenset[str]) -> frozenset[str]:
    """Leave out numbers, and the words that stand for them."""
    return frozenset(word for word in said if not word.isdigit())


@dataclass(frozen=True, slots=True)
class _Numbered:
    """Nodes whose names differ in numbers alone, in their order."""

    nodes: tuple[Node, ...]
    sizes: tuple[int, ...]  # of the runs that are equal in the first number that varies
    levels: int  # numbers that vary
    stem: frozenset[str]

    @classmethod
    def of(cls, nodes: Sequence[Node]) -> _Numbered | None:
        if len({numberless(".".join(node.path)) for node in nodes}) > 1:
            return None
        ordered = sorted(nodes, key=lambda node: numbers(".".join(node.path)))
        rows = [numbers(".".join(node.path)) for node in ordered]
        varying = [at for at, column in enumerate(zip(*rows, strict=True)) if len(set(column)) > 1]
        if not varying:
            return None
        first = varying[0]
        sizes = tuple(len(list(run)) for _, run in groupby(rows, lambda row: row[first]))
        text = numberless(".".join(ordered[0].path)).split("#")[first]
        return cls(tuple(ordered), sizes, len(varying), words(text.split(".")[-2:]))

    def like(self, other: _Numbered) -> bool:
        """Check that the numbers of both count the same.

        The outer ones of a side could be the inner ones of the other: `layer.0.norm.1` and
        `norms.1.0`. Where the counts allow both, the words before them must say which it is.
        """
        if min(self.levels, other.levels) > 1:
            square = len(self.sizes) == self.sizes[0]
            same = self.sizes == other.sizes
        else:
            one, same = self.nodes[0], True
            counts = Counter(one.kinds).values()
            square = one.unit is None and not any(n % len(self.nodes) for n in counts)
        return same and (not square or self.stem == other.stem)


Words = frozenset[str]


def _told_apart(
    here: Sequence[Words], there: Sequence[Words], *, complete: bool
) -> dict[tuple[int, int], str]:
    """Pair names by words that not all of their side have: each the best of the other alone."""
    if len(here) * len(there) > MANY * MANY:
        return {}
    own = [_distinct(side) for side in (here, there)]
    score = {
        (a, b): len(
            here[a] & there[b] & (own[0][a] | own[1][b])
            if min(len(here), len(there)) == 1
            else own[0][a] & own[1][b]
        )
        for a in range(len(here))
        for b in range(len(there))
    }
    done: dict[tuple[int, int], str] = {}
    for (a, b), most in score.items():
        rivals = [n for (x, y), n in score.items() if (x == a) != (y == b)]
        if most and most > max(rivals, default=0):
            done[a, b] = NAMES
    left = [
        [at for at in range(len(side)) if at not in {pair[number] for pair in done}]
        for number, side in enumerate((here, there))
    ]
    if complete and done and len(left[0]) == len(left[1]) == 1:
        done[left[0][0], left[1][0]] = REST
    return done


def _distinct(side: Sequence[Words]) -> list[Words]:
    shared = frozenset.intersection(*side)
    return [each - shared for each in side]


def _fused(here: Sequence[Unit], there: Sequence[Unit]) -> list[Fused]:
    """Propose which units are the parts of a fused one, by the words of their names."""
    return [
        Fused(whole, parts, back)
        for side, others, back in ((here, there, False), (there, here, True))
        for whole in side
        if whole.part_names and (parts := _parts(whole, others))
    ]


def _parts(whole: Unit, units: Sequence[Unit]) -> tuple[Unit, ...]:
    """Return the units that are called what the parts of a fused one are, if each is there once."""
    alike = [unit for unit in units if unit.kinds == whole.kinds[:1]]
    named = [[unit for unit in alike if name in words(unit.path[-1:])] for name in whole.part_names]
    return tuple(each[0] for each in named) if all(len(each) == 1 for each in named) else ()
