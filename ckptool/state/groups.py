"""Tensors that become others together, and what a step makes of all entries by them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from ckptool.errors import EditError
from ckptool.records import dataclass
from ckptool.state.edits import Change, Count, Entries, Value
from ckptool.tensors.tensor import MAX_DIMENSIONS, TensorInfo, ties
from ckptool.text import counted, listed, shape as shown

MAX_DIGITS = 18  # of a row, and of a number in a key
Patterns = str | Iterable[str]
Given = TypeVar("Given")
Made = TypeVar("Made")


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that become others together: the keys that go in, and the entries that come out."""

    keys: tuple[str, ...]
    made: tuple[tuple[str, TensorInfo], ...]


def changed(
    step: str, rule: str, entries: Entries, groups: Sequence[Group], more: str = ""
) -> Change:
    """Put what groups make where the first tensor of each was; `more` is said of what was made.

    Raises `EditError` for a tensor that is in two groups, and for one of two that are the same
    tensor where the other is in none.
    """
    at: dict[str, Group] = {}
    for group in groups:
        for key in group.keys:
            if key in at or group.keys.count(key) > 1:
                raise EditError(f"{key} is used twice: {_both(at.get(key, group), group)}")
            at[key] = group
    for key, first in ties(entries).items():
        if (key in at) != (first in at):
            taken, left = (key, first) if key in at else (first, key)
            raise EditError(
                f"{taken} and {left} are one tensor, and the step takes only {taken}",
                hint="name both in the step, or drop one before it",
            )
    moves: list[tuple[tuple[str, ...], str, Value]] = []
    done: set[int] = set()
    for key, value in entries.items():
        if key not in at:
            moves.append(((key,), key, value))
        elif id(at[key]) not in done:
            done.add(id(at[key]))
            moves += [(at[key].keys, new, tensor) for new, tensor in at[key].made]
    made = sum(len(group.made) for group in groups)
    did = f"{step}: {counted(len(at), 'tensor')} of {len(entries)}"
    said = [did if made == len(at) else f"{did} became {made}{more}"]
    remade = {new for group in groups for new, _ in group.made}
    numbers = [Count(step, rule, len(groups))]
    return Change(moves, said, remade=remade, matched=dict.fromkeys(at, rule), counts=numbers)


def _both(one: Group, other: Group) -> str:
    return " and ".join(dict.fromkeys(" + ".join(each.keys) for each in (one, other)))


def tensor_of(entries: Entries, key: str) -> TensorInfo:
    """Return a tensor that can be cut; raises `EditError` for what cannot."""
    value = entries[key]
    if not isinstance(value, TensorInfo):
        layout = getattr(value, "layout", "")
        what = f"a {layout} tensor" if layout else "not a tensor"
        raise EditError(f"{key} is {what}: it is not changed", hint=f"leave {key} out of the step")
    return value


def tried(name: str, make: Callable[[Given], Made], given: Given) -> Made:
    """Return what is made of what is given; raises `EditError`, with a name, where it cannot be."""
    try:
        made = make(given)
    except ValueError as error:
        raise EditError(f"{name}: {error}") from None
    for value in made if isinstance(made, list) else [made]:
        if isinstance(value, TensorInfo) and len(value.shape) > MAX_DIMENSIONS:
            what = f"{len(value.shape)} dimensions: torch takes {MAX_DIMENSIONS}"
            raise EditError(f"{name} would have {what}")
    return made


def dimension(value: TensorInfo, dim: int, more: int = 0) -> int:
    """Return a dimension counted from the front; raises `ValueError` where there is none."""
    count = len(value.shape) + more
    if not -count <= dim < count:
        raise ValueError(f"{shown(value.shape)} has no dimension {dim}")
    return dim % count


def refuse_no_count(name: str, *counts: int) -> None:
    """Raise `EditError` for a count that is not 1 or more."""
    if any(count < 1 for count in counts):
        raise EditError(f"{name} = {listed(map(str, counts))}: it must be 1 or more")
