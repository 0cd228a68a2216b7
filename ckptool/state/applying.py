"""Apply edits one after the other: to keys, to values, and to the paths of modules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

from ckptool.errors import EditError, KeyCollision
from ckptool.records import dataclass, grouped
from ckptool.state.casting import Casting
from ckptool.state.changes import PARAMETER, Change, Count, Edit, Entries, KeyEdit, KeyMap, Value
from ckptool.state.selecting import select as select
from ckptool.state.wrappers import BOOKKEEPING, Peeling
from ckptool.tensors import values
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import listed, quoted


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
    notes: list[str] = []
    matched: set[str] = set()
    for step in steps:
        try:
            change = _changed(step, {key: each.value for key, each in now.items()}, why)
            after = _after(change, now, source)
        except EditError as error:
            raise error.within(step.where) from None
        key_edits.append(change.edit)
        said += change.said
        notes += change.notes
        casts += change.casts
        counts += [replace(each, number=each.number or step.number) for each in change.counts]
        for cast in change.casts:
            cast.where = ", ".join(filter(None, (step.where, cast.where)))
        matched.update(chain.from_iterable(now[key].olds for key in change.matched))
        used = set(chain.from_iterable(sources for sources, _, _ in change.moves))
        if gone := [key for key in now if key not in used] if len(used) < len(now) else []:
            kept = {old for each in after.values() for old in each.olds}
            told = {key: change.why.get(key, (key, step.reason)) for key in gone}
            lost = ((old, key) for key in gone for old in now[key].olds if old not in kept)
            why = {old: told[key] for old, key in lost} | why
        now = after
    _own(now)
    _note_remade(casts, now)
    pairs = _in_order(entries, [(old, new) for new, each in now.items() for old in each.olds])
    unmatched = (
        {old: None for old, new in pairs if new is not None and old not in matched}
        if len(matched) < len(entries)
        else ()
    )
    key_map = KeyMap(
        pairs=tuple(pairs),
        why=why,
        said=tuple(said),
        entries={key: each.value for key, each in now.items()},
        remade=frozenset(old for each in now.values() if each.remade for old in each.olds),
        unmatched=tuple(unmatched),
        counts=tuple(counts),
        casts=tuple(casts),
        notes=tuple(notes),
    )

    def all_of(key: str) -> str | None:
        result: str | None = key
        for edit in key_edits:
            if result is None:
                return None
            result = edit(result)
        return result

    return key_map, all_of


def _in_order(
    entries: Iterable[str], pairs: list[tuple[str, str | None]]
) -> list[tuple[str, str | None]]:
    """Return pairs in the order of their old keys, those too that have no new one."""
    if [old for old, _ in pairs] == list(entries):
        return pairs
    written = grouped(pairs)
    return [(old, new) for old in entries for new in written.get(old, (None,))]


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


def _note_remade(casts: Iterable[Casting], entries: Mapping[str, _Entry]) -> None:
    """Note which tensors that were cast are not in the output as they are."""
    if casts:
        values = (each.value for each in entries.values())
        written = {id(each.storage) for each in values if isinstance(each, TensorInfo)}
    for cast in casts:
        made = cast.tensors.items()
        cast.remade = {key for key, (_, after) in made if id(after.storage) not in written}


def _changed(step: Edit, entries: Entries, why: Mapping[str, tuple[str, str]]) -> Change:
    """Return what a step makes of entries."""
    if step.change is not None:
        return step.change(entries)
    given = entries
    if step.name == "drop":  # what went with a wrapper may be named all the same
        went = (name for name, reason in why.values() if reason == BOOKKEEPING)
        given = {**entries, **{name.rpartition(".")[2]: None for name in went}}
    edit = step.make(given)
    after = {key: edit(key) for key in entries}
    said = edit.said(list(entries)) if isinstance(edit, Peeling) else _said(step, after)
    moves = [((key,), new, entries[key]) for key, new in after.items() if new is not None]
    keeps = step.name == "keep"
    matched = {key: step.name for key, new in after.items() if keeps or new != key}
    taken = len(moves) if keeps else len(matched)
    counts = [Count(step.name.partition(" ")[0], step.rule, taken)] if step.rule else []
    return Change(moves, said, edit, matched=matched, counts=counts)


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
    last = new if new in both else both[1]  # what moves there is wanted more than what is there
    return KeyCollision(
        f"{both[0]} and {both[1]} would both become {new}",
        evidence=[f"{key}: by `{rule}`" for key, rule in rules.items()],
        hint=f"drop one first: ckptool convert --drop {quoted(last)} {source} OUT"
        if source
        else f"drop {last} first",
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
    new = edit(f"{path}.{PARAMETER}" if path else PARAMETER)
    if new is None or not new.endswith(PARAMETER):
        return ()
    return (new.removesuffix(PARAMETER).removesuffix("."),)


def _module(key: str) -> str:
    return key.rpartition(".")[0]


def _modules(key: str) -> list[str]:
    """List the modules that a key is in, the root first."""
    steps = key.split(".")
    return [".".join(steps[:depth]) for depth in range(len(steps))]
