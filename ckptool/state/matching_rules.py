"""From pairs of keys to few rules: prefixes and templates that rename exactly as the pairs say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckptool.records import dataclass, grouped
from ckptool.state.matching import Pair
from ckptool.state.matching_names import numberless, numbers
from ckptool.state.renaming import REGEX, Renaming, Rule
from ckptool.state.templates import DIGITS

Names = Mapping[str, str]  # key by key: what it becomes
Move = tuple[str, str]
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
        stays = [key for key in keys if between[key] == key]
        first = _exact(_rules_of(sorted(each.items(), key=_natural), stays), between)
        inner = {between[key]: new for key, new in wanted.items()}
        moved = {between[key] for key in keys if between[key] != key}
        needed = [new for new in between.values() if new not in moved or inner.get(new, new) != new]
        then = _rules(list(between.values()), inner, needed)
        plans.append(Plan(tuple(first), tuple(then), between))
    return min(plans, key=lambda each: each.count)


def templates(pairs: Sequence[Move], others: Iterable[str] = ()) -> list[tuple[Rule, int]]:
    """Return rules for pairs which take none of other keys, each with how many it is of."""
    return [(made.rule, len(made.rows)) for made in _generalised(pairs, _by_form(others))]


def _rules_of(pairs: Sequence[Move], others: Iterable[str]) -> list[Rule]:
    return [rule for rule, _ in templates(pairs, others)]


Forms = Mapping[str, Sequence[str]]  # keys by what a template of their form may begin with


def _by_form(keys: Iterable[str]) -> Forms:
    return grouped((prefix, key) for key in keys for prefix, _ in _cuts(_plain(key)))


def _natural(pair: Move) -> tuple[str, tuple[int, ...]]:
    return numberless(pair[0]), numbers(pair[0])


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
    others = [key for key in keys if key not in wanted]
    return _exact(_rules_of(pairs, others), {key: wanted.get(key, key) for key in keys})


def _prefixes(keys: Sequence[str], wanted: Names, needed: Sequence[str]) -> Iterator[Move]:
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


def _cuts(key: str) -> Iterator[Move]:
    """Yield each prefix of whole components of a key, the shortest first, and the rest of it."""
    end = key.find(".")
    while end >= 0:
        if end:
            yield key[:end], key[end:]
        end = key.find(".", end + 1)
    yield key, ""


@dataclass(frozen=True, slots=True)
class _Made:
    """A rule and the pairs that it is of."""

    rule: Rule
    rows: tuple[Move, ...]

    @property
    def fields(self) -> int:
        """Count the fields, or what looks like them."""
        return self.rule.old.count("{")


def _generalised(pairs: Sequence[Move], near: Forms) -> list[_Made]:
    """Return templates for pairs, where their numbers allow it, the narrow ones first.

    They take no key that is `near`, but for those of the pairs.
    """
    groups = grouped(((_plain(old), _plain(new)), (old, new)) for old, new in pairs)
    own = {old for old, _ in pairs}
    made = []
    for (form, _), rows in groups.items():
        for each in _of_numbers(rows):
            if each.fields:
                foreign = (key for key in near.get(form, ()) if not own & {*_above(key)})
                made += _narrow(each, [*foreign])
            else:
                made.append(each)
    order = {old: at for at, (old, _) in enumerate(pairs)}
    return sorted(made, key=lambda each: (each.fields, order[each.rows[0][0]]))


def _plain(name: str) -> str:
    return _NUMBER.sub("#", name)


def _above(key: str) -> tuple[str, str]:
    """Return a key and its module."""
    return key, key.rpartition(".")[0]


def _narrow(made: _Made, foreign: Sequence[str]) -> list[_Made]:
    """Return rules for the same pairs that take no foreign key."""
    if not _takes(made, foreign):
        return [made]
    columns = [*zip(*(_NUMBER.findall(old) for old, _ in made.rows), strict=True)]
    ways = [[_Made(literal(*row), (row,)) for row in made.rows]]
    for column in columns:
        if len(set(column)) > 1:
            way = [each for part in _parts(made.rows, column) for each in _of_numbers(part)]
            if not any(_takes(each, foreign) for each in way):
                ways.append(way)
    return min(ways, key=len)


def _takes(made: _Made, keys: Iterable[str]) -> bool:
    return any(map(Renaming([made.rule]).match, keys))


def _parts(rows: Sequence[Move], column: Sequence[str]) -> Iterable[list[Move]]:
    """Return rows in groups, by a number of each."""
    return grouped(zip(column, rows, strict=True)).values()


def _of_numbers(rows: Sequence[Move]) -> Iterator[_Made]:
    """Yield the rules of pairs that differ in numbers alone."""
    if len(rows) == 1 or any(_SIGNS.search("".join(row)) for row in rows):
        yield from (_Made(literal(*row), (row,)) for row in rows)
        return
    one, other = (
        [*zip(*map(_NUMBER.findall, side), strict=True)] for side in zip(*rows, strict=True)
    )
    fields: dict[int, int] = {}  # the place of a number in NEW -> that in OLD
    for at, column in enumerate(other):
        same = [i for i, each in enumerate(one) if each == column]
        if same and len(set(column)) > 1:
            fields[at] = next((i for i in same if i not in fields.values()), same[0])
    letters = {i: LETTERS[at] for at, i in enumerate(sorted({*fields.values()})[: len(LETTERS)])}
    undecided = _undecided(rows, one, other, fields, letters)
    if undecided:
        for part in _parts(rows, undecided):
            yield from _of_numbers(part)
        return
    old, new = rows[0]
    filled = _filled(new, {at: letters[i] for at, i in fields.items()})
    yield _Made(Rule(_filled(old, letters), filled), tuple(rows))


Column = tuple[str, ...]


def _undecided(
    rows: Sequence[Move],
    one: Sequence[Column],
    other: Sequence[Column],
    fields: Mapping[int, int],
    letters: Mapping[int, str],
) -> Column | None:
    """Return numbers by which pairs must be told apart, as no field stands for them."""
    varying = [each for i, each in enumerate(one) if len(set(each)) > 1 and i not in letters]
    made = [each for at, each in enumerate(other) if len(set(each)) > 1 and at not in fields]
    if made and len({old for old, _ in rows}) < len(rows):  # of choices: one OLD, several NEW
        return made[0]
    if made:
        found = [each for each in one if len(set(each)) > 1]
        telling = [
            each for each in found if len({*zip(each, made[0], strict=True)}) == len({*each})
        ]
        return min(telling or found, key=lambda each: len(set(each)))
    return varying[0] if varying else None


def _filled(path: str, letters: Mapping[int, str]) -> str:
    """Write fields for some of the numbers of a path."""
    places = iter(range(path.count("") + 1))

    def field(found: re.Match[str]) -> str:
        at = next(places)
        return f"{{{letters[at]}}}" if at in letters else found[0]

    return _NUMBER.sub(field, path)


def literal(old: str, new: str, *, alone: bool = False) -> Rule:
    """Return a rule for a prefix, or for one key: `alone`, or one that a rule would misread."""
    odd = alone or _SIGNS.search(old + new) or old.startswith(REGEX) or not (old and new)
    if not odd and not old.endswith(".") and not new.endswith("."):
        return Rule(old, new)
    escaped = new.replace("\\", "\\\\")
    return Rule(f"{REGEX}{re.escape(old)}", escaped)


def _exact(rules: Sequence[Rule], wanted: Names) -> list[Rule]:
    """Put rules for single keys before those that say something else of them.

    Rules that take nothing go.
    """
    find = Renaming(rules).match
    said = {key: find(key) for key in wanted}
    modules = {prefix for key in wanted for prefix, rest in _cuts(key) if rest}
    wrong = [
        literal(key, new, alone=key in modules)
        for key, new in wanted.items()
        if new != (found[1] if (found := said[key]) else key)
    ]
    used = {found[0] for key, found in said.items() if found and found[1] == wanted[key]}
    return [*wrong, *(rule for number, rule in enumerate(rules) if number in used)]


def choices(groups: Iterable[Sequence[Move]], plan: Plan) -> Iterator[list[Rule]]:
    """Yield rules for pairs that may be, which take no key but theirs after those of a plan."""
    find = Renaming(plan.then).match
    near = _by_form(key for key in plan.between.values() if find(key) is None)
    for pairs in groups:
        yield [made.rule for made in _generalised(pairs, near)]


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
