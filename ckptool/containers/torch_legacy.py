"""Legacy torch files: what `torch.save` wrote before torch 1.6, and still does on request.

Five pickles in a row (magic number, protocol version, system info, the object, the sorted storage
keys), then for each key an 8-byte element count and the raw bytes, little-endian on any machine
(torch/serialization.py, `_legacy_save` and `_legacy_load`; torch/csrc/serialization.cpp,
`THPStorage_writeFileRaw`). Read only: what is written is a torch zip.
"""

from __future__ import annotations

from ckptool.containers._container import Container, Traits
from ckptool.errors import CkptoolError, Malformed
from ckptool.files import budget
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader
from ckptool.pickles.pickle_reader import Ended, Pickle, Vocabulary
from ckptool.pickles.torch_objects import StorageId, TorchVocabulary
from ckptool.pickles.tree import LongInteger
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Storage

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL_VERSION = 1001
FIRST_WINDOW = 1 << 20


def sniff(head: bytes) -> bool:
    """Check for the pickle of the magic number, of any protocol, at the start."""
    try:
        return _number(pickle_reader.load(head[:64]).tree) == MAGIC
    except CkptoolError:
        return False


def _number(node: object) -> object:
    if isinstance(node, LongInteger):
        return int.from_bytes(node.data, "little", signed=True)
    return node


def read(reader: Reader) -> Checkpoint:
    """Read the five pickles and the counts before the storages."""
    window = _Window(reader)
    with pickle_reader.remembered(window.seen):
        return _read(reader, window)


def _read(reader: Reader, window: _Window) -> Checkpoint:
    magic = window.load(0)
    version = window.load(magic.end)
    if version.tree != PROTOCOL_VERSION:
        what = f"a legacy torch file of protocol version {version.tree!r}"[:100]
        raise Malformed(what, offset=magic.end)
    system = window.load(version.end)
    at = system.end
    # The pickle has the sizes of storages, the list after it their order in the file: the first
    # reading collects what the second needs.
    named: dict[str, StorageId] = {}

    def note(storage: StorageId) -> Storage:
        named[storage.key] = storage
        return _storage(reader, storage, 0)

    spending = budget.current()
    spent = spending.spent
    first = window.load(at, TorchVocabulary(note))
    first.tree, spending.spent = None, spent + len(named) * budget.NODE
    keys = window.load(first.end)
    places, end = _places(reader, named, keys)

    def find_storage(storage: StorageId) -> Storage:
        return _storage(reader, storage, places[storage.key])

    parsed = window.load(at, TorchVocabulary(find_storage))
    others = (magic, version, system, keys)  # loading runs what they call, too
    return Checkpoint(
        reader.path,
        "torch-legacy",
        parsed.tree,
        reader.nbytes,
        globals=parsed.globals | {name: at for each in others for name, at in each.globals.items()},
        calls=[*parsed.calls, *(call for each in others for call in each.calls)],
        pickle_name="the pickle",
        generation="torch before 1.6, or newer on request",
        protocol=parsed.protocol,
        unread_nbytes=reader.nbytes - end,
        unread=("what follows the storages",) if end < reader.nbytes else (),
    )


def _storage(reader: Reader, named: StorageId, start: int) -> Storage:
    start += reader.base
    return Storage(reader.file, named.key, start, named.nbytes, named.dtype, named.location)


def _places(
    reader: Reader, named: dict[str, StorageId], keys: Pickle
) -> tuple[dict[str, int], int]:
    """Return where each storage starts and where the last one ends; check every count."""
    listed = keys.tree
    if not isinstance(listed, list) or not all(isinstance(key, str | int) for key in listed):
        raise Malformed("the list of storage keys is damaged")
    names = [str(key) for key in listed]
    if len(set(names)) != len(names) or set(names) != set(named):
        what = "the storages in the pickle and those behind it are not the same"
        raise Malformed(what, offset=keys.end)
    position = keys.end
    places = {}
    for name in names:
        storage = named[name]
        count = int.from_bytes(reader.read(position, 8), "little", signed=True)
        if count != storage.numel:
            what = f"storage {name} should have {storage.numel} elements and has {count}"
            raise Malformed(what, offset=position)
        places[name] = position + 8
        position += 8 + storage.nbytes
    if position > reader.nbytes:
        raise Malformed(
            f"the file should have {position} bytes and has {reader.nbytes}",
            offset=reader.nbytes,
            hint="it is truncated; download or copy it again",
        )
    return places, position


class _Window:
    """The front of a file, read further as the pickles in it turn out to be longer."""

    def __init__(self, reader: Reader) -> None:
        self.seen: list[Pickle] = []
        self._reader = reader
        self._data = b""
        self._grow(min(FIRST_WINDOW, reader.nbytes))

    def _grow(self, nbytes: int) -> None:
        more = nbytes - len(self._data)
        budget.current().read(more)
        self._data += self._reader.read(len(self._data), more)

    def load(self, start: int, vocabulary: Vocabulary | None = None) -> Pickle:
        """Parse the pickle at `start`."""
        spending = budget.current()
        while True:
            spent = spending.spent
            try:
                self.seen.append(pickle_reader.load(self._data, start, vocabulary))
                return self.seen[-1]
            except Ended as error:
                if len(self._data) == self._reader.nbytes:
                    why = "it is truncated, or from an unfinished torch.save"
                    error.hint = f"{why}; download or copy it again"
                    raise
                spending.spent = spent  # what was made is gone
                self._grow(min(4 * len(self._data), self._reader.nbytes))


CONTAINERS = (
    Container(
        "torch-legacy",
        "legacy torch",
        sniff=sniff,
        read=read,
        traits=Traits(read_as=("pickle",)),
        library="torch",
    ),
)
