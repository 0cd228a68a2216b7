"""Pure edits of keys and values, and what they did.

An edit of keys is `old key -> new key, the same key, or None` (dropped). One of values makes of all
entries others: a tensor that is split becomes several, those that are joined become one. An edit
that needs to see all entries first (a pattern that must match something, wrappers that all keys
share) is made from them; once made, an edit of keys is a plain function of one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptool.errors import EditError, KeyCollision, NothingMatched
from ckptool.pickles.tree import Node
from ckptool.state import casting, wrappers
from ckptool.state.casting import Casting
from ckptool.state.renaming import Renaming, Rule
from ckptool.state.selecting import close_matches, examples, nothing_matched, select as select
from ckptool.state.wrappers import BOOKKEEPING, WRAPPERS, Peeling
from ckptool.tensors import values
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, listed, quoted, several

KeyEdit = Callable[[str], str | None]
Value = Node  # a tensor, or what else is in a state_dict
Entries = Mapping[str, Value]
Maker = Callable[[Entries], KeyEdit]  # all entries -> the edit of one key
Move = tuple[tuple[str, ...], str, Value]  # the keys it is made of, the new key, the value

DEFAULT_PREFIX = "module."
AUTO = "auto"  # the prefix that is every known wrapper
SHAPE_DIFFERS = "shape differs"  # the reason that transfers give
_SENTINEL = "\0some parameter\0"  # stands for "some parameter" where a module path is edited


@dataclass(frozen=True, slots=True)
class Count:
    """How many entries a rule of a step took; `rule` is as the user wrote it.

    `number` is that of the step in its recipe, from 1 on.
    """

    step: str
    rule: str
    count: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What a step makes of all entries, in the order of the output.

    A key without a move is dropped, `why` tells under which name and for which reason. `edit`
    moves the paths of modules, `remade` are new keys of tensors that were cut, joined or
    rearranged, `matched` the keys that a rule took, changed or not, and the rule.
    """

    moves: Sequence[Move]
    said: Sequence[str] = ()
    edit: KeyEdit = lambda key: key
    why: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    remade: Collection[str] = ()
    matched: Mapping[str, str] = field(default_factory=dict)
    counts: Sequence[Count] = ()
    casts: Sequence[Casting] = ()


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What edits did, in order: pairs of old key and new key, None for dropped ones.

    `why` gives for each dropped key the name it had when it was dropped, and the reason; `said`
    tells in words what each step did, `counts` in numbers. An entry that was split has several
    pairs, and one that was joined is the new key of several; `remade` are the old keys of those,
    and `unmatched` those that no rule took. `entries` are the values under the new keys, `casts`
    what was cast.
    """

    pairs: tuple[tuple[str, str | None], ...]
    why: dict[str, tuple[str, str]]
    said: tuple[str, ...] = ()
    entries: dict[str, Value] = field(default_factory=dict, compare=False, repr=False)
    remade: frozenset[str] = frozenset()
    unmatched: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()
    casts: tuple[Casting, ...] = field(default=(), compare=False, repr=False)

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """List the keys that are kept under another name."""
        return [(old, new) for old, new in self.pairs if new is not None and new != old]

    @property
    def dropped(self) -> list[str]:
        """List the keys that are not kept."""
        return [old for old, new in self.pairs if new is None]

    @property
    def written(self) -> list[str]:
        """List the new keys in order."""
        return list(dict.fromkeys(new for _, new in self.pairs if new is not None))


@dataclass(frozen=True, slots=True)
class Edit:
    """One step of an edit, as the user asked for it: `reason` is what a dropped key is told.

    `make` makes an edit of keys, `change`, where there is one, that of values and keys. `where`
    names the step in errors, where it is one of several, and `number` says which it is.
    """

    name: str
    make: Maker = lambda keys: lambda key: key
    reason: str = ""
    change: Callable[[Entries], Change] | None = None
    where: str = ""
    number: int = 0


def with_dot(prefix: str) -> str:
    """Complete a prefix: `module` means `module.`."""
    return prefix if not prefix or prefix.endswith(".") else prefix + "."


def _some_prefix(prefix: str) -> str:
    if not prefix:
        raise EditError("the prefix is empty: nothing to do")
    return with_dot(prefix)


def strip_prefix(
    prefix: str = DEFAULT_PREFIX,
    *,
    every: bool = False,
    anywhere: bool = False,
    keep_bookkeeping: bool = False,
    required: bool = True,
) -> Edit:
    """Take a prefix off the start of each key that has it, once.

    `every` insists that all keys have it; `anywhere` also takes it as whole dotted components
    inside a key. Where all other keys have it, the entries that a wrapper keeps for itself
    (`n_averaged`, `step`, `initted`) are dropped, unless `keep_bookkeeping`. Raises
    `NothingMatched` when made for keys of which none has it, if that is `required`.
    """
    wanted = _some_prefix(prefix)

    def strip(key: str) -> str:
        if key.startswith(wanted):
            key = key[len(wanted) :]
        return wrappers.without(key, [wanted]) if anywhere else key

    def make(entries: Entries) -> KeyEdit:
        others = [key for key in entries if strip(key) == key]
        if len(others) == len(entries):
            if not required:
                return strip
            raise NothingMatched(
                f"no key starts with `{wanted}`" if not anywhere else f"no key holds `{wanted}`",
                evidence=[f"keys are like {key}" for key in examples(entries)],
                **_prefix_remedy(entries, wanted, all if every else any),
            )
        counters = all(wrappers.is_counter(key, entries[key]) for key in others)
        if every and not counters:
            raise EditError(
                f"{len(others)} of {len(entries)} keys do not start with `{wanted}`",
                evidence=examples(others),
                hint="without --every, those that do are stripped",
            )
        gone = set(others) if counters and not keep_bookkeeping else set()
        return lambda key: None if key in gone else strip(key)

    return Edit(f"strip {wanted}", make, BOOKKEEPING)


def _prefix_remedy(
    entries: Entries, wanted: str, enough: Callable[[Iterable[bool]], bool]
) -> dict[str, str]:
    """Return the option that would help, and why, or a hint alone."""
    found = wrappers.peeling(entries)
    if found.prefixes:
        why = f"every key starts with `{found.prefix}`"
        return {"option": f"--prefix {found.prefix}", "hint": why}
    if entries and enough(f".{wanted}" in key for key in entries):
        return {"option": "--anywhere", "hint": f"`{wanted}` is inside keys"}
    close = [] if wanted in WRAPPERS else close_matches(wanted.rstrip("."), list(entries))
    if close:
        return {"hint": f"did you mean `{close[0]}`?"}
    return _shared_by_most(entries)


def strip_wrappers(
    *, required: bool = True, anywhere: bool = False, keep_bookkeeping: bool = False
) -> Edit:
    """Peel every known wrapper that all keys share, in any order, repeatedly.

    Those that begin with `_` come off inside keys too, and all of them with `anywhere`. What a
    wrapper keeps for itself is dropped, unless `keep_bookkeeping`. Raises `NothingMatched` when
    made for keys that have none, if that is `required`.
    """

    def make(entries: Entries) -> KeyEdit:
        found = wrappers.peeling(entries, anywhere=anywhere, keep=keep_bookkeeping)
        if not found and required:
            raise NothingMatched(
                "no known wrapper prefix that all keys share",
                evidence=[f"keys are like {key}" for key in examples(entries)],
                **_shared_by_most(entries),
            )
        return found

    return Edit("strip wrappers", make, BOOKKEEPING)


def _shared_by_most(entries: Entries) -> dict[str, str]:
    """Return the remedy where some keys have a wrapper, at their start or inside."""
    inside = any(f".{DEFAULT_PREFIX}" in key for key in entries)
    if inside and DEFAULT_PREFIX not in wrappers.submodules(entries):
        why = f"`{DEFAULT_PREFIX}` is inside keys"
        return {"option": f"--prefix {DEFAULT_PREFIX} --anywhere", "hint": why}
    for prefix in WRAPPERS:
        count = sum(key.startswith(prefix) for key in entries)
        if count:
            why = f"{count} of {counted(len(entries), 'key')} start with `{prefix}`"
            return {"option": f"--prefix {prefix}", "hint": why}
    return {"hint": "no known wrapper prefix on any key: nothing to strip"} if entries else {}


def add_prefix(prefix: str = DEFAULT_PREFIX) -> Edit:
    """Put a prefix before every key."""
    wanted = _some_prefix(prefix)
    return Edit(f"add {wanted}", lambda keys: lambda key: wanted + key)


def rename(old: str, new: str) -> Edit:
    """Move a key or dotted prefix, or what a template or regular expression matches.

    The rules are those of `--rename OLD=NEW`. Raises `NothingMatched` when made for keys of which
    the rule takes none, and `EditError` for a rule that cannot be read.
    """
    return renames([(old, new)])


Pairs = Iterable[tuple[str, str]]


def renames(rules: Pairs, *, optional: bool = False, back: Renaming | None = None) -> Edit:
    """Rename keys by rules, of which each sees the key as it was, and the first that fits wins.

    Each rule must take something, unless they are `optional`. `back` are the rules the other way
    round: where they do not lead back to a key, it is refused. Raises also `KeyCollision`.
    """
    renaming = Renaming([Rule(*pair) for pair in rules])

    def change(entries: Entries) -> Change:
        found = {key: match for key in entries if (match := renaming.match(key))}
        counts = [0] * len(renaming.rules)
        for number, _ in found.values():
            counts[number] += 1
        if not optional:
            _refuse_idle(renaming, counts, list(entries))
        if back is not None:
            _refuse_no_way(renaming, back, found)
        moves = [((key,), found[key][1] if key in found else key, entries[key]) for key in entries]
        pairs = list(zip(renaming.rules, counts, strict=True))
        of = f"of {len(entries)} keys"
        said = [f"moved `{r.old}` to `{r.new}` in {count} {of}" for r, count in pairs if count]
        numbers = [Count("rename", str(rule), count) for rule, count in pairs]
        matched = {key: numbers[number].rule for key, (number, _) in found.items()}
        return Change(moves, said, renaming, matched=matched, counts=numbers)

    return Edit("rename", change=change)


Found = Mapping[str, tuple[int, str]]  # for a key the number of the rule, and the new key


def _refuse_idle(renaming: Renaming, counts: Sequence[int], keys: Sequence[str]) -> None:
    """Raise an error for a rule that takes nothing."""
    for number, (rule, count) in enumerate(zip(renaming.rules, counts, strict=True)):
        if count:
            continue
        alone = Renaming([rule])
        taken = [match[0] for key in keys if alone.match(key) and (match := renaming.match(key))]
        if not taken:
            raise nothing_matched(rule.old, keys).within(renaming.place(number))
        first = renaming.rules[taken[0]]
        raise EditError(
            f"`{rule}` takes nothing: {counted(len(taken), 'key')} that it matches went to the "
            f"rules before it, such as `{first}`",
            hint="the first rule that matches a key takes it: put the narrow ones first",
        ).within(renaming.place(number))


def _refuse_no_way(renaming: Renaming, back: Renaming, found: Found) -> None:
    for key, (number, new) in found.items():
        if back(new) != key:
            raise EditError(
                f"`{renaming.rules[number]}` would make {new} of {key}, which the recipe makes "
                f"{back(new)} of"
            ).within(renaming.place(number))


def drop(patterns: str | Iterable[str], *, optional: bool = False) -> Edit:
    """Drop what a pattern or several select; each must select something, unless `optional`."""
    wanted = several(patterns)

    def make(entries: Entries) -> KeyEdit:
        selected = select(wanted, list(entries), optional=optional)
        return lambda key: None if key in selected else key

    return Edit("drop", make, "dropped as asked")


def keep(patterns: str | Iterable[str], *, optional: bool = False) -> Edit:
    """Drop all but what patterns select; each must select something, unless `optional`."""
    wanted = several(patterns)

    def make(entries: Entries) -> KeyEdit:
        selected = select(wanted, list(entries), optional=optional)
        return lambda key: key if key in selected or key.endswith(_SENTINEL) else None

    return Edit("keep", make, "not among those to keep")


def without(unwanted: str | Iterable[str], reason: str) -> Edit:
    """Drop exactly the keys given, for a reason that is reported."""
    dropped = frozenset(several(unwanted))
    return Edit("without", lambda keys: lambda key: None if key in dropped else key, reason)


# Edits of values.


def cast(
    to: str,
    *,
    only: str | Iterable[str] = (),
    except_: str | Iterable[str] = (),
    overflow: str = "refuse",
    optional: bool = False,
) -> Edit:
    """Round the floats, or those of them that `only` selects and `except_` does not, to a dtype.

    `to` is a name of torch or safetensors (`bfloat16`, `bf16`). Integers, complex numbers,
    quantized tensors with their scales and what is no tensor stay as they are; tensors that share
    their storage still do, and Parameters stay Parameters. Where a finite number would become
    infinite, `overflow` says what happens: `refuse`, `inf`, or `clamp` to the largest. Raises
    `EditError` for a dtype of anything else than real floats and for one name of two of a tied
    tensor, and `NothingMatched` when made for keys of which a pattern selects none, unless that is
    `optional`.
    """
    target = casting.target(to, overflow)

    def change(entries: Entries) -> Change:
        keys = list(entries)
        chosen = select(only, keys, optional=optional) if several(only) else set(keys)
        chosen -= select(except_, keys, optional=optional)
        done = casting.cast(entries, target, chosen, overflow)
        moves = [
            ((key,), key, done.tensors[key][1] if key in done.tensors else value)
            for key, value in entries.items()
        ]
        counts = [Count("cast", f"to {target.label}", len(done.tensors))]
        return Change(moves, counts=counts, casts=[done])

    return Edit(f"cast {target.label}", change=change)


# Applying.


@dataclass(slots=True)
class _Entry:
    """An entry on its way: the keys of the input it is made of, and whether it was remade."""

    olds: tuple[str, ...]
    value: Value
    remade: bool = False


def apply(
    steps: Sequence[Edit], entries: Entries | Sequence[str], source: str = ""
) -> tuple[KeyMap, KeyEdit]:
    """Apply edits one after the other; return what they did, and all of them as one edit of keys.

    `source` is the input as a command names it. Raises what the edits
    raise, and `KeyCollision` where two keys would become one.
    """
    if not isinstance(entries, Mapping):
        entries = dict.fromkeys(entries)
    now = {key: _Entry((key,), value) for key, value in entries.items()}
    why: dict[str, tuple[str, str]] = {}
    key_edits, said, counts, casts = list[KeyEdit](), list[str](), list[Count](), list[Casting]()
    matched: set[str] = set()
    for step in steps:
        try:
            change = _changed(step, {key: each.value for key, each in now.items()}, why)
            after = _after(change, now, source)
        except EditError as error:
            raise error.within(step.where) from None
        key_edits.append(change.edit)
        said += change.said
        casts += change.casts
        counts += [replace(each, number=each.number or step.number) for each in change.counts]
        for cast in change.casts:
            cast.where = cast.where or step.where
        matched.update(old for key in change.matched for old in now[key].olds)
        used = {key for sources, _, _ in change.moves for key in sources}
        if gone := [key for key in now if key not in used]:
            kept = {old for each in after.values() for old in each.olds}
            told = {key: change.why.get(key, (key, step.reason)) for key in gone}
            lost = ((old, key) for key in gone for old in now[key].olds if old not in kept)
            why = {old: told[key] for old, key in lost} | why
        now = after
    written: dict[str, list[str | None]] = {}
    for new, each in now.items():
        for old in each.olds:
            written.setdefault(old, []).append(new)
    _own(now)
    key_map = KeyMap(
        pairs=tuple((old, new) for old in entries for new in written.get(old, (None,))),
        why=why,
        said=tuple(said),
        entries={key: each.value for key, each in now.items()},
        remade=frozenset(old for each in now.values() if each.remade for old in each.olds),
        unmatched=tuple(old for old in entries if old in written and old not in matched),
        counts=tuple(counts),
        casts=tuple(casts),
    )

    def all_of(key: str) -> str | None:
        result: str | None = key
        for edit in key_edits:
            if result is None:
                return None
            result = edit(result)
        return result

    return key_map, all_of


def _own(entries: Mapping[str, _Entry]) -> None:
    """Give what was remade storages that hold nothing else; what is one tensor stays one."""
    owned: dict[tuple[object, ...], Value] = {}
    for key, each in entries.items():
        if each.remade and isinstance(each.value, TensorInfo):
            view = each.value.view
            try:
                each.value = owned[view] = owned.get(view) or values.own(each.value)
            except ValueError as error:
                raise EditError(f"{key}: {error}") from None


def _changed(step: Edit, entries: Entries, why: Mapping[str, tuple[str, str]]) -> Change:
    """Return what a step makes of entries."""
    if step.change is not None:
        return step.change(entries)
    given = dict(entries)
    if step.name == "drop":  # what went with a wrapper may be named all the same
        went = (name for name, reason in why.values() if reason == BOOKKEEPING)
        given |= {name.rpartition(".")[2]: None for name in went}
    edit = step.make(given)
    after = {key: edit(key) for key in entries}
    said = edit.said(list(entries)) if isinstance(edit, Peeling) else _said(step, after)
    moves = [((key,), new, entries[key]) for key, new in after.items() if new is not None]
    matched = {key: step.name for key, new in after.items() if new != key}
    return Change(moves, said, edit, matched=matched)


def _after(change: Change, now: Mapping[str, _Entry], source: str) -> dict[str, _Entry]:
    """Return the entries after a step; raises an error where two would have one key."""
    after: dict[str, _Entry] = {}
    for sources, new, value in change.moves:
        if new == "" and not any("" in now[key].olds for key in sources):
            raise EditError(f"the key {sources[0]} would have no name left")
        if new in after:
            raise _collision(change, new, source)
        one = now[sources[0]]
        if len(sources) == 1 and value is one.value and new not in change.remade:
            after[new] = one
            continue
        before = [now[key] for key in sources]
        olds = dict.fromkeys(old for each in before for old in each.olds)
        remade = new in change.remade or any(each.remade for each in before)
        after[new] = _Entry(tuple(olds), value, remade)
    return after


def _collision(change: Change, new: str, source: str) -> EditError:
    """Return the error of keys that would become one, with the rules that make them so."""
    first, second, *_ = [sources for sources, made, _ in change.moves if made == new]
    if first == second:
        return KeyCollision(f"{listed(first)} would become {new} twice")
    both = [next((key for key in keys if key != new), new) for keys in (first, second)]
    rules = {key: change.matched[key] for key in both if key in change.matched}
    return KeyCollision(
        f"{both[0]} and {both[1]} would both become {new}",
        evidence=[f"{key}: by `{rule}`" for key, rule in rules.items()],
        hint=f"drop one first: ckptool convert --drop {quoted(both[1])} {source} OUT"
        if source
        else f"drop {both[1]} first",
    )


def _said(step: Edit, after: Mapping[str, str | None]) -> list[str]:
    """Describe what a step did to the names, where it moved a prefix."""
    count = sum(new not in (old, None) for old, new in after.items())
    verb, _, what = step.name.partition(" ")
    if not count or verb not in ("strip", "add"):
        return []
    done = {"strip": f"stripped `{what}` from", "add": f"added `{what}` to"}[verb]
    return [f"{done} {count} of {len(after)} keys"]


def rekey_modules(
    paths: Sequence[str], key_map: KeyMap, edit: KeyEdit
) -> list[tuple[str | None, str]]:
    """Return which `_metadata` entry is under which module path after an edit, in order.

    A module that has tensors of its own goes where they go, another where a parameter in it would.
    An entry goes only when it had keys and none of them is kept, or all are elsewhere; one that
    moves replaces one that did not (a wrapper's own). The old path None stands for an entry to be
    made anew: the root that an added prefix leaves empty.
    """
    had, homes, filled = set[str](), dict[str, dict[str, None]](), set[str]()
    for old, new in key_map.pairs:
        had.update(_modules(old))
        if new is not None:
            filled.update(_modules(new))
            homes.setdefault(_module(old), {})[_module(new)] = None
    moved: dict[str, str | None] = {}
    for path in paths:
        places = homes.get(path) or _moved(path, edit)
        for place in sorted(places, key=lambda place: place != path):
            if path in had and place not in filled:
                continue
            if place not in moved or place != path:
                moved[place] = path
    if "" in paths and "" not in moved and (filled or "" not in had):
        moved = {"": None, **moved}
    return [(old, new) for new, old in moved.items()]


def _moved(path: str, edit: KeyEdit) -> tuple[str, ...]:
    """Return where an edit moves a module, by what becomes of a parameter in it."""
    new = edit(f"{path}.{_SENTINEL}" if path else _SENTINEL)
    if new is None or not new.endswith(_SENTINEL):
        return ()
    return (new.removesuffix(_SENTINEL).removesuffix("."),)


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _modules(key: str) -> list[str]:
    """List the modules that a key is in, the root first."""
    steps = key.split(".")
    return [".".join(steps[:depth]) for depth in range(len(steps))]
