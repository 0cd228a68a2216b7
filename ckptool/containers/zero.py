"""DeepSpeed ZeRO 1, 2 and 3: slices of float32 masters of all ranks, joined under their names.

A step is a folder of `*_optim_states.pt`, a file for each rank, and `*_model_states.pt`, one of all
ranks or, in stage 3, of each (`_zero_files.py` reads them). What joins them in DeepSpeed is
utils/zero_to_fp32.py, which puts buffers first, makes them float32, and loses frozen parameters of
stage 1. Here order, `_metadata` and what was not trained are those of `module`.

In stages 1 and 2 the partitions of all ranks, one behind the other, are the parameters of a group;
since 0.19 each may be padded. The end of a group is padded to a multiple of twice the ranks. In
stage 3 each parameter is cut in as many slices as there are ranks, the last of them padded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from math import prod

from ckptool.containers import _zero_agreement as agreement, torch_zip
from ckptool.containers._container import Container, Traits
from ckptool.containers._sets import combined, read_part, slim
from ckptool.containers._zero_files import Model, Shapes, Slices, found_in
from ckptool.errors import EditError, Malformed
from ckptool.files import budget, paths
from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Dict, Node
from ckptool.records import grouped
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.replacing import make_state_dict
from ckptool.tensors import values as cuts
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TENSORS, Packing, TensorInfo
from ckptool.text import counted, length, listed

NAME = "deepspeed-zero"
MODULE = "module"  # what `--values` chooses: the weights in the dtype of the training
_EXTRA = "_extra_state"


def join(files: Sequence[str], values: str) -> Checkpoint | None:
    """Read all files of a step as one checkpoint; None where none is of ZeRO.

    The masters are taken, or with the `values` `module` the weights as they were trained.
    """
    parts: dict[str, Checkpoint] = {}
    slices: list[Slices] = []
    models: list[Model] = []
    experts: dict[str, dict[str, Node]] = {}
    masters = values != MODULE
    with remembered(parts.values()):
        for name, found in _read(files, parts):
            if isinstance(found, Slices):
                slices.append(found)
            elif isinstance(found, Model):  # of the others, all that is said would stay
                models.append(agreement.slim(found, models[0]) if models else found)
            elif found is not None:
                experts[name] = found
        if not slices and not models:
            return None
        notes = agreement.check(slices, models, experts, masters=masters)
        model = models[0]
        if masters:
            entries = _masters(slices, models)
            notes += agreement.of_step(slices[0], model, entries)
        else:
            entries = _of_module(model, experts)
        tree = make_state_dict(entries, model.metadata)
    path = paths.folder_of(model.path) or "."
    return combined(path, NAME, tree, parts, [_said(slices, model, masters=masters), *notes])


def _read(
    files: Sequence[str], parts: dict[str, Checkpoint]
) -> Iterator[tuple[str, Slices | Model | dict[str, Node] | None]]:
    """Read files, and keep in `parts` what is needed of each beside what is found in it.

    In stage 3 the pickles of all models but the first are alike: of hundreds, two are parsed.
    """
    spending = budget.current()
    parsed: Model | None = None
    again: Container | None = None
    known = Dict()  # instead of a tree
    for number, path in enumerate(files):
        spent = spending.spent
        part = read_part(files, number, again)
        name = os.path.basename(path)
        alike = part.tree is known
        found = parsed.of_another(part) if parsed and alike else found_in(part)
        parts[name] = slim(part)
        if parsed or not isinstance(found, Model):
            spending.spent = spent
            spending.spend(len(part.records) * budget.TENSOR)
        if isinstance(found, Model) and not alike:
            parsed, again = found, _like(replace(parts[name], tree=known))
        yield name, found


def _like(part: Checkpoint) -> Container | None:
    """Return what reads archives with the very pickle of a part."""
    record = part.records.get("data.pkl")
    if record is None or record.packing is not Packing.PLAIN:
        return None
    data = TensorInfo(DType.U8, (record.nbytes,), (1,), record)
    with closing(Readers()) as readers:
        pickled = b"".join(map(bytes, blocks(data, readers)))
    (container,) = torch_zip.CONTAINERS
    return container._replace(read=partial(torch_zip.read_like, like=part, pickled=pickled))


_LEFT_OUT = "not read: optimizer and training state"


def _said(slices: Sequence[Slices], model: Model, *, masters: bool) -> str:
    """Say what was joined."""
    at = "" if model.steps is None else f" at step {model.steps}"
    if not masters:
        return f"DeepSpeed{at}: weights in the dtype of the training, of {model.name}; {_LEFT_OUT}"
    first = slices[0]
    dtypes = sorted({flat.dtype.label for flat in first.flat})
    ranks = f"all {first.world} ranks are" if first.world > 1 else "its one rank is"
    there = f"{ranks} there{' and agree' if first.world > 1 else ''}"
    what = f"{listed(dtypes)} master weights; {_LEFT_OUT}"
    return f"DeepSpeed ZeRO stage {first.stage}{at}: {there}; {what}"


# The weights.


def _of_module(model: Model, experts: Mapping[str, Mapping[str, Node]]) -> dict[str, Node]:
    """Return the weights as they were trained, those of experts behind all others."""
    noted, entries = model.noted, model.entries
    for key, value in entries.items():
        shape = noted.get(key)
        if _is_placeholder(model, key, value) or (
            shape is not None and getattr(value, "shape", None) != shape
        ):
            raise EditError(
                f"the weights of the training are incomplete in ZeRO stage 3: {key} is a "
                "placeholder",
                hint="leave out --values: the master weights are complete",
            )
    for name, tensors in experts.items():
        if twice := tensors.keys() & entries.keys():
            raise Malformed(f"{min(twice)} is in {name} and in another file", path=model.path)
        entries |= tensors
    return {
        key: cuts.own(value) if key in noted and isinstance(value, TensorInfo) else value
        for key, value in entries.items()
    }


def _masters(slices: Sequence[Slices], models: Sequence[Model]) -> dict[str, Node]:
    """Return the state_dict in the order of the module; ties stay one tensor."""
    model, stage = models[0], slices[0].stage
    try:
        made: dict[str, Node] = {**(_of_stage_3 if stage == 3 else _of_groups)(slices, model)}
        made |= _frozen(models, stage)
    except ValueError as error:
        raise Malformed(f"slices that cannot be joined: {error}", path=slices[0].path) from error
    entries = model.entries
    budget.current().spend((len(entries) + len(made) * len(slices)) * budget.TENSOR)
    trained, tied = dict(made), _tied(model)
    for key in tied.keys() & entries.keys() - made.keys():
        made[key] = trained.get(tied[key], entries[key])
    for key, value in entries.items():
        if key not in made and _is_placeholder(model, key, value):
            raise Malformed(
                f"{key} is a placeholder, and no rank has slices of it", path=model.path
            )
    return {key: made.get(key, entries.get(key)) for key in dict.fromkeys((*entries, *made))}


def _tied(model: Model) -> dict[str, str]:
    """Return which keys are tied to a parameter: as rank 0 says, or by the tensors themselves.

    A placeholder has a storage of its own for each parameter.
    """
    entries, noted = model.entries, model.noted
    held = ((key, entries.get(key)) for key in noted)
    names = grouped((value.view, key) for key, value in held if isinstance(value, TensorInfo))
    tied: dict[str, str] = {}
    for key, value in entries.items():
        if key not in noted and isinstance(value, TensorInfo):
            same = names.get(value.view, [])
            tied |= {key: same[0]} if len(same) == 1 else {}
    return tied | {key: name for key, name in model.shared.items() if isinstance(name, str)}


def _is_placeholder(model: Model, key: str, value: Node) -> bool:
    """Check for what stage 3 leaves of a parameter in the module."""
    own = key in model.buffers or key.rpartition(".")[2] == _EXTRA
    whole = own or model.noted.get(key) == (0,)
    return isinstance(value, TENSORS) and value.shape == (0,) and not whole


def _of_groups(slices: Sequence[Slices], model: Model) -> dict[str, Node]:
    """Cut parameters out of the partitions of stages 1 and 2."""
    found: dict[str, Node] = {}
    for number, shapes in enumerate(model.groups):
        flat = [each.flat[number] for each in slices]
        position = 0
        paddings = _paddings(slices[0], number, shapes)
        for (key, shape), padding in zip(shapes.items(), paddings, strict=True):
            pieces = list(_cut(flat, position, prod(shape), key, model))
            found[key] = _of_pieces(pieces, shape, key)
            position += prod(shape) + padding
        there, unit = sum(each.numel for each in flat), 2 * len(slices)
        if there > -(-position // unit) * unit or there < position:
            where = f" in group {number}" if len(model.groups) > 1 else ""
            raise _left_over("all ranks", slices[0].path, there - position, where)
    return found


def _paddings(first: Slices, number: int, shapes: Shapes) -> list[int]:
    if first.paddings is None:
        return [0] * len(shapes)
    listed = first.paddings if isinstance(first.paddings, list) else []
    group = listed[number] if number < len(listed) else None
    found = [length(each) for each in group] if isinstance(group, list) else []
    known = [each for each in found if each is not None]
    if len(known) != len(shapes):
        raise Malformed("`param_alignment_paddings` do not fit the parameters", path=first.path)
    return known


def _of_stage_3(slices: Sequence[Slices], model: Model) -> dict[str, Node]:
    """Join each parameter of the slice that each rank has of it, one behind the other in a rank."""
    found: dict[str, Node] = {}
    position = 0
    for key, shape in (pair for group in model.groups for pair in group.items()):
        size = -(-prod(shape) // len(slices))
        pieces = [piece for each in slices for piece in _cut(each.flat, position, size, key, each)]
        found[key] = _of_pieces(pieces, shape, key)
        position += size
    for each in slices:
        if there := sum(flat.numel for flat in each.flat) - position:
            raise _left_over(each.name, each.path, there)
    return found


def _left_over(who: str, path: str, count: int, where: str = "") -> Malformed:
    few = f"{counted(-count, 'element')} fewer than the noted shapes need"
    many = f"{counted(count, 'element')} beyond the noted shapes and their padding"
    return Malformed(f"slices of {who} have {many if count > 0 else few}{where}", path=path)


def _cut(
    flat: Sequence[TensorInfo], start: int, count: int, key: str, of: Slices | Model
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


def _of_pieces(pieces: list[TensorInfo], shape: tuple[int, ...], key: str) -> TensorInfo:
    """Join pieces without what pads the last ones, in a storage of their own."""
    if not pieces:
        raise Malformed(f"no rank has slices, of {key} neither")
    made = cuts.joined([each for each in pieces if each.numel] or pieces[:1], 0)
    made = cuts.own(cuts.shaped(cuts.part(made, 0, 0, prod(shape)), shape))
    if made.storage.chunked is not None:  # whose other names are all alike
        made.storage.key = key
    return made


def _frozen(models: Sequence[Model], stage: int) -> dict[str, Node]:
    """Return what was not trained: whole, or in stage 3 the fragments of all ranks."""
    found: dict[str, Node] = {}
    for key, shape in models[0].frozen.items():
        size = -(-prod(shape) // len(models)) if stage == 3 else prod(shape)
        pieces = []
        for model in models:
            piece = model.fragments.get(key)
            if not isinstance(piece, TensorInfo) or piece.numel != size:
                what = f"{model.name} has no fragment of {size} elements"
                raise Malformed(f"{what} of {key}, which is frozen", path=model.path)
            plain = replace(piece, requires_grad=False, origin=None)
            pieces.append(cuts.shaped(plain, (size,)))
        found[key] = _of_pieces(pieces if stage == 3 else pieces[:1], shape, key)
    return found


CONTAINERS = (
    Container(NAME, "DeepSpeed ZeRO checkpoint", traits=Traits(beside_files=True, remade=True)),
)
