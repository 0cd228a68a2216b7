"""Pure edits of keys and values, and what they did.

An edit of keys is `old key -> new key, the same key, or None` (dropped). One of values makes of all
entries others: a tensor that is split becomes several, those that are joined become one. An edit
that needs to see all entries first (a pattern that must match something, wrappers that all keys
share) is made from them; once made, an edit of keys is a plain function of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptool.errors import EditError, NothingMatched
from ckptool.state import casting, wrappers
from ckptool.state.applying import apply as apply, rekey_modules as rekey_modules
from ckptool.state.changes import (
    PARAMETER,
    Change as Change,
    Count as Count,
    Edit as Edit,
    Entries as Entries,
    KeyEdit as KeyEdit,
    KeyMap as KeyMap,
    Move as Move,
    Value as Value,
)
from ckptool.state.selecting import close_matches, examples, nothing_matched, select as select
from ckptool.state.wrappers import BOOKKEEPING, WRAPPERS
from ckptool.text import counted, several

if TYPE_CHECKING:
    from ckptool.state.renaming import Renaming

DEFAULT_PREFIX = "module."
AUTO = "auto"  # the prefix that is every known wrapper
SHAPE_DIFFERS = "shape differs"  # the reason that transfers give


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
                f"no key starts with `{wanted}`" if not anywhere else f"no key contains `{wanted}`",
                evidence=[f"keys look like {key}" for key in examples(entries)],
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
                evidence=[f"keys look like {key}" for key in examples(entries)],
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
    from ckptool.state.renaming import Renaming, Rule

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
    from ckptool.state.renaming import Renaming

    for number, (rule, count) in enumerate(zip(renaming.rules, counts, strict=True)):
        if count:
            continue
        alone = Renaming([rule])
        taken = [match[0] for key in keys if alone.match(key) and (match := renaming.match(key))]
        if not taken:
            error = nothing_matched(rule.old, keys)
            before = [each for each in renaming.rules if each.new == rule.old]
            if before:
                error.hint = f"rules of one step see keys as they were: {before[0].old}={rule.new}"
            raise error.within(renaming.place(number))
        first = renaming.rules[taken[0]]
        raise EditError(
            f"`{rule}` takes nothing: {counted(len(taken), 'key')} that it matches went to the "
            f"rules before it, such as `{first}`",
            hint="the first rule that matches a key is applied: put narrow rules first",
        ).within(renaming.place(number))


def _refuse_no_way(renaming: Renaming, back: Renaming, found: Found) -> None:
    for key, (number, new) in found.items():
        if back(new) != key:
            raise EditError(
                f"`{renaming.rules[number]}` would turn {key} into {new}, which the recipe turns "
                f"into {back(new)}"
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
        return lambda key: key if key in selected or key.endswith(PARAMETER) else None

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
