"""Write a distributed checkpoint as `torch.distributed.checkpoint` does in one process.

What torch flattens is what it can shard: dicts, and lists that hold tensors or dicts. Any other
value is an entry of its own, pickled (torch/distributed/checkpoint/_traverse.py). Names of keys
are texts there, a dict without entries leaves no trace, and attributes (`_metadata`) are lost.

The index has the form that torch 2.3 and every later one reads: the state of `TensorProperties`
is a tuple of five (torch/distributed/checkpoint/metadata.py), and there is no `storage_meta`,
which would hold when and where it was written and a random number.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from itertools import islice
from typing import Any

from ckptool.containers import torch_zip
from ckptool.errors import KeyCollision, LimitExceeded
from ckptool.files import planner
from ckptool.files.copying import Done, PlannedFile
from ckptool.files.jobs import Copy
from ckptool.pickles import pickle_writer
from ckptool.pickles.calls import dangerous
from ckptool.pickles.names import is_accepted, python3_name
from ckptool.pickles.safety import nodes
from ckptool.pickles.torch_objects import Lowering, StorageView
from ckptool.pickles.tree import Dict, Global, Node, Object, PersistentId, children, items
from ckptool.records import dataclass
from ckptool.state import tensor_facts, walk
from ckptool.state.walk import MAX_MEMBERS, Path, label
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import can_resolve
from ckptool.tensors.tensor import TENSORS, AnyTensor, Storage, TensorInfo, contiguous_stride
from ckptool.text import listed

INDEX = ".metadata"
DATA = "__0_0.distcp"  # the first file of rank 0
_CHECKPOINT = "torch.distributed.checkpoint"
MAX_ENTRIES = 1 << 22  # a file may hold a dict in many places, and that one dicts again
_VERSION = "1.0.0"  # CURRENT_DCP_VERSION in filesystem.py there

Step = str | int
_KEYS = (str, int, float, bytes, type(None))
# Plain for all that they are not in the table of what `weights_only` accepts.
_PLAIN = {("builtins", "frozenset"), ("builtins", "bytes")}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor, or a value that is pickled as a whole, and the path to it."""

    path: tuple[Step, ...]
    node: Node

    @property
    def key(self) -> str:
        """Return the key as torch makes it of the path."""
        return _dotted(self.path)


def _dotted(path: tuple[Step, ...]) -> str:
    return ".".join(map(str, path))


@dataclass(slots=True)
class Flat:
    """The entries of a tree, and what is lost: `unfit` maps places to reasons."""

    entries: list[Entry] = field(default_factory=list)
    unfit: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    numbered: list[str] = field(default_factory=list)

    def tensors(self) -> Iterator[tuple[Path, AnyTensor]]:
        """Yield all tensors as they are read back, those inside pickled values too."""
        for entry in self.entries:
            path = tuple(map(str, entry.path))
            if isinstance(entry.node, TENSORS):  # without its attributes
                yield path, entry.node
                continue
            for inside, tensor in walk.tensors(entry.node):
                yield (*path, *inside), tensor

    def notes(self) -> Iterator[str]:
        """Say what a distributed checkpoint has no place for."""
        if self.empty:
            yield f"an empty dict leaves no trace in it: {listed(self.empty, 4)}"
        if self.numbered:
            yield f"keys that are not text become text: {listed(self.numbered, 4)}"
        yield from tensor_facts.lost((each.key, each.node) for each in self.entries)
        storages = [each.node.storage for each in self.entries if isinstance(each.node, TensorInfo)]
        shared = len(storages) - len(set(storages))
        if shared:
            more = "1 copy" if shared == 1 else f"{shared} copies"
            yield f"tensors that share storage are written one by one: {more} more"


def owns(name: str) -> bool:
    """Return whether a file is of a distributed checkpoint."""
    return name == INDEX or (name.startswith("__") and name.endswith((".distcp", INDEX)))


# Flattening.


def flatten(tree: Node) -> Flat:
    """Flatten a dict as torch does it.

    Raises `KeyCollision` where two entries get one name.
    """
    flattener = _Flattener()
    flattener.visit(tree, (), ())
    flat = flattener.flat
    keys: set[str] = set()
    for entry in flat.entries if not flat.unfit else ():
        if entry.key in keys:
            raise KeyCollision(
                "with their keys joined by dots, two entries would have one name: "
                f"duplicated flatten key {entry.key}"
            )
        keys.add(entry.key)
    return flat


class _Flattener:
    """What was found on the way, and what is known of nodes that are met again, by id."""

    def __init__(self) -> None:
        self.flat = Flat()
        self.nested: dict[int, bool] = {}
        self.reasons: dict[int, str] = {}

    def visit(self, node: Node, path: tuple[Step, ...], around: tuple[int, ...]) -> bool:
        """Add the entries of a node; return whether it fits."""
        flat, place = self.flat, _dotted(path)
        if id(node) in around:
            flat.unfit[place] = "a value that holds itself"
            return False
        if not self.is_nested(node):
            return self.leaf(node, path)
        members = list(enumerate(node)) if isinstance(node, list) else list(self.named(node, path))
        if not members and path:
            flat.empty.append(place)
        if len(flat.entries) + len(flat.empty) > MAX_ENTRIES:
            raise LimitExceeded(f"more than {MAX_ENTRIES} entries when its dicts are flattened")
        first = len(flat.entries)
        fits = [self.visit(each, (*path, step), (*around, id(node))) for step, each in members]
        if isinstance(node, list) and not all(fits):  # without one, the others would move up
            del flat.entries[first:]
            return False
        return True

    def leaf(self, node: Node, path: tuple[Step, ...]) -> bool:
        """Add an entry, or why it is none."""
        reason = _unfit(node) if isinstance(node, TENSORS) else self.unplain(node)
        if reason:
            self.flat.unfit[_dotted(path)] = reason
            return False
        self.flat.entries.append(Entry(path, node))
        return True

    def is_nested(self, node: Node) -> bool:
        """Return whether torch flattens a value (`_is_terminal` in _traverse.py)."""
        if not isinstance(node, list):
            return items(node) is not None
        if id(node) not in self.nested:
            self.nested[id(node)] = False  # a list inside itself
            self.nested[id(node)] = any(
                isinstance(each, TENSORS) or self.is_nested(each) for each in node
            )
        return self.nested[id(node)]

    def named(self, node: Node, path: tuple[Step, ...]) -> Iterator[tuple[Step, Node]]:
        """Yield the members of a dict by the text of their keys; of equal keys the last counts."""
        members: dict[str, tuple[Node, Node]] = {}
        for key, value in items(node) or ():
            if not _is_key(key):
                place = _dotted((*path, label(key)))
                self.flat.unfit[place] = "a key of a dictionary that is not a plain value"
                continue
            text = str(key)
            if text in members and type(members[text][0]) is not type(key):
                yield text, value  # another key of the same text: a collision
            members[text] = (key, value)
        for text, (key, value) in members.items():
            if not isinstance(key, str):
                self.flat.numbered.append(_dotted((*path, text)))
            yield text, value

    def unplain(self, node: Node) -> str:
        """Say why a value is not plain, with an empty text where it is."""
        if isinstance(node, Global):
            return _odd(node)
        if isinstance(node, TENSORS):
            return next(filter(None, map(_odd, nodes(node))), "")
        if isinstance(node, Storage | StorageView | PersistentId):
            return f"a {type(node).__name__.lower()} is not a plain value"
        if isinstance(node, Object) and _odd(node):
            return _odd(node)
        if id(node) not in self.reasons:
            self.reasons[id(node)] = "a value that holds itself"
            reasons = (self.unplain(each) for each in children(node))
            self.reasons[id(node)] = next(filter(None, reasons), "")
        return self.reasons[id(node)]


def _is_key(node: Node) -> bool:
    """Check for a plain key; a tuple may hold another twice, that another, and so on."""
    stack, seen = [node], 0
    while stack and seen <= MAX_MEMBERS:
        each, seen = stack.pop(), seen + 1
        if isinstance(each, tuple):
            stack += each[: MAX_MEMBERS + 1]
        elif not isinstance(each, _KEYS):
            return False
    return not stack


def _odd(node: Node) -> str:
    """Say why a name or a call is not plain, with an empty text where it is, or is another node."""
    if isinstance(node, Global):
        plain = is_accepted(node) or python3_name(node) in _PLAIN
        return "" if plain else f"{node} is not a plain value"
    if not isinstance(node, Object):
        return ""
    if _odd(node.callee):
        return f"a {_odd(node.callee)}"
    return "a call of what a call returned is not a plain value" if any(dangerous([node])) else ""


def _unfit(tensor: AnyTensor) -> str:
    """Say why a tensor cannot be an entry, with an empty text where it can."""
    if not isinstance(tensor, TensorInfo) or not _has_size(tensor.dtype):
        return "no plain tensor"
    if tensor.lazy and not can_resolve(tensor.dtype, tensor.lazy):
        return f"a pending operation that torch does not do on {tensor.dtype.torch_name}"
    return ""


def _has_size(dtype: DType) -> bool:
    """Return whether torch's planner can size a dtype (torch/_utils.py, `_element_size`)."""
    name = dtype.torch_name
    return bool(name) and not dtype.quantized and not name.startswith("bits")


# Writing.


def lay_out(entries: Iterable[Entry]) -> tuple[PlannedFile, PlannedFile]:
    """Plan the file of all entries, one torch zip after the other, and the index."""
    position = 0
    archives: list[tuple[int, PlannedFile]] = []
    index = _Index()
    storages = []
    for entry in entries:
        archive = _archive(entry, position)
        archives.append((position, archive))
        index.add(entry, position, archive.nbytes)
        position += archive.nbytes
        if isinstance(entry.node, TensorInfo):
            storages.append(entry.node.storage)
    jobs = [job for _, archive in archives for job in archive.jobs]

    def finish(done: Sequence[Done]) -> Iterable[tuple[int, bytes]]:
        of_each = iter(done)
        for base, archive in archives:
            yield from _runs(archive, base, list(islice(of_each, len(archive.jobs))))

    jobs += planner.checks(jobs, storages)
    data = PlannedFile(DATA, position, (), jobs, finish)
    pickled = pickle_writer.dump(index.tree(), Lowering())
    return data, PlannedFile(INDEX, len(pickled), [(0, pickled)])


def _archive(entry: Entry, base: int) -> PlannedFile:
    """Plan the torch zip of an entry; its jobs write to places in the whole file."""
    node = entry.node
    if not isinstance(node, TensorInfo):
        return torch_zip.archive(node, lambda storage, start: Copy(storage, base + start))
    dtype = node.dtype if node.dtype.storage_class else None
    storage = Storage("", "", 0, node.nbytes, dtype)
    tensor = TensorInfo(node.dtype, node.shape, contiguous_stride(node.shape), storage)
    return torch_zip.archive(tensor, lambda _, start: planner.job(node, base + start))


def _runs(archive: PlannedFile, base: int, done: Sequence[Done]) -> Iterator[tuple[int, bytes]]:
    """Yield what an archive holds beside storages, pieces that touch as one: a write is a call."""
    start, run = 0, bytearray()
    for offset, data in sorted([*archive.literals, *archive.finish(done)]):
        if offset != start + len(run):
            yield base + start, bytes(run)
            start, run = offset, bytearray()
        run += data
    yield base + start, bytes(run)


class _Index:
    """The nodes of `.metadata`, entry by entry."""

    def __init__(self) -> None:
        self.described: list[tuple[Node, Node]] = []
        self.paths: list[tuple[Node, Node]] = []
        self.places: list[tuple[Node, Node]] = []
        self.properties: dict[DType, Object] = {}

    def add(self, entry: Entry, offset: int, nbytes: int) -> None:
        key, node = entry.key, entry.node
        info = {"relative_path": DATA, "offset": offset, "length": nbytes}
        at = None
        if isinstance(node, TensorInfo):
            size, at = _size(node.shape), _size((0,) * len(node.shape))
            chunk = _made("metadata.ChunkStorageMetadata", offsets=at, sizes=size)
            value = _made(
                "metadata.TensorStorageMetadata",
                properties=self._properties(node.dtype),
                size=size,
                chunks=[chunk],
            )
        else:
            value = _made("metadata.BytesStorageMetadata")
        index = {"fqn": key, "index": None if at is None else 0, "offset": at}
        self.described.append((key, value))
        self.paths.append((key, entry.path))
        place = _made("metadata.MetadataIndex", **index)
        self.places.append((place, _made("filesystem._StorageInfo", **info)))

    def _properties(self, dtype: DType) -> Object:
        """Return the `TensorProperties` of all tensors of a dtype; torch takes tuples as state."""
        if dtype not in self.properties:
            layout = Object(Global("torch.serialization", "_get_layout"), ("torch.strided",))
            contiguous = Object(Global(f"{_CHECKPOINT}.metadata", "_MEM_FORMAT_ENCODING"), (0,))
            state = (Global("torch", dtype.torch_name), layout, False, contiguous, False)
            named = Global(f"{_CHECKPOINT}.metadata", "TensorProperties")
            self.properties[dtype] = Object(named, (), "newobj", steps=[("build", state)])
        return self.properties[dtype]

    def tree(self) -> Node:
        """Return the index as a whole."""
        return _made(
            "metadata.Metadata",
            state_dict_metadata=Dict(self.described),
            planner_data=Dict(self.paths),
            storage_data=Dict(self.places),
            storage_meta=None,
            version=_VERSION,
        )


def _made(named: str, **state: Node) -> Object:
    """Make an instance of a dataclass, as pickle does: without a call of its constructor."""
    module, _, name = named.rpartition(".")
    steps: list[tuple[str, Any]] = [("build", Dict(list(state.items())))] if state else []
    return Object(Global(f"{_CHECKPOINT}.{module}", name), (), "newobj", steps=steps)


def _size(sizes: tuple[int, ...]) -> Object:
    return Object(Global("torch", "Size"), (sizes,))
