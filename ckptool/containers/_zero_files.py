"""What files of DeepSpeed ZeRO hold: slices of float32 masters, and the module with its shapes.

Formats: deepspeed/runtime/engine.py (`_common_checkpoint_state`, `_save_zero_checkpoint`),
runtime/zero/stage_1_and_2.py, stage3.py and runtime/bf16_optimizer.py (`state_dict`); the last does
not say its stage, and does not leave out what pads the end of a group.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from math import prod

from ckptool.errors import Malformed, Unsupported
from ckptool.pickles.holdings import sizes_of
from ckptool.pickles.tree import Node, Object, attribute, items, named_items
from ckptool.records import dataclass
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.numbers import FLOATS
from ckptool.tensors.tensor import MAX_COUNT, TensorInfo, tensors_of
from ckptool.text import length

EXPERT = re.compile(r"(?:layer_(\d+)_)?expert_(\d+)_mp_rank_\d+_model_states\.pt", re.ASCII)
_NAME = re.compile(r"(?:(?:zero_pp|expp)_rank_(\d+)_)?mp_rank_(\d+)", re.ASCII)
_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # of stages 1 and 2, of stage 3
_LAYERS = ("ds_autoep_layers", "autoep_layers")
_MAX_WORLD = 1 << 20
Shapes = dict[str, tuple[int, ...]]
Said = tuple[tuple[str, object], ...]


@dataclass(frozen=True, slots=True)
class Rank:
    """Of which rank a file is, by its name: of those that share the data, and the model."""

    name: str
    path: str
    rank: int
    mp_rank: int


@dataclass(frozen=True, slots=True)
class Slices(Rank):
    """What `optim_states.pt` of a rank holds: a flat tensor for each group, or each sub group.

    `worlds` count the partitions of groups, `said` is what groups of the optimizer are trained
    with; `step` counts how often it has stepped: a number, a tensor of one, or None.
    """

    flat: list[TensorInfo]
    stage: int
    worlds: tuple[int, ...]
    paddings: Node
    step: object
    said: Said
    experts: bool

    @property
    def world(self) -> int:
        """Return the number of ranks."""
        return max(self.worlds)


@dataclass(frozen=True, slots=True)
class Model(Rank):
    """What `model_states.pt` holds: the module, and the shapes of the parameters in its groups.

    `experts` counts those of each layer of a mixture, whose files are known by their names where
    `by_expert`; `degree` is that of model parallelism.
    """

    entries: dict[str, Node]
    metadata: Node
    groups: list[Shapes]
    frozen: Shapes
    fragments: dict[str, Node]
    shared: dict[str, Node]
    buffers: frozenset[str]
    steps: int | None
    skipped: int
    world: int | None
    degree: int
    experts: tuple[int, ...]
    by_expert: bool

    @property
    def noted(self) -> Shapes:
        """Return the shapes of all parameters."""
        return {key: shape for each in (*self.groups, self.frozen) for key, shape in each.items()}

    def of_another(self, part: Checkpoint) -> Model:
        """Return the model in the file of another rank, whose pickle is the same."""
        return replace(
            self,
            **asdict(_rank(part)),
            entries=_moved({key: self.entries.get(key) for key in self.buffers}, part),
            fragments=_moved(self.fragments, part),
        )


def _moved(tensors: Mapping[str, Node], part: Checkpoint) -> dict[str, Node]:
    """Return tensors with the storages of another file that are under the same keys."""
    moved: dict[str, Node] = {}
    for name, value in tensors.items():
        if isinstance(value, TensorInfo):
            own = value.storage
            storage = replace(
                part.records[f"data/{own.key}"],
                key=own.key,
                dtype=own.dtype,
                location=own.location,
                byteorder=own.byteorder,
            )
            moved[name] = replace(value, storage=storage)
    return moved


def _rank(part: Checkpoint) -> Rank:
    name = os.path.basename(part.path)
    match = _NAME.search(name)
    return Rank(name, part.path, _number(match, 1), _number(match, 2))


def found_in(part: Checkpoint) -> Slices | Model | dict[str, Node] | None:
    """Return what a file holds, of experts the tensors; None where it is no part of ZeRO."""
    rank, top = _rank(part), dict(named_items(part.tree))
    if EXPERT.fullmatch(rank.name):
        return tensors_of(top)
    state = dict(named_items(top.get("optimizer_state_dict")))
    key = next((key for key in _FLAT if key in state), None)
    if key is not None:
        return _slices(rank, state, key)
    groups = top.get("param_shapes")
    if "module" not in top or not isinstance(groups, list):
        return None
    return _model(rank, top, [_shapes(group, part.path) for group in groups])


def _number(match: re.Match[str] | None, group: int) -> int:
    return length(match[group], 10) or 0 if match and match[group] else 0


def _slices(rank: Rank, state: Mapping[str, Node], key: str) -> Slices:
    flat = state[key]
    tensors = [each for each in _list(state, key) if isinstance(each, TensorInfo)]
    if not isinstance(flat, list) or len(tensors) != len(flat) or any(map(_odd, tensors)):
        raise Malformed(f"`{key}` is not a list of flat tensors of floats", path=rank.path)
    count = state.get("partition_count")
    counts = count if isinstance(count, list) else [count]
    worlds = tuple(each for each in map(length, counts) if each is not None)
    stage = state.get("zero_stage")
    if isinstance(stage, Object) and stage.args:  # a member of an enum
        stage = stage.args[0]
    known = (3 if key == _FLAT[1] else 1) if stage is None else length(stage)
    fits = known == 3 if key == _FLAT[1] else known in (0, 1, 2)
    if not fits or len(worlds) != len(counts) or not 0 < max(worlds, default=0) <= _MAX_WORLD:
        raise Malformed("its `zero_stage` or `partition_count` is invalid", path=rank.path)
    step, said = _training(state)
    return Slices(
        **asdict(rank),
        flat=[replace(each, requires_grad=False, origin=None) for each in tensors],
        stage=known or 1,
        worlds=worlds,
        paddings=state.get("param_alignment_paddings"),
        step=step,
        said=said,
        experts=len(set(worlds)) > 1 or "ds_zero_partition_groups" in state,
    )


def _odd(tensor: TensorInfo) -> bool:
    """Check for what is no row of floats that follow each other."""
    return len(tensor.shape) != 1 or tensor.stride != (1,) or tensor.dtype not in FLOATS


def _training(state: Mapping[str, Node]) -> tuple[object, Said]:
    """Return how often the optimizer has stepped, and the learning rates of its groups."""
    step: object = None
    said: list[tuple[str, object]] = []
    for name in ("base_optimizer_state", "optimizer_state_dict"):
        inner = dict(named_items(state.get(name)))
        held = [dict(named_items(each)) for each in _list(inner, "param_groups")]
        rates = [each.get("lr") for each in held]
        said += [("lr", rate) for rate in rates if type(rate) is float]
        of_each = [dict(named_items(each)) for _, each in items(inner.get("state")) or []]
        for found in (each.get("step") for each in (*of_each, *held)):
            if length(found) is not None or _is_number(found):
                step = found if step is None else step
    return step, tuple(said)


def _is_number(step: object) -> bool:
    return isinstance(step, TensorInfo) and step.numel == 1 and step.dtype.label == "F32"


def _model(rank: Rank, top: Mapping[str, Node], groups: list[Shapes]) -> Model:
    module = top["module"]
    if module is None:
        raise Unsupported(
            f"{rank.name} is of a pipeline, whose weights are in files of its layers",
            path=rank.path,
            hint="ds_to_universal.py of DeepSpeed makes one file of each parameter",
        )
    return Model(
        **asdict(rank),
        entries=dict(named_items(module)),
        metadata=attribute(module, "_metadata"),
        groups=groups,
        frozen=_shapes(top.get("frozen_param_shapes"), rank.path),
        fragments=dict(named_items(top.get("frozen_param_fragments"))),
        shared=dict(named_items(top.get("shared_params"))),
        buffers=frozenset(each for each in _list(top, "buffer_names") if isinstance(each, str)),
        steps=length(top.get("global_steps")),
        skipped=length(top.get("skipped_steps")) or 0,
        world=length(top.get("dp_world_size")),
        degree=length(top.get("mp_world_size")) or 1,
        experts=tuple(each for each in _list(top, "num_experts") if type(each) is int),
        by_expert=not any(top.get(name) for name in _LAYERS),
    )


def _list(held: Mapping[str, Node], name: str) -> list[Node]:
    """Return a list that is held under a name, an empty one for anything else."""
    found = held.get(name)
    return found if isinstance(found, list) else []


def _shapes(group: Node, path: str) -> Shapes:
    found: Shapes = {}
    for key, value in named_items(group):
        sizes = sizes_of(value)
        if sizes is None or prod(sizes) > MAX_COUNT:
            raise Malformed(f"the noted shape of {key} is invalid", path=path)
        if key in found:
            raise Malformed(f"the shape of {key} is noted twice", path=path)
        found[key] = sizes
    return found
