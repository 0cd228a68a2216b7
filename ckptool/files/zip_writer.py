"""The layout of a zip archive that is written: stored records, aligned, with a zip64 end record."""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence

from ckptool.files.zips import (
    BIG16,
    BIG32,
    CENTRAL_NBYTES,
    COMMON,
    END,
    END64,
    LOCAL_NBYTES,
    LOCATOR,
    REST,
    STORED,
)
from ckptool.records import NamedTuple


class Record(NamedTuple):
    """A record to write, and the checksum of its bytes once it is known.

    There may be many, so they are made when they are placed, and again for their headers.
    """

    name: bytes
    nbytes: int
    crc32: int = 0


def lay_out(records: Iterable[Record], alignment: int) -> tuple[Sequence[int], int]:
    """Return where the data of each record starts, and the size of the archive.

    Data is aligned by padding in the local headers.
    """
    position, size, starts = 0, END64.size + LOCATOR.size + END.size, array("Q")
    for name, nbytes, _ in records:
        wide = _wide_extra(nbytes)
        fixed = position + LOCAL_NBYTES + len(name) + len(wide) + 4
        size += CENTRAL_NBYTES + len(name) + len(_central_extra(wide, position))
        starts.append(fixed + -fixed % alignment)
        position = starts[-1] + nbytes
    return starts, position + size


def headers(records: Iterable[Record], starts: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset, bytes)` of all headers, the directory and the end records."""
    data, count, position = bytearray(), 0, 0
    for (name, nbytes, checksum), start in zip(records, starts, strict=True):
        wide, small = _wide_extra(nbytes), min(nbytes, BIG32)
        facts = (_VERSION, _UTF8, STORED, _NO_TIME, _FIRST_DAY, checksum, small, small)
        common = COMMON.pack(*facts, len(name), 0)[:-2]  # but for the size of the extra field
        yield position, _local_header(common, name, wide, start - position)
        data += _central_header(common, name, wide, position)
        count, position = count + 1, start + nbytes
    yield position, bytes(data) + _end_records(count, position, len(data))


# Version 4.5 on FAT, as miniz and Python's zipfile write zip64; the date is 1980-01-01.
_VERSION, _UTF8, _NO_TIME, _FIRST_DAY = 45, 0x0800, 0, 0x21
_U16 = struct.Struct("<H").pack
_CENTRAL_START = b"PK\1\2" + struct.pack("<H", _VERSION)  # by which it was made


def _wide_extra(nbytes: int) -> bytes:
    return struct.pack("<HHQQ", 1, 16, nbytes, nbytes) if nbytes >= BIG32 else b""


def _local_header(common: bytes, name: bytes, wide: bytes, nbytes: int) -> bytes:
    """Write a header that is padded to so many bytes."""
    size = nbytes - LOCAL_NBYTES - len(name)
    padding = size - len(wide) - 4
    extra = (_U16(size), name, wide, _U16(padding), b"Z" * padding)
    return b"PK\3\4%b%b%b%bFB%b%b" % (common, *extra)


def _central_extra(wide: bytes, header: int) -> bytes:
    if header < BIG32:
        return wide
    values = wide[4:] + struct.pack("<Q", header)
    return struct.pack("<HH", 1, len(values)) + values


def _central_header(common: bytes, name: bytes, wide: bytes, header: int) -> bytes:
    extra = _central_extra(wide, header)
    rest = REST.pack(0, 0, 0, 0, min(header, BIG32))
    return b"%b%b%b%b%b%b" % (_CENTRAL_START, common, _U16(len(extra)), rest, name, extra)


def _end_records(count: int, offset: int, nbytes: int) -> bytes:
    """Write both end records; torch writes the zip64 one always, and so do we."""
    end64 = END64.pack(
        b"PK\6\6", END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, nbytes, offset
    )
    locator = LOCATOR.pack(b"PK\6\7", 0, offset + nbytes, 1)
    few, size, start = min(count, BIG16), min(nbytes, BIG32), min(offset, BIG32)
    end = END.pack(b"PK\5\6", 0, 0, few, few, size, start, 0)
    return end64 + locator + end
