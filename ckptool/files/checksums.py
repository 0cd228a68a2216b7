"""Recorded checksums: what is read of a storage in order, and whether that agrees with them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from zlib_ng.zlib_ng import crc32_combine

from ckptool.errors import Malformed
from ckptool.records import NamedTuple
from ckptool.tensors import values
from ckptool.tensors.tensor import Storage, TensorInfo, is_contiguous


class Part(NamedTuple):
    """Bytes of a storage with a recorded checksum that are read in order, and their CRC-32."""

    storage: Storage
    start: int
    nbytes: int
    crc32: int = 0

    def read(self, checksum: int) -> Part:
        """Return the part with the CRC-32 of what was read."""
        return Part(self.storage, self.start, self.nbytes, checksum)


def recorded(storage: Storage) -> Iterator[Storage]:
    """Iterate over the storages with a recorded checksum that a storage is made of."""
    whole = storage.whole or storage
    if whole.crc32 is not None:
        yield whole
    for value in values.arguments(storage):
        yield from recorded(value.storage)


def part(storage: Storage, start: int, nbytes: int) -> Part | None:
    """Return bytes as a part of the storage with the recorded checksum, None where none is."""
    whole = storage.whole or storage
    if whole.crc32 is None:
        return None
    return Part(whole, storage.start - whole.start + start, nbytes)


def part_of(value: TensorInfo, first: int, count: int) -> Part | None:
    """Return elements of a value, `count` from `first`, where they are read in order."""
    if not is_contiguous(value.shape, value.stride):
        return None
    size = value.dtype.itemsize
    return part(value.storage, value.start + first * size, count * size)


def checksums(found: Iterable[Part]) -> dict[Storage, int]:
    """Return the checksums of the storages of which the parts leave nothing out."""
    reached: dict[Storage, dict[int, int]] = {}
    for storage, start, nbytes, checksum in sorted(found, key=lambda each: each.start):
        ends = reached.setdefault(storage, {0: 0})
        if start in ends and start + nbytes not in ends:
            ends[start + nbytes] = crc32_combine(ends[start], checksum, nbytes)
    return {each: ends[each.nbytes] for each, ends in reached.items() if each.nbytes in ends}


def compare(found: Mapping[Storage, int]) -> None:
    """Raise `Malformed` for a storage whose recorded checksum is another than was found."""
    for storage, checksum in found.items():
        if storage.crc32 != checksum:
            raise Malformed(
                f"{storage.path}: the bytes of storage {storage.key} do not match their checksum",
                path=storage.path,
                offset=storage.start,
                evidence=[f"CRC-32 recorded {storage.crc32:08x}, found {checksum:08x}"],
                hint="the file is damaged; download or copy it again",
            )
