"""Tensors joined of what ranks hold of them: pure functions, which say what does not fit.

A DTensor is cut along dimensions of a mesh, one after the other: what was cut last is joined first.
`Shard` cuts in the order of the mesh. `_StridedShard` is for what was cut before by dimensions of
the mesh that come after it, in `split_factor` pieces (FSDP2 of a model under tensor parallelism):
where those are all that cut the same dimension, it is a cut like any other, made last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod

from ckptool.errors import Malformed, Unsupported
from ckptool.pickles.holdings import Holding, Mesh, Placement, Sizes
from ckptool.records import grouped
from ckptool.tensors import values
from ckptool.tensors.chunks import tiling_problem
from ckptool.tensors.tensor import MAX_COUNT, MAX_DIMENSIONS, TensorInfo, contiguous_stride
from ckptool.text import listed, shape as shape_text

Agree = Callable[[TensorInfo, TensorInfo], bool]
_CUTS = {"Shard", "_StridedShard"}


def joined(key: str, held: Mapping[str, Holding], agree: Agree) -> TensorInfo:
    """Join what ranks hold of a tensor, by the names of their files.

    Those that hold the same piece must `agree`. Raises `Malformed` for pieces that do not make the
    tensor, `Unsupported` for placements that are no plain cuts.
    """
    first, *others = held
    for name in others:
        if differing := _difference(held[first], held[name]):
            raise Malformed(f"{key}: {differing} in {first} and {name}")
    try:
        mesh = held[first].mesh
        return _of_mesh(key, mesh, held, agree) if mesh else _of_boxes(key, held, agree)
    except ValueError as error:
        raise Malformed(f"{key}: {error}") from None


def _difference(one: Holding, other: Holding) -> str:
    """Say in what two holdings are not of one tensor, an empty text where they are."""
    if one.shape != other.shape:
        return f"the shapes are {shape_text(one.shape)} and {shape_text(other.shape)}"
    if one.placements != other.placements or one.order != other.order:
        placed = (listed(map(str, each.placements)) for each in (one, other))
        return f"the placements are {' and '.join(placed)}"
    if (one.mesh and one.mesh.sizes) != (other.mesh and other.mesh.sizes):
        sizes = (shape_text(each.mesh.sizes) if each.mesh else "none" for each in (one, other))
        return f"the sizes of the mesh are {' and '.join(sizes)}"
    if one.boxes != other.boxes:
        return "the metadata of the shards differs"
    return ""


# Pieces of a mesh.


def _of_mesh(key: str, mesh: Mesh, held: Mapping[str, Holding], agree: Agree) -> TensorInfo:
    like = next(iter(held.values()))
    _refuse_placements(key, like.placements, mesh)
    cut = [at for at, each in enumerate(like.placements) if each.kind in _CUTS]
    pieces: dict[Sizes, tuple[str, TensorInfo]] = {}
    for name, each in held.items():
        assert each.mesh is not None
        assert each.mesh.coordinate is not None
        place = tuple(each.mesh.coordinate[at] for at in cut)
        piece = each.pieces[0].tensor
        of, before = pieces.setdefault(place, (name, piece))
        if before is not piece and not agree(before, piece):
            raise Malformed(f"{key}: {of} and {name} hold the same piece, and differ")
    sizes = tuple(mesh.sizes[at] for at in cut)
    if len(pieces) != prod(sizes):
        raise Malformed(f"{key}: {len(pieces)} of its {prod(sizes)} pieces are there")
    found = {place: piece for place, (_, piece) in pieces.items()}
    for at in reversed(_cut_order(key, mesh, like)):
        dim, position = like.placements[at].dim, cut.index(at)
        assert dim is not None
        runs = grouped((_without(place, position), found[place]) for place in sorted(found))
        cut.remove(at)
        found = {place: values.joined(run, dim) for place, run in runs.items()}
    (whole,) = found.values()
    if whole.shape != like.shape:
        shapes = f"{shape_text(whole.shape)} and not {shape_text(like.shape)}"
        raise Malformed(f"{key}: its pieces make a tensor of shape {shapes}")
    return whole


def _without(place: Sizes, position: int) -> Sizes:
    return place[:position] + place[position + 1 :]


def _refuse_placements(key: str, placements: Sequence[Placement], mesh: Mesh) -> None:
    odd = [str(each) for each in placements if each.kind not in _CUTS | {"Replicate"}]
    if odd:
        raise Unsupported(
            f"{key} is placed as {listed(odd)}: its ranks hold summands or masks, and no pieces",
            hint="redistribute it to Shard or Replicate before it is saved",
        )
    if len(placements) != len(mesh.sizes) or 0 in mesh.sizes:
        count = f"{len(placements)} placements on a mesh of {shape_text(mesh.sizes)}"
        raise Malformed(f"{key} has {count}")


def _cut_order(key: str, mesh: Mesh, held: Holding) -> list[int]:
    """Order the dimensions of a mesh as they cut a tensor, first to last."""
    by_dim: dict[int, list[int]] = {}
    for at, each in enumerate(held.placements):
        if each.kind not in _CUTS:
            continue
        if type(each.dim) is not int or not 0 <= each.dim < len(held.shape):
            raise Malformed(f"{key} {shape_text(held.shape)} is cut along dimension {each.dim}")
        by_dim.setdefault(each.dim, []).append(at)
    orders = {dim: _of_dimension(key, mesh, held, cuts) for dim, cuts in by_dim.items()}
    for dim, said in held.order or ():
        if sorted(said) != sorted(orders.get(dim, ())):
            raise Malformed(f"{key} has a shard_order that does not fit its placements")
        orders[dim] = list(said)
    return [at for order in orders.values() for at in order]


def _of_dimension(key: str, mesh: Mesh, held: Holding, cuts: Sequence[int]) -> list[int]:
    """Order what cuts one dimension; those further right in the mesh are placed first."""
    order: list[int] = []
    for at in reversed(cuts):
        placement = held.placements[at]
        if placement.factor == 1:
            order.insert(0, at)
        elif placement.factor == prod(mesh.sizes[each] for each in order):
            order.append(at)
        else:
            raise Unsupported(
                f"{key} is placed as {placement} on a mesh of {shape_text(mesh.sizes)}: no "
                "plain pieces of it",
                hint="redistribute it to Shard or Replicate before it is saved",
            )
    return order


# Pieces that say where they begin.


def _of_boxes(key: str, held: Mapping[str, Holding], agree: Agree) -> TensorInfo:
    like = next(iter(held.values()))
    boxes: dict[tuple[Sizes, Sizes], tuple[str, TensorInfo]] = {}
    for name, each in held.items():
        for piece in each.pieces:
            if piece.offsets is None:
                raise Malformed(f"{key}: {name} does not say where its piece begins")
            box = (piece.offsets, piece.tensor.shape)
            of, before = boxes.setdefault(box, (name, piece.tensor))
            if before is not piece.tensor and not agree(before, piece.tensor):
                raise Malformed(f"{key}: {of} and {name} hold the same piece, and differ")
    if like.boxes and not {box for box in like.boxes if 0 not in box[1]} <= boxes.keys():
        raise Malformed(f"{key}: {len(boxes)} of its {len(like.boxes)} pieces are there")
    return assembled(key, like.shape, [(at, piece) for (at, _), (_, piece) in boxes.items()])


def assembled(key: str, shape: Sizes, pieces: Iterable[tuple[Sizes, TensorInfo]]) -> TensorInfo:
    """Make a tensor of pieces that begin at places in it; raises `Malformed` where they do not."""
    boxes = list(pieces)
    if not boxes:
        raise Malformed(f"{key}: no rank holds a piece of it")
    if len(shape) > MAX_DIMENSIONS or prod(shape) > MAX_COUNT:
        raise Malformed(f"{key} has the shape {shape_text(shape)}")
    for at, piece in boxes:
        sizes = piece.shape
        inside = len(at) == len(sizes) == len(shape) and all(
            begin + size <= whole for begin, size, whole in zip(at, sizes, shape, strict=True)
        )
        if not inside:
            where = f"{shape_text(sizes)} at {shape_text(at)}"
            raise Malformed(f"a piece of {key} {shape_text(shape)} is beyond it: {where}")
    like = boxes[0][1]
    if any(piece.dtype is not like.dtype for _, piece in boxes):
        raise Malformed(f"the pieces of {key} are of several dtypes")
    if 0 in shape:
        return replace(like, shape=shape, stride=contiguous_stride(shape))
    boxes = [(at, piece) for at, piece in boxes if piece.numel]
    if wrong := tiling_problem(shape, [(at, piece.shape) for at, piece in boxes]):
        raise Malformed(f"the pieces of {key} {shape_text(shape)} {wrong}")
    try:
        return values.of_boxes(shape, boxes)
    except ValueError as error:
        raise Malformed(f"{key}: {error}") from None
