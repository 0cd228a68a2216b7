"""Pure edits of keys and values, and what they did.

An edit of keys is `old key -> new key, the same key, or None` (dropped). One of values is `key,
value -> pairs of both`: none where the entry is dropped, several where it is split. An edit that
needs to see all entries first (a pattern that must match something, wrappers that all keys share)
is made from them; once made, it is a plain function of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate

from ckptool.errors import EditError, KeyCollision, NothingMatched
from ckptool.pickles.tree import Node
from ckptool.state import casting, wrappers
from ckptool.state.casting import Casting
from ckptool.state.wrappers import BOOKKEEPING, WRAPPERS, Peeling
from ckptool.text import counted, quoted, several

KeyEdit = Callable[[str], str | None]
Value = Node  # a tensor, or what else is in a state_dict
Entries = Mapping[str, Value]
Maker = Callable[[Entries], KeyEdit]  # all entries -> the edit of one key
Change = Callable[[str, Value], Iterable[tuple[str, Value]]]

DEFAULT_PREFIX = "module."
SHAPE_DIFFERS = "shape differs"  # the reason that transfers give
_SENTINEL = "\0some parameter\0"  # stands for "some parameter" where a module path is edited


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What edits did, in order: pairs of old key and new key, None for dropped ones.

    `why` gives for each dropped key the name it had when it was dropped, and the reason; `said`
    tells in words which prefixes came off or on, and how many keys had them. An entry that was
    split has several pairs. `entries` are the values under the new keys, `casts` what was cast.
    """

    pairs: tuple[tuple[str, str | None], ...]
    why: dict[str, tuple[str, str]]
    said: tuple[str, ...] = ()
    entries: dict[str, Value] = field(default_factory=dict, compare=False, repr=False)
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
        return [new for _, new in self.pairs if new is not None]


@dataclass(frozen=True, slots=True)
class Edit:
    """One step of an edit, as the user asked for it: `reason` is what a dropped key is told.

    `change` makes the edit of values, for one that has any; `make` that of keys, which moves the
    paths of modules too.
    """

    name: str
    make: Maker = lambda keys: lambda key: key
    reason: str = ""
    change: Callable[[Entries], Change] | None = None


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
) -> Edit:
    """Take a prefix off the start of each key that has it, once.

    `every` insists that all keys have it; `anywhere` also takes it as whole dotted components
    inside a key. Where all other keys have it, the entries that a wrapper keeps for itself
    (`n_averaged`, `step`, `initted`) are dropped, unless `keep_bookkeeping`. Raises
    `NothingMatched` when made for keys of which none has it.
    """
    wanted = _some_prefix(prefix)

    def strip(key: str) -> str:
        if key.startswith(wanted):
            key = key[len(wanted) :]
        return wrappers.without(key, [wanted]) if anywhere else key

    def make(entries: Entries) -> KeyEdit:
        others = [key for key in entries if strip(key) == key]
        if len(others) == len(entries):
            raise NothingMatched(
                f"no key starts with `{wanted}`" if not anywhere else f"no key holds `{wanted}`",
                evidence=[f"keys are like {key}" for key in _examples(entries)],
                **_prefix_remedy(entries, wanted, all if every else any),
            )
        counters = all(wrappers.is_counter(key, entries[key]) for key in others)
        if every and not counters:
            raise EditError(
                f"{len(others)} of {len(entries)} keys do not start with `{wanted}`",
                evidence=_examples(others),
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
                evidence=[f"keys are like {key}" for key in _examples(entries)],
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
    """Move a dotted prefix, or one key, to another name.

    Raises `NothingMatched` when made for keys of which none is under `old`.
    """
    old, new = old.rstrip("."), new.rstrip(".")

    def move(key: str) -> str:
        if key == old:
            return new
        if old and not key.startswith(old + "."):
            return key
        rest = key[len(old) + 1 :] if old else key
        return f"{new}.{rest}" if new else rest

    def make(entries: Entries) -> KeyEdit:
        if all(move(key) == key for key in entries):
            raise nothing_matched(old, list(entries))
        return move

    return Edit(f"rename {old}={new}", make)


def drop(patterns: str | Iterable[str]) -> Edit:
    """Drop what a pattern or several select; each must select something."""
    wanted = several(patterns)

    def make(entries: Entries) -> KeyEdit:
        selected = select(wanted, list(entries))
        return lambda key: None if key in selected else key

    return Edit("drop", make, "dropped as asked")


def keep(patterns: str | Iterable[str]) -> Edit:
    """Drop all but what a pattern or several select; each must select something."""
    wanted = several(patterns)

    def make(entries: Entries) -> KeyEdit:
        selected = select(wanted, list(entries))
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
) -> Edit:
    """Round the floats, or those of them that `only` selects and `except_` does not, to a dtype.

    `to` is a name of torch or safetensors (`bfloat16`, `bf16`). Integers, complex numbers,
    quantized tensors with their scales and what is no tensor stay as they are; tensors that share
    their storage still do, and Parameters stay Parameters. Where a finite number would become
    infinite, `overflow` says what happens: `refuse`, `inf`, or `clamp` to the largest. Raises
    `EditError` for a dtype of anything else than real floats and for one name of two of a tied
    tensor, and `NothingMatched` when made for keys of which a pattern selects none.
    """
    target = casting.target(to, overflow)

    def change(entries: Entries) -> Change:
        keys = list(entries)
        chosen = select(only, keys) if several(only) else set(keys)
        chosen -= select(except_, keys) if several(except_) else set()
        return casting.cast(entries, target, chosen, overflow)

    return Edit(f"cast {target.label}", change=change)


# The selection language.


def _is_pattern(text: str) -> bool:
    return text.startswith("re:") or any(sign in text for sign in "*?[")


def matcher(pattern: str) -> Callable[[str], bool]:
    """Compile one pattern: a key or dotted prefix, a glob, or a regular expression after `re:`.

    Raises `EditError` for a regular expression that is none.
    """
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            raise EditError(f"`{pattern[3:]}` is not a regular expression: {error}") from None
        return lambda key: expression.fullmatch(key) is not None
    if _is_pattern(pattern):
        glob = re.compile(translate(pattern))
        return lambda key: glob.match(key) is not None
    exact = pattern.rstrip(".")
    return lambda key: key in (exact, pattern) or key.startswith(exact + ".")


def select(patterns: str | Iterable[str], keys: Sequence[str]) -> set[str]:
    """Return the keys that any pattern selects; raises `NothingMatched` for one without any."""
    selected: set[str] = set()
    for pattern in several(patterns):
        matches = matcher(pattern)
        found = {key for key in keys if matches(key)}
        # A key may itself look like a glob: an exact match always counts.
        found |= {pattern} & set(keys)
        if not found:
            raise nothing_matched(pattern, keys)
        selected |= found
    return selected


def nothing_matched(pattern: str, keys: Sequence[str]) -> NothingMatched:
    """Return the error of a pattern that selects nothing, with example keys and close ones."""
    hint = _without_wrappers(pattern, keys)
    if not hint:
        hint = _inside(pattern, keys)
    if not hint:
        close = close_matches(pattern, keys)
        hint = f"did you mean `{close[0]}`?" if close else ""
    return NothingMatched(
        f"`{pattern}` selects none of {counted(len(keys), 'key')}",
        evidence=[f"keys are like {key}" for key in _examples(keys)],
        hint=hint,
    )


def _inside(pattern: str, keys: Sequence[str]) -> str:
    """Offer a glob for a name that is inside keys, or at their end."""
    for wider in (f"*.{pattern}.*", f"*.{pattern}"):
        matches = matcher(wider)
        if count := sum(matches(key) for key in keys):
            return f"`{wider}` selects {counted(count, 'key')}"
    return ""


def _without_wrappers(pattern: str, keys: Sequence[str]) -> str:
    """Offer a pattern as it is after its wrapper prefixes have come off the keys."""
    found = wrappers.peeling([pattern])
    inner = found.name(pattern)
    if not found.prefixes:
        return ""
    matches = matcher(inner)
    count = sum(matches(key) for key in keys)
    if not count:
        return ""
    selects = f"`{inner}` selects {counted(count, 'key')}"
    return f"{selects}: here they have no `{found.prefix}` (transfer peels it first)"


def close_matches(wanted: str, keys: Sequence[str]) -> list[str]:
    """Return keys and dotted prefixes that are spelled like `wanted`."""
    from difflib import get_close_matches

    # Names as they would be written: whole prefixes, and those below a shared first component.
    named: dict[str, str] = {}
    for key in keys[:20_000]:
        steps = key.split(".")
        for depth in range(1, len(steps) + 1):
            path = ".".join(steps[:depth])
            named.setdefault(path, path)
            named.setdefault(".".join(steps[1:depth]) or path, path)
    close = get_close_matches(wanted, list(named)[:20_000], n=3, cutoff=0.7)
    return [named[name] for name in close]


def _examples(given: Iterable[str]) -> list[str]:
    """Pick keys that show what keys look like: first, middle, last."""
    keys = list(given)
    if len(keys) <= 3:
        return keys
    return [keys[0], keys[len(keys) // 2], keys[-1]]


# Applying.


def apply(
    steps: Sequence[Edit], entries: Entries | Sequence[str], source: str = ""
) -> tuple[KeyMap, KeyEdit]:
    """Apply edits one after the other; return what they did, and all of them as one edit of keys.

    `source` is the input as a command names it. Raises what the edits
    raise, and `KeyCollision` where two keys would become one.
    """
    if not isinstance(entries, Mapping):
        entries = dict.fromkeys(entries)
    now = [(key, key, value) for key, value in entries.items()]  # the old key, the new, the value
    why: dict[str, tuple[str, str]] = {}
    made: list[KeyEdit] = []
    said: list[str] = []
    casts: list[Casting] = []
    for step in steps:
        before = [key for _, key, _ in now]
        given = {key: value for _, key, value in now}
        if step.name == "drop":  # what went with a wrapper may be named all the same
            went = (name for name, reason in why.values() if reason == BOOKKEEPING)
            given |= {name.rpartition(".")[2]: None for name in went}
        edit = step.make(given)
        after = [edit(key) for key in before]
        said += edit.said(before) if isinstance(edit, Peeling) else _said(step, before, after)
        made.append(edit)
        if step.change is None:
            moved = [
                (old, new, value)
                for (old, _, value), new in zip(now, after, strict=True)
                if new is not None
            ]
        else:
            change = step.change({key: value for _, key, value in now})
            moved = [(old, *pair) for old, key, value in now for pair in change(key, value)]
            casts += [change] if isinstance(change, Casting) else []
        if len(moved) < len(now) or step.change:
            kept = {old for old, _, _ in moved}
            why |= {old: (key, step.reason) for old, key, _ in now if old not in kept}
        now = moved
    written: dict[str, list[str | None]] = {}
    for old, new, _ in now:
        written.setdefault(old, []).append(new)
    pairs = tuple((old, new) for old in entries for new in written.get(old, (None,)))
    _refuse_collision(pairs, source)

    def all_of(key: str) -> str | None:
        result: str | None = key
        for edit in made:
            if result is None:
                return None
            result = edit(result)
        return result

    values = {new: value for _, new, value in now}
    return KeyMap(pairs, why, tuple(said), values, tuple(casts)), all_of


def _said(step: Edit, before: Sequence[str], after: Sequence[str | None]) -> list[str]:
    """Describe what a step did to the names, where it moved a prefix."""
    moved = [(old, new) for old, new in zip(before, after, strict=True) if new not in (old, None)]
    verb, _, what = step.name.partition(" ")
    if not moved or verb not in ("strip", "add", "rename"):
        return []
    count = f"{len(moved)} of {len(before)} keys"
    if verb == "rename":
        old, _, new = what.partition("=")
        return [f"moved `{old}` to `{new}` in {count}"]
    if verb == "add":
        return [f"added `{what}` to {count}"]
    return [f"stripped `{what}` from {count}"]


def _refuse_collision(pairs: Sequence[tuple[str, str | None]], source: str) -> None:
    taken: dict[str, str] = {}
    for old, new in pairs:
        if new is None:
            continue
        if new == "" != old:
            raise EditError(f"the key {old} would have no name left")
        if new in taken:
            raise KeyCollision(
                f"{taken[new]} and {old} would both become {new}",
                hint=f"drop one first: ckptool convert --drop {quoted(old)} {source} OUT"
                if source
                else f"drop {old} first",
            )
        taken[new] = old


def rekey_modules(
    paths: Sequence[str], key_map: KeyMap, edit: KeyEdit
) -> list[tuple[str | None, str]]:
    """Return which `_metadata` entry is under which module path after an edit, in order.

    A module moves as a parameter directly in it would. An entry goes only when it had keys and
    all of them were dropped; one that moves replaces one that did not (a wrapper's own). The old
    path None stands for an entry to be made anew: the root that an added prefix leaves empty.
    """
    emptied = _emptied(key_map)
    moved: dict[str, str | None] = {}
    for path in paths:
        if path in emptied:
            continue
        new = edit(f"{path}.{_SENTINEL}" if path else _SENTINEL)
        if new is None:
            continue
        place = new.removesuffix(_SENTINEL).removesuffix(".")
        if place not in moved or place != path:
            moved[place] = path
    if "" in paths and "" not in {*moved, *emptied}:
        moved = {"": None, **moved}
    return [(old, new) for new, old in moved.items()]


def _emptied(key_map: KeyMap) -> set[str]:
    """Find the module paths that had keys under them, all of which were dropped."""
    had: set[str] = set()
    kept: set[str] = set()
    for old, new in key_map.pairs:
        steps = old.split(".")
        paths = {".".join(steps[:depth]) for depth in range(len(steps))}
        had |= paths
        if new is not None:
            kept |= paths
    return had - kept
