"""One checkpoint made from several: their state_dicts go in, the entries of one come out."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import EditError
from ckptool.files.copying import Begin, no_progress
from ckptool.pickles.tree import Node
from ckptool.state import checkpoint as places, module_metadata, replacing
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.tensors import numbers, values
from ckptool.tensors.tensor import TensorInfo
from ckptool.verbs import surgery
from ckptool.verbs.options import Options
from ckptool.verbs.surgery import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

Transform = Callable[[Sequence[StateDict]], dict[str, Node]]


def combine(
    sources: Sequence[str | Path],
    target: str | Path,
    transform: Transform,
    *,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write the bare state_dict that a function makes of those of several checkpoints.

    Raises what reading and writing raise, and what `transform` does.
    """
    options = options or Options()
    inputs = [containers.read(source) for source in sources]
    states = [places.find(each, options.at) for each in inputs]
    first = places.state_dict_node(inputs[0].tree, states[0].at)
    tree = replacing.make_state_dict(transform(states), states[0].metadata)
    tree = module_metadata.with_texts(tree, module_metadata.texts(first))
    return surgery.rewrite(
        sources[0],
        target,
        bare=True,
        options=replace(options, at=None),
        progress=progress,
        opened=_checkpoint(inputs, tree),
    )


def _checkpoint(inputs: Sequence[Checkpoint], tree: Node) -> Checkpoint:
    """Return a checkpoint whose bytes are in the files of several."""
    first = inputs[0]
    return Checkpoint(
        first.path,
        first.container,
        tree,
        sum(each.nbytes for each in inputs),
        globals={name: offset for each in inputs for name, offset in each.globals.items()},
        calls=[call for each in inputs for call in each.calls],
        pickle_name=first.pickle_name,
        files=tuple(dict.fromkeys(file for each in inputs for file in each.files)),
        held=tuple(held for each in inputs for held in each.held),
    )


def average(
    sources: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] = (),
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write the mean of the floats of several state_dicts, the rest as the first has it.

    The sum is in double precision. Raises `EditError` where keys, shapes or dtypes differ, or
    where there is not one weight for each source.
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else sources
    given = list(weights) or [1.0] * len(sources)
    if len(given) != len(sources) or not sum(given):
        raise EditError(f"{len(given)} weights for {len(sources)} checkpoints, of sum {sum(given)}")
    transform = partial(_mean, weights=given)
    return combine(sources, target, transform, options=options, progress=progress)


def _mean(states: Sequence[StateDict], weights: Sequence[float]) -> dict[str, Node]:
    first, made = states[0].entries, values.Made()
    for number, state in enumerate(states[1:], 2):
        if differing := sorted(first.keys() ^ state.entries.keys()):
            raise EditError(
                f"checkpoint {number} has other keys than the first", evidence=differing[:8]
            )
    entries: dict[str, Node] = {}
    for key, value in first.items():
        args = [state.entries[key] for state in states]
        if not isinstance(value, TensorInfo) or value.dtype not in numbers.FLOATS:
            entries[key] = value
            continue
        if any(
            not isinstance(each, TensorInfo)
            or (each.dtype, each.shape) != (value.dtype, value.shape)
            for each in args
        ):
            raise EditError(f"{key} has another shape or dtype in one of the checkpoints")
        kernel = numbers.mean(value.dtype, weights)
        entries[key] = values.elementwise(kernel, args, value.dtype, made)
    return entries
