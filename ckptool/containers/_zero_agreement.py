"""Whether the files of a step of DeepSpeed ZeRO are all there, of one save, and plain joins."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace

from ckptool.containers._agreement import agree
from ckptool.containers._zero_files import EXPERT, Model, Rank, Slices
from ckptool.errors import FormatError, Malformed, PartialCheckpoint, Unsupported
from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.tree import Node
from ckptool.tensors import numbers
from ckptool.tensors.tensor import TENSORS, TensorInfo
from ckptool.text import argument, counted, length, listed

_UNIVERSAL = "ds_to_universal.py of DeepSpeed makes one file of each parameter"
_SHOWN = 8
Experts = Mapping[str, Mapping[str, Node]]


def slim(model: Model, first: Model) -> Model:
    """Return what is needed of the model of another rank; refuse one of other parameters."""
    if (model.groups, model.frozen) != (first.groups, first.frozen):
        raise Malformed(
            f"{first.name} and {model.name} differ in the names or shapes of their parameters",
            path=model.path,
        )
    return replace(
        model,
        entries={key: value for key, value in model.entries.items() if key in model.buffers},
        metadata=None,
        groups=first.groups,
        frozen=first.frozen,
        shared={},
    )


def check(
    slices: Sequence[Slices], models: Sequence[Model], experts: Experts, *, masters: bool
) -> list[str]:
    """Refuse files that are not all of one save, or more than a join; return what to note."""
    _refuse_parallel([*slices, *models])
    if not models:
        raise PartialCheckpoint(
            "mp_rank_00_model_states.pt, with the names and shapes of the weights, is missing",
            path=slices[0].path,
            hint="rank 0 saved it; copy all files into one folder",
        )
    _refuse_experts(slices, models[0], experts, masters=masters)
    if not masters:
        return []
    if not slices:
        raise _without_masters(models[0])
    first = slices[0]
    for each in slices[1:]:
        _refuse_other(first, each)
    _refuse_missing(slices, first.world)
    _refuse_missing(models, first.world if first.stage == 3 else 1)
    for model in models:
        _refuse_other_model(first, models[0], model)
    with closing(Readers()) as readers:
        _refuse_other_steps(slices, readers)
        return list(_differing(models, readers))


# More than a join.


def _refuse_parallel(files: Sequence[Rank]) -> None:
    """Refuse tensor and pipeline parallelism: no file says how weights were cut."""
    ranks = {each.mp_rank for each in files}
    degree = max((each.degree for each in files if isinstance(each, Model)), default=1)
    if len(ranks) > 1 or max(ranks) > 0 or degree > 1:
        count = max(degree, max(ranks) + 1)
        raise Unsupported(
            f"{files[0].name} is one of {count} model-parallel ranks (tensor or pipeline "
            "parallelism): no file says how its weights were cut",
            path=files[0].path,
            hint=_UNIVERSAL,
        )


def _refuse_experts(
    slices: Sequence[Slices], model: Model, experts: Experts, *, masters: bool
) -> None:
    """Refuse masters of experts, which other ranks share than share the rest.

    Their weights in the dtype of the training are in a file for each, of layers by number.
    """
    mixed = bool(experts) or any(count > 1 for count in model.experts)
    if not mixed and not any(each.experts for each in slices):
        return
    if masters or not model.by_expert:
        whole = model.by_expert and experts
        raise Unsupported(
            f"{model.name} is of a mixture of experts, whose master weights are cut differently",
            path=model.path,
            hint="--values module takes the weights in the dtype of the training" if whole else "",
        )
    there = {
        (length(match[1] or "0", 10), length(match[2], 10))
        for match in map(EXPERT.fullmatch, experts)
        if match
    }
    wanted = {(layer, each) for layer, count in enumerate(model.experts) for each in range(count)}
    if absent := sorted(wanted - there):
        layer, expert = absent[0]
        raise PartialCheckpoint(
            f"{len(absent)} of {counted(len(wanted), 'file')} of experts are missing",
            path=model.path,
            evidence=[f"no file of expert {expert} of layer {layer}"],
        )


# All there, and of one save.


def _without_masters(model: Model) -> FormatError:
    folder = os.path.join(os.path.dirname(model.path), "zero")
    if os.path.isdir(folder):  # deepspeed/checkpoint/ds_to_universal.py
        return Unsupported(
            f"{model.name} is of a universal checkpoint of DeepSpeed, with a file of each "
            f"parameter in {folder}",
            path=model.path,
            hint="convert the step that it was made of",
        )
    whole = all(
        isinstance(value := model.entries.get(key), TENSORS) and value.shape == shape
        for key, shape in model.noted.items()
    )
    of = f" of its {counted(model.world, 'rank')}" if model.world else ""
    return PartialCheckpoint(
        f"the master weights are missing: no *_optim_states.pt{of} is next to {model.name}",
        path=model.path,
        hint=f"ckptool convert --values module {argument(model.path)} OUT   writes its weights in "
        "the dtype of the training"
        if whole
        else "copy all files into one folder",
    )


def _refuse_other(first: Slices, other: Slices) -> None:
    """Refuse slices that are not cut as the first are."""
    _refuse_differing(
        other,
        (first, "ZeRO stage", first.stage, other.stage),
        (first, "number of ranks", first.world, other.world),
        (first, "number of groups", len(first.flat), len(other.flat)),
        (first, "dtype", _dtypes(first), _dtypes(other)),
        (first, "`param_alignment_paddings`", first.paddings, other.paddings),
    )


def _refuse_differing(other: Rank, *facts: tuple[Rank, str, object, object]) -> None:
    """Refuse a file of which a fact is not that of one that was read before."""
    for known, what, one, another in facts:
        if one != another:
            said = f"{known.name} and {other.name} differ in their {what}: {one} and {another}"
            raise _of_other_saves(said, other.path)


def _of_other_saves(said: str, path: str) -> Malformed:
    return Malformed(said, path=path, hint="they are from different saves")


def _dtypes(slices: Slices) -> str:
    return listed(dict.fromkeys(flat.dtype.label for flat in slices.flat))


def _refuse_missing(files: Sequence[Rank], world: int) -> None:
    """Refuse files that are not one for each rank."""
    names: dict[int, str] = {}
    for each in files:
        if names.setdefault(each.rank, each.name) != each.name:
            twice = f"{names[each.rank]} and {each.name} are both of rank {each.rank}"
            raise _of_other_saves(twice, each.path)
    absent = [rank for rank in range(min(world, len(names) + _SHOWN)) if rank not in names]
    like = files[0].name
    if absent:
        wanted = [re.sub(r"pp_rank_\d+", f"pp_rank_{rank}", like) for rank in absent]
        raise PartialCheckpoint(
            f"{len(names)} of {counted(world, 'file')} like {like} are there, one of each rank",
            path=files[0].path,
            evidence=[f"{name} is missing" for name in wanted[:_SHOWN]],
            hint="each machine that saved it kept its own; copy all files into one folder",
        )
    if beyond := [name for rank, name in names.items() if rank >= world]:
        said = f"{beyond[0]} is there, and {like} is of {counted(world, 'rank')}"
        raise _of_other_saves(said, files[0].path)


def _refuse_other_model(first: Slices, model: Model, other: Model) -> None:
    groups = (0, 0) if first.stage == 3 else (len(first.flat), len(other.groups))
    _refuse_differing(
        other,
        (first, "number of ranks", first.world, other.world or first.world),
        (model, "step", model.steps, other.steps),
        (first, "number of groups", *groups),
    )


def _refuse_other_steps(slices: Sequence[Slices], readers: Readers) -> None:
    """Refuse files of which the optimizers have stepped differently often, or differ in rates."""
    first, known = slices[0], _number(slices[0].step, readers)
    for each in slices[1:]:
        step = _number(each.step, readers)
        _refuse_differing(each, (first, "step", known, step))
        if each.said != first.said:
            said = f"{first.name} and {each.name} differ in their learning rates"
            raise _of_other_saves(said, each.path)


def _number(step: object, readers: Readers) -> object:
    """Return a number, of a tensor its only element."""
    if isinstance(step, TensorInfo):
        data = b"".join(map(bytes, blocks(step, readers)))
        return int(found) if (found := struct.unpack("<f", data)[0]).is_integer() else found
    return step


def _differing(models: Sequence[Model], readers: Readers) -> Iterator[str]:
    """Yield a note of buffers that differ between ranks."""
    first, *others = models
    differing = {
        key: None
        for model in others
        for key, value in model.entries.items()
        if key not in first.entries or not agree(first.entries[key], value, readers)
    }
    if differing:
        yield f"differ between ranks, those of {first.name} are used: {listed(differing)}"


def of_step(first: Slices, model: Model, entries: Mapping[str, Node]) -> list[str]:
    """Refuse a model that is of another step than the masters, or note that it may be.

    An optimizer that was not loaded with its model has stepped less often; the module is then still
    made of the masters. In stage 3 nothing is there to compare.
    """
    with closing(Readers()) as readers:
        step = _number(first.step, readers)
        if model.steps is None or step is None or step == model.steps - model.skipped:
            return []
        said = f"{model.name} is from step {model.steps}, the optimizer has stepped {step} times"
        sizes = {
            key: value.numel
            for key, value in model.entries.items()
            if key in model.noted and key not in model.frozen and isinstance(value, TensorInfo)
        }
        key = min(sizes, key=lambda each: sizes[each] or 1 << 62, default="")
        master, trained = entries.get(key), model.entries.get(key)
        if not isinstance(master, TensorInfo) or not isinstance(trained, TensorInfo):
            return [said]
        if trained.numel and not _is_made_of(trained, master, readers):
            raise _of_other_saves(f"{said}, and {key} in it is another", model.path)
        return [said]


def _is_made_of(trained: TensorInfo, master: TensorInfo, readers: Readers) -> bool:
    """Check whether the first elements of a weight are its master's, rounded."""
    one = bytes(next(blocks(trained, readers)))
    other = bytes(next(blocks(master, readers)))
    count = min(len(one) // trained.dtype.itemsize, len(other) // master.dtype.itemsize)
    other = other[: count * master.dtype.itemsize]
    if trained.dtype not in numbers.CASTS:
        return True
    if trained.dtype is not master.dtype:
        made = bytearray(count * trained.dtype.itemsize)
        numbers.cast(made, other, master.dtype, trained.dtype)
        return one[: len(made)] == made
    return one[: len(other)] == other
