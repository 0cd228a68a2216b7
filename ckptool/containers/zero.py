"""DeepSpeed ZeRO 1, 2 and 3: slices of float32 master weights of all ranks, joined by name.

A step is a folder of `*_optim_states.pt`, a file for each rank, and `*_model_states.pt`, one of all
ranks or, in stage 3, of each. Formats: deepspeed/runtime/engine.py (`_save_checkpoint`,
`_get_zero_param_shapes`), runtime/zero/stage_1_and_2.py and stage3.py (`state_dict`); what joins
them there is utils/zero_to_fp32.py, which puts buffers first, makes them float32, and loses frozen
parameters of stage 1. Here order, `_metadata` and buffers are those of `module`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ckptool.containers._container import Container, Traits
from ckptool.containers._sets import by_number, combined, nothing, read_part
from ckptool.errors import EditError, Malformed, PartialCheckpoint, Unsupported
from ckptool.files import budget
from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.holdings import sizes_of
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Node, Object, attribute, named_items
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.replacing import make_state_dict
from ckptool.tensors import values as cuts
from ckptool.tensors.tensor import TENSORS, TensorInfo
from ckptool.text import counted, length

NAME = "deepspeed-zero"
MASTER, MODULE = "master", "module"  # what `--values` chooses
_RANK = re.compile(r"(?:zero_pp|expp)_rank_(\d+)_mp_rank_(\d+)|mp_rank_(\d+)")
_FLAT = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # of stages 1 and 2, of stage 3
_SHOWN = 8
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class _Slices:
    """What `optim_states.pt` of a rank holds: flat tensors, and what is said of them."""

    name: str
    path: str
    rank: int
    flat: list[TensorInfo]
    stage: int
    world: int
    paddings: Node
    step: object


@dataclass(frozen=True, slots=True)
class _Model:
    """What `model_states.pt` holds: the module, and the shapes of the parameters in its groups."""

    name: str
    path: str
    rank: int
    module: Node
    groups: list[Shapes]
    frozen: Shapes
    fragments: dict[str, Node]
    shared: dict[str, Node]
    step: Node


def join(files: Sequence[str], values: str) -> Checkpoint | None:
    """Read all files of a step as one checkpoint; None where no rank has slices of weights.

    `values` are `master`, float32, by default, or those of `module`, in the dtype of the training.
    """
    if values not in ("", MASTER, MODULE):
        raise EditError(f"--values is {MASTER} or {MODULE}, and not `{values}`")
    parts: dict[str, Checkpoint] = {}
    slices: list[_Slices] = []
    models: list[_Model] = []
    with remembered(parts.values()):
        for count, path in enumerate(sorted(files, key=by_number), 1):
            budget.current().share = count / len(files)
            part = read_part(path, count)
            name = os.path.basename(path)
            top = dict(named_items(part.tree))
            if name.endswith("_optim_states.pt"):
                slices += _slices(name, path, top)
            else:
                models += _models(name, path, top)
            parts[name] = replace(part, tree=None)
        if not slices:
            return None
        _refuse_others(parts, slices[0])
        model = _agreed(slices, models)
        entries = dict(_entries(slices, models, values or MASTER))
        tree = make_state_dict(entries, attribute(model.module, "_metadata"))
    first = slices[0]
    step = f" at step {model.step}" if length(model.step) is not None else ""
    what = "float32 master weights" if values != MODULE else "weights in the dtype of the training"
    ranks = counted(first.world, "rank")
    note = f"DeepSpeed ZeRO stage {first.stage} of {ranks}{step}: {what}, joined"
    return combined(os.path.dirname(first.path) or ".", NAME, tree, parts, [note])


# What is in a file.


def _slices(name: str, path: str, top: Mapping[str, Node]) -> Iterator[_Slices]:
    """Yield the slices of a rank, none of a file of another optimizer."""
    state = dict(named_items(top.get("optimizer_state_dict")))
    key = next((key for key in _FLAT if key in state), None)
    if key is None:
        return
    flat = state[key]
    tensors = [each for each in flat if isinstance(each, TensorInfo)] if type(flat) is list else []
    if not isinstance(flat, list) or len(tensors) != len(flat) or any(_odd(t) for t in tensors):
        raise Malformed(f"`{key}` is no list of flat tensors of float32", path=path)
    count = state.get("partition_count")
    worlds = [length(each) for each in (count if isinstance(count, list) else [count])]
    stage = state.get("zero_stage")
    if isinstance(stage, Object) and stage.args:  # a member of an enum
        stage = stage.args[0]
    known = length(stage) or (3 if key == _FLAT[1] else 1)
    world = max((each or 0 for each in worlds), default=0)
    if not 0 < world <= 1 << 20 or (known == 3) != (key == _FLAT[1]):
        raise Malformed("its stage or its count of partitions makes no sense", path=path)
    plain = [replace(each, requires_grad=False, origin=None) for each in tensors]
    paddings = state.get("param_alignment_paddings")
    yield _Slices(name, path, _rank(name), plain, known, world, paddings, _step(state))


def _odd(tensor: TensorInfo) -> bool:
    """Check for what is no row of numbers that follow each other."""
    return len(tensor.shape) != 1 or tensor.stride != (1,) or tensor.dtype.label != "F32"


def _models(name: str, path: str, top: Mapping[str, Node]) -> Iterator[_Model]:
    groups = top.get("param_shapes")
    if "module" not in top or not isinstance(groups, list):
        return
    yield _Model(
        name,
        path,
        _rank(name),
        top["module"],
        [_shapes(group, path) for group in groups],
        _shapes(top.get("frozen_param_shapes"), path),
        dict(named_items(top.get("frozen_param_fragments"))),
        dict(named_items(top.get("shared_params"))),
        top.get("global_steps"),
    )


def _shapes(group: Node, path: str) -> Shapes:
    found = {key: sizes_of(value) for key, value in named_items(group)}
    odd = [key for key, sizes in found.items() if sizes is None or prod(sizes) >= 1 << 62]
    if odd:
        raise Malformed(f"the noted shape of {odd[0]} makes no sense", path=path)
    return {key: sizes for key, sizes in found.items() if sizes is not None}


def _rank(name: str) -> int:
    match = _RANK.search(name)
    return int(match[1] or 0) if match else 0


def _step(state: Mapping[str, Node]) -> object:
    """Return how often the optimizer has stepped: a tensor, or in a group; None where unknown."""
    for name in ("base_optimizer_state", "optimizer_state_dict"):
        inner = dict(named_items(state.get(name)))
        for _, each in named_items(inner.get("state")):
            step = dict(named_items(each)).get("step")
            if isinstance(step, TensorInfo) and step.numel == 1:
                return step
        groups = inner.get("param_groups")
        for each in groups if isinstance(groups, list) else []:
            if (step := length(dict(named_items(each)).get("step"))) is not None:
                return step
    return None


# Whether they are of one save, and all there.


def _refuse_others(parts: Mapping[str, Checkpoint], first: _Slices) -> None:
    """Refuse what is more than a join: tensor or pipeline parallelism, experts."""
    cut = [
        name for name in parts if (match := _RANK.search(name)) and int(match[2] or match[3] or 0)
    ]
    experts = [name for name in parts if name.startswith("expp_rank")]
    for names, what in ((cut, "tensor or pipeline parallelism"), (experts, "experts")):
        if names:
            raise Unsupported(
                f"{names[0]}: ZeRO with {what}, whose files do not say how weights were cut",
                path=first.path,
                hint="ds_to_universal.py of DeepSpeed makes one file of each parameter",
            )


def _agreed(slices: Sequence[_Slices], models: Sequence[_Model]) -> _Model:
    """Refuse files that are not all of one save; return the model of rank 0."""
    first = slices[0]
    for each in slices[1:]:
        for what, one, other in (
            ("the stage", first.stage, each.stage),
            ("the number of ranks", first.world, each.world),
            ("the number of groups", len(first.flat), len(each.flat)),
        ):
            if one != other:
                raise Malformed(f"{what} is {one} in {first.name}, {other} in {each.name}")
    _refuse_missing([(each.rank, each.name) for each in slices], first.world, first.path)
    if not models:
        absent = "mp_rank_00_model_states.pt, with the names and shapes of the weights,"
        raise PartialCheckpoint(f"{absent} is not there", path=first.path)
    if first.stage == 3:
        _refuse_missing([(each.rank, each.name) for each in models], first.world, first.path)
    for model in models[1:]:
        if (model.groups, model.frozen) != (models[0].groups, models[0].frozen):
            raise Malformed(f"{models[0].name} and {model.name} differ in names or shapes")
        if model.step != models[0].step:
            what = f"step {models[0].step}, {model.name} of step {model.step}"
            raise Malformed(f"{models[0].name} is of {what}")
    _refuse_steps(slices)
    return models[0]


def _refuse_missing(found: Sequence[tuple[int, str]], world: int, path: str) -> None:
    names = dict(found)
    absent = [rank for rank in range(min(world, len(names) + _SHOWN)) if rank not in names]
    if absent or len(found) != world:
        like = found[0][1]
        wanted = [re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", like) for rank in absent]
        raise PartialCheckpoint(
            f"{len(found)} of {counted(world, 'file')} like {like} are there, one of each rank",
            path=path,
            evidence=[f"{name} is not there" for name in wanted[:_SHOWN]],
            hint="each machine that saved it kept its own; bring all files into one folder",
        )


def _refuse_steps(slices: Sequence[_Slices]) -> None:
    """Refuse files of which the optimizers have stepped differently often."""
    readers = Readers()
    try:
        steps = {each.name: _number(each.step, readers) for each in slices}
    finally:
        readers.close()
    known = {name: step for name, step in steps.items() if step is not None}
    first = next(iter(known), "")
    for name, step in known.items():
        if step != known[first]:
            raise Malformed(f"files of different steps: {first} and {name} differ in `step`")


def _number(step: object, readers: Readers) -> object:
    """Return bytes that are equal for equal steps."""
    if isinstance(step, TensorInfo):
        return b"".join(map(bytes, blocks(step, readers)))
    return step


# The weights.


def _entries(
    slices: Sequence[_Slices], models: Sequence[_Model], values: str
) -> Iterator[tuple[str, Node]]:
    """Yield the state_dict in the order of the module; ties stay one tensor."""
    model, stage = models[0], slices[0].stage
    made: dict[str, Node] = {}
    if values == MASTER:
        made |= _of_stage_3(slices, model) if stage == 3 else _of_stage_2(slices, model)
        made |= _frozen(models, stage)
    module = dict(named_items(model.module))
    budget.current().spend((len(module) + len(made)) * budget.TENSOR)
    for key, value in module.items():
        if (
            values == MODULE
            and isinstance(value, TENSORS)
            and value.shape != _noted(model, key, value)
        ):
            raise EditError(
                f"stage {stage} keeps no whole weights of the training: {key} is a placeholder",
                hint="leave out --values: the float32 master weights are whole",
            )
        made.setdefault(key, value)
    for key, source in model.shared.items():
        if values == MASTER and isinstance(source, str) and source in made:
            made[key] = made[source]
    for key in dict.fromkeys((*module, *made)):
        value = made[key]
        if isinstance(value, TENSORS) and value.shape != _noted(model, key, value):
            raise Malformed(
                f"{key} is a placeholder, and no rank has slices of it", path=model.path
            )
        yield key, value


def _noted(model: _Model, key: str, value: TensorInfo | Node) -> tuple[int, ...]:
    """Return the shape that is noted of a parameter, or of what it is tied to; else its own."""
    source = model.shared.get(key, key)
    for group in (*model.groups, model.frozen):
        for name in (key, source):
            if isinstance(name, str) and name in group:
                return group[name]
    own: tuple[int, ...] = value.shape
    return own


def _of_stage_2(slices: Sequence[_Slices], model: _Model) -> dict[str, Node]:
    """Cut parameters out of the partitions of all ranks, one behind the other in each group.

    Since 0.19 each parameter may be padded; the end of a group is padded so that the ranks have
    equally much, to a multiple of twice their number at most.
    """
    found: dict[str, Node] = {}
    if len(model.groups) != len(slices[0].flat):
        what = f"{counted(len(slices[0].flat), 'group')} of slices, {len(model.groups)} of shapes"
        raise Malformed(what, path=slices[0].path)
    for number, shapes in enumerate(model.groups):
        flat = [each.flat[number] for each in slices]
        paddings = _paddings(slices[0], number, len(shapes))
        position = 0
        for (key, shape), padding in zip(shapes.items(), paddings, strict=True):
            found[key] = _shaped(flat, position, shape, key, model)
            position += prod(shape) + padding
        there, unit = sum(each.numel for each in flat), 2 * len(slices)
        if -(-there // unit) != -(-position // unit):
            raise _left_over(slices[0], there - position, number)
    return found


def _paddings(first: _Slices, number: int, count: int) -> list[int]:
    if first.paddings is None:
        return [0] * count
    group = first.paddings[number] if isinstance(first.paddings, list) else None
    found = [length(each) for each in group] if isinstance(group, list) else []
    known = [each for each in found if each is not None]
    if len(known) != count:
        raise Malformed("`param_alignment_paddings` do not fit the parameters", path=first.path)
    return known


def _of_stage_3(slices: Sequence[_Slices], model: _Model) -> dict[str, Node]:
    """Join parameters of the slice that each rank has of each, one behind the other in a rank.

    A slice is as long in every rank: the last ones are padded.
    """
    found: dict[str, Node] = {}
    position = 0
    for key, shape in (pair for group in model.groups for pair in group.items()):
        size = -(-prod(shape) // len(slices))
        pieces = [piece for each in slices for piece in _cut(each.flat, position, size, key, each)]
        found[key] = _of_pieces(pieces, shape, key, model)
        position += size
    for each in slices:
        there = sum(flat.numel for flat in each.flat)
        if there != position:
            raise _left_over(each, there - position, None)
    return found


def _left_over(each: _Slices, count: int, group: int | None) -> Malformed:
    where = "" if group is None else f" in group {group}"
    what = "more" if count > 0 else "fewer"
    return Malformed(
        f"{each.name} has {abs(count)} elements {what} than the noted shapes{where}",
        path=each.path,
    )


def _shaped(
    flat: Sequence[TensorInfo], start: int, shape: tuple[int, ...], key: str, model: _Model
) -> TensorInfo:
    return _of_pieces(list(_cut(flat, start, prod(shape), key, model)), shape, key, model)


def _cut(
    flat: Sequence[TensorInfo], start: int, count: int, key: str, of: _Slices | _Model
) -> Iterator[TensorInfo]:
    """Yield the elements from `start` in tensors one behind the other."""
    left = count
    if not count:
        yield from (cuts.part(each, 0, 0, 0) for each in flat[:1])
    for each in flat:
        here = min(each.numel - start, left)
        if here > 0:
            yield cuts.part(each, 0, start, start + here)
            left -= here
        start = max(0, start - each.numel)
    if left:
        raise Malformed(f"{key} is beyond the end of the slices", path=of.path)


def _of_pieces(
    pieces: list[TensorInfo], shape: tuple[int, ...], key: str, model: _Model
) -> TensorInfo:
    """Join pieces, and leave out what pads the last ones."""
    if not pieces:
        raise Malformed(f"no rank has slices, of {key} neither", path=model.path)
    whole = cuts.joined(pieces, 0)
    return cuts.shaped(cuts.part(whole, 0, 0, prod(shape)), shape)


def _frozen(models: Sequence[_Model], stage: int) -> dict[str, Node]:
    """Return what was not trained: whole, or in stage 3 the fragments of all ranks."""
    first = models[0]
    found: dict[str, Node] = {}
    for key, shape in first.frozen.items():
        fragments = [model.fragments.get(key) for model in models]
        tensors = [each for each in fragments if isinstance(each, TensorInfo)]
        if len(tensors) != len(fragments):
            raise Malformed(f"a rank has no fragment of {key}, which is frozen", path=first.path)
        if stage < 3:
            found[key] = tensors[0]
            continue
        flat = [cuts.shaped(each, (each.numel,)) for each in tensors]
        found[key] = _shaped(flat, 0, shape, key, first)
    return found


CONTAINERS = (
    Container(
        NAME,
        "DeepSpeed ZeRO checkpoint",
        "",
        (),
        (),
        lambda head: False,
        nothing,
        traits=Traits(beside_files=True, remade=True),
    ),
)
