"""Pure edits of keys and values, and what they did.

An edit of keys is `old key -> new key, the same key, or None` (dropped). One of values is `key,
value -> pairs of both`: none where the entry is dropped, several where it is split. An edit that
needs to see all entries first (a pattern that must match something, wrappers that all keys share)
is made from them; once made, it is a plain function of one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import translate

from ckptool.errors import EditError, KeyCollision, NothingMatched
from ckptool.pickles.tree import Node
from ckptool.tensors import dtype as dtypes
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, quoted, several

KeyEdit = Callable[[str], str | None]
Maker = Callable[[Sequence[str]], KeyEdit]  # all keys -> the edit of one
Value = Node  # a tensor, or what else is in a state_dict
Entries = Mapping[str, Value]
Change = Callable[[str, Value], Iterable[tuple[str, Value]]]

DEFAULT_PREFIX = "module."
SHAPE_DIFFERS = "shape differs"  # the reason that transfers give
# The prefixes of known wrappers, and who puts them there.
WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric",
    "_module.": "Opacus",
}
_SENTINEL = "\0some parameter\0"  # stands for "some parameter" where a module path is edited


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What edits did, in order: pairs of old key and new key, None for dropped ones.

    `why` gives for each dropped key the name it had when it was dropped, and the reason; `said`
    tells in words which prefixes came off or on, and how many keys had them. An entry that was
    split has several pairs. `entries` are the values under the new keys.
    """

    pairs: tuple[tuple[str, str | None], ...]
    why: dict[str, tuple[str, str]]
    said: tuple[str, ...] = ()
    entries: dict[str, Value] = field(default_factory=dict, compare=False, repr=False)

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
    prefix: str = DEFAULT_PREFIX, *, every: bool = False, anywhere: bool = False
) -> Edit:
    """Take a prefix off the start of each key that has it, once.

    `every` insists that all keys have it; `anywhere` also takes it as whole dotted components
    inside a key. Raises `NothingMatched` when made for keys of which none has it.
    """
    wanted = _some_prefix(prefix)

    def strip(key: str) -> str:
        if key.startswith(wanted):
            key = key[len(wanted) :]
        return _without_components(key, wanted) if anywhere else key

    def make(keys: Sequence[str]) -> KeyEdit:
        having = [key for key in keys if strip(key) != key]
        if not having:
            raise NothingMatched(
                f"no key starts with `{wanted}`" if not anywhere else f"no key holds `{wanted}`",
                evidence=[f"keys are like {key}" for key in _examples(keys)],
                **_prefix_remedy(keys, wanted, all if every else any),
            )
        if every and len(having) < len(keys):
            others = [key for key in keys if strip(key) == key]
            raise EditError(
                f"{len(others)} of {len(keys)} keys do not start with `{wanted}`",
                evidence=_examples(others),
                hint="without --every, those that do are stripped",
            )
        return strip

    return Edit(f"strip {wanted}", make)


def _without_components(key: str, wanted: str) -> str:
    """Take whole dotted components out of the inside of a key."""
    steps, middle = key.split("."), wanted[:-1].split(".")
    at = 0
    while at + len(middle) < len(steps):
        if steps[at : at + len(middle)] == middle:
            del steps[at : at + len(middle)]
        else:
            at += 1
    return ".".join(steps)


def _prefix_remedy(
    keys: Sequence[str], wanted: str, enough: Callable[[Iterable[bool]], bool]
) -> dict[str, str]:
    """Return the option that would help, and why, or a hint alone."""
    wrappers = peeled(keys)
    if wrappers:
        prefix = "".join(wrappers)
        return {"option": f"--prefix {prefix}", "hint": f"every key starts with `{prefix}`"}
    if keys and enough(f".{wanted}" in key for key in keys):
        return {"option": "--anywhere", "hint": f"`{wanted}` is inside keys"}
    close = [] if wanted in WRAPPERS else close_matches(wanted.rstrip("."), keys)
    if close:
        return {"hint": f"did you mean `{close[0]}`?"}
    return _shared_by_most(keys)


def peeled(keys: Sequence[str]) -> list[str]:
    """List the wrapper prefixes that all keys share, outermost first."""
    found: list[str] = []
    offset = 0
    while keys:
        wrapper = next(
            (each for each in WRAPPERS if all(key.startswith(each, offset) for key in keys)), None
        )
        if wrapper is None or any(len(key) == offset + len(wrapper) for key in keys):
            break
        found.append(wrapper)
        offset += len(wrapper)
    return found


def strip_wrappers(*, required: bool = True) -> Edit:
    """Peel every known wrapper that all keys share, in any order, repeatedly.

    Raises `NothingMatched` when made for keys that share none, if that is `required`.
    """

    def make(keys: Sequence[str]) -> KeyEdit:
        wrappers = peeled(keys)
        if not wrappers and required:
            raise NothingMatched(
                "no known wrapper prefix that all keys share",
                evidence=[f"keys are like {key}" for key in _examples(keys)],
                **_shared_by_most(keys),
            )
        return lambda key: unwrapped(key, wrappers)

    return Edit("strip wrappers", make)


def unwrapped(key: str, wrappers: Sequence[str]) -> str:
    """Take wrapper prefixes off a key, one after the other."""
    for wrapper in wrappers:
        key = key.removeprefix(wrapper)
    return key


def _shared_by_most(keys: Sequence[str]) -> dict[str, str]:
    for wrapper in WRAPPERS:
        count = sum(key.startswith(wrapper) for key in keys)
        if count:
            why = f"{count} of {counted(len(keys), 'key')} start with `{wrapper}`"
            return {"option": f"--prefix {wrapper}", "hint": why}
    return {"hint": "no known wrapper prefix on any key: nothing to strip"} if keys else {}


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

    def make(keys: Sequence[str]) -> KeyEdit:
        if all(move(key) == key for key in keys):
            raise nothing_matched(old, keys)
        return move

    return Edit(f"rename {old}={new}", make)


def drop(patterns: str | Iterable[str]) -> Edit:
    """Drop what a pattern or several select; each must select something."""
    wanted = several(patterns)

    def make(keys: Sequence[str]) -> KeyEdit:
        selected = select(wanted, keys)
        return lambda key: None if key in selected else key

    return Edit("drop", make, "dropped as asked")


def keep(patterns: str | Iterable[str]) -> Edit:
    """Drop all but what a pattern or several select; each must select something."""
    wanted = several(patterns)

    def make(keys: Sequence[str]) -> KeyEdit:
        selected = select(wanted, keys)
        return lambda key: key if key in selected or key.endswith(_SENTINEL) else None

    return Edit("keep", make, "not among those to keep")


def without(unwanted: Iterable[str], reason: str) -> Edit:
    """Drop exactly the keys given, for a reason that is reported."""
    dropped = frozenset(unwanted)
    return Edit("without", lambda keys: lambda key: None if key in dropped else key, reason)


# Edits of values.


def cast(dtype: str, *, only: str | Iterable[str] = (), except_: str | Iterable[str] = ()) -> Edit:
    """Round the floats, or those of them that `only` selects and `except_` does not, to a dtype.

    `dtype` is a name of torch or safetensors (`bfloat16`, `bf16`). Integers, complex numbers and
    what is no tensor stay as they are; tensors that share their storage still do, and Parameters
    stay Parameters; other attributes that Python keeps on a tensor are not carried. Raises
    `EditError` for a dtype of anything else than real floats, and `NothingMatched` when made for
    keys of which a pattern selects none.
    """
    from ckptool.pickles.torch_objects import is_parameter
    from ckptool.tensors import numbers, values

    target = _real_float(dtype)

    def make(entries: Entries) -> Change:
        keys = list(entries)
        chosen = select(only, keys) if several(only) else set(keys)
        chosen -= select(except_, keys) if several(except_) else set()
        made: values.Made = {}
        known: dict[int, TensorInfo] = {}  # one tensor under two keys stays one

        def change(key: str, value: Value) -> Iterable[tuple[str, Value]]:
            if (
                key not in chosen
                or not isinstance(value, TensorInfo)
                or value.dtype not in numbers.REAL_FLOATS - {target}
            ):
                return ((key, value),)
            if id(value) not in known:
                kernel = numbers.cast(value.dtype, target)
                rounded = values.elementwise(kernel, [value], target, made)
                origin = value.origin if is_parameter(value) else None
                known[id(value)] = replace(rounded, origin=origin)
            return ((key, known[id(value)]),)

        return change

    return Edit(f"cast {target.label}", change=make)


def _real_float(name: str) -> DType:
    from ckptool.tensors import numbers

    label = name.lower().replace("fp", "f")
    found = dtypes.BY_SAFETENSORS_NAME.get(label.upper()) or dtypes.BY_TORCH_NAME.get(label)
    if found not in numbers.ROUNDED:
        known = ", ".join(dtype.label for dtype in DType if dtype in numbers.ROUNDED)
        raise EditError(f"`{name}` is no dtype of floats", hint=f"known are {known}")
    return found


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
    wrappers = peeled([pattern])
    inner = unwrapped(pattern, wrappers)
    if not wrappers:
        return ""
    matches = matcher(inner)
    count = sum(matches(key) for key in keys)
    if not count:
        return ""
    prefix = "".join(wrappers)
    found = f"`{inner}` selects {counted(count, 'key')}"
    return f"{found}: here they have no `{prefix}` (transfer peels it first)"


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


def _examples(keys: Sequence[str]) -> list[str]:
    """Pick keys that show what keys look like: first, middle, last."""
    if len(keys) <= 3:
        return list(keys)
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
    for step in steps:
        before = [key for _, key, _ in now]
        edit = step.make(before)
        after = [edit(key) for key in before]
        said += _said(step, before, after)
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

    return KeyMap(pairs, why, tuple(said), {new: value for _, new, value in now}), all_of


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
    lost = {old.removesuffix(new or "") if old.endswith(new or "") else what for old, new in moved}
    prefix = lost.pop() if len(lost) == 1 else what
    return [f"stripped `{prefix}` from {count}"]


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
