"""The weighted sum of several state_dicts: which entries belong together, and which are summed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from ckptool.errors import EditError
from ckptool.pickles.subclasses import class_of
from ckptool.pickles.torch_objects import attributes, is_parameter
from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.state.quantized import quantized
from ckptool.state.wrappers import Peeling, peeling
from ckptool.tensors import numbers, values
from ckptool.tensors.averaging import Mean
from ckptool.tensors.tensor import TENSORS, TensorInfo, ties
from ckptool.text import argument, at_most, counted, listed, shape

Entries = Mapping[str, Node]
Args = tuple[TensorInfo, ...]

STATISTICS = (".running_mean", ".running_var")  # of BatchNorm, by the end of a key
SHOWN = 4  # keys of a difference
NO_TENSOR, QUANTIZED, BOOKKEEPING = "not tensors", "quantized, with scales", "a wrapper's own"


@dataclass(slots=True)
class Averaging:
    """What was made of the first state_dict: `entries`, in its order.

    `sums` are what is summed: what of, and what it makes. `last` are the keys of which the last
    one has the value, by what they are; `apart` are those that are tied in the first alone, with
    the key that each was tied to; `others` counts the tensors of another dtype than the first's,
    by the number of the input.
    """

    weights: tuple[float, ...]
    entries: dict[str, Node] = field(default_factory=dict)
    sums: dict[str, tuple[Args, TensorInfo]] = field(default_factory=dict)
    last: dict[str, list[str]] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)
    others: dict[int, int] = field(default_factory=dict)
    stripped: list[str] = field(default_factory=list)  # of attributes that Python keeps on them

    @property
    def statistics(self) -> list[str]:
        """List the running statistics of BatchNorm among what is summed."""
        return [key for key in self.sums if f".{key}".endswith(STATISTICS)]


def average(names: Sequence[str], states: Sequence[Entries], weights: Sequence[float]) -> Averaging:
    """Sum the floats of state_dicts with the same keys and shapes, wrappers peeled.

    `names` are what errors call them. The rest is the last one's. Raises `EditError` where keys,
    shapes or kinds of numbers differ.
    """
    done = Averaging(tuple(weights))
    keys = _same_keys(names, states)
    whole = _kept_whole(states, keys)
    made: values.Made = {}
    known: dict[tuple[int, ...], TensorInfo] = {}  # one tensor under two keys stays one
    for key, value in states[0].items():
        args = [state[own[key]] for state, own in zip(states, keys, strict=True) if key in own]
        what = BOOKKEEPING if len(args) < len(states) else whole.get(key) or _not_summed(value)
        if what:
            done.last.setdefault(what, []).append(key)
            last = args[-1]
            alone = len(states) == 1 or not isinstance(last, TensorInfo)
            done.entries[key] = last if alone else _in_order(last, made)
            continue
        tensors = tuple(each for each in args if isinstance(each, TensorInfo))
        which = tuple(map(id, tensors))
        if which not in known:
            known[which] = _sum(tensors, done.weights, made)
        done.entries[key] = summed = known[which]
        done.sums[key] = (tensors, summed)
        for number, each in enumerate(tensors):
            if each.dtype is not tensors[0].dtype:
                done.others[number] = done.others.get(number, 0) + 1
        changed = summed is not tensors[0]
        if changed and attributes(tensors[0]) is not None and not is_parameter(tensors[0]):
            done.stripped.append(key)
    tied = ties(done.entries)
    first = {key: each for key, each in ties(states[0]).items() if key in done.sums}
    done.apart = {key: each for key, each in first.items() if key not in tied}
    return done


def _sum(args: Args, weights: tuple[float, ...], made: values.Made) -> TensorInfo:
    """Return the weighted sum of tensors; the first where it is all of them."""
    first = args[0]
    if numbers.sums_to_one(weights) and all(each.view == first.view for each in args):
        return first if len(args) == 1 else _in_order(first, made)
    kernel = Mean(tuple(each.dtype for each in args), weights)
    summed = values.elementwise(kernel, args, first.dtype, made)
    return replace(summed, origin=first.origin if is_parameter(first) else None)


def _in_order(value: TensorInfo, made: values.Made) -> TensorInfo:
    """Return a tensor little-endian, as what is summed is: a torch file has one order for all."""
    if value.storage.byteorder == "little":
        return value
    return replace(values.elementwise(_same, [value], value.dtype, made), origin=value.origin)


def _same(out: memoryview, block: memoryview) -> None:
    out[:] = block


def _not_summed(value: Node) -> str:
    """Name what an entry is that cannot be summed; empty for floats and complex ones."""
    if not isinstance(value, TENSORS):
        return NO_TENSOR
    if not isinstance(value, TensorInfo):
        return value.layout
    summed = value.dtype in numbers.ROUNDED or value.dtype in numbers.COMPLEX
    return class_of(value) or ("" if summed else value.dtype.label)


def _kept_whole(states: Sequence[Entries], keys: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the keys of quantized weights and of scales, which belong together."""
    found: dict[str, str] = {}
    for state, own in zip(states, keys, strict=True):
        names, firsts = set().union(*quantized(state)), ties(state)
        names |= {firsts.get(name, name) for name in names}  # what is tied to one stays with it
        whole = (key for key, name in own.items() if names & {name, firsts.get(name)})
        found |= dict.fromkeys(whole, QUANTIZED)
    return found


# Which keys belong together.


def _same_keys(names: Sequence[str], states: Sequence[Entries]) -> list[dict[str, str]]:
    """Return for each state_dict its keys by those of the first; raises `EditError`.

    What a wrapper keeps for itself may be there or not.
    """
    first = states[0]
    found, differing, evidence = [{key: key for key in first}], list[str](), list[str]()
    peels = [peeling(state) for state in states]
    for name, state, peel in zip(names[1:], states[1:], peels[1:], strict=True):
        own = {key: key for key in first}
        if state.keys() != first.keys():
            own = _matched((peels[0], first), (peel, state))
        lines = _differences(names[0], first, peels[0], name, state, own)
        differing += [name] if lines else []
        evidence += lines
        found.append(own)
    if not differing:
        return found
    which = names[1:] if len(names) == 2 else [f"{len(differing)} of {len(names) - 1} others"]
    pair = f"{argument(names[0])} {argument(differing[0])}"
    raise EditError(
        f"{listed(which)} and {names[0]} do not have the same keys and shapes; nothing was written",
        evidence=evidence[: 4 * SHOWN],
        hint=f"ckptool diff --structure --ignore-prefix auto {pair}   lists all",
    )


def _matched(one: tuple[Peeling, Entries], other: tuple[Peeling, Entries]) -> dict[str, str]:
    """Return the keys of another state_dict by those of the first with the same name beneath."""
    peel, state = other
    beneath = {peel.name(key): key for key in state}
    return {key: beneath[name] for key in one[1] if (name := one[0].name(key)) in beneath}


def _differences(
    first: str, ours: Entries, peel: Peeling, name: str, theirs: Entries, own: Mapping[str, str]
) -> list[str]:
    """Describe what two state_dicts do not have in common."""
    taken, counters = set(own.values()), peeling(theirs).bookkeeping
    here = [key for key in ours if key not in own and key not in peel.bookkeeping]
    there = [key for key in theirs if key not in taken and key not in counters]
    lines = [
        f"only in {file}: {counted(len(keys), 'key')}: {listed(keys, SHOWN)}"
        for file, keys in ((first, here), (name, there))
        if keys
    ]
    other = [
        f"{key}: {_described(ours[key])} in {first}, {_described(theirs[same])} in {name}"
        for key, same in own.items()
        if _kind(ours[key]) != _kind(theirs[same])
    ]
    return [*lines, *at_most(other, SHOWN, " that differ")]


def _kind(value: Node) -> tuple[object, ...]:
    """Return what must be the same in all: the shape, and whether that is summed."""
    sizes = value.shape if isinstance(value, TENSORS) else None
    is_complex = isinstance(value, TensorInfo) and value.dtype in numbers.COMPLEX
    return sizes, not _not_summed(value), is_complex


def _described(value: Node) -> str:
    if not isinstance(value, TENSORS):
        return "not a tensor"
    return f"{class_of(value) or value.dtype.label} {shape(value.shape)}"
