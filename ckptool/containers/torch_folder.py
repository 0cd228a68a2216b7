"""An unpacked torch zip: a folder with `data.pkl`, `version` and the storages as files in `data/`.

Read only: what is written is a torch zip.
"""

from __future__ import annotations

import re

from ckptool.containers._container import Container, Traits
from ckptool.containers._pickles import is_pickle
from ckptool.containers._records import byteorder
from ckptool.errors import LimitExceeded, Malformed
from ckptool.files import fileio, paths
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader
from ckptool.pickles.torch_objects import StorageId, TorchVocabulary
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Storage
from ckptool.text import readable

MAX_PICKLE = 64 << 20
PICKLE = "data.pkl"


def read(reader: Reader) -> Checkpoint | None:
    """Read the pickle; the storages stay where they are. None for a pickle of another folder."""
    folder, name = paths.split(reader.file)
    if name != PICKLE or not paths.is_file(paths.join(folder, "version")):
        return None
    if paths.is_file(paths.join(folder, "constants.pkl")):
        return None
    if reader.nbytes > MAX_PICKLE:
        raise LimitExceeded(f"{PICKLE} has {readable(reader.nbytes)}")
    files: dict[str, fileio.Stamp] = {reader.file: reader.stamp}
    byteorder = _byteorder(paths.join(folder, "byteorder"))
    total = reader.nbytes
    known: dict[str, Reader] = {}

    def find_storage(said: StorageId) -> Storage:
        nonlocal total
        if not re.fullmatch(r"\w{1,40}", said.key, re.ASCII):
            raise Malformed(f"a storage named {said.key!r}"[:100])
        path = paths.join(folder, "data", said.key)
        if path not in known and not paths.is_file(path):
            raise Malformed(f"there is no file of storage {said.key}")
        found = known[path] = known.get(path) or Reader(path)
        nbytes, files[found.file] = found.nbytes, found.stamp
        if nbytes != said.nbytes:
            what = f"storage {said.key} should have {said.nbytes} bytes and has {nbytes}"
            raise Malformed(what)
        total += nbytes
        fileio.spare(found.file, len(files))
        return Storage(found.file, said.key, 0, nbytes, said.dtype, said.location, byteorder)

    parsed = pickle_reader.load(reader.read(0, reader.nbytes), 0, TorchVocabulary(find_storage))
    with pickle_reader.remembered([parsed]):
        if parsed.end != reader.nbytes:
            raise Malformed(f"{PICKLE} has bytes after its end", offset=parsed.end)
    return Checkpoint(
        reader.path,
        "torch-folder",
        parsed.tree,
        total,
        globals=parsed.globals,
        calls=parsed.calls,
        pickle_name=PICKLE,
        byteorder=byteorder,
        protocol=parsed.protocol,
        files=tuple(files.items()),
    )


def _byteorder(path: str) -> str:
    if not paths.is_file(path):
        return "little"
    with Reader(path) as reader:
        return byteorder(reader.read(0, min(16, reader.nbytes)), path)


CONTAINERS = (
    Container(
        "torch-folder",
        "unpacked torch zip",
        index_patterns=(PICKLE,),
        sniff=is_pickle,
        read=read,
        traits=Traits(beside_files=True, read_as=("pickle",)),
    ),
)
