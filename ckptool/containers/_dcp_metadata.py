"""The index of a distributed checkpoint: the pickle `.metadata` -> records.

Its classes are those of torch/distributed/checkpoint/metadata.py, and `_StorageInfo` of
filesystem.py there. torch 2.0 took `TensorProperties` from
torch/distributed/_shard/sharded_tensor/metadata.py; Megatron core adds `mcore_data`, in a subclass
or as an attribute (megatron/core/dist_checkpointing/strategies/torch.py). Names are not looked at:
an object is what its attributes say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from math import prod

from ckptool.errors import FormatError, LimitExceeded, Malformed, Unsupported
from ckptool.files import budget
from ckptool.pickles.pickle_reader import Vocabulary
from ckptool.pickles.subclasses import dtype_of, sizes_of
from ckptool.pickles.tree import MAX_NESTING, Global, Node, Object, Pairs
from ckptool.records import dataclass
from ckptool.state.checkpoint import attribute, items
from ckptool.tensors.chunks import tiling_problem
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import MAX_COUNT, MAX_DIMENSIONS
from ckptool.text import counted, length, listed

Step = str | int
Sizes = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """Where a saved object lies: a file of the folder, and a range of its bytes."""

    file: str
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Box:
    """A chunk of a tensor: where it begins in each dimension, its sizes, where it is saved."""

    offsets: Sizes
    sizes: Sizes
    part: Part


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor and its boxes, or another object, whose `dtype` is None, in a single box.

    `path` leads to it in the nested dict that was saved. Empty boxes are left out.
    """

    key: str
    path: tuple[Step, ...]
    dtype: DType | None
    shape: Sizes
    boxes: tuple[Box, ...]


@dataclass(frozen=True, slots=True)
class _Place:
    """A `MetadataIndex`: a key, and one text of key and offset."""

    key: str
    text: str


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A `ChunkStorageMetadata`."""

    offsets: Sizes
    sizes: Sizes


class IndexVocabulary(Vocabulary):
    """Make small what an index says of each chunk; what is odd stays as it is, for `parse`."""

    def called(self, node: Object) -> Node:
        """Take a torch.Size for the tuple that it is."""
        sizes = node.args[0] if node.callee == _SIZE and len(node.args) == 1 else None
        return sizes if type(sizes) is tuple and sizes_of(sizes) == sizes else node

    def built(self, node: Node, state: Node) -> Node | None:
        """Read what it is as soon as its state is known."""
        built = super().built(node, state)
        if not isinstance(built, Object) or type(built.callee) is not Global or built.args:
            return built
        read = _SMALL.get(built.callee.name) if _TORCH.match(built.callee.module) else None
        try:
            return read(built) if read and len(built.steps) == 1 else built
        except FormatError:
            return built


@dataclass(frozen=True, slots=True)
class Index:
    """All entries in their order, who wrote them, and what there is to say of them."""

    entries: list[Entry]
    generation: str
    notes: list[str]


def parse(tree: Node) -> Index:
    """Read the index; raises `Malformed` or `Unsupported`."""
    described = items(attribute(tree, "state_dict_metadata"))
    if described is None:
        raise Malformed("the index has no state_dict_metadata")
    places = _places(attribute(tree, "storage_data"))
    known = {key for key, _ in described if isinstance(key, str)}
    paths = _paths(attribute(tree, "planner_data"), known)
    entries: dict[str, Entry] = {}
    budget.current().spend(len(described) * 2 * budget.NAME)
    for key, value in described:
        if not isinstance(key, str):
            raise Malformed("a key of the index is not text")
        if key in entries:
            raise Malformed(f"the index has the key {key} twice")
        entries[key] = _entry(key, value, paths.get(key, (key,)), places)
    found = list(entries.values())
    return Index(found, _generation(tree, described), _reshaped(attribute(tree, "mcore_data")))


def _generation(tree: Node, described: Pairs) -> str:
    """Say which torch wrote it, by what came later than 2.0."""
    writer = "Megatron core, " if attribute(tree, "mcore_data") is not None else ""
    if attribute(tree, "version") is not None:
        return f"{writer}torch 2.9 or newer"
    properties = (attribute(value, "properties") for _, value in described)
    first = next((each for each in properties if isinstance(each, Object)), None)
    if first is not None and "_shard" in str(first.callee):
        return f"{writer}torch 2.0 to 2.2"
    return f"{writer}torch 2.3 or newer" if first is not None else writer.rstrip(", ")


def _reshaped(data: Node) -> list[str]:
    """Note the tensors that Megatron core says it saved in another shape than the model's."""
    word = "nd_reformulated_orig_global_shape"
    keys = [
        key
        for key, value in items(data) or []
        if isinstance(key, str) and any(name == word for name, _ in items(value) or [])
    ]
    if not keys:
        return []
    which = f"{counted(len(keys), 'tensor')} ({listed(keys, 3)})"
    return [f"Megatron core saved {which} in another shape than the model's"]


# Where things are saved.


def _places(node: Node) -> dict[str, Part]:
    """Give the parts by `_place` of what is in them."""
    pairs = items(node)
    if pairs is None:
        raise Malformed("the index has no storage_data")
    places: dict[str, Part] = {}
    budget.current().spend(len(pairs) * 2 * budget.NAME)
    for index, info in pairs:
        place = _named(index)
        if place.text in places:
            raise Malformed(f"storage_data lists a part of {place.key} twice")
        places[place.text] = _part(info, place.key)
    return places


def _named(node: Node) -> _Place:
    """Read a `MetadataIndex`."""
    if isinstance(node, _Place):
        return node
    key, offset = attribute(node, "fqn"), attribute(node, "offset")
    offsets = None if offset is None else sizes_of(offset)
    if not isinstance(key, str) or (offset is not None and offsets is None):
        raise Malformed("an entry of storage_data names no key and offset")
    return _Place(key, _place(key, offsets))


def _place(key: str, offsets: Sizes | None) -> str:
    """Make one text of key and offset: a file chooses the numbers, and could make them collide."""
    return f"{offsets} {key}"


def _part(info: Node, key: str = "") -> Part:
    """Read a `_StorageInfo`."""
    if isinstance(info, Part):
        return info
    name, offset, nbytes = (attribute(info, each) for each in ("relative_path", "offset", "length"))
    if not isinstance(name, str) or type(offset) is not int or type(nbytes) is not int:
        raise Malformed(f"storage_data has no entry for {key}")
    if name in ("", ".", "..") or any(character in name for character in "/\\\0"):
        raise Malformed(f"{key} is in {name!r}, which is not the name of a file in the folder")
    if length(offset) is None or length(nbytes) is None or max(offset, nbytes) > MAX_COUNT:
        raise Malformed(f"{key} is at an impossible place: {nbytes} bytes from {offset}")
    transforms = attribute(info, "transform_descriptors")
    if transforms:
        shown = [str(each) for each in transforms] if isinstance(transforms, list) else ["unknown"]
        raise Unsupported(f"{key} is saved through a transformation ({listed(shown)})")
    return Part(name, offset, nbytes)


# What is saved.


def _entry(key: str, value: Node, path: tuple[Step, ...], places: dict[str, Part]) -> Entry:
    properties = attribute(value, "properties")
    if properties is None:
        if not isinstance(value, Object) or attribute(value, "chunks") is not None:
            raise Malformed(f"the index does not say what {key} is")
        part = places.get(_place(key, None))
        if part is None:
            raise Malformed(f"storage_data has no entry for {key}")
        return Entry(key, path, None, (), (Box((), (), part),))
    shape = _checked(key, attribute(value, "size"))
    boxes = list(_boxes(key, value, shape))
    wrong = tiling_problem(shape, boxes)
    if wrong:
        raise Malformed(f"the chunks of {key} {shape_text(shape)} {wrong}")
    found = []
    for offsets, sizes in boxes:
        part = places.get(_place(key, offsets))
        if part is None:
            raise Malformed(f"storage_data has no entry for the chunk of {key} at {offsets}")
        found.append(Box(offsets, sizes, part))
    return Entry(key, path, _dtype(key, properties), shape, tuple(found))


def shape_text(shape: Sizes) -> str:
    """Write a shape as torch does."""
    return str(list(shape))


def _boxes(key: str, value: Node, shape: Sizes) -> Iterator[tuple[Sizes, Sizes]]:
    """Yield the chunks that hold elements, each once; all where the tensor has none."""
    chunks = attribute(value, "chunks")
    if not isinstance(chunks, list):
        raise Malformed(f"{key} has no list of chunks")
    seen = set()
    for chunk in chunks:
        box = _chunk(chunk, key)
        offsets, sizes = box.offsets, box.sizes
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise Malformed(f"a chunk of {key} has another number of dimensions than it")
        if any(o + s > whole for o, s, whole in zip(offsets, sizes, shape, strict=True)):
            raise Malformed(
                f"a chunk of {key} {shape_text(shape)} is outside of it: "
                f"{shape_text(sizes)} at {shape_text(offsets)}"
            )
        text = f"{offsets} {sizes}"  # hashed as a text, as in `_place`
        if text not in seen and (0 not in sizes or sizes == shape):
            seen.add(text)
            yield offsets, sizes


def _chunk(node: Node, key: str = "") -> _Chunk:
    """Read a `ChunkStorageMetadata`."""
    if isinstance(node, _Chunk):
        return node
    offsets, sizes = (_checked(key, attribute(node, each)) for each in ("offsets", "sizes"))
    return _Chunk(offsets, sizes)


# What is said of each chunk, by its class of torch.
_SMALL: dict[str, Callable[[Node], _Place | Part | _Chunk]] = {
    "MetadataIndex": _named,
    "_StorageInfo": _part,
    "ChunkStorageMetadata": _chunk,
}
_TORCH = re.compile(r"torch\.distributed\.(_shard\.)?checkpoint\.")
_SIZE = Global("torch", "Size")


def _checked(key: str, node: Node) -> Sizes:
    found = sizes_of(node)
    beyond = prod(size or 1 for size in found or ()) > MAX_COUNT
    if found is None or len(found) > MAX_DIMENSIONS or beyond:
        what = "is not a tuple of numbers, negative or beyond 2^62"
        raise Malformed(f"a size or offset of {key} {what}")
    return found


def _dtype(key: str, properties: Node) -> DType:
    """Read a `TensorProperties`: its state is a tuple, or a dict as of any dataclass."""
    state = properties.state if isinstance(properties, Object) else None
    named = state[0] if isinstance(state, tuple) and state else attribute(properties, "dtype")
    found = dtype_of(named)
    if found is None:
        shown = f"the dtype {named}" if isinstance(named, Global) else "no dtype"
        raise Malformed(f"{key} has {shown}")
    return found


# The nested dict.


def _paths(node: Node, known: set[str]) -> dict[str, tuple[Step, ...]]:
    """Give the path of each key in the nested dict; empty where the planner kept none."""
    paths: dict[str, tuple[Step, ...]] = {}
    for key, path in items(node) or []:
        if not isinstance(key, str) or key not in known:
            continue
        if not isinstance(path, tuple) or not path or not isinstance(path[0], str):
            raise Malformed("planner_data gives no path")
        if len(path) > MAX_NESTING:
            raise LimitExceeded(f"values nested more than {MAX_NESTING} deep")
        if not all(isinstance(step, str) or length(step) is not None for step in path):
            raise Malformed("planner_data gives a path of other things than names and numbers")
        paths[key] = path
    return paths
