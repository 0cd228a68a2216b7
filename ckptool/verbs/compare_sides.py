"""What `diff` compares: which state_dicts, under which keys; and what it tells without deciding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from ckptool import containers
from ckptool.errors import EditError, NothingMatched
from ckptool.pickles.torch_objects import attributes, is_parameter, python_type
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, edits, module_metadata
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.edit_options import stripping
from ckptool.state.edits import Edit
from ckptool.state.walk import Path
from ckptool.state.wrappers import BOOKKEEPING
from ckptool.tensors.summaries import NO_TOLERANCE, Tolerance
from ckptool.tensors.tensor import TENSORS, AnyTensor, TensorInfo, ties
from ckptool.text import listed, several


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be compared, and how.

    `ignore_prefix` are prefixes, or `auto` for the wrappers that all keys of a side share, with
    `anywhere` inside keys too; `steps` make the right's tensors of the left's.
    """

    at: str | None = None
    left_at: str | None = None
    right_at: str | None = None
    every: bool = False
    structure: bool = False
    tolerance: Tolerance = NO_TOLERANCE
    select: str | Sequence[str] = ()
    steps: Sequence[Edit] = ()
    ignore_prefix: str | Sequence[str] = ()
    anywhere: bool = False

    @property
    def sides(self) -> tuple[tuple[str | None, str], tuple[str | None, str]]:
        """Return where each state_dict is, None for the only one, and the option that says so."""
        return self._side(self.left_at, "--left-at"), self._side(self.right_at, "--right-at")

    def _side(self, at: str | None, option: str) -> tuple[str | None, str]:
        return (self.at, "--at") if at is None and self.at is not None else (at, option)

    @property
    def chosen(self) -> bool:
        """Check whether a state_dict was chosen on either side."""
        return any(at is not None for at, _ in self.sides)


def tolerance(atol: float, rtol: float) -> Tolerance:
    """Make a tolerance; raises `EditError` for one below zero, or NaN."""
    if not (atol >= 0 and rtol >= 0):
        raise EditError("--atol and --rtol take numbers from 0 up")
    return Tolerance(atol, rtol)


def state_dicts(
    left: Checkpoint, right: Checkpoint, asked: Asked
) -> tuple[StateDict | None, StateDict | None]:
    """Return both state_dicts, or none where all tensors are to be compared by their path."""
    if asked.every and asked.chosen:
        raise EditError("--all compares all tensors: it takes no --at")
    if asked.every:
        return None, None
    (left_at, left_option), (right_at, right_option) = asked.sides
    found = [
        _several(checkpoint) if at is None else []
        for checkpoint, at in ((left, left_at), (right, right_at))
    ]
    if found[0] and found[0] == found[1]:
        return None, None
    one = _state_dict(left, left_at, left_option)
    other = _state_dict(right, right_at, right_option)
    if (places.part_of(left, one) is None) != (places.part_of(right, other) is None):
        places.refuse_part(left, one)
        places.refuse_part(right, other)
    return (one, other) if one and other else (None, None)


def _several(checkpoint: Checkpoint) -> list[Path]:
    found = places.candidates(checkpoint.tree)
    return [each.at for each in found] if len(found) > 1 else []


def _state_dict(checkpoint: Checkpoint, at: str | None, option: str) -> StateDict | None:
    if at is not None:
        return places.locate(checkpoint, at, option)
    return places.find_or_none(checkpoint, several=False, option=option)


def edited(asked: Asked, left: StateDict, right: StateDict) -> tuple[StateDict, StateDict]:
    """Remove the prefixes that are to be ignored, and make the right's tensors of the left's.

    A side may lack a prefix, or not both. What a wrapper keeps for itself is not compared, which
    a note says.
    """
    sides = left, right
    for prefix in several(asked.ignore_prefix):
        step = stripping([prefix], anywhere=asked.anywhere)
        done, missing = [], []
        for state in sides:
            try:
                done.append(_rekeyed(state, [step]))
            except NothingMatched as error:
                done.append(state)
                missing.append(error)
        if len(missing) == len(sides) and prefix != edits.AUTO:
            raise missing[0]
        sides = done[0], done[1]
    return _rekeyed(sides[0], asked.steps), sides[1]


def _rekeyed(state: StateDict, steps: Sequence[Edit]) -> StateDict:
    if not steps:
        return state
    key_map, edit = edits.apply(steps, state.entries)
    metadata = module_metadata.rekeyed(state.metadata, key_map, edit)
    gone = key_map.dropped
    said = (f"not compared ({BOOKKEEPING}): {listed(gone)}",) if gone else ()
    notes = (*state.notes, *said)
    return replace(state, entries=key_map.entries, metadata=metadata, notes=notes)


# What is told and decides nothing.


def notes(
    left: Checkpoint, right: Checkpoint, one: StateDict, other: StateDict, keys: Sequence[str]
) -> Iterator[str]:
    """Note what containers may not keep, of the keys that both sides have."""
    chosen = set(keys)
    orders = [[key for key in state.entries if key in chosen] for state in (one, other)]
    moved = next((pair for pair in zip(*orders, strict=True) if pair[0] != pair[1]), None)
    if moved:
        yield f"the keys are in another order: {moved[0]} where {moved[1]} is"
    yield from _tie_notes(left, right, one, other, chosen)
    if not all(containers.by_name(side.container).traits.strides for side in (left, right)):
        return  # a side has no place for the rest
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
    sides = ({k: v for k, v in side.entries.items() if k in chosen} for side in (one, other))
    own, others = map(ties, sides)
    for checkpoint, mine, foreign in ((left, own, others), (right, others, own)):
        alone = [f"{key} = {first}" for key, first in mine.items() if foreign.get(key) != first]
        if alone:
            yield f"tied only in {checkpoint.path}: {listed(alone)}"
