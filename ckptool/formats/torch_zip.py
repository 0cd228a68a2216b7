"""torch zip: what `torch.save` writes since torch 1.6.

A stored zip archive with `<root>/data.pkl`, a record `<root>/data/<key>` for each storage,
`<root>/byteorder` and `<root>/version`; storages are aligned to 64 bytes by padding in the extra
field of their local headers, which `mmap=True` relies on (caffe2/serialize/inline_container.cc).

Written is a layout of our own, with sizes and checksums in the local headers. `.format_version`
is left out on purpose: with it, `torch.load(mmap=True)` under `calculate_storage_offsets` would
compute offsets from the exact layout of torch's own writer (torch/serialization.py, `_load`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

from ckptool import pickle_reader, pickle_writer
from ckptool.checkpoint import Checkpoint
from ckptool.copying import Copy, Layout
from ckptool.errors import Malformed, NotACheckpoint, NotRepresentable, Unsupported
from ckptool.fileio import Reader
from ckptool.formats import _others, _zip
from ckptool.formats._torch_tree import Lowering, StorageId, TorchVocabulary
from ckptool.pickle_reader import Pickle
from ckptool.tensor import Packing, Storage

ALIGNMENT = 64
ROOT = "archive"  # as torch names it when it saves to a buffer; a constant, for equal bytes
MAX_METADATA = 64 << 20  # of inflated metadata, or as many bytes as the file has


def sniff(head: bytes) -> bool:
    """Tell whether a file starts as a zip archive."""
    return head.startswith(b"PK\3\4")


def read(reader: Reader) -> Checkpoint:
    """Read the directory and the pickle; the storages stay where they are."""
    directory = _zip.read_directory(reader)
    members = directory.members
    root = _root(reader, members)
    records = {name.removeprefix(root): member for name, member in members.items()}
    recorded = any(member.crc32 for member in members.values() if member.nbytes)
    small = {
        name: _small(reader, records[name], recorded)
        for name in ("data.pkl", "byteorder", ".format_version")
        if name in records
    }
    byteorder = small.get("byteorder", b"little").decode("latin-1")
    if byteorder not in ("little", "big"):
        raise Malformed(f"the byteorder record says {byteorder!r}", path=reader.path)
    used: dict[str, Storage] = {}

    def find_storage(said: StorageId) -> Storage:
        member = records.get(f"data/{said.key}")
        if member is None:
            raise Malformed(f"there is no record of storage {said.key}", path=reader.path)
        if member.nbytes != said.nbytes:
            raise Malformed(
                f"storage {said.key} should have {said.nbytes} bytes and has {member.nbytes}",
                path=reader.path,
                offset=member.start,
            )
        storage = _storage(reader, said, member, byteorder, recorded)
        used[member.name] = storage
        return storage

    parsed = pickle_reader.load(small["data.pkl"], 0, TorchVocabulary(find_storage))
    if parsed.end != len(small["data.pkl"]):
        what = "data.pkl goes on after its end"
        raise _after(parsed, Malformed(what, path=reader.path, offset=parsed.end))
    known = {f"{root}{name}" for name in (*small, *_CARRIED_ANEW)} | used.keys()
    unread = [name for name in members if name not in known]
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
        unread=tuple(name.removeprefix(root) for name in unread),
        unread_nbytes=sum(members[name].packed_nbytes for name in unread),
        records={
            name: used.get(member.name) or _record_of(reader, name, member, recorded)
            for name, member in records.items()
        },
        unlisted=directory.unlisted,
        flaws=() if "version" in records else ("there is no `version` record; torch demands one",),
    )


def _after(parsed: Pickle, error: Malformed) -> Malformed:
    error.named, error.calls = parsed.globals, parsed.calls
    return error


def _record_of(reader: Reader, name: str, member: _zip.Member, recorded: bool) -> Storage:
    """Describe a record that holds no storage of the tree as if it did."""
    return _storage(reader, StorageId(name, None, "cpu", 0), member, "little", recorded)


_CARRIED_ANEW = ("version", ".storage_alignment", ".data/serialization_id")


def _root(reader: Reader, members: dict[str, _zip.Member]) -> str:
    """Find the one folder that all records lie in; torch names it after the file."""
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if not pickles:
        what, hint = _others.describe_zip(members)
        raise NotACheckpoint(f"{reader.path} is {what}", path=reader.path, hint=hint)
    if len(pickles) > 1:
        raise Malformed("a zip archive with more than one data.pkl", path=reader.path)
    root = pickles[0].removesuffix("data.pkl")
    outside = [name for name in members if not name.startswith(root)]
    if outside:  # torch takes the first record's folder: nothing may shadow what lies in it
        raise Malformed(f"record {outside[0]} lies outside {root}", path=reader.path)
    if f"{root}constants.pkl" in members:
        raise Unsupported(
            f"{reader.path} is a TorchScript archive, which is not read yet", path=reader.path
        )
    return root


def _small(reader: Reader, member: _zip.Member, recorded: bool) -> bytes:
    limit = max(MAX_METADATA, reader.nbytes)
    return _zip.read_member(reader, member, limit, check=recorded)


def _storage(
    reader: Reader, said: StorageId, member: _zip.Member, byteorder: str, recorded: bool
) -> Storage:
    deflated = member.method == _zip.DEFLATED
    return Storage(
        reader.file,
        said.key,
        reader.base + member.start,
        member.nbytes,
        said.dtype,
        said.location,
        byteorder,
        member.crc32 if recorded else None,
        Packing.DEFLATED if deflated else Packing.PLAIN,
        member.packed_nbytes if deflated else 0,
    )


def _generation(records: dict[str, _zip.Member]) -> str:
    if ".format_version" in records:
        return "torch 2.7 or newer"
    if "byteorder" in records:
        return "torch 2.1 or newer"
    return "torch 1.6 to 2.0, or another writer"


def lay_out(checkpoint: Checkpoint) -> Layout:
    """Plan an archive that holds the checkpoint's tree and the storages that it uses."""
    lowering = Lowering()
    pickled = pickle_writer.dump(checkpoint.tree, lowering)
    orders = {storage.byteorder for storage in lowering.storages if storage.nbytes}
    if len(orders) > 1:
        raise NotRepresentable("tensors of two byte orders have no place in one torch file")
    byteorder = orders.pop() if orders else "little"
    small = [("data.pkl", pickled), ("byteorder", byteorder.encode())]
    before = [_record(name, data) for name, data in small]
    after = [_record("version", b"3\n")]
    stored = [
        _zip.Record(f"{ROOT}/data/{key}", storage.nbytes)
        for storage, key in lowering.storages.items()
    ]
    records = [*before, *stored, *after]
    directory, nbytes = _zip.lay_out(records, ALIGNMENT)
    jobs = [
        Copy(storage, record.start)
        for storage, record in zip(lowering.storages, stored, strict=True)
    ]

    def finish() -> Iterable[tuple[int, bytes]]:
        for job, record in zip(jobs, stored, strict=True):
            record.crc32 = job.crc32
        return _zip.headers(records, directory)

    literals = [(record.start, record.data or b"") for record in (*before, *after)]
    return Layout(nbytes, list(jobs), literals, finish)


def _record(name: str, data: bytes) -> _zip.Record:
    return _zip.Record(f"{ROOT}/{name}", len(data), data, zlib.crc32(data))
