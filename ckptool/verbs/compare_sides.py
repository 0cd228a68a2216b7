"""What `diff` compares: which state_dicts, under which keys; and what it tells without deciding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ckptool.errors import AmbiguousStateDict, EditError
from ckptool.pickles.torch_objects import attributes, is_parameter, python_type
from ckptool.state import checkpoint as places, edits, module_metadata
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.edits import Edit
from ckptool.state.walk import Path
from ckptool.tensors.tensor import TENSORS, AnyTensor, TensorInfo
from ckptool.text import listed
from ckptool.verbs.compare_values import NO_TOLERANCE, Tolerance

AUTO = "auto"


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be compared, and how.

    `ignore_prefix` is a prefix, or `auto` for the wrappers that all keys of a side share; `rename`
    holds pairs of dotted prefixes, the left's and the right's.
    """

    left_at: str | None = None
    right_at: str | None = None
    every: bool = False
    structure: bool = False
    tolerance: Tolerance = NO_TOLERANCE
    select: Sequence[str] = ()
    rename: Sequence[tuple[str, str]] = ()
    ignore_prefix: str | None = None


def tolerance(atol: float, rtol: float) -> Tolerance:
    """Make a tolerance; raises `EditError` for one below zero, or NaN."""
    if not (atol >= 0 and rtol >= 0):
        raise EditError("--atol and --rtol take numbers from 0 up")
    return Tolerance(atol, rtol)


def state_dicts(
    left: Checkpoint, right: Checkpoint, asked: Asked
) -> tuple[StateDict | None, StateDict | None]:
    """Give both state_dicts, or none where all tensors are to be compared by their path."""
    if asked.every and (asked.left_at is not None or asked.right_at is not None):
        raise EditError("--all compares all there is: it takes no --at")
    if asked.every:
        return None, None
    found = [
        _several(checkpoint) if at is None else []
        for checkpoint, at in ((left, asked.left_at), (right, asked.right_at))
    ]
    if found[0] and found[0] == found[1]:
        return None, None
    one = _state_dict(left, asked.left_at, "--left-at", right)
    other = _state_dict(right, asked.right_at, "--right-at", left)
    return (one, other) if one and other else (None, None)


def _several(checkpoint: Checkpoint) -> list[Path]:
    found = places.candidates(checkpoint.tree)
    return [each.at for each in found] if len(found) > 1 else []


def _state_dict(
    checkpoint: Checkpoint, at: str | None, option: str, other: Checkpoint
) -> StateDict | None:
    try:
        if at is not None:
            return places.find(checkpoint, at)
        return places.find_or_none(checkpoint, several=False)
    except AmbiguousStateDict as error:
        error.option = error.option.replace("--at", option)
        raise


def edited(asked: Asked, left: StateDict, right: StateDict) -> tuple[StateDict, StateDict]:
    """Take the prefixes off that are to be ignored, and give the left's keys the right's names."""
    moves = [edits.rename(old, new) for old, new in asked.rename]
    prefix = asked.ignore_prefix
    if prefix is None:
        return _rekeyed(left, moves), right
    if prefix == AUTO:
        step = edits.strip_wrappers(required=False)
        return _rekeyed(left, [step, *moves]), _rekeyed(right, [step])
    step = edits.strip_prefix(prefix)
    has_left, has_right = (
        any(key.startswith(edits.with_dot(prefix)) for key in state.entries)
        for state in (left, right)
    )
    if not has_left and not has_right:
        step.make([*left.entries, *right.entries])  # which refuses
    return (
        _rekeyed(left, [*([step] if has_left else []), *moves]),
        _rekeyed(right, [step] if has_right else []),
    )


def _rekeyed(state: StateDict, steps: Sequence[Edit]) -> StateDict:
    if not steps:
        return state
    key_map, edit = edits.apply(steps, list(state.entries))
    entries = {new: state.entries[old] for old, new in key_map.pairs if new is not None}
    metadata = module_metadata.rekeyed(state.metadata, key_map, edit)
    return replace(state, entries=entries, metadata=metadata)


# What is told and decides nothing.


def notes(
    left: Checkpoint, right: Checkpoint, one: StateDict, other: StateDict, keys: Sequence[str]
) -> Iterator[str]:
    """Tell what containers may not keep, of the keys that both sides have."""
    chosen = set(keys)
    orders = [[key for key in state.entries if key in chosen] for state in (one, other)]
    moved = next((pair for pair in zip(*orders, strict=True) if pair[0] != pair[1]), None)
    if moved:
        yield f"the keys stand in another order, {moved[0]} where {moved[1]} does"
    yield from _tie_notes(left, right, one, other, chosen)
    if "safetensors" in (left.container, right.container):
        return  # which has no place for the rest
    pairs = [
        (key, one.entries[key], other.entries[key])
        for key in keys
        if isinstance(one.entries[key], TENSORS) and isinstance(other.entries[key], TENSORS)
    ]
    for name, fact in _FACTS.items():
        differing = [key for key, a, b in pairs if fact(a) != fact(b)]
        if differing:
            yield f"{name} differ: {listed(differing)}"


_FACTS: dict[str, Callable[[AnyTensor], object]] = {
    "strides": lambda tensor: isinstance(tensor, TensorInfo) and tensor.stride,
    "requires_grad": lambda tensor: isinstance(tensor, TensorInfo) and tensor.requires_grad,
    "Parameter or tensor": is_parameter,
    "classes of tensors": python_type,
    "which tensors have attributes": lambda tensor: attributes(tensor) is not None,
    "device tags": lambda tensor: isinstance(tensor, TensorInfo) and tensor.storage.location,
}


def _tie_notes(
    left: Checkpoint, right: Checkpoint, one: StateDict, other: StateDict, chosen: set[str]
) -> Iterator[str]:
    ties, others = _ties(one, chosen), _ties(other, chosen)
    for checkpoint, own, foreign in ((left, ties, others), (right, others, ties)):
        alone = [f"{key} = {first}" for key, first in own.items() if foreign.get(key) != first]
        if alone:
            yield f"tied in {checkpoint.path} alone: {listed(alone)}"


def _ties(state: StateDict, chosen: set[str]) -> dict[str, str]:
    """Say which keys are exactly the tensor of a key before them."""
    firsts: dict[tuple[object, ...], str] = {}
    ties = {
        key: firsts.setdefault(value.view, key)
        for key, value in state.entries.items()
        if key in chosen and isinstance(value, TensorInfo) and value.numel
    }
    return {key: first for key, first in ties.items() if key != first}
