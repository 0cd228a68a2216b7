"""Repetitions as one row: `layers.{0-47}.attn.qkv.weight`, where only numbers of keys differ."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from ckptool.records import dataclass
from ckptool.text import SHOWN

LEAST = 3  # rows that are worth folding

Numbers = tuple[int, ...]
Part = str | Numbers  # a component of a key, or the numbers that it has in several
Item = tuple[tuple[Part, ...], tuple[int, ...]]  # a key in parts, and the rows that have it
Block = tuple[tuple[str, ...], tuple[str, ...]]  # the keys of a change, and the sign before each
_TIED = "\0"  # before the place of the number of a key that another text has too


@dataclass(frozen=True, slots=True)
class Fold:
    """A key of all `rows`, by their index: with `{0-47}` in place of a component."""

    key: str
    rows: tuple[int, ...]


def folded(rows: Sequence[tuple[str, Hashable]]) -> list[Fold]:
    """Fold rows of equal content whose keys differ in numbers alone, in the order of the first.

    Numbers between dots are taken from the last to the first: what is the same in each of 8
    experts, and these in each of 48 layers, is `layers.{0-47}.experts.{0-7}.w1`.
    """
    groups: dict[Hashable, list[Item]] = {}
    for index, (key, content) in enumerate(rows):
        groups.setdefault((key, content), []).append((tuple(map(_part, key.split("."))), (index,)))
    items = list(map(_joined, groups.values()))
    for place in reversed(range(max((len(parts) for parts, _ in items), default=0))):
        groups, others = {}, []
        for item in items:
            parts, indices = item
            if place < len(parts) and not isinstance(parts[place], str):
                same = (parts[:place], parts[place + 1 :], rows[indices[0]][1])
                groups.setdefault(same, []).append(item)
            else:
                others.append(item)
        items = [*others, *(_joined(group, place) for group in groups.values())]
    folds = [fold for item in items for fold in _unfolded(*item, rows)]
    return sorted(folds, key=lambda fold: fold.rows[0])


def _part(text: str) -> Part:
    number = text.isascii() and text.isdigit() and len(text) < 10 and str(int(text)) == text
    return (int(text),) if number else text


def _joined(group: Sequence[Item], place: int | None = None) -> Item:
    """Make one of items that are the same, but for their numbers at a place."""
    parts, indices = group[0]
    if len(group) == 1:
        return parts, indices
    every = tuple(sorted(index for _, each in group for index in each))
    if place is None:
        return parts, every
    numbers = {number for each, _ in group for number in each[place] if isinstance(number, int)}
    return (*parts[:place], tuple(sorted(numbers)), *parts[place + 1 :]), every


def _unfolded(
    parts: Sequence[Part], indices: tuple[int, ...], rows: Sequence[tuple[str, Hashable]]
) -> list[Fold]:
    """Write what was folded, or each row where there are too few."""
    if len(indices) < LEAST:
        return [Fold(rows[index][0], (index,)) for index in indices]
    return [Fold(".".join(map(_written, parts)), indices)]


def _written(part: Part) -> str:
    if isinstance(part, str) or len(part) == 1:
        return part if isinstance(part, str) else str(part[0])
    known = set(part)
    starts = [number for number in part if number - 1 not in known]
    ends = [number for number in part if number + 1 not in known]
    runs = (f"{a}-{b}" if a < b else f"{a}" for a, b in zip(starts, ends, strict=True))
    return f"{{{','.join(runs)}}}"


def rows_folded(rows: Sequence[tuple[str, ...]], key: int = 0) -> list[tuple[str, ...]]:
    """Fold the rows of a table by the column of keys; a last column, `x 48`, is for those."""
    folds = folded([(row[key], (*row[:key], *row[key + 1 :])) for row in rows])
    if len(folds) == len(rows):
        return list(rows)
    return [
        (*first[:key], fold.key, *first[key + 1 :], times(fold))
        for fold in folds
        for first in [rows[fold.rows[0]]]
    ]


def times(fold: Fold) -> str:
    """Write of how many rows it is; nothing of one."""
    return f"x {len(fold.rows)}" if len(fold.rows) > 1 else ""


def names_folded(names: Sequence[tuple[str, str]], limit: int = SHOWN) -> str:
    """Write keys, each with what is behind it, in a line; of the rest, how many there are."""
    folds = folded(names)
    shown = [
        " ".join(filter(None, [fold.key, names[fold.rows[0]][1], times(fold)]))
        for fold in folds[:limit]
    ]
    rest = sum(len(fold.rows) for fold in folds[limit:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")


def blocks_folded(blocks: Sequence[Block]) -> list[tuple[Block, tuple[int, ...]]]:
    """Fold changes whose first keys differ in numbers that the other keys have too.

    Gives each with the changes that it is for, by their index.
    """
    tied = [tuple(_tied(keys[0], key) for key in keys[1:]) for keys, _ in blocks]
    rows = [(keys[0], (rest, signs)) for (keys, signs), rest in zip(blocks, tied, strict=True)]
    found = []
    for fold in folded(rows):
        first = fold.rows[0]
        keys = (fold.key, *(_loosened(fold.key, key) for key in tied[first]))
        found.append(((keys, blocks[first][1]), fold.rows))
    return found


def _tied(key: str, text: str) -> str:
    """Put the place of a number in the key where a text has it, in their order."""
    places = [(part, place) for place, part in enumerate(key.split(".")) if part.isdigit()]
    parts = []
    for part in text.split("."):
        found = next((at for at, (number, _) in enumerate(places) if number == part), None)
        parts.append(part if found is None else f"{_TIED}{places[found][1]}")
        places = places if found is None else places[found + 1 :]
    return ".".join(parts)


def _loosened(key: str, text: str) -> str:
    components = key.split(".")
    return ".".join(
        components[int(part[1:])] if part.startswith(_TIED) else part for part in text.split(".")
    )
