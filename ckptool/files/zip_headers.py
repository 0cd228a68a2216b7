"""The local headers of a zip archive, checked against the entries of its directory.

Where a file is far away, each is a request: then what the directory says is believed until the
bytes of a record are read.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import NoReturn

from ckptool.errors import Malformed, Unsupported
from ckptool.files import budget
from ckptool.files.fileio import Reader
from ckptool.records import NamedTuple

STORED, DEFLATED = 0, 8
COMMON = struct.Struct("<5H3L2H")  # of a local header and an entry of the directory: `Header`
_LOCAL = struct.Struct("<4s" + COMMON.format[1:])
LOCAL_NBYTES = _LOCAL.size
BIG16, BIG32 = 0xFFFF, 0xFFFFFFFF
_ENCRYPTED = 0x2041  # encrypted, strongly encrypted, masked headers
_PATCHED = 0x0020
_DESCRIPTOR = 0x0008
_HEADERS_AT_ONCE = 1 << 16
_DESCRIPTORS = (16, 24)  # signature, checksum and two sizes of four or eight bytes
LARGEST_DESCRIPTOR = max(_DESCRIPTORS)
_ALIGNED = 64  # bytes, by torch


class Member(NamedTuple):
    """One record of an archive; `start` is where its packed bytes begin."""

    name: str
    method: int
    crc32: int
    packed_nbytes: int
    nbytes: int
    header: int
    start: int


class Header(NamedTuple):
    """What a local header and an entry of the directory both have."""

    version: int
    flags: int
    method: int
    time: int
    date: int
    crc32: int
    packed: int
    nbytes: int
    name_size: int
    extra_size: int


def fail(reader: Reader, what: str, offset: int) -> NoReturn:
    """Raise `Malformed` at a place in the archive."""
    raise Malformed(what, path=reader.path, offset=offset)


def text(name: bytes) -> str:
    """Return a name as text: UTF-8, or what MS-DOS had."""
    try:
        return name.decode("utf-8")
    except UnicodeDecodeError:
        return name.decode("cp437")


class LocalHeaders:
    """The local headers of an archive, many in one read where its records are small."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._start, self._data = 0, b""

    def _find(self, start: int, nbytes: int) -> int:
        """Return where in `_data` a header starts."""
        end = self._start + len(self._data)
        if not self._start <= start <= end - nbytes:
            near = not self._reader.file.far and self._start <= start <= end + _HEADERS_AT_ONCE
            size = max(nbytes, _HEADERS_AT_ONCE if near else 0)
            self._data = self._reader.read(start, min(size, self._reader.nbytes - start))
            self._start = start
        return start - self._start

    def usual_start(self, said: bytes, flags: int, name: bytes, header: int) -> int:
        """Return where the data starts behind a header that says the same as its entry.

        `said` are the fields of the entry in the order of `Header`, without the last. The header
        may defer all of sizes and checksum, as torch's does. 0 for another header, or none.
        """
        nbytes = LOCAL_NBYTES + len(name)
        end = header + nbytes
        if end > self._reader.nbytes or flags & (_ENCRYPTED | _PATCHED):
            return 0
        at = header - self._start
        if at < 0 or at + nbytes > len(self._data):
            at = self._find(header, nbytes)
        here = self._data[at : at + LOCAL_NBYTES]
        if here[4:28] != said:
            deferred = b"%b%b%b" % (said[:10], bytes(12), said[22:])
            if not flags & _DESCRIPTOR or here[4:28] != deferred:
                return 0
        if not here.startswith(b"PK\3\4") or not self._data.startswith(name, at + LOCAL_NBYTES):
            return 0
        return end + here[28] + (here[29] << 8)

    def data_start(self, name: bytes, entry: Header, header: int) -> int:
        """Check a local header against its entry, and return where the data starts."""
        reader, name_end = self._reader, LOCAL_NBYTES + len(name)
        if header + name_end > reader.nbytes:
            fail(reader, f"the header of record {text(name)} is beyond the end", header)
        at = self._find(header, name_end)
        signature, *common = _LOCAL.unpack_from(self._data, at)
        local = Header._make(common)
        local_name = self._data[at + LOCAL_NBYTES : at + name_end]
        if signature != b"PK\3\4" or local.name_size != len(name) or local_name != name:
            what = f"the header of record {text(name)} is not where the directory says"
            fail(reader, what, header)
        odd = local.method != entry.method or local.flags & (_ENCRYPTED | _PATCHED)
        if odd or not _sizes_agree(local, entry):
            fail(reader, f"the two headers of record {text(name)} disagree", header)
        if entry.method == STORED and entry.packed != entry.nbytes:
            fail(reader, f"record {text(name)} is stored and has two sizes", header)
        return header + name_end + local.extra_size


class FarHeaders:
    """The local headers of an archive far away, each checked when its record is read.

    torch aligns the data of records and ends them with a data descriptor or with nothing, so that
    the next header says where the data starts. Where that is not so, the header is read at once.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._listed: dict[int, tuple[bytes, Header]] = {}

    def usual_start(self, said: bytes, flags: int, name: bytes, header: int) -> int:
        """Know of no header what it says."""
        return 0

    def data_start(self, name: bytes, entry: Header, header: int) -> int:
        """Note an entry; `placed` says later where its data starts."""
        budget.current().spend(budget.CALL)
        self._listed[header] = name, entry
        return header

    def placed(self, members: Sequence[Member], directory: int) -> list[Member]:
        """Return the members with the places of their data."""
        headers = sorted([*self._listed, directory])
        ends = dict(pairwise(headers))
        return [each._replace(start=self._start(each, ends)) for each in members]

    def _start(self, member: Member, ends: Mapping[int, int]) -> int:
        name, entry = self._listed[member.header]
        fixed = member.header + LOCAL_NBYTES + len(name)
        for descriptor in _DESCRIPTORS if entry.flags & _DESCRIPTOR else (0,):
            start = ends.get(member.header, 0) - descriptor - member.packed_nbytes
            if start % _ALIGNED == 0 and 0 <= start - fixed <= BIG16:
                file, base = self._reader.file, self._reader.base
                check = partial(self._check, name, entry, member.header, start)
                file.later(base + start, base + start + member.packed_nbytes, check)
                return start
        return LocalHeaders(self._reader).data_start(name, entry, member.header)

    def _check(self, name: bytes, entry: Header, header: int, start: int) -> None:
        if LocalHeaders(self._reader).data_start(name, entry, header) != start:
            fail(self._reader, f"record {text(name)} does not end at the next one", header)


def refuse_packing(reader: Reader, name: str, entry: Header) -> None:
    """Raise `Unsupported` for a record that is encrypted, or packed in another way."""
    if entry.flags & (_ENCRYPTED | _PATCHED):
        raise Unsupported(f"record {name} is encrypted or a patch", path=reader.path)
    if entry.method not in (STORED, DEFLATED):
        what = f"record {name} has compression method {entry.method}"
        raise Unsupported(what, path=reader.path)


def _sizes_agree(local: Header, entry: Header) -> bool:
    """Compare CRC and sizes; a local header may defer them, or leave sizes to its zip64 field."""
    if local[5:8] == entry[5:8]:
        return True
    deferred = bool(local.flags & _DESCRIPTOR)
    if deferred and not any(local[5:8]):  # as torch writes all of them
        return True
    return all(
        here in (there, unknown) or (here == 0 and deferred)
        for here, there, unknown in (
            (local.crc32, entry.crc32, 0),
            (local.packed, entry.packed, BIG32),
            (local.nbytes, entry.nbytes, BIG32),
        )
    )
