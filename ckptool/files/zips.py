"""The zip container below torch's: a strict reader of its directory.

Source: PKWARE's APPNOTE.TXT 6.3. The central directory is what counts; a local header may leave
its sizes and checksum zero for a data descriptor to hold, as torch's writer does (flag 0x0008),
but where it says more it must say the same. torch looks records up without regard to case, so
names that differ only in case are refused.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator, Sequence
from itertools import islice
from operator import attrgetter
from typing import NoReturn

from zlib_ng.zlib_ng import crc32

from ckptool.errors import LimitExceeded, Malformed, Unsupported
from ckptool.files import budget
from ckptool.files.fileio import CHUNK, Reader, spooled, unpacked
from ckptool.files.zip_headers import (
    BIG16 as BIG16,
    BIG32 as BIG32,
    COMMON as COMMON,
    DEFLATED as DEFLATED,
    LARGEST_DESCRIPTOR,
    LOCAL_NBYTES as LOCAL_NBYTES,
    STORED as STORED,
    FarHeaders,
    Header,
    LocalHeaders,
    Member as Member,
    fail,
    refuse_packing,
    text,
)
from ckptool.records import NamedTuple
from ckptool.tensors.tensor import Packing, Storage

MAX_MEMBERS = 1_000_000

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
LOCATOR = struct.Struct("<4sLQL")
REST = struct.Struct("<3H2L")  # of an entry: comment, disk, attributes, local header
_CENTRAL = struct.Struct("<4sH" + COMMON.format[1:] + REST.format[1:])
CENTRAL_NBYTES = _CENTRAL.size
_MAX_COMMENT = 0xFFFF
_UNICODE_PATH = 0x7075  # "up", in an extra field: a version, the name's checksum, another name
_FOLDER = 0x10  # of MS-DOS: miniz, and so torch, reads no byte of such a record, whoever wrote it
_VOLUMES = "an archive in several volumes"


class Directory(NamedTuple):
    """The records of an archive by name, how many bytes belong to none, and entries of folders."""

    members: dict[str, Member]
    unlisted: int
    folders: list[str]


def read_directory(reader: Reader) -> Directory:
    """Read the central directory and check it against every local header.

    Raises `Malformed`, `Unsupported` or `LimitExceeded` with the offset of what is wrong.
    """
    offset, nbytes, count = _find_directory(reader)
    if count > MAX_MEMBERS:
        raise LimitExceeded(f"an archive of {count} records", path=reader.path, offset=offset)
    spending = budget.current()
    spending.read(nbytes, 2 * nbytes)  # local headers say the same
    spending.spend(min(count, nbytes // CENTRAL_NBYTES) * budget.MEMBER)
    data = reader.read(offset, nbytes)
    headers = FarHeaders(reader) if reader.file.far else LocalHeaders(reader)
    entries = list(islice(_central_entries(reader, data, offset, headers), count + 1))
    if isinstance(headers, FarHeaders):
        entries = headers.placed(entries, offset)
    if len(entries) != count:
        fail(reader, f"the archive lists {len(entries)} records and counts {count}", offset)
    spending.spend(-nbytes)  # of `data`, which has been read by now
    unlisted = _unlisted(reader, entries, offset)
    members = [member for member in entries if not member.name.endswith("/")]
    _refuse_odd_names(reader, members)
    folders = [member.name for member in entries if member.name.endswith("/")]
    return Directory({member.name: member for member in members}, unlisted, folders)


def _find_directory(reader: Reader) -> tuple[int, int, int]:
    """Return offset, size and entry count of the central directory."""
    for most in (END.size, END.size + _MAX_COMMENT):  # torch writes no comment
        data, at = _end_record(reader, most)
        if at >= 0:
            fields = END.unpack_from(data, at)
            if at + END.size + fields[-1] == len(data):
                return _directory_of(reader, fields, reader.nbytes - len(data) + at)
    raise Malformed(
        "the zip archive has no end record; the file is truncated or incomplete",
        path=reader.path,
        offset=reader.nbytes,
        hint="download or copy the file again, and compare its size",
    )


def _end_record(reader: Reader, most: int) -> tuple[bytes, int]:
    """Return the end of a file, and where in it the end record of an archive is; -1 without one.

    The last one with room behind it, as miniz takes it: an earlier one must not be believed.
    """
    tail = min(reader.nbytes, most)
    data = reader.read(reader.nbytes - tail, tail)
    return data, data.rfind(b"PK\5\6", 0, max(0, len(data) - END.size + 4))


def at_end(reader: Reader) -> bool:
    """Check for an archive behind other bytes, which lax readers find from its end."""
    data, at = _end_record(reader, END.size + _MAX_COMMENT)
    if at < 0:
        return False
    *_, nbytes, offset, _ = END.unpack_from(data, at)
    end = reader.nbytes - len(data) + at
    starts = (offset, end - nbytes)  # as the record says, and as Python's zipfile finds it
    listed = any(0 <= at <= end - 4 and reader.read(at, 4) == b"PK\1\2" for at in starts)
    return listed or data[max(0, at - LOCATOR.size) :].startswith(b"PK\6\7")


def _directory_of(reader: Reader, fields: tuple[int, ...], end_at: int) -> tuple[int, int, int]:
    _, disk, directory_disk, here, *small, _ = fields
    stop, wide = end_at, small
    end64 = _zip64_end(reader, end_at)
    if end64 is not None:
        stop, disk, directory_disk, here, *wide = end64
        pairs = zip(small, wide, (BIG16, BIG32, BIG32), strict=True)
        if any(short not in (long, unknown) for short, long, unknown in pairs):
            fail(reader, "the two end records of the archive disagree", stop)
    count, nbytes, offset = wide
    if disk or directory_disk or here != count:
        raise Unsupported(_VOLUMES, path=reader.path, offset=end_at)
    if offset + nbytes != stop:
        fail(reader, "the archive's directory does not end where its end record starts", stop)
    return offset, nbytes, count


def _zip64_end(reader: Reader, end_at: int) -> tuple[int, ...] | None:
    """Return offset, disks, counts, size and offset of the zip64 end record; None without one."""
    at = end_at - LOCATOR.size
    locator = reader.read(at, LOCATOR.size) if at >= END64.size else b""
    if locator[:4] != b"PK\6\7":
        return None
    _, disk, stop, disks = LOCATOR.unpack(locator)
    if disk or disks > 1:
        raise Unsupported(_VOLUMES, path=reader.path, offset=at)
    if stop + END64.size != at:
        _refuse_shifted(reader, stop, end_at)
    signature, _, _, _, *fields = END64.unpack(reader.read(stop, END64.size))
    if signature != b"PK\6\6":
        fail(reader, "the zip64 end record is damaged", stop)
    return (stop, *fields)


def _refuse_shifted(reader: Reader, stop: int, end_at: int) -> NoReturn:
    """Refuse an end record in the wrong place, and several archives in a row by that name."""
    here = end_at - LOCATOR.size - END64.size
    moved = here - stop  # where the last of several archives starts
    if moved > 0 and reader.read(here, 4) == b"PK\6\6" and reader.read(moved, 4) == b"PK\3\4":
        raise Unsupported(
            "zip archives one behind another, as in a shard (.distcp) of a distributed checkpoint",
            path=reader.path,
            offset=here,
            hint="give the folder that contains it, with its .metadata",
        )
    fail(reader, "the zip64 end record is not where it should be", end_at)


def _central_entries(
    reader: Reader, data: bytes, base: int, headers: LocalHeaders | FarHeaders
) -> Iterator[Member]:
    position = 0
    while position < len(data):
        if len(data) - position < CENTRAL_NBYTES:
            fail(reader, "the archive's directory is cut off", base + position)
        usual = _usual_entry(data, position, headers)
        if usual is not None:
            yield usual[0]
            position = usual[1]
            continue
        signature, _, *common, comment_size, disk, _, attributes, header = _CENTRAL.unpack_from(
            data, position
        )
        entry = Header._make(common)
        name_at = position + CENTRAL_NBYTES
        extra_at = name_at + entry.name_size
        comment_at = extra_at + entry.extra_size
        end = comment_at + comment_size
        if signature != b"PK\1\2" or end > len(data):
            fail(reader, "an entry of the archive's directory is damaged", base + position)
        if BIG32 in (entry.packed, entry.nbytes, header):
            small = (entry.nbytes, entry.packed, header)
            extra = data[extra_at:comment_at]
            nbytes, packed, header = _wide(reader, extra, small, base + position)
            entry = entry._replace(nbytes=nbytes, packed=packed)
        raw_name = data[name_at:extra_at]
        name = text(raw_name)
        if _second_name(data[extra_at:comment_at]) not in (b"", raw_name):
            fail(reader, f"record {name} has two names", base + position)
        if disk > 1:  # torch takes 1 for 0 (miniz, `mz_zip_reader_read_central_dir`)
            fail(reader, f"record {name} is in another part of the archive", base + position)
        if attributes & _FOLDER and entry.nbytes:
            fail(reader, f"record {name} says that it is a folder, and has data", base + position)
        refuse_packing(reader, name, entry)
        start = headers.data_start(raw_name, entry, header)
        sizes = (entry.crc32, entry.packed, entry.nbytes)
        yield Member(name, entry.method, *sizes, header, start)
        position = end


def _usual_entry(
    data: bytes, position: int, headers: LocalHeaders | FarHeaders
) -> tuple[Member, int] | None:
    """Return an entry with nothing special about it, as there may be many, and where it ends."""
    (
        signature, _, _, flags, method, _, _, checksum, packed, nbytes, name_size, extra_size,
        comment_size, disk, _, attributes, header,
    ) = _CENTRAL.unpack_from(data, position)  # fmt: skip
    if extra_size or comment_size or disk or attributes or signature != b"PK\1\2":
        return None
    if method != STORED or packed != nbytes or nbytes == BIG32 or header == BIG32:
        return None
    name_at = position + CENTRAL_NBYTES
    end = name_at + name_size
    said, name = data[position + 6 : position + 30], data[name_at:end]
    start = headers.usual_start(said, flags, name, header) if end <= len(data) else 0
    return (
        (Member(text(name), method, checksum, packed, nbytes, header, start), end)
        if start
        else None
    )


def _second_name(extra: bytes) -> bytes:
    """Return the name that the extra field of Info-ZIP states, which newer zipfiles take."""
    position = 0
    while b"up" in extra and position + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, position)
        if tag == _UNICODE_PATH:
            return extra[position + 9 : position + 4 + size]
        position += 4 + size
    return b""


def _wide(reader: Reader, extra: bytes, values: tuple[int, ...], offset: int) -> tuple[int, ...]:
    """Take the 64-bit numbers of the zip64 extra field for those that do not fit 32 bits."""
    position = 0
    while position + 4 <= len(extra):
        tag, size = struct.unpack_from("<HH", extra, position)
        data = extra[position + 4 : position + 4 + size]
        if tag == 1:
            wide = [value for (value,) in struct.iter_unpack("<Q", data[: len(data) // 8 * 8])]
            if len(wide) < values.count(BIG32):
                break
            return tuple(wide.pop(0) if value == BIG32 else value for value in values)
        position += 4 + size
    raise Malformed("a zip64 entry without its sizes", path=reader.path, offset=offset)


def _unlisted(reader: Reader, members: Sequence[Member], directory: int) -> int:
    """Refuse records that overlap; count the bytes between them that are no data descriptor."""
    end, before, unlisted = 0, "", 0
    for name, _, _, nbytes, _, header, start in sorted(members, key=attrgetter("header")):
        if header < end:
            fail(reader, f"records {before} and {name} overlap", header)
        if header > end:
            unlisted += _beyond_descriptor(header - end, before)
        end, before = start + nbytes, name
    if end > directory:
        fail(reader, f"record {before} reaches into the archive's directory", directory)
    return unlisted + _beyond_descriptor(directory - end, before)


def _beyond_descriptor(gap: int, before: str) -> int:
    return gap if gap > (LARGEST_DESCRIPTOR if before else 0) else 0


def _refuse_odd_names(reader: Reader, members: Sequence[Member]) -> None:
    lines = "".join(f"\n{member.name}" for member in members)
    if not any(part in f"{lines}\n" for part in _ODD_PARTS):
        names = lines.casefold().split("\n")
        if len(set(names)) == len(names) == len(members) + 1:
            return
    seen: set[str] = set()
    for member in members:
        folded = member.name.casefold()
        if folded in seen:
            first = next(other.name for other in members if other.name.casefold() == folded)
            fail(reader, f"two records are named {first} and {member.name}", member.header)
        seen.add(folded)
        if re.search(_ODD_NAME, member.name):
            fail(reader, f"a record named {member.name!r}", member.header)


_ODD_NAME = r"\A(/|\Z)|[\0\\]|(\A|/)\.\.(/|\Z)"
_ODD_PARTS = ("\n/", "\n\n", "\0", "\\", "..")  # one is in lines of which one is odd


def read_member(reader: Reader, member: Member, limit: int, *, check: bool) -> bytes:
    """Read and inflate a small record; raises `LimitExceeded` where it is larger than `limit`."""
    if member.nbytes > limit:
        raise LimitExceeded(
            f"record {member.name} says it has {member.nbytes} bytes",
            path=reader.path,
            offset=member.header,
        )
    budget.current().read(member.nbytes, member.packed_nbytes)
    data = reader.read(member.start, member.packed_nbytes)
    if member.method == DEFLATED:
        inflater = zlib.decompressobj(-15)
        try:
            data = inflater.decompress(data, member.nbytes + 1)
        except zlib.error:
            data = b""
    if len(data) != member.nbytes or (check and crc32(data) != member.crc32):
        raise Malformed(
            f"record {member.name} does not match its checksum or size",
            path=reader.path,
            offset=member.start,
            hint="the file is damaged; download or copy it again",
        )
    return data


def blocks(reader: Reader, member: Member) -> Iterator[bytes]:
    """Yield the bytes of a record, unpacked; raises `Malformed` where they are not as it says."""
    if member.method == DEFLATED:
        data = unpacked(_packed(reader, member), reader)
    else:
        end = member.start + member.nbytes
        starts = range(member.start, end, CHUNK)
        data = (reader.read(start, min(CHUNK, end - start)) for start in starts)
    checksum = 0
    for block in data:
        checksum = crc32(block, checksum)
        yield block
    if checksum != member.crc32 and member.crc32:
        fail(reader, f"record {member.name} does not match its checksum", member.start)


def part(reader: Reader, member: Member) -> Reader:
    """Return a reader of the bytes of a record, of a copy where it is deflated."""
    if member.method == DEFLATED:
        return spooled(_packed(reader, member), reader)
    return reader.part(member.start, member.nbytes, reader.path)


def _packed(reader: Reader, member: Member) -> Storage:
    return Storage(
        reader.path,
        member.name,
        member.start,
        member.nbytes,
        packing=Packing.DEFLATED,
        packed_nbytes=member.packed_nbytes,
    )
