"""The recipe that a matching is written as: rules with their reasons, choices as comments."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ckptool.records import dataclass, grouped
from ckptool.state.matching import Ambiguous, Fused, Matching, Pair, resolve
from ckptool.state.matching_names import numberless
from ckptool.state.matching_rules import Plan, blocks_of, choices, literal, plan, templates
from ckptool.state.matching_units import Node, Shape
from ckptool.state.renaming import REGEX, Renaming, Rule
from ckptool.state.selecting import matcher
from ckptool.text import counted, listed, visible

MANY_CHOICES = 36  # lines of one group; of more, only those in the order of the files
MAX_CHOICES = 1 << 18  # characters of all: a recipe has at most 1 MiB
CHANNELS = 4  # of pictures: what a patch holds may be flattened channels last
_LEAF = "\1"  # stands for the leaf in names that are generalised


@dataclass(frozen=True, slots=True)
class Choice:
    """What is ambiguous in several places alike, with a rule for each thing it may be."""

    here: tuple[str, ...]
    there: tuple[str, ...]
    keys: int
    rules: tuple[Rule, ...]
    all_choices: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """A fused tensor and its parts, as a step says it; `back` joins the parts."""

    whole: str
    parts: tuple[str, ...]
    tensors: int
    back: bool


@dataclass(frozen=True, slots=True)
class Reshape:
    """Keys of the output that get another shape; `sure` if only dimensions of 1 come and go."""

    keys: tuple[str, ...]
    was: Shape
    shape: Shape
    tensors: int
    sure: bool


@dataclass(frozen=True, slots=True)
class Draft:
    """All that a recipe says; `wanted` are the names that keys get, `why` says how sure."""

    wanted: Mapping[str, str]
    why: Mapping[str, str]
    plan: Plan
    choices: tuple[Choice, ...]
    cuts: tuple[Cut, ...]
    reshapes: tuple[Reshape, ...]

    @property
    def sure(self) -> bool:
        """Check that nothing is left to be chosen."""
        return not self.choices and not self.cuts and all(each.sure for each in self.reshapes)


def draft(matching: Matching, here: Mapping[str, Shape], there: Mapping[str, Shape]) -> Draft:
    """Return the recipe of a matching."""
    found = names(matching.pairs)
    wanted = {key: found[key] for key in here if key in found}
    why = {key: pair.why for pair in matching.pairs for key in pair.here.keys.values()}
    how = plan(list(here), wanted, blocks_of(matching.pairs))
    return Draft(
        wanted,
        why,
        how,
        tuple(_choices(matching.ambiguous, how)),
        tuple(_cuts(matching.fused, how)),
        tuple(_reshapes(wanted, here, there)),
    )


def names(pairs: Iterable[Pair]) -> dict[str, str]:
    """Return what each key of paired units becomes; one that has no partner goes with the rest."""
    return {
        key: pair.there.keys.get(leaf) or ".".join((*pair.there.path, leaf))
        for pair in pairs
        for leaf, key in pair.here.keys.items()
        if leaf in pair.there.keys or key.endswith(f".{leaf}")
    }


# What is ambiguous.


def _choices(groups: Iterable[Ambiguous], how: Plan) -> Iterator[Choice]:
    alike = grouped(((_shapes(group.here), _shapes(group.there)), group) for group in groups)
    few = [
        max(len(each.here) * len(each.there) for each in same) <= MANY_CHOICES
        for same in alike.values()
    ]
    pairs = (
        [pair for group in same for pair in _possible(group, how, every=every)]
        for same, every in zip(alike.values(), few, strict=True)
    )
    for (here, there), every, rules in zip(alike, few, choices(pairs, how), strict=True):
        units = [
            unit for group in alike[here, there] for node in group.here for unit in node.all_units
        ]
        keys = sum(len(unit.keys) for unit in units)
        ordered = sorted(rules, key=lambda rule: rule.old)
        yield Choice(here, there, keys, tuple(ordered), every)


def _shapes(nodes: Iterable[Node]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(numberless(".".join(node.path)) for node in nodes))


def _possible(group: Ambiguous, how: Plan, *, every: bool) -> Iterator[tuple[str, str]]:
    """Iterate over the moves that a group allows, for each the one in the order of files first."""
    for at, here in enumerate(group.here):
        ordered = [*group.there[at:], *group.there[:at]] if every else group.there[at : at + 1]
        for there in ordered:
            for old, new in _moves(names(resolve(here, there).pairs)):
                yield how.between.get(old) or _between(old, how), new


def _moves(wanted: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Iterate over moves of modules, or of keys where the names of leaves differ."""
    done = set()
    for key, new in wanted.items():
        old_path, _, leaf = key.rpartition(".")
        new_path, _, new_leaf = new.rpartition(".")
        pair = (old_path, new_path) if leaf == new_leaf and old_path and new_path else (key, new)
        if pair not in done:
            done.add(pair)
            yield pair


def _between(path: str, how: Plan) -> str:
    """Return what the path of a module is after the first rules of a plan."""
    return Renaming(how.first)(path)


# What is fused.


def _cuts(fused: Iterable[Fused], how: Plan) -> Iterator[Cut]:
    rows = grouped(
        ((each.back, len(parts)), (whole, "\n".join(parts)))
        for each in fused
        for whole, parts in _leaves(each, how)
    )
    for (back, _), pairs in rows.items():
        for rule, count in templates(pairs):
            whole, *parts = (
                text.replace(_LEAF, "{p}") for text in (rule.old, *rule.new.split("\n"))
            )
            yield Cut(whole, tuple(parts), count, back)


def _leaves(fused: Fused, how: Plan) -> Iterator[tuple[str, list[str]]]:
    """Iterate over the keys of a whole with those of its parts; one for all leaves if it can be."""
    units = [fused.whole, *fused.parts]
    leaves = [leaf for leaf in fused.whole.keys if all(leaf in unit.keys for unit in units)]
    rows = {}
    for leaf in leaves:
        keys = [unit.keys[leaf] for unit in units]
        named = [
            how.between.get(key, key) if (at == 0) != fused.back else key
            for at, key in enumerate(keys)
        ]
        alike = len(units[0].keys) > 1 and all(key.endswith(leaf) for key in named)
        stems = [key.removesuffix(leaf) + _LEAF for key in named] if alike else named
        rows[tuple(stems)] = stems
    yield from ((whole, parts) for whole, *parts in rows.values())


# Shapes.


def _reshapes(
    wanted: Mapping[str, str], here: Mapping[str, Shape], there: Mapping[str, Shape]
) -> Iterator[Reshape]:
    rows: dict[tuple[Shape, Shape, bool], list[str]] = {}
    for old, new in wanted.items():
        was, shape = tuple(here[old]), tuple(there.get(new, here[old]))
        if was != shape:
            squeezed = [[size for size in each if size != 1] for each in (was, shape)]
            sure = squeezed[0] == squeezed[1]
            if sure and len(squeezed[0]) == 1:
                was, shape = (
                    tuple(-1 if size > 1 else 1 for size in each) for each in (was, shape)
                )
            patch = min(len(was), len(shape)) > 1 and max(was, shape, key=len)[1] <= CHANNELS
            rows.setdefault((was, shape, sure or not patch), []).append(new)
    outputs = [wanted.get(key, key) for key in here]
    for (was, shape, sure), keys in rows.items():
        yield Reshape(tuple(_selecting(keys, outputs)), was, shape, len(keys), sure)


def _selecting(keys: Sequence[str], outputs: Sequence[str]) -> Iterator[str]:
    """Iterate over patterns that select keys and no others of the output."""
    others = [*(set(outputs) - set(keys))]
    for rule, _ in templates([(key, key) for key in keys], others):
        wide = any(map(matcher(rule.old), others))
        yield f"{REGEX}{re.escape(rule.old)}" if wide else rule.old


# Text.


def text(made: Draft, title: Sequence[str], left: Sequence[str], *, whole: bool) -> str:
    """Write a recipe as TOML; title and what is left are comments.

    A `whole` one takes all keys of what it is made for, and refuses others.
    """
    lines = [*_comments(title), "recipe = 1"]
    find = Renaming(made.plan.first).match
    if made.plan.first:
        taken = [(found[0], key) for key in made.plan.between if (found := find(key))]
        lines += ["", "# Blocks that are numbered differently.", "[[step]]", "rename = ["]
        lines += [*_rule_lines(made.plan.first, taken, {}), "]"]
    lines += ["", "[[step]]", "rename = [", *_renames(made), "]"]
    lines += [] if made.wanted else ["optional = true"]  # what is chosen leaves that nothing
    for reshape in made.reshapes:
        lines += ["", *_reshape_lines(reshape)]
    for cut in made.cuts:
        lines += ["", *_cut_lines(cut)]
    lines += ["", *_comments(left)] if left else []
    if whole:
        lines += ["", "[expect]", "unmatched = 'refuse'"]
    return "\n".join(lines) + "\n"


def _renames(made: Draft) -> Iterator[str]:
    find = Renaming(made.plan.then).match
    after = {new: key for key, new in made.plan.between.items()}
    taken = [(found[0], after[key]) for key in after if (found := find(key))]
    yield from _rule_lines(made.plan.then, taken, made.why)
    room = MAX_CHOICES
    for number, choice in enumerate(made.choices):
        lines = [*_choice_lines(choice)]
        room -= sum(map(len, lines))
        if room < 0:
            yield f"    # and {counted(len(made.choices) - number, 'more group')} of this kind"
            break
        yield from lines
    if not made.wanted:
        key = next(iter(made.plan.between))
        yield "    # Nothing is sure: this line changes nothing."
        yield f"    [{_quoted(literal(key, key).old)}, {_quoted(key)}],"


def _rule_lines(
    rules: Sequence[Rule], taken: Iterable[tuple[int, str]], why: Mapping[str, str]
) -> Iterator[str]:
    """Write rules, each with how many keys it takes, and what makes it sure."""
    counts: Counter[int] = Counter()
    reasons: dict[int, dict[str, None]] = {}
    for number, key in taken:
        counts[number] += 1
        reasons.setdefault(number, {})[why.get(key, "")] = None
    for number, rule in enumerate(rules):
        said = "; ".join(filter(None, reasons.get(number, {})))
        note = counted(counts[number], "key") + (f"; sure: {said}" if said else "")
        yield f"    [{_quoted(rule.old)}, {_quoted(rule.new)}],  # {note}"


def _choice_lines(choice: Choice) -> Iterator[str]:
    what, to = listed(choice.here, 4), listed(choice.there, 4)
    yield f"    # Ambiguous, {counted(choice.keys, 'key')}: {what}"
    if len(choice.here) == len(choice.there) == 1 == len({rule.old for rule in choice.rules}):
        yield f"    # has the shapes of {to}, and nothing else says that it is that:"
    else:
        yield f"    # may be {to}; uncomment one line for each:"
    if not choice.all_choices:
        yield "    # (only those in the order of the files are here)"
    before = ""
    for rule in choice.rules:
        if before and rule.old != before and choice.all_choices:
            yield "    #"
        before = rule.old
        yield f"    # [{_quoted(rule.old)}, {_quoted(rule.new)}],"


def _cut_lines(cut: Cut) -> Iterator[str]:
    parts = f"[{', '.join(map(_quoted, cut.parts))}]"
    what = "its parts one after the other" if not cut.back else "made of these, one after the other"
    yield f"# Ambiguous, {counted(cut.tensors, 'module')}: {visible(cut.whole)} may be {what};"
    yield "# other orders are possible (the rows of each head together). Uncomment both lines:"
    yield "# [[step]]"
    if cut.back:
        yield f"# fuse = {{from = {parts}, to = {_quoted(cut.whole)}}}"
    else:
        yield f"# split = {{from = {_quoted(cut.whole)}, to = {parts}}}"


def _reshape_lines(each: Reshape) -> Iterator[str]:
    sign = "" if each.sure else "# "
    if not each.sure:
        yield f"# Ambiguous, {counted(each.tensors, 'tensor')}: the channels of a patch may be its"
        yield "# first or its last dimension. If they are the first, uncomment both lines:"
    keys = ", ".join(map(_quoted, each.keys))
    yield f"{sign}[[step]]"
    yield (
        f"{sign}reshape = {{keys = [{keys}], shape = {list(each.shape)}, was = {list(each.was)}}}"
    )


def _comments(lines: Iterable[str]) -> list[str]:
    return [f"# {visible(line)}" for line in lines]


def _quoted(name: str) -> str:
    """Write a text in TOML."""
    if "'" not in name and visible(name) == name:
        return f"'{name}'"
    return '"' + "".join(_escaped(letter) for letter in name) + '"'


def _escaped(letter: str) -> str:
    if letter in '"\\':
        return f"\\{letter}"
    return letter if visible(letter) == letter else f"\\U{ord(letter):08x}"
