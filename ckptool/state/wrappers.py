"""Known wrappers of a model: what each puts before its keys, and what it keeps beside them.

A wrapper of the whole model begins every key; one of a part is inside some. Beside it there may be
entries of the wrapper's own, which no model takes: `n_averaged` (torch/optim/swa_utils.py,
`AveragedModel`), `step` and `initted` (ema_pytorch), a key `_metadata` that holds no tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.tensors.tensor import TensorInfo

# The prefixes of known wrappers, and who puts them there.
WRAPPERS = {
    "module.": "DataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
    "_fpw_module.": "FSDP",
    "_checkpoint_wrapped_module.": "activation checkpointing",
    "_forward_module.": "Lightning Fabric",
    "_module.": "Opacus, or a module of that name",
    "ema_model.": "EMA",
}
_HAS_WRAPPER = re.compile("|".join(map(re.escape, WRAPPERS)))
COUNTERS = ("n_averaged", "step", "initted")
_NO_TENSORS = (*COUNTERS, "_metadata")
BOOKKEEPING = "bookkeeping"  # the reason that reports state
_ONLY_BESIDE = {"ema_model.": {"step", "initted"}}  # else it may be any module's name
_AVERAGED = {("module.", "n_averaged"): "AveragedModel"}

Entries = Mapping[str, Node]


@dataclass(frozen=True, slots=True)
class Peeling:
    """What comes off keys: prefixes that all share, outermost first, then components inside.

    `kinds` names the wrapper of each prefix; `bookkeeping` are the entries that go with them.
    """

    prefixes: tuple[str, ...] = ()
    kinds: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    bookkeeping: frozenset[str] = frozenset()
    keep: bool = False
    start: int = 1  # the first component of a key that `inside` may take

    def __bool__(self) -> bool:
        return bool(self.prefixes or self.inside)

    def __call__(self, key: str) -> str | None:
        """Return the key as it is without wrappers, None for an entry of a wrapper's own."""
        return None if key in self.bookkeeping and not self.keep else self.name(key)

    def name(self, key: str) -> str:
        """Return any key as it is without wrappers."""
        key = self.rest(key)
        return without(key, self.inside, self.start) if self.inside else key

    def rest(self, key: str) -> str:
        """Return any key as it is without the prefixes that all share."""
        for prefix in self.prefixes:
            key = key.removeprefix(prefix)
        return key

    @property
    def only_default(self) -> bool:
        """Check whether a prefix of `module.` is all there is, as commands take it by default."""
        return self.prefix == "module." and not self.inside

    @property
    def prefix(self) -> str:
        """Return all that begins every key."""
        return "".join(self.prefixes)

    def said(self, keys: Sequence[str]) -> list[str]:
        """Describe what comes off how many keys."""
        lines = []
        if self.prefix:
            count = len(keys) - len(self.bookkeeping)
            lines.append(f"stripped `{self.prefix}` from {count} of {len(keys)} keys")
        if self.inside:
            count = sum(self.name(key) != self.rest(key) for key in keys)
            what = ", ".join(f"`{each}`" for each in self.inside)
            lines.append(f"stripped {what} inside {count} of {len(keys)} keys")
        return lines


def peeling(
    entries: Entries | Iterable[str], *, anywhere: bool = False, keep: bool = False
) -> Peeling:
    """Find the wrappers that all keys share, in any order, repeatedly, and those inside keys.

    Inside keys those count that begin with `_`, and with `anywhere` all: `module` may be the name
    of a submodule. `keep` leaves the bookkeeping of a wrapper where it is.
    """
    if not isinstance(entries, Mapping):
        entries = dict.fromkeys(entries)
    prefixes: list[str] = []
    kinds: list[str] = []
    gone: set[str] = set()
    keys, offset = list(entries), 0
    while True:
        ends = (key for key in keys if key.endswith(_NO_TENSORS))  # of few keys, more is asked
        counters = {key: key[offset:] for key in ends if is_counter(key[offset:], entries[key])}
        others = [key for key in keys if key not in counters] if counters else keys
        beside = set(counters.values())
        prefix = _shared(others, offset, beside)
        if prefix is None:
            break
        prefixes.append(prefix)
        averaged = (_AVERAGED.get((prefix, name)) for name in beside)
        kinds.append(next(filter(None, averaged), WRAPPERS[prefix]))
        gone |= counters.keys()
        keys, offset = others, offset + len(prefix)
    found = Peeling(tuple(prefixes), tuple(kinds), (), frozenset(gone), keep)
    start = int(not (prefixes or anywhere))
    inner = replace(found, inside=_inside(entries, found, anywhere, start), start=start)
    if not inner.inside:
        return inner
    # Where two keys would become one, a component is no wrapper.
    distinct = (len(set(map(each.name, entries))) for each in (inner, found))
    return inner if next(distinct) == next(distinct) else found


def is_counter(name: str, value: Node) -> bool:
    """Check for an entry that a wrapper keeps for itself: one number, or no tensor."""
    if name in COUNTERS:
        return prod(getattr(value, "shape", ())) == 1
    return name == "_metadata" and not hasattr(value, "shape")


def _shared(keys: Sequence[str], offset: int, beside: set[str]) -> str | None:
    if not keys:
        return None
    for prefix in WRAPPERS:
        if prefix in _ONLY_BESIDE and not _ONLY_BESIDE[prefix] & beside:
            continue
        end = offset + len(prefix)
        if all(key.startswith(prefix, offset) and len(key) > end for key in keys):
            return prefix
    return None


def _inside(entries: Entries, found: Peeling, anywhere: bool, start: int) -> tuple[str, ...]:
    """List the wrappers that some keys hold from component `start` on, after shared prefixes."""
    keys = [found.rest(key) for key in entries if "._" in key or anywhere]
    names = submodules(entries) if keys else set()
    return tuple(
        prefix
        for prefix in WRAPPERS
        if (prefix[0] == "_" or (anywhere and prefix not in _ONLY_BESIDE))
        and prefix not in names
        and any(f".{prefix}" in (key if start else f".{key}") for key in keys)
    )


def without(key: str, prefixes: Iterable[str], start: int = 1) -> str:
    """Take prefixes as whole dotted components out of a key, from component `start` on."""
    steps = key.split(".")
    for prefix in prefixes:
        middle = prefix.rstrip(".").split(".")
        at = start
        while at + len(middle) < len(steps):
            if steps[at : at + len(middle)] == middle:
                del steps[at : at + len(middle)]
            else:
                at += 1
    return ".".join(steps)


def submodules(entries: Entries) -> set[str]:
    """Return which prefixes are names of submodules: `X.module.k` is the tensor of `module.k`."""
    found = set()
    wrapped = [(key, value) for key, value in entries.items() if _HAS_WRAPPER.search(key, 1)]
    for prefix in WRAPPERS:
        for key, value in wrapped:
            at = key.find(f".{prefix}")
            other = entries.get(key[at + 1 :]) if at >= 0 else None
            if not isinstance(value, TensorInfo) or not isinstance(other, TensorInfo):
                continue
            if value.storage == other.storage:
                found.add(prefix)
                break
    return found


def worn(entries: Entries, *, removable: bool = False) -> list[str]:
    """Describe the known wrappers that keys have, or those that `auto` removes, and how many."""
    found, names = peeling(entries), submodules(entries)
    lines = []
    if found.prefixes:
        but = f"all but {', '.join(sorted(found.bookkeeping))} start"
        every = but if found.bookkeeping else "every key starts"
        lines.append(f"{every} with `{found.prefix}` ({', '.join(found.kinds)})")
    unwrapped = (key.removeprefix(found.prefix) for key in entries)
    rests = [rest for rest in unwrapped if _HAS_WRAPPER.search(rest)]
    for prefix, kind in WRAPPERS.items():
        if prefix in names or not _ONLY_BESIDE.get(prefix, entries.keys()) & entries.keys():
            continue
        if removable and prefix not in found.inside:
            continue
        begin = 0 if found.prefixes or removable else sum(rest.startswith(prefix) for rest in rests)
        inside = sum(f".{prefix}" in (f".{rest}" if found.prefixes else rest) for rest in rests)
        lines += [f"{begin} of {len(entries)} keys start with `{prefix}` ({kind})"] if begin else []
        part = kind if prefix[0] == "_" else f"{kind} of a part, or a module of that name"
        lines += [f"{inside} of {len(entries)} keys contain `.{prefix}` ({part})"] if inside else []
    return lines
