"""Rank files: what each rank of FSDP or tensor parallelism saved, read as one checkpoint.

`torch.save(model.state_dict())` of every rank, as verl, torchtune and accelerate leave it, holds a
piece of each tensor: a DTensor (FSDP2, tensor parallelism), or a ShardedTensor (FSDP1,
torch/distributed/fsdp/_state_dict_utils.py, `_sharded_post_state_dict_hook`). Joined, they are the
file of rank 0 with the whole tensors in it. What is no piece should be the same for all ranks.

FSDP1's LOCAL_STATE_DICT has parameters in a row, a `_flat_param`, without names and shapes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from ckptool.containers import _pieces
from ckptool.containers._agreement import agree
from ckptool.containers._container import Container, Traits
from ckptool.containers._sets import combined, harmful, read_part
from ckptool.errors import EditError, FormatError, Malformed, PartialCheckpoint, Unsupported
from ckptool.files import budget
from ckptool.files.fileio import Readers
from ckptool.pickles.holdings import Holding, Meshes, call_of, held
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Dict, Node, Object, Pairs, named_items
from ckptool.records import dataclass
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.parts import is_flat
from ckptool.state.walk import Path, dotted, tensors
from ckptool.tensors.numbers import FLOATS
from ckptool.tensors.tensor import AnyTensor, CompositeTensor, TensorInfo
from ckptool.text import counted, listed

NAME = "torch-rank-files"
# Of modules of torch: what a rank counts or measures itself (torch/nn/modules/batchnorm.py, and
# quantization/observer.py in torch/ao).
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked", "min_val", "max_val")
_STEPS = ("step", "global_step", "iteration", "epoch", "steps_run", "epochs_run")
_SHOWN = 8
_PIECE = budget.TENSOR + budget.NAME + budget.CALL  # bytes of memory


@dataclass(frozen=True, slots=True)
class _Rank:
    """What a rank wrote: its file, and the tensors in that, each as it is and what it is of."""

    name: str
    read: Checkpoint
    tensors: dict[Path, AnyTensor]
    held: dict[Path, Holding]
    steps: dict[str, int]

    @property
    def number(self) -> int | None:
        """Return the rank that its tensors say, None where none does."""
        return next((each.rank for each in self.held.values() if each.rank is not None), None)


def join(files: Sequence[str], values: str) -> Checkpoint | None:
    """Read the files of all ranks as one checkpoint; None where they hold no pieces of tensors.

    Raises `PartialCheckpoint` where ranks are missing or the pieces have no names, `Malformed`
    where ranks do not agree.
    """
    ranks: list[_Rank] = []
    with remembered(each.read for each in ranks):
        if not _read_all(files, ranks):
            return None
        _refuse_flat(ranks)
        if all(each.whole is not None for rank in ranks for each in rank.held.values()):
            return None
        if values:
            raise EditError(f"the ranks of {ranks[0].name} hold one value of each tensor")
        _refuse_missing(ranks)
        _refuse_steps(ranks)
        return _joined(ranks)


def _read_all(files: Sequence[str], ranks: list[_Rank]) -> bool:
    """Read all files into `ranks`; stop at the first that is readable and holds no pieces.

    One that is not readable is a fault of the set where the others are one: names prove nothing.
    """
    spending = budget.current()
    broken: FormatError | None = None
    for number in range(len(files)):
        spent = spending.spent
        try:
            rank = _rank(read_part(files, number))
        except FormatError as error:
            if ranks:
                raise
            broken = broken or error
            continue
        if not ranks and not rank.held and not _flat(rank):
            return False
        if broken is not None:
            raise broken
        if ranks:  # what is said of each piece takes more than all else
            plain = {path: each for path, each in rank.tensors.items() if path not in rank.held}
            rank = replace(rank, read=replace(rank.read, tree=None), tensors=plain)
            spending.spent = spent
            spending.spend(len(rank.held) * _PIECE + len(rank.tensors) * budget.TENSOR)
        ranks.append(rank)
    return bool(ranks)


def _rank(read: Checkpoint) -> _Rank:
    """Take what is needed of a file; of a tree, all that is said of each piece would stay."""
    found = dict(tensors(read.tree))
    meshes: Meshes = {}
    pieces = {p: of for p, each in found.items() if (of := held(each, meshes)) is not None}
    odd = [path for path, each in found.items() if path not in pieces and _is_piece(each)]
    if odd:
        raise Unsupported(
            f"{read.path}: what a rank holds of {dotted(odd[0])} is not a plain tensor",
            path=read.path,
        )
    steps = {
        key: value for key, value in named_items(read.tree) if key in _STEPS and type(value) is int
    }
    return _Rank(os.path.basename(read.path), harmful(read), found, pieces, steps)


def _is_piece(tensor: AnyTensor) -> bool:
    kinds = ("DTensor", "ShardedTensor")
    return isinstance(tensor, CompositeTensor) and tensor.layout in kinds


# Ranks that are of one checkpoint, and all there.


def _flat(rank: _Rank) -> list[Path]:
    return [path for path in rank.tensors if path and is_flat(path[-1])]


def _refuse_flat(ranks: Sequence[_Rank]) -> None:
    """Refuse parameters in a row: names may be beside them, shapes are in no file."""
    for rank in ranks:
        for path in _flat(rank):
            raise PartialCheckpoint(
                f"{rank.read.path}: {dotted(path)} holds parameters in a row, and no file says "
                "their names and shapes",
                path=rank.read.path,
                hint="save it under FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT), or "
                "SHARDED_STATE_DICT, whose rank files ckptool joins",
            )


def _refuse_missing(ranks: Sequence[_Rank]) -> None:
    """Refuse files that are not all of one world, each of another rank."""
    worlds: dict[int, str] = {}
    known: dict[int, str] = {}
    listed_ranks: set[int] = set()
    for rank in ranks:
        if any(each.mesh and each.mesh.coordinate is None for each in rank.held.values()):
            raise Malformed(f"{rank.name} does not say where in its mesh it is")
        world = max((each.world or 0 for each in rank.held.values()), default=0)
        worlds.setdefault(world, rank.name)
        for each in rank.held.values():
            listed_ranks.update(each.mesh.ranks if each.mesh else ())
        if rank.number is not None and known.setdefault(rank.number, rank.name) != rank.name:
            first = known[rank.number]
            raise Malformed(f"{first} and {rank.name} are both of rank {rank.number}")
    if len(worlds) > 1:
        (one, first), (other, second), *_ = worlds.items()
        raise Malformed(f"{first} is of {counted(one, 'rank')}, {second} of {other}")
    (world,) = worlds
    world = max(world, len(listed_ranks))
    absent = sorted(listed_ranks - known.keys())
    if not absent and len(known) < world:
        absent = [number for number in range(len(known) + _SHOWN) if number not in known]
    if len(ranks) < world or (known and absent):
        lost = listed(map(str, absent[: world - len(ranks)]), _SHOWN)
        raise PartialCheckpoint(
            f"{len(ranks)} of {counted(world, 'rank file')} are there"
            + (f": without rank {lost}" if known else ""),
            path=ranks[0].read.path,
            evidence=[f"{rank.name} is there" for rank in ranks[:_SHOWN]],
            hint="each machine that saved it kept its own; copy all files into one folder",
        )


def _refuse_steps(ranks: Sequence[_Rank]) -> None:
    first, *others = ranks
    for rank in others:
        for name, value in first.steps.items():
            other = rank.steps.get(name)
            if other is not None and other != value:
                what = f"{name} is {value} in {first.name} and {other} in {rank.name}"
                raise Malformed(f"files of different saves: {what}", path=rank.read.path)


# The whole tensors, in the tree of rank 0.


class _Joining:
    """What is joined of the tensors of all ranks; `readers` are for those that must be equal."""

    def __init__(self, ranks: Sequence[_Rank], readers: Readers) -> None:
        self.first, *self.others = ranks
        self.readers = readers
        self.differing: list[str] = []
        self.made: dict[Any, TensorInfo] = {}

    def each(self) -> Iterator[tuple[AnyTensor, AnyTensor]]:
        """Yield each tensor of rank 0 that is a piece, and the whole one."""
        for rank in self.others:
            if lost := rank.held.keys() - self.first.held.keys():
                what = f"{rank.name} holds a piece of {dotted(min(lost))}"
                raise Malformed(f"{what}, {self.first.name} does not")
        for path, tensor in self.first.tensors.items():
            if path in self.first.held:
                yield tensor, _in_parameter(tensor, self.whole(path))
            else:
                self.plain(path, tensor)

    def whole(self, path: Path) -> TensorInfo:
        """Join the pieces of a tensor; those that are tied stay one."""
        held = {self.first.name: self.first.held[path]}
        for rank in self.others:
            if path not in rank.held:
                what = f"{self.first.name} holds a piece of {dotted(path)}"
                raise Malformed(f"{what}, {rank.name} does not", path=rank.read.path)
            held[rank.name] = rank.held[path]
        views = tuple(piece.tensor.view for each in held.values() for piece in each.pieces)
        if views not in self.made:
            self.made[views] = _pieces.joined(dotted(path), held, self.agree)
        return self.made[views]

    def plain(self, path: Path, tensor: AnyTensor) -> None:
        """Compare what is no piece: a buffer may differ between ranks, a parameter may not."""
        for rank in self.others:
            other = rank.tensors.get(path)
            if other is not None and self.agree(tensor, other):
                continue
            if _is_parameter(path, tensor):
                what = "differs" if other is not None else "is missing"
                raise Malformed(
                    f"{dotted(path)} is not a piece, and {what} in {rank.name}: a parameter is the "
                    "same for all ranks",
                    path=rank.read.path,
                )
            self.differing.append(dotted(path))
            break

    def agree(self, one: AnyTensor, other: AnyTensor) -> bool:
        """Check that two ranks hold the same."""
        return agree(one, other, self.readers)


def _is_parameter(path: Path, tensor: AnyTensor) -> bool:
    """Check for what may be trained: floats, but for what modules of torch count and measure.

    A state_dict does not say what is a buffer. What is a Parameter in the file is none.
    """
    if call_of(tensor) is not tensor.origin:
        return True
    name = path[-1].rpartition(".")[2] if path else ""
    return tensor.dtype in FLOATS and name not in _BUFFERS


def _in_parameter(tensor: AnyTensor, whole: TensorInfo) -> TensorInfo:
    """Return the whole of a piece as the Parameter that the piece is."""
    origin = tensor.origin
    if origin is call_of(tensor):
        return whole
    inner = _in_parameter(origin.args[0], whole)
    grad = len(origin.args) > 1 and origin.args[1] is True
    made = replace(origin, args=(inner, *origin.args[1:]))
    return replace(whole, requires_grad=grad, origin=made)


def _joined(ranks: Sequence[_Rank]) -> Checkpoint:
    with closing(Readers()) as readers:
        joining = _Joining(ranks, readers)
        whole = {id(piece): value for piece, value in joining.each()}
    first = ranks[0].read
    tree = _replaced(first.tree, whole, {})
    notes = [
        f"joined of {counted(len(ranks), 'rank file')}, all that there are: {_described(ranks)}"
    ]
    if joining.differing:
        differ = f"differ between ranks, those of {ranks[0].name} are used"
        notes.append(f"{differ}: {listed(joining.differing)}")
    return combined(first.path, NAME, tree, {rank.name: rank.read for rank in ranks}, notes)


def _described(ranks: Sequence[_Rank]) -> str:
    """Say of what kind the pieces are, and of a mesh, what each dimension of it is called."""
    kinds: dict[str, None] = {}
    for each in ranks[0].held.values():
        mesh = each.mesh
        if mesh is None:
            kinds["ShardedTensors (FSDP1)"] = None
            continue
        names = mesh.names if len(mesh.names) == len(mesh.sizes) else [""] * len(mesh.sizes)
        sizes = (f"{name} {size}".strip() for name, size in zip(names, mesh.sizes, strict=True))
        kinds[f"DTensors (FSDP2, tensor parallelism) on a mesh of {' x '.join(sizes)}"] = None
    return listed(kinds)


def _replaced(node: Node, new: Mapping[int, Node], done: dict[int, Node]) -> Node:
    """Return a tree with other tensors; what is there twice, or in itself, stays one node."""

    def change(each: Node) -> Node:
        return _replaced(each, new, done)

    def pairs(given: Pairs) -> Pairs:
        return [(key, change(value)) for key, value in given]

    if id(node) in new or id(node) in done:
        return new.get(id(node)) or done[id(node)]
    match node:
        case Dict():
            made = done[id(node)] = Dict()
            made.pairs += pairs(node.pairs)
        case list():
            done[id(node)] = grown = list[Node]()
            grown += map(change, node)
        case tuple():
            done[id(node)] = tuple(map(change, node))
        case Object():
            called = done[id(node)] = replace(node, steps=[])
            called.args, called.kwargs = change(node.args), change(node.kwargs)
            called.steps += [
                (kind, pairs(payload) if kind == "setitem" else change(payload))
                for kind, payload in node.steps
            ]
        case _:
            return node
    return done[id(node)]


CONTAINERS = (Container(NAME, "rank files", traits=Traits(beside_files=True, remade=True)),)
