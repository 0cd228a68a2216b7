"""torch zip: what `torch.save` writes since torch 1.6.

A stored zip archive with `<root>/data.pkl`, a record `<root>/data/<key>` for each storage,
`<root>/byteorder` and `<root>/version`; storages are aligned to 64 bytes by padding in the extra
field of their local headers, which `mmap=True` relies on (caffe2/serialize/inline_container.cc).

Written is a layout of our own, with sizes and checksums in the local headers. `.format_version`
is left out on purpose: with it, `torch.load(mmap=True)` under `calculate_storage_offsets` would
compute offsets from the exact layout of torch's own writer (torch/serialization.py, `_load`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import repeat
from typing import TYPE_CHECKING

from zlib_ng.zlib_ng import crc32

from ckptool.containers._container import Container, Traits, Writer
from ckptool.containers._records import Records, read_records
from ckptool.errors import NotRepresentable
from ckptool.files.fileio import Reader
from ckptool.pickles.torch_objects import Lowering, StorageId, TorchVocabulary
from ckptool.pickles.tree import Node
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Storage, TensorInfo

if TYPE_CHECKING:  # a listing writes nothing
    from ckptool.files import zip_writer
    from ckptool.files.copying import Done, PlannedFile
    from ckptool.files.jobs import Copy

ALIGNMENT = 64
ROOT = "archive"  # as torch names it when it saves to a buffer; a constant, for equal bytes


def sniff(head: bytes) -> bool:
    """Tell whether a file starts as a zip archive."""
    return head.startswith(b"PK\3\4")


def read(reader: Reader) -> Checkpoint | None:
    """Read the directory and the pickle; the storages stay where they are.

    Gives None for an archive that torch.save did not write, a TorchScript one too.
    """
    records = read_records(reader, "data.pkl")
    if records is None or "constants.pkl" in records.members:
        return None
    byteorder = records.byteorder()

    def find_storage(said: StorageId) -> Storage:
        return records.storage(said, f"data/{said.key}", byteorder)

    parsed = records.load("data.pkl", TorchVocabulary(find_storage))
    members = records.members
    unread = records.unread(_CARRIED_ANEW)
    unread_nbytes = sum(member.packed_nbytes for member in map(members.__getitem__, unread))
    return Checkpoint(
        reader.path,
        "torch-zip",
        parsed.tree,
        reader.nbytes,
        globals=parsed.globals,
        calls=parsed.calls,
        pickle_name="data.pkl",
        byteorder=byteorder,
        generation=_generation(records),
        protocol=parsed.protocol,
        unread=unread,
        unread_nbytes=unread_nbytes,
        records=records.described(),
        unlisted=records.unlisted,
        flaws=() if "version" in members else ("there is no `version` record; torch demands one",),
    )


def read_like(reader: Reader, like: Checkpoint, pickled: bytes) -> Checkpoint | None:
    """Read an archive whose pickle is, byte for byte, that of one like it: its records alone.

    What the pickle says is then known, and no tree is made. None for any other archive.
    """
    records = read_records(reader, "data.pkl")
    if records is None or {*records.members} != {*like.records}:
        return None
    if records.small("data.pkl") != pickled or records.byteorder() != like.byteorder:
        return None
    unlisted, found = records.unlisted, records.described()
    if any(each.nbytes != like.records[name].nbytes for name, each in found.items()):
        return None
    return replace(
        like,
        path=reader.path,
        nbytes=reader.nbytes,
        records=found,
        unlisted=unlisted,
        files=((reader.file, reader.stamp),),
    )


_CARRIED_ANEW = (
    "data.pkl",
    "byteorder",
    "version",
    ".format_version",
    ".storage_alignment",
    ".data/serialization_id",
)


def _generation(records: Records) -> str:
    if ".format_version" in records.members:
        return "torch 2.7 or newer"
    if "byteorder" in records.members:
        return "torch 2.1 or newer"
    return "torch 1.6 to 2.0, or another writer"


def lay_out(checkpoint: Checkpoint, entries: dict[str, Node] | None, untie: bool) -> PlannedFile:
    """Plan an archive that holds the checkpoint's tree and the storages that it uses."""
    if any(
        isinstance(each, TensorInfo) and not each.dtype.torch_name
        for each in (entries or {}).values()
    ):
        raise NotRepresentable("torch has no dtype for six-bit floats")
    further = {name: checkpoint.records[name] for name in checkpoint.kept}
    return archive(checkpoint.tree, further=further, location=checkpoint.location)


def archive(
    tree: Node,
    job: Callable[[Storage, int], Copy] | None = None,
    further: Mapping[str, Storage] | None = None,
    location: str = "",
) -> PlannedFile:
    """Plan an archive that holds a tree, the storages that it uses, and `further` records.

    `job` returns what writes the bytes of a storage to a place in the archive: a copy. With a
    `location`, all storages are tagged with that device.
    """
    from ckptool.files import planner, zip_writer
    from ckptool.files.copying import PlannedFile
    from ckptool.files.jobs import Copy
    from ckptool.pickles import pickle_writer

    lowering = Lowering(location)
    pickled = pickle_writer.dump(tree, lowering)
    orders = {storage.byteorder for storage in lowering.storages if storage.nbytes}
    if len(orders) > 1:
        raise NotRepresentable("tensors of two byte orders cannot be in one torch file")
    byteorder = orders.pop() if orders else "little"
    small = {"data.pkl": pickled, "byteorder": byteorder.encode(), "version": b"3\n"}
    held = {f"data/{key}": storage for key, storage in enumerate(lowering.storages)}
    held |= further or {}
    storages = tuple(held.values())

    def record(name: str, nbytes: int, checksum: int) -> zip_writer.Record:
        return zip_writer.Record(f"{ROOT}/{name}".encode(), nbytes, checksum)

    *before, after = (record(name, len(data), crc32(data)) for name, data in small.items())

    def records(checksums: Iterable[int]) -> Iterator[zip_writer.Record]:
        yield from before
        for (name, storage), checksum in zip(held.items(), checksums, strict=False):
            yield record(name, storage.nbytes, checksum)
        yield after

    starts, nbytes = zip_writer.lay_out(records(repeat(0)), ALIGNMENT)
    places = zip(storages, starts[2:-1], strict=True)
    jobs = [(job or Copy)(storage, start) for storage, start in places]
    if job is None:
        jobs += planner.checks(jobs, storages)

    def finish(done: Sequence[Done]) -> Iterable[tuple[int, bytes]]:
        return zip_writer.headers(records(each.crc32 for each in done), starts)

    literals = [*zip((*starts[:2], starts[-1]), small.values(), strict=True)]
    return PlannedFile("", nbytes, literals, jobs, finish)


CONTAINERS = (
    Container(
        "torch-zip",
        "torch zip",
        word="torch",
        suffixes=(".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pkl"),
        sniff=sniff,
        read=read,
        writer=Writer(lay_out, ".pth", "pytorch_model", ".bin"),
        traits=Traits(records=True, device_tags=True, memory_mapped=True),
        library="torch",
    ),
)
