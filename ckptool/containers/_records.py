"""The records of a zip archive as torch lays it out: all in one folder, storages where they lie."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from typing import cast

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files import budget as costs, zips
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader
from ckptool.pickles.pickle_reader import Pickle, Vocabulary
from ckptool.pickles.torch_objects import StorageId
from ckptool.records import dataclass
from ckptool.tensors.tensor import Packing, Storage

MAX_METADATA = 64 << 20  # of inflated metadata, or as many bytes as the file has


@dataclass(frozen=True, slots=True)
class Records:
    """What lies in the one folder of an archive, by name without that folder.

    A member that is asked for as a storage becomes one: of hundreds of thousands there are never
    both. `recorded` says whether there are checksums, `data_recorded` whether storages have some:
    all zero means that none were computed (of storages alone: `torch.serialization.skip_data`, and
    what GPUDirect Storage fills in later).
    """

    reader: Reader
    members: dict[str, zips.Member | Storage]
    recorded: bool
    data_recorded: bool
    unlisted: int

    def small(self, name: str) -> bytes:
        """Read and inflate a record of metadata; raises `LimitExceeded` for one too large."""
        member = self.members[name]
        if isinstance(member, Storage):
            raise Malformed(f"{name} is a storage too", path=self.reader.path)
        limit = max(MAX_METADATA, self.reader.nbytes)
        return zips.read_member(self.reader, member, limit, check=self.recorded)

    def unread(self, known: Container[str]) -> tuple[str, ...]:
        """Name the members that were not asked for as storages, but for those `known`."""
        return tuple(
            name
            for name, member in self.members.items()
            if not isinstance(member, Storage) and name not in known
        )

    def byteorder(self) -> str:
        """Read the record that says `little` or `big`; without one it is little."""
        known = "byteorder" in self.members
        return byteorder(self.small("byteorder"), self.reader.path) if known else "little"

    def load(self, name: str, vocabulary: Vocabulary) -> Pickle:
        """Parse the pickle in a record."""
        pickled = self.small(name)
        parsed = pickle_reader.load(pickled, 0, vocabulary)
        with pickle_reader.remembered([parsed]):
            if parsed.end != len(pickled):
                what = f"{name} has bytes after its end"
                raise Malformed(what, path=self.reader.path, offset=parsed.end)
        costs.current().spend(-len(pickled))  # it has been read by now
        return parsed

    def storage(self, said: StorageId, name: str, byteorder: str) -> Storage:
        """Find the record of a storage; raises `Malformed` where it is not as the pickle says."""
        member = self.members.get(name)
        if member is None:
            raise Malformed(f"there is no record of storage {said.key}", path=self.reader.path)
        nbytes = said.nbytes
        if member.nbytes != nbytes:
            raise Malformed(
                f"storage {said.key} should have {nbytes} bytes and has {member.nbytes}",
                path=self.reader.path,
                offset=member.start,
            )
        storage = self.members[name] = self._storage(said, name, member, byteorder)
        return storage

    def described(self) -> dict[str, Storage]:
        """Turn all members into storages by name, those of no tree too; asked last."""
        for name, member in self.members.items():
            if not isinstance(member, Storage):
                said = StorageId(name, None, "cpu", 0)
                self.members[name] = self._storage(said, name, member, "little")
        return cast("dict[str, Storage]", self.members)

    def _storage(
        self, said: StorageId, name: str, member: zips.Member | Storage, byteorder: str
    ) -> Storage:
        if isinstance(member, Storage):  # two pickles of an archive share it
            return replace(member, key=said.key, dtype=said.dtype, location=said.location)
        deflated = member.method == zips.DEFLATED
        recorded = self.recorded
        if recorded != self.data_recorded and _is_data(name):
            recorded = self.data_recorded
        return Storage(
            self.reader.file,
            said.key,
            self.reader.base + member.start,
            member.nbytes,
            said.dtype,
            said.location,
            byteorder,
            member.crc32 if recorded else None,
            Packing.DEFLATED if deflated else Packing.PLAIN,
            member.packed_nbytes if deflated else 0,
        )


def byteorder(said: bytes, path: str) -> str:
    """Read what a record of the byte order says; raises `Malformed`."""
    order = said.decode("latin-1")
    if order not in ("little", "big"):
        raise Malformed(f"the byteorder record says {order!r}", path=path)
    return order


_BESIDE_A_NAME = 32  # what an entry takes in memory besides, in letters


@dataclass(slots=True)
class Budget:
    """Bounds the names that are made of shared parts by what the file has of them.

    Modules that stand in several places are named in each, and a file may share them at will.
    """

    letters: int

    def spend(self, name: str, looks: int = 0) -> None:
        """Count a name, and so many things that were looked at for it.

        Raises `LimitExceeded` when there are too many.
        """
        costs.current().spend(len(name) + costs.PAIR)
        self.letters -= len(name) + _BESIDE_A_NAME + looks
        if self.letters < 0:
            raise LimitExceeded("modules that repeat each other without end")


def budget(nbytes: int) -> Budget:
    """Give the budget of so many bytes of metadata."""
    return Budget((1 << 20) + 16 * nbytes)


def read_records(reader: Reader, wanted: str) -> Records | None:
    """Read the directory; None where no folder at the top holds the record `wanted`.

    Raises `Malformed` where several do, or where a record lies outside that folder.
    """
    directory = zips.read_directory(reader)
    members = directory.members
    found = [name for name in members if name.count("/") == 1 and name.endswith(f"/{wanted}")]
    if not found:
        return None
    if len(found) > 1:
        raise Malformed(f"a zip archive with more than one {wanted}", path=reader.path)
    root = found[0].removesuffix(wanted)
    outside = [name for name in (*members, *directory.folders) if not name.startswith(root)]
    if outside:  # torch takes the first entry's folder, and nothing may shadow what is in it
        raise Malformed(f"record {outside[0]} is outside {root}", path=reader.path)
    start = len(root)
    inside: dict[str, zips.Member | Storage] = {
        name[start:]: member for name, member in members.items()
    }
    recorded = any(member.crc32 for member in members.values())
    data_recorded = any(member.crc32 and _is_data(name[start:]) for name, member in members.items())
    return Records(reader, inside, recorded, data_recorded, directory.unlisted)


def _is_data(name: str) -> bool:
    """Check for the record of a storage."""
    return name.startswith(("data/", "constants/", "tensors/"))
