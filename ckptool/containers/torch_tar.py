"""torch tar: what `torch.save` wrote in torch 0.1, an uncompressed tar of four members.

`storages` is a pickled count, then for each storage a pickle of (key, location, class), an 8-byte
element count and the raw bytes; then a pickled list of views (key, root key, offset, size).
`tensors` is a pickled count, then for each tensor a pickle of (key, storage key, class), the
number of dimensions (4 bytes, and 4 that mean nothing), sizes, strides and offset of 8 bytes each.
`pickle` names tensors and storages by their key alone (torch/serialization.py, `legacy_load` in
`_legacy_load`). Files that others wrote lack `tensors` and have torch's later calls in `pickle`,
with the persistent ids of storages as plain tuples. Read only: what is written is a torch zip.

torch tries this container before the legacy one, and so does ckptool.
"""

from __future__ import annotations

import struct
from dataclasses import replace

from ckptool.containers._container import Container, Traits
from ckptool.errors import Malformed
from ckptool.files import tars
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader
from ckptool.pickles.pickle_reader import Ended, Pickle, Vocabulary
from ckptool.pickles.torch_objects import (
    StorageId,
    StorageView,
    TorchVocabulary,
    old_tensor,
    storage_dtype,
)
from ckptool.pickles.tree import Global, Node, Object
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Storage, TensorInfo
from ckptool.text import length

FIRST_WINDOW = 1 << 12
_MEMBERS = ("sys_info", "pickle", "tensors", "storages")


def sniff(head: bytes) -> bool:
    """Return whether a file starts as a tar."""
    return tars.is_tar(head)


def read(reader: Reader) -> Checkpoint | None:
    """Read the members; None for any other tar."""
    members = tars.read_members(reader)
    if not {"pickle", "storages"} <= members.keys():
        return None
    parts = {}
    seen: list[Pickle] = []
    for name in _MEMBERS:
        if name in members:
            member = members[name]
            if member.kind != "file":
                raise Malformed(f"the member {name} is a {member.kind}", offset=member.start)
            part = reader.part(member.start, member.nbytes, reader.path)
            parts[name] = _Part(part, seen)
    known = _TarVocabulary()
    with pickle_reader.remembered(seen):
        _storages(parts["storages"], known)
        if "tensors" in parts:
            _tensors(parts["tensors"], known)
        if "sys_info" in parts:
            parts["sys_info"].load()
        parsed = parts["pickle"].load(known)
    return Checkpoint(
        reader.path,
        "torch-tar",
        parsed.tree,
        reader.nbytes,
        globals={name: at for each in seen for name, at in each.globals.items()},
        calls=[call for each in seen for call in each.calls],
        pickle_name="pickle",
        generation="torch 0.1",
        protocol=parsed.protocol,
        unread=tuple(name for name in members if name not in _MEMBERS),
        flaws=tuple(
            f"torch.load finds no member {name}: it is named {members[name].name}"
            for name in parts
            if members[name].name != name
        ),
    )


def _key(node: Node) -> str:
    """Return a key as text: torch's are numbers, in memory or as decimal text."""
    if type(node) is int or isinstance(node, str):
        return str(node)
    raise Malformed("the key of a storage or tensor is neither a number nor text")


class _Part:
    """A member, read from its start: pickles, which are added to those `seen`, and bytes."""

    def __init__(self, reader: Reader, seen: list[Pickle]) -> None:
        self.reader = reader
        self.position = 0
        self.pickles = seen

    def load(self, vocabulary: Vocabulary | None = None) -> Pickle:
        """Parse the pickle that comes next, read further as it turns out to be longer."""
        left = self.reader.nbytes - self.position
        window = min(FIRST_WINDOW, left)
        while True:
            data = self.reader.read(self.position, window)
            try:
                self.pickles.append(pickle_reader.load(data, 0, vocabulary))
            except Ended:
                if window == left:
                    raise
                window = min(4 * window, left)
            else:
                self.position += self.pickles[-1].end
                return self.pickles[-1]

    def count(self) -> int:
        """Read a pickled count."""
        count = length(self.load().tree)
        if count is None:
            raise Malformed("the count of storages or tensors is not a number, or negative")
        return count

    def row(self) -> tuple[Node, ...]:
        """Read a pickled tuple of three."""
        row = self.load().tree
        if not isinstance(row, tuple) or len(row) != 3:
            raise Malformed("the description of a storage or tensor is not a tuple of three")
        return row

    def numbers(self, layout: str) -> tuple[int, ...]:
        """Read integers."""
        data = self.reader.read(self.position, struct.calcsize(layout))
        self.position += len(data)
        return struct.unpack(layout, data)


def _storages(part: _Part, known: _TarVocabulary) -> None:
    for _ in range(part.count()):
        row_key, location, kind = part.row()
        if not isinstance(location, str) or not isinstance(kind, Global):
            raise Malformed("a storage without a class or location", offset=part.position)
        dtype = storage_dtype(kind, part.position)
        (count,) = part.numbers("<q")
        key, nbytes = _key(row_key), count * (dtype.itemsize if dtype else 1)
        if length(count) is None or nbytes > part.reader.nbytes - part.position:
            raise Malformed(f"storage {key} says it has {count} elements", offset=part.position)
        if key in known.storages:
            raise Malformed(f"two storages are {key}", offset=part.position)
        start = part.reader.base + part.position
        known.storages[key] = Storage(part.reader.file, key, start, nbytes, dtype, location)
        part.position += nbytes
    if part.position < part.reader.nbytes:  # what others wrote ends here
        _views(part, known)


def _views(part: _Part, known: _TarVocabulary) -> None:
    views = part.load().tree
    for view in views if isinstance(views, list | tuple) else [None]:
        match view:
            case (key, root, int(offset), int(count)) if _key(root) in known.storages:
                storage = known.storages[_key(root)]
                if isinstance(storage, StorageView):
                    raise Malformed(f"storage {_key(key)} is a view of a view")
                itemsize = storage.dtype.itemsize if storage.dtype else 1
                unknown = length(offset) is None or length(count) is None
                if unknown or (offset + count) * itemsize > storage.nbytes:
                    raise Malformed(f"a view of storage {_key(root)} beyond its end")
                known.storages[_key(key)] = StorageView(storage, offset, count)
            case _:
                raise Malformed("the list of views of storages is damaged", offset=part.position)


def _tensors(part: _Part, known: _TarVocabulary) -> None:
    for _ in range(part.count()):
        key, stored, _ = part.row()
        storage = known.storages.get(_key(stored))
        if storage is None:
            raise Malformed(f"tensor {_key(key)} is in a storage that is missing")
        dimensions, _ = part.numbers("<ii")
        if not 0 <= dimensions <= part.reader.nbytes // 16:
            raise Malformed(f"tensor {_key(key)} has {dimensions} dimensions", offset=part.position)
        shape = part.numbers(f"<{dimensions}q")
        stride = part.numbers(f"<{dimensions}q")
        (offset,) = part.numbers("<q")
        if not shape and isinstance(storage, Storage) and not storage.nbytes:
            shape, stride = (0,), (1,)  # torch 0.1 had no scalars: it is empty
        known.tensors[_key(key)] = old_tensor(storage, offset, shape, stride, part.position)


class _TarVocabulary(TorchVocabulary):
    """Resolve the keys that stand for tensors and storages, and what others wrote instead."""

    def __init__(self) -> None:
        super().__init__(self._described)
        self.storages: dict[str, Storage | StorageView] = {}
        self.tensors: dict[str, TensorInfo] = {}

    def _described(self, described: StorageId) -> Storage:
        storage = self.storages.get(described.key)
        if not isinstance(storage, Storage) or storage.nbytes != described.nbytes:
            raise Malformed(f"there is no storage {described.key} of {described.nbytes} bytes")
        return storage

    def persistent(self, value: Node, offset: int) -> Node:
        """Turn a key into what it stands for, (class, file, source) into the class."""
        match value:
            case (Global() as named, *_):
                return named
            case tuple():
                return super().persistent(value, offset)
        key = _key(value)
        value = self.tensors.get(key) or self.storages.get(key)
        if value is None:
            raise Malformed(f"there is no tensor or storage {key}", offset=offset)
        return value

    def called(self, node: Object) -> Node:
        """Turn a call into a tensor, one whose storage is a plain tuple too."""
        match node.callee, node.args:
            case Global("torch._utils"), (("storage", Global(), *_) as said, *rest):
                storage = super().persistent(said, node.offset)
                return super().called(replace(node, args=(storage, *rest)))
        return super().called(node)


CONTAINERS = (
    Container("torch-tar", "torch tar", sniff=sniff, read=read, traits=Traits(read_as=("tar",))),
)
