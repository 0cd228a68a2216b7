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
from ckptool.records import dataclass


@dataclass(slots=True)
class Record:
    """A record to write: `data`, or `nbytes` that are copied; `crc32` once it is known.

    There may be many, so they are made when they are placed, and again for their headers.
    """

    name: bytes
    nbytes: int
    data: bytes | None = None
    crc32: int = 0
    header: int = 0
    start: int = 0


def _placed(records: Iterable[Record], alignment: int) -> Iterator[Record]:
    """Place records one after the other, their data aligned by padding in the local headers."""
    position = 0
    for record in records:
        record.header = position
        fixed = position + LOCAL_NBYTES + len(record.name) + len(_wide_extra(record)) + 4
        record.start = fixed + -fixed % alignment
        position = record.start + record.nbytes
        yield record


def lay_out(records: Iterable[Record], alignment: int) -> tuple[Sequence[int], int]:
    """Return where the data of each record starts, and the size of the archive."""
    position, size, starts = 0, END64.size + LOCATOR.size + END.size, array("Q")
    for record in _placed(records, alignment):
        starts.append(record.start)
        position = record.start + record.nbytes
        size += CENTRAL_NBYTES + len(record.name) + len(_central_extra(record))
    return starts, position + size


def headers(records: Iterable[Record], alignment: int) -> Iterator[tuple[int, bytes]]:
    """Yield `(offset, bytes)` of all headers, the directory and the end records."""
    data, count, position = bytearray(), 0, 0
    for record in _placed(records, alignment):
        common = _common(record)
        yield record.header, _local_header(record, common)
        data += _central_header(record, common)
        count, position = count + 1, record.start + record.nbytes
    yield position, bytes(data) + _end_records(count, position, len(data))


# Version 4.5 on FAT, as miniz and Python's zipfile write zip64; the date is 1980-01-01.
_VERSION, _UTF8, _NO_TIME, _FIRST_DAY = 45, 0x0800, 0, 0x21
_U16 = struct.Struct("<H").pack
_CENTRAL_START = b"PK\1\2" + struct.pack("<H", _VERSION)  # by which it was made


def _common(record: Record) -> bytes:
    """Write what both headers of a record say, all but the size of the extra field."""
    size = min(record.nbytes, BIG32)
    facts = (_VERSION, _UTF8, STORED, _NO_TIME, _FIRST_DAY, record.crc32, size, size)
    return COMMON.pack(*facts, len(record.name), 0)[:-2]


def _wide_extra(record: Record) -> bytes:
    if record.nbytes < BIG32:
        return b""
    return struct.pack("<HHQQ", 1, 16, record.nbytes, record.nbytes)


def _local_header(record: Record, common: bytes) -> bytes:
    name, wide = record.name, _wide_extra(record)
    size = record.start - record.header - LOCAL_NBYTES - len(name)
    padding = size - len(wide) - 4
    filled = (common, _U16(size), name, wide, _U16(padding), b"Z" * padding)
    return b"PK\3\4%b%b%b%bFB%b%b" % filled


def _central_extra(record: Record) -> bytes:
    if record.header < BIG32:
        return _wide_extra(record)
    values = _wide_extra(record)[4:] + struct.pack("<Q", record.header)
    return struct.pack("<HH", 1, len(values)) + values


def _central_header(record: Record, common: bytes) -> bytes:
    extra = _central_extra(record)
    rest = REST.pack(0, 0, 0, 0, min(record.header, BIG32))
    return b"%b%b%b%b%b%b" % (_CENTRAL_START, common, _U16(len(extra)), rest, record.name, extra)


def _end_records(count: int, offset: int, nbytes: int) -> bytes:
    """Write both end records; torch writes the zip64 one always, and so do we."""
    end64 = END64.pack(
        b"PK\6\6", END64.size - 12, _VERSION, _VERSION, 0, 0, count, count, nbytes, offset
    )
    locator = LOCATOR.pack(b"PK\6\7", 0, offset + nbytes, 1)
    few, size, start = min(count, BIG16), min(nbytes, BIG32), min(offset, BIG32)
    end = END.pack(b"PK\5\6", 0, 0, few, few, size, start, 0)
    return end64 + locator + end
