"""What one rank has of a tensor: pieces of a DTensor or ShardedTensor, and which of it they are.

A DTensor (torch/distributed/tensor/_api.py) says on which mesh it is, how each dimension of that
places it, and where in the mesh the rank is that wrote it. The mesh was a tensor of ranks, and a
layout of them later (torch/distributed/device_mesh.py). A ShardedTensor lists the boxes of all
ranks (torch/distributed/_shard/sharded_tensor/api.py, `__getstate__`).
"""

from __future__ import annotations

from math import prod

from ckptool.pickles.tree import Dict, Global, Node, Object, attribute, items
from ckptool.records import dataclass
from ckptool.tensors.tensor import TENSORS, AnyTensor, TensorInfo
from ckptool.text import length

FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
MAX_LAYOUT = 4  # levels of a layout of a mesh, one within another
Sizes = tuple[int, ...]


def sizes_of(node: Node) -> tuple[int, ...] | None:
    """Read a size or stride: a tuple or list of lengths, or a call of torch.Size on one."""
    if isinstance(node, Object) and node.callee == Global("torch", "Size") and node.args:
        node = node.args[0]
    if type(node) is not tuple and type(node) is not list:
        return None
    for number in node:
        if length(number) is None:
            return None
    return tuple(node)


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor: where it begins in each dimension (None: not known), its elements."""

    offsets: Sizes | None
    tensor: TensorInfo


@dataclass(frozen=True, slots=True)
class Placement:
    """How a dimension of a mesh places a tensor: a class of torch, the dimension that it cuts.

    `factor` is the `split_factor` of a `_StridedShard`, the number of cuts that others made before.
    """

    kind: str
    dim: int | None
    factor: int = 1

    def __str__(self) -> str:
        dim = "" if self.dim is None else str(self.dim)
        return f"{self.kind}({dim}{f', {self.factor}' if self.factor != 1 else ''})"


@dataclass(frozen=True, slots=True)
class Mesh:
    """The ranks that a DTensor is on: how many in each dimension, and where in it this rank is.

    `ranks` are those of the mesh or of the one that it is a slice of. What the file does not say
    is None or empty.
    """

    sizes: Sizes
    names: tuple[str, ...] = ()
    coordinate: Sizes | None = None
    ranks: Sizes = ()
    rank: int | None = None


@dataclass(frozen=True, slots=True)
class Holding:
    """What a DTensor or ShardedTensor of a rank holds of a tensor of this shape.

    `rank` and `world` are None where the file does not say. Of a DTensor, `placements` has one
    for each dimension of its `mesh`, and `order` the dimensions of the mesh that cut each of the
    tensor, first to last, where it says so. Of a ShardedTensor, `boxes` are those of all ranks.
    """

    shape: Sizes
    pieces: tuple[Piece, ...]
    rank: int | None
    world: int | None
    mesh: Mesh | None = None
    placements: tuple[Placement, ...] = ()
    order: tuple[tuple[int, Sizes], ...] | None = None
    boxes: tuple[tuple[Sizes, Sizes], ...] = ()

    @property
    def whole(self) -> TensorInfo | None:
        """Return the tensor itself where a piece is all of it, and no summand of it."""
        summand = any("Partial" in each.kind for each in self.placements)
        if summand or len(self.pieces) != 1 or self.pieces[0].tensor.shape != self.shape:
            return None
        return self.pieces[0].tensor


Meshes = dict[int, tuple[Node, Mesh, int | None]]  # by the `id` of their nodes, with the world


def held(tensor: AnyTensor, meshes: Meshes) -> Holding | None:
    """Read what a rank holds of a tensor, inside a Parameter too; None for all of any other.

    `meshes` remembers those of a file, which are shared by its tensors.
    """
    return holding(call_of(tensor), meshes)


def call_of(tensor: AnyTensor) -> Node:
    """Return the call that rebuilds a tensor, inside that of a Parameter."""
    origin = tensor.origin
    while isinstance(origin, Object) and origin.args and isinstance(origin.args[0], TENSORS):
        origin = origin.args[0].origin
    return origin


def holding(origin: Node, meshes: Meshes | None = None) -> Holding | None:
    """Read what a rank holds of a tensor, None for a tensor of any other class.

    Where in a mesh that is, is read with `meshes` alone.
    """
    if not isinstance(origin, Object) or origin.callee != FROM_TYPE or len(origin.args) != 4:
        return None
    _, kind, args, state = origin.args
    shape = sizes_of(args[2]) if isinstance(args, tuple) and len(args) > 2 else None
    if not isinstance(kind, Global) or shape is None or not isinstance(state, tuple):
        return None
    if kind.name == "DTensor":
        return _dtensor(shape, state, meshes)
    return _sharded(shape, state) if kind.name == "ShardedTensor" else None


def _dtensor(shape: Sizes, state: tuple[Node, ...], meshes: Meshes | None) -> Holding | None:
    """Read a DTensor: (None, its slots)."""
    slots = dict(pair for part in state for pair in items(part) or [] if type(pair[0]) is str)
    local, spec = slots.get("_local_tensor"), slots.get("_spec")
    placements = attribute(spec, "placements")
    if not isinstance(local, TensorInfo) or not isinstance(placements, tuple):
        return None
    found = tuple(
        Placement(each.callee.name, attribute(each, "dim"), _factor(each))
        for each in placements
        if isinstance(each, Object) and isinstance(each.callee, Global)
    )
    pieces = (Piece(None, local),)
    if meshes is None:
        return Holding(shape, pieces, None, None, placements=found)
    node = attribute(spec, "mesh")
    if id(node) not in meshes:
        meshes[id(node)] = (node, *_mesh(node))
    _, mesh, world = meshes[id(node)]
    return Holding(shape, pieces, mesh.rank, world, mesh, found, _order(spec))


def _factor(placement: Node) -> int:
    factor = attribute(placement, "split_factor")
    return factor if type(factor) is int else 1


def _mesh(mesh: Node) -> tuple[Mesh, int | None]:
    """Read a DeviceMesh, and how many ranks there are.

    Its layout came with torch 2.9, and is a tuple of layouts since 2.14.
    """
    ranks = attribute(mesh, "_rank_map") or attribute(mesh, "mesh")
    layout = attribute(mesh, "_layout")
    axes = attribute(layout, "axes")
    shape = attribute(layout, "shape")
    if isinstance(axes, tuple):
        sizes = tuple(_count(attribute(each, "shape")) for each in axes)
    elif shape is not None:
        sizes = tuple(map(_count, shape if isinstance(shape, tuple) else (shape,)))
    else:
        sizes = ranks.shape if isinstance(ranks, TensorInfo) else ()
    names = attribute(mesh, "mesh_dim_names") or attribute(mesh, "_mesh_dim_names")
    listed = attribute(mesh, "_flatten_rank_map") or attribute(mesh, "_flatten_mesh_list")
    members = sizes_of(listed) or ()
    coordinate = sizes_of(attribute(mesh, "_coordinate_on_dim"))
    if coordinate is not None and (
        len(coordinate) != len(sizes)
        or any(at >= size for at, size in zip(coordinate, sizes, strict=True))
    ):
        coordinate = None
    rank = length(attribute(mesh, "_rank"))
    if rank is None and coordinate is not None and len(members) == prod(sizes):
        rank = members[_number(coordinate, sizes)]
    world = ranks.numel if isinstance(ranks, TensorInfo) else prod(sizes) or None
    return Mesh(sizes, _texts(names), coordinate, members, rank), world


def _count(shape: Node, levels: int = MAX_LAYOUT) -> int:
    """Count the ranks along a dimension of a layout: a number, or numbers within each other."""
    if isinstance(shape, tuple) and levels:
        return prod(_count(each, levels - 1) for each in shape)
    return length(shape) or 0


def _texts(node: Node) -> tuple[str, ...]:
    return tuple(each for each in node if type(each) is str) if isinstance(node, tuple) else ()


def _number(coordinate: Sizes, sizes: Sizes) -> int:
    """Count the places of a mesh before a coordinate, in row-major order."""
    number = 0
    for at, size in zip(coordinate, sizes, strict=True):
        number = number * size + at
    return number


def _order(spec: Node) -> tuple[tuple[int, Sizes], ...] | None:
    """Read `shard_order`, of torch 2.10 and later: the dimensions of the mesh that cut each."""
    order = attribute(spec, "shard_order")
    if not isinstance(order, tuple):
        return None
    pairs = [tuple(each.args) for each in order if isinstance(each, Object)]
    return tuple((pair[0], sizes_of(pair[1]) or ()) for pair in pairs if len(pair) == 2)


def _sharded(shape: Sizes, state: tuple[Node, ...]) -> Holding | None:
    """Read a ShardedTensor: its pieces, the metadata of all, the group."""
    pieces = []
    for shard in state[0] if state and isinstance(state[0], list) else ():
        tensor = _slots(shard).get("tensor")
        if not isinstance(tensor, TensorInfo):
            return None
        offsets, _ = _box(_slots(shard).get("metadata"))
        pieces.append(Piece(offsets, tensor))
    all_of = attribute(state[1], "shards_metadata") if len(state) > 1 else None
    boxes = [_box(each) for each in all_of] if isinstance(all_of, list) else []
    group = next((part for part in state if attribute(part, "global_world_size")), None)
    rank, world = attribute(group, "global_rank"), attribute(group, "global_world_size")
    return Holding(
        shape,
        tuple(pieces),
        length(rank),
        length(world),
        boxes=tuple((at, sizes) for at, sizes in boxes if at is not None and sizes is not None),
    )


def _box(metadata: Node) -> tuple[Sizes | None, Sizes | None]:
    """Read a ShardMetadata: where a box begins, and its sizes."""
    slots = _slots(metadata)
    return sizes_of(slots.get("shard_offsets")), sizes_of(slots.get("shard_sizes"))


def _slots(node: Node) -> dict[str, Node]:
    """Return the attributes of an object with `__slots__`, its state being (None, they)."""
    state = node.state if isinstance(node, Object) else None
    inside = state[1] if isinstance(state, tuple) and len(state) == 2 else state
    return dict(inside.pairs) if isinstance(inside, Dict) else {}
