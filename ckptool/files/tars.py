"""Tars: a strict walk of the raw headers, then what `tarfile` makes of them.

torch reads its tar with `tarfile`, so `tarfile` decides what is one and how members are named. But
it takes a size of -1000, four sources of a name of which the last wins, and any unknown type as a
file; other readers of tar do otherwise. What they could disagree about is refused first.

A header is a block of 512 bytes with a checksum over itself; data follow, padded to whole blocks.
Sources: POSIX.1-2017, `pax` (ustar and pax); the manual of GNU tar, "Basic Tar Format".
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Never

from ckptool.errors import LimitExceeded, Malformed, Unsupported
from ckptool.files import budget
from ckptool.files.fileio import Reader, ReaderFile
from ckptool.records import dataclass
from ckptool.text import length

if TYPE_CHECKING:
    from tarfile import TarInfo

BLOCK = 512
MAX_MEMBERS = 1_000_000
MAX_RECORDS = 1 << 20  # bytes of a long name, or of the records of pax about one member
MAX_GLOBAL = 64  # records about all members: `tarfile` copies them for each member
_FILES = (b"0", b"\0", b"7")
_OTHERS = {
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
}
# Headers about the next member: L and K (long name and link of GNU) or x (pax); a g (pax, about all
# members that follow) may come before them.
_ABOUT_NEXT = (b"", b"L", b"K", b"LK", b"KL", b"x")
_GLOBAL_NAMES = rb"path\Z|size\Z|GNU\.sparse\."
_OCTAL = rb" *[0-7]*[\0 ]*"
# What `tarfile` takes for the start of a checksum: white space, a sign, an octal digit, or the flag
# of a binary number. Other files are spared the import.
_CHECKSUM_STARTS = b"\0\t\n\v\f\r\x1c\x1d\x1e\x1f +-01234567\x80\xff"
_TEXT = ("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member: its name as it is there, where its data start, and what it is (`file` ...)."""

    name: str
    start: int
    nbytes: int
    kind: str = "file"


def is_tar(head: bytes) -> bool:
    """Return whether a file starts as a tar: with a magic, or a header that `tarfile` takes."""
    if len(head) < BLOCK or head[257:262] == b"ustar":
        return len(head) >= BLOCK
    return head[148] in _CHECKSUM_STARTS and _parsed(head[:BLOCK]) is not None


def _parsed(header: bytes) -> TarInfo | None:
    from tarfile import HeaderError, TarInfo

    try:
        return TarInfo.frombuf(header, *_TEXT)
    except HeaderError:
        return None


def read_members(reader: Reader) -> dict[str, TarMember]:
    """Read all headers; raises a `FormatError` with the offset of what is wrong.

    The members are under their names without `./` before and `/` behind.
    """
    members: dict[str, TarMember] = {}
    for info in _infos(reader):
        name, start = info.name.removeprefix("./").rstrip("/"), info.offset_data
        kind = _OTHERS.get(info.type, "file")
        if name in ("", "."):
            continue
        if "\0" in name or ".." in name.split("/") or name.startswith("/"):
            _fail(f"a member named {name!r}", start)
        if name in members and "folder" not in (kind, members[name].kind):
            _fail(f"two members are named {name}", start)
        members[name] = TarMember(info.name, start, info.size, kind)
    return members


def _infos(reader: Reader) -> list[TarInfo]:
    """Return the members that `tarfile` finds, where they start as the raw headers say."""
    import tarfile

    starts = list(_starts(reader))
    try:
        with tarfile.open(
            None, "r:", ReaderFile(reader), encoding=_TEXT[0], errors=_TEXT[1]
        ) as tar:
            infos = tar.getmembers()
    except (tarfile.TarError, ValueError):
        infos = []
    if [info.offset_data for info in infos] != starts:
        _fail("the headers of the archive can be read in two ways", 0)
    return infos


def _fail(what: str, offset: int, hint: str = "") -> Never:
    raise Malformed(what, offset=offset, hint=hint)


def _starts(reader: Reader) -> Iterator[int]:
    """Walk the raw headers, and iterate over where the data of members start."""
    position, count, about, spending = 0, 0, b"", budget.current()
    records: dict[bytes, bytes] = {}
    everywhere: set[bytes] = set()
    while position < reader.nbytes:
        block = reader.read(position, min(BLOCK, reader.nbytes - position))
        if not block.strip(b"\0"):
            return  # two blocks of zeros end it; what follows is padding
        header = _header(block, position)
        is_member = header.type not in (b"L", b"K", b"x", b"g")
        if is_member:
            nbytes = _data_size(header, records, position)
        elif (nbytes := header.size) > MAX_RECORDS:
            raise LimitExceeded(f"{nbytes} bytes about one member", offset=position)
        start = position + BLOCK
        end = start + -(-nbytes // BLOCK) * BLOCK
        if end > reader.nbytes:
            hint = "it is truncated; download or copy it again"
            _fail("the tar archive ends inside a member", position, hint)
        spending.stored += BLOCK
        if is_member:
            spending.spend(budget.MEMBER)
            yield start
            count, about, records = count + 1, b"", {}
        else:
            about += header.type
        if about.removeprefix(b"g") not in _ABOUT_NEXT:
            _fail(f"a member after headers of the types {about.decode()}, which disagree", position)
        if header.type in b"xg":
            spending.read(end - start)
            records = _pax(reader.read(start, end - start), nbytes, position)
            spending.spend(len(records) * budget.MEMBER)
        if header.type == b"g":
            everywhere, records = everywhere | records.keys(), {}
        if count > MAX_MEMBERS:
            raise LimitExceeded(f"an archive of more than {MAX_MEMBERS} members")
        if len(everywhere) > MAX_GLOBAL or any(
            re.match(_GLOBAL_NAMES, name) for name in everywhere
        ):
            _fail("a header about all members that names one, or states too much", position)
        position = end


def _header(block: bytes, offset: int) -> TarInfo:
    """Parse a raw header; its checksum and size must be numbers to every reader."""
    header, is_binary = _parsed(block), block[124:125] >= b"\x80"
    if not is_binary and not re.fullmatch(_OCTAL, block[124:136]):
        _fail("the size of a member is not an octal number", offset)
    if header is None or not re.fullmatch(_OCTAL, block[148:156]):
        _fail("the header of a member does not match its checksum", offset)
    if length(header.size) is None:
        _fail("the size of a member is negative or beyond 2^63", offset)
    return header


def _data_size(header: TarInfo, records: dict[bytes, bytes], offset: int) -> int:
    """Return how many bytes of data follow the header of a member; refuse types not applied."""
    if header.type == b"S" or any(key.startswith(b"GNU.sparse.") for key in records):
        _fail(f"the member {header.name} is a sparse file", offset + BLOCK)
    if header.type not in (*_FILES, *_OTHERS):
        kind = header.type.decode("latin-1")
        raise Unsupported(f"a member of the unknown type {kind!r}", offset=offset)
    stated = records.get(b"size")
    size = header.size if stated is None else length(stated, 10)
    if size is None:
        _fail("the size of a member is not a number", offset)
    # Links, folders and devices have no data, whatever size they state.
    return size if header.type in _FILES else 0


def _pax(data: bytes, nbytes: int, offset: int) -> dict[bytes, bytes]:
    """Read the records of a pax header: `length key=value` and a newline, the length of all.

    `data` are whole blocks: `tarfile` reads records beyond the `nbytes` of the header too.
    """
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(data) and data[position]:
        stated, space, _ = data[position : position + 20].partition(b" ")
        end = position + (length(stated, 10) or 0) if space else 0
        key, _, value = data[position + len(stated) + 1 : end].partition(b"=")
        if end > nbytes or not key or key in records or not value.endswith(b"\n"):
            _fail("a record of a pax header is damaged", offset)
        records[key] = value[:-1]
        position = end
    return records
