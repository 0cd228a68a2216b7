"""From pairs of keys to few rules: prefixes and templates that rename exactly as the pairs say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ckptool.state.matching import Pair
from ckptool.state.renaming import REGEX, Renaming, Rule
from ckptool.state.templates import DIGITS

Names = Mapping[str, str]  # key by key: what it becomes
LETTERS = "".join(letter for letter in "ijklmne" if letter in DIGITS)
_NUMBER = re.compile(r"(?<![0-9])[0-9]+(?![0-9])", re.ASCII)
_SIGNS = re.compile(r"[{}*]")


@dataclass(frozen=True, slots=True)
class Plan:
    """Rules to be done one after the other: first those of blocks, if they make it shorter.

    `between` is what keys are called after the first.
    """

    first: tuple[Rule, ...]
    then: tuple[Rule, ...]
    between: Names

    @property
    def count(self) -> int:
        """Count the rules."""
        return len(self.first) + len(self.then)


def plan(keys: Sequence[str], wanted: Names, blocks: Iterable[Names]) -> Plan:
    """Return the shortest rules of several ways: in one step, or by way of one kind of blocks.

    `blocks` map paths of modules to those of the other side; keys that are not in `wanted` keep
    their names, or go with their block.
    """
    plans = [Plan((), tuple(_rules(keys, wanted, keys)), {key: key for key in keys})]
    for each in blocks:
        between = _moved(keys, each)
        if len(set(between.values())) < len(keys) or between == plans[0].between:
            continue
        first = _exact(list(_generalised(list(each.items()))), between)
        inner = {between[key]: new for key, new in wanted.items()}
        moved = {between[key] for key in keys if between[key] != key}
        needed = [new for new in between.values() if new not in moved or inner.get(new, new) != new]
        then = _rules(list(between.values()), inner, needed)
        plans.append(Plan(tuple(first), tuple(then), between))
    return min(plans, key=lambda each: each.count)


def _moved(keys: Iterable[str], blocks: Names) -> dict[str, str]:
    """Return what keys are called once their blocks have the names of the other side."""
    found = {}
    for key in keys:
        end = key.find(".")
        found[key] = key
        while end > 0:
            if key[:end] in blocks:
                found[key] = blocks[key[:end]] + key[end:]
                break
            end = key.find(".", end + 1)
    return found


def _rules(keys: Sequence[str], wanted: Names, needed: Sequence[str]) -> list[Rule]:
    """Return rules for the keys that need them, which leave all others as they are."""
    pairs = list(_prefixes(keys, wanted, needed))
    return _exact(list(_generalised(pairs)), {key: wanted.get(key, key) for key in keys})


def _prefixes(
    keys: Sequence[str], wanted: Names, needed: Sequence[str]
) -> Iterator[tuple[str, str]]:
    """Iterate over the longest moves of a prefix that say the same as the pairs."""
    moves: dict[str, str | None] = {}
    for key in keys:
        new = wanted.get(key)
        for prefix, rest in _cuts(key):
            fits = new is not None and new.endswith(rest) and len(new) > len(rest)
            move = new[: len(new) - len(rest)] if fits and new is not None else None
            if moves.setdefault(prefix, move) != move:
                moves[prefix] = None
    done = set()
    for key in needed:
        new = wanted.get(key)
        if new is None:
            continue
        ways = ((prefix, moves[prefix]) for prefix, _ in _cuts(key))
        prefix, move = next(((old, to) for old, to in ways if to), (key, new))
        if prefix not in done:
            done.add(prefix)
            yield prefix, move


def _cuts(key: str) -> Iterator[tuple[str, str]]:
    """Yield each prefix of whole components of a key, the shortest first, and the rest of it."""
    end = key.find(".")
    while end >= 0:
        if end:
            yield key[:end], key[end:]
        end = key.find(".", end + 1)
    yield key, ""


def generalised(pairs: Sequence[tuple[str, str]]) -> list[Rule]:
    """Return templates for pairs, where their numbers allow it, the narrow ones first."""
    return list(_generalised(pairs))


def _generalised(pairs: Sequence[tuple[str, str]]) -> Iterator[Rule]:
    groups: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for old, new in pairs:
        groups.setdefault((_NUMBER.sub("#", old), _NUMBER.sub("#", new)), []).append((old, new))
    rules = [rule for rows in groups.values() for rule in _templates(rows)]
    yield from sorted(rules, key=lambda rule: rule.old.count("{"))


def _templates(rows: Sequence[tuple[str, str]]) -> Iterator[Rule]:
    """Return the rules of pairs that differ in numbers alone."""
    if len(rows) == 1 or any(_SIGNS.search("".join(row)) for row in rows):
        yield from (literal(*row) for row in rows)
        return
    olds, news = ([_NUMBER.findall(row[side]) for row in rows] for side in (0, 1))
    one, other = (list(zip(*numbers, strict=True)) for numbers in (olds, news))
    fields: dict[int, int] = {}  # the place of a number in NEW -> that in OLD
    split = -1
    for at, column in enumerate(other):
        if len(set(column)) > 1:
            same = [i for i, each in enumerate(one) if each == column and i not in fields.values()]
            if same:
                fields[at] = same[0]
            elif split < 0:
                split = _source(one, column)
    unused = [i for i, each in enumerate(one) if len(set(each)) > 1 and i not in fields.values()]
    if split < 0 and not unused and len(fields) <= len(LETTERS):
        letters = {i: LETTERS[at] for at, i in enumerate(sorted(fields.values()))}
        old = _filled(rows[0][0], letters)
        new = _filled(rows[0][1], {at: letters[i] for at, i in fields.items()})
        yield Rule(old, new)
        return
    by = split if split >= 0 else (unused or [*fields.values()])[0]
    parts: dict[str, list[tuple[str, str]]] = {}
    for row, number in zip(rows, one[by], strict=True):
        parts.setdefault(number, []).append(row)
    for part in parts.values():
        yield from _templates(part)


def _source(columns: Sequence[tuple[str, ...]], made: tuple[str, ...]) -> int:
    """Return the number of OLD that tells one of NEW, or else one that varies."""
    varying = [i for i, column in enumerate(columns) if len(set(column)) > 1]
    telling = [
        i
        for i in varying
        if len(set(zip(columns[i], made, strict=True))) == len(set(columns[i]))
    ]
    return min(telling or varying, key=lambda i: len(set(columns[i])))


def _filled(path: str, letters: Mapping[int, str]) -> str:
    """Write fields for some of the numbers of a path."""
    places = iter(range(path.count("") + 1))

    def field(found: re.Match[str]) -> str:
        at = next(places)
        return f"{{{letters[at]}}}" if at in letters else found[0]

    return _NUMBER.sub(field, path)


def literal(old: str, new: str) -> Rule:
    """Return a rule for a prefix; for names that a rule would read otherwise, for one key."""
    odd = _SIGNS.search(old + new) or old.startswith(REGEX) or old.endswith(".")
    if not (odd or new.endswith(".") or not old or not new):
        return Rule(old, new)
    escaped = new.replace("\\", "\\\\")
    return Rule(f"{REGEX}{re.escape(old)}", escaped)


def _exact(rules: list[Rule], wanted: Names) -> list[Rule]:
    """Put rules for single keys before those that would say something else of them.

    Rules that take nothing go.
    """
    find = Renaming(rules).match
    wrong = []
    used = set()
    for key, new in wanted.items():
        found = find(key)
        if (found[1] if found else key) == new:
            used.update([found[0]] if found else [])
        else:
            wrong.append(literal(key, new))
    return [*wrong, *(rule for number, rule in enumerate(rules) if number in used)]


def blocks_of(pairs: Iterable[Pair]) -> list[dict[str, str]]:
    """Return the numbered modules that are paired, the outermost and the innermost around units."""
    outer, inner = dict[str, str](), dict[str, str]()
    for pair in pairs:
        found = []
        for before, (here, there) in zip([((), ()), *pair.around], pair.around, strict=False):
            old, new = _numbered(here, len(before[0])), _numbered(there, len(before[1]))
            if old and new:
                found.append((old, new))
        if found:
            outer[found[0][0]], inner[found[-1][0]] = found[0][1], found[-1][1]
    return [outer, inner]


def _numbered(path: Sequence[str], above: int) -> str:
    """Return the longest part of a path, below its first components, that ends in a number."""
    ends = [at for at in range(above + 1, len(path) + 1) if path[at - 1][-1:].isdigit()]
    return ".".join(path[: ends[-1]]) if ends else ""
