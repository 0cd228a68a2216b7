"""What `keys` lists: the tensors of the state_dict, or of the whole file, chosen and sorted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ckptool.state import checkpoint as places, edits, walk
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.tensors.tensor import TENSORS, AnyTensor

Entry = tuple[str, AnyTensor]


@dataclass(frozen=True, slots=True)
class Listing:
    """Tensors by key, or by path where `state` is None; `beside` names what stands around them."""

    checkpoint: Checkpoint
    state: StateDict | None
    entries: list[Entry]
    beside: list[str]


def listing(checkpoint: Checkpoint, at: str | None = None, *, every: bool = False) -> Listing:
    """Choose what to list: the state_dict, or every tensor where that is asked or all there is.

    Raises `AmbiguousStateDict` where there are several candidates, `NoSuchKey` for a wrong `at`.
    """
    state = None
    if at is not None:
        state = places.find(checkpoint, at)
    elif not every:
        state = places.find_or_none(checkpoint, several=False)
    if state is None:
        whole = walk.tensors(checkpoint.tree)
        return Listing(
            checkpoint, None, [(walk.dotted(path) or ".", info) for path, info in whole], []
        )
    tensors = [(key, value) for key, value in state.entries.items() if isinstance(value, TENSORS)]
    return Listing(checkpoint, state, tensors, places.beside(checkpoint.tree, state.at))


def chosen(listed: Listing, patterns: Sequence[str], sort: str) -> Listing:
    """Keep what the patterns select, sorted by `size`, by `name`, or as in the `file`."""
    entries = listed.entries
    if patterns:
        keys = edits.select(patterns, [key for key, _ in entries])
        entries = [(key, info) for key, info in entries if key in keys]
    if sort == "size":
        entries = sorted(entries, key=lambda entry: -entry[1].nbytes)
    elif sort == "name":
        entries = sorted(entries, key=lambda entry: entry[0])
    return replace(listed, entries=entries)
