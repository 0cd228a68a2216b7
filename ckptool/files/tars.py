"""A strict reader of tar archives: ustar, with the long names of GNU and the records of pax.

Sources: POSIX.1-2017, `pax` (ustar and pax), and the manual of GNU tar ("Basic Tar Format"). A
header is a block of 512 bytes with a checksum over itself; data follow, padded to whole blocks.
Members that are no regular files (links, devices, sparse files) are listed and never opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files.fileio import Reader

BLOCK = 512
MAX_MEMBERS = 1_000_000
MAX_NAME = 1 << 20  # bytes of a long name, or of the records of pax about one member
_KINDS = {
    b"0": "file",
    b"\0": "file",
    b"7": "file",
    b"1": "hard link",
    b"2": "symbolic link",
    b"3": "device",
    b"4": "device",
    b"5": "folder",
    b"6": "pipe",
    b"S": "sparse file",
}
_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL = b"L", b"K", b"x", b"g"


@dataclass(frozen=True, slots=True)
class TarMember:
    """One member: where its data start in the archive, and what it is (`file`, `folder` ...)."""

    name: str
    start: int
    nbytes: int
    kind: str


def is_tar(head: bytes) -> bool:
    """Tell whether a file starts with a header whose magic and checksum are right."""
    return head[257:262] == b"ustar" and _checksum_fits(head[:BLOCK])


def _checksum_fits(header: bytes) -> bool:
    """Compare the sum of a header's bytes, which some old tars took of signed ones."""
    if len(header) < BLOCK:
        return False
    blank = header[:148] + b" " * 8 + header[156:]
    total = sum(blank)
    signed = total - 256 * sum(byte > 127 for byte in blank)
    try:
        return int(header[148:156].rstrip(b"\0 ").lstrip() or b"-1", 8) in (total, signed)
    except ValueError:
        return False


def read_members(reader: Reader) -> dict[str, TarMember]:
    """Read all headers; raises `Malformed` or `LimitExceeded` with the offset of what is wrong."""
    members: dict[str, TarMember] = {}
    for member in _members(reader):
        name = member.name.removeprefix("./").rstrip("/")
        if name in ("", "."):
            continue
        if "\0" in name or ".." in name.split("/") or name.startswith("/"):
            _fail(f"a member named {name!r}", member.start)
        if name in members and "folder" not in (member.kind, members[name].kind):
            _fail(f"two members are named {name}", member.start)
        members[name] = replace(member, name=name)
        if len(members) > MAX_MEMBERS:
            raise LimitExceeded(f"an archive of more than {MAX_MEMBERS} members")
    return members


def _fail(what: str, offset: int) -> None:
    raise Malformed(what, offset=offset)


def _members(reader: Reader) -> Iterator[TarMember]:
    position = 0
    said: dict[str, str] = {}
    everywhere: dict[str, str] = {}
    while position < reader.nbytes:
        header = reader.read(position, min(BLOCK, reader.nbytes - position))
        if not header.strip(b"\0"):
            return  # two blocks of zeros end it; what follows is padding
        if not _checksum_fits(header):
            _fail("the header of a member does not match its checksum", position)
        kind, start = header[156:157], position + BLOCK
        nbytes = _size(header[124:136], position)
        if kind not in (_LONG_NAME, _LONG_LINK, _PAX, _PAX_GLOBAL):
            told = everywhere | said
            nbytes = _decimal(told.get("size", str(nbytes)), position)
            yield _member(header, told, start, nbytes)
            said = {}
            # Links, folders and devices have no data, whatever size they state.
            nbytes = nbytes if _KINDS.get(kind, "file") in ("file", "sparse file") else 0
        elif nbytes > MAX_NAME:
            raise LimitExceeded(f"{nbytes} bytes about one member", offset=position)
        elif kind == _LONG_NAME:
            said["path"] = _text(reader.read(start, nbytes).partition(b"\0")[0])
        elif kind == _PAX:
            said |= _pax(reader.read(start, nbytes), position)
        elif kind == _PAX_GLOBAL:
            everywhere |= _pax(reader.read(start, nbytes), position)
        if start + nbytes > reader.nbytes:
            raise Malformed(
                "the tar archive ends inside a member",
                offset=position,
                hint="it is truncated; get it again from where it came",
            )
        position = start + -(-nbytes // BLOCK) * BLOCK


def _member(header: bytes, told: dict[str, str], start: int, nbytes: int) -> TarMember:
    kind = _KINDS.get(header[156:157], "member of another kind")
    if kind == "file" and any(key.startswith("GNU.sparse.") for key in told):
        kind = "sparse file"
    name = _text(header[:100].partition(b"\0")[0])
    prefix = _text(header[345:500].partition(b"\0")[0])
    if header[257:263] == b"ustar\0" and prefix:
        name = f"{prefix}/{name}"
    name = told.get("path", name)
    if kind == "file" and name.endswith("/"):  # as tars before ustar wrote folders
        kind = "folder"
    return TarMember(name, start, nbytes, kind)


def _size(field: bytes, offset: int) -> int:
    """Read a size: octal digits, or with the highest bit set a binary number (GNU)."""
    if field[0] & 0x80:
        size = int.from_bytes(field, "big") & ((1 << 95) - 1)
        if field[0] != 0x80 or size >= 1 << 63:
            _fail("the size of a member is negative or beyond 2^63", offset)
        return size
    try:
        return int(field.strip(b"\0 ") or b"0", 8)
    except ValueError:
        raise Malformed("the size of a member is no octal number", offset=offset) from None


def _decimal(text: str, offset: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        _fail("the size of a member is no number", offset)
    return int(text)


def _pax(data: bytes, offset: int) -> dict[str, str]:
    """Read the records of a pax header: `length key=value` and a newline, the length of all."""
    records: dict[str, str] = {}
    position = 0
    while position < len(data) and data[position]:
        length, space, _ = data[position : position + 20].partition(b" ")
        end = position + int(length) if space and length.isdigit() else 0
        record = data[position + len(length) + 1 : end]
        key, equals, value = record.partition(b"=")
        if end > len(data) or not equals or not value.endswith(b"\n"):
            _fail("a record of a pax header is damaged", offset)
        records[_text(key)] = _text(value[:-1])
        position = end
    return records


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
