"""Archives around a checkpoint: zip, tar, gzip; what is inside, and a member by its name.

`archive.zip::policy.pth` names a member, `a.tar.gz::b.zip::c.pth` one in an archive in an archive;
a real file of the very name wins. Members that are stored as they are (in a tar, or in a zip that
does not pack them) are read in place, others from a temporary file. No path of an archive ever
becomes one on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from ckptool.errors import FormatError, LimitExceeded, NoSuchFile, Unsupported
from ckptool.files import tars, zips
from ckptool.files.fileio import MARK, Reader
from ckptool.files.spool import Spool, bounded, gunzipped, limit
from ckptool.text import counted, quoted, readable, table

SHOWN = 8
SUFFIXES = (".zip", ".nemo", ".tgz", ".gz")  # beside .tar, which checkpoints have too
_PLACE = f"`{MARK}` names a file in an archive; --at chooses a place in a checkpoint"
_GZIP = b"\x1f\x8b"

Suffixes = Callable[[], tuple[str, ...]]  # of checkpoints: asked only where members are listed


@dataclass(frozen=True, slots=True)
class ArchiveMember:
    """A member: its name, its size unpacked (None where only unpacking tells), what it is."""

    name: str
    nbytes: int
    kind: str = "file"
    likely: bool = False  # by its name it is a checkpoint, or an archive


@dataclass(slots=True)
class Inside:
    """An archive that is open: its members, and what must live as long as they are used."""

    reader: Reader
    zipped: dict[str, zips.Member] = field(default_factory=dict)
    tarred: dict[str, tars.TarMember] = field(default_factory=dict)
    alone: str = ""  # the one file that a gzip file holds, which is `reader` then
    held: tuple[object, ...] = ()

    def members(self, suffixes: Suffixes) -> list[ArchiveMember]:
        """List all members, those that look like checkpoints first, the largest first of all."""
        rows = [(member.name, member.nbytes, "file") for member in self.zipped.values()]
        rows += [(member.name, member.nbytes, member.kind) for member in self.tarred.values()]
        rows += [(self.alone, self.reader.nbytes, "file")] if self.alone else []
        endings = (*suffixes(), *SUFFIXES)
        members = [
            ArchiveMember(name, nbytes, kind, kind == "file" and name.lower().endswith(endings))
            for name, nbytes, kind in rows
            if kind != "folder"
        ]
        return sorted(members, key=lambda member: (not member.likely, -member.nbytes))


def split(path: str) -> tuple[str, list[str]]:
    """Split what may name a member into the file and the names in it; none for a plain file."""
    if MARK not in path or os.path.lexists(path):
        return path, []
    steps = path.split(MARK)
    for count in range(1, len(steps)):
        file = MARK.join(steps[:count])
        if os.path.isfile(file):
            return file, steps[count:]
    return steps[0], steps[1:]


def enter(stack: ExitStack, reader: Reader) -> Inside | None:
    """Look into an archive, None for what is none; what it opens is closed with `stack`."""
    head = reader.read(0, min(tars.BLOCK, reader.nbytes))
    if head.startswith(b"PK\3\4"):
        return Inside(reader, zipped=zips.read_directory(reader).members)
    if tars.is_tar(head):
        return Inside(reader, tarred=tars.read_members(reader))
    if not head.startswith(_GZIP):
        return None
    unpacked, spool = _spooled(stack, bounded(gunzipped(reader), reader), reader.path)
    head = unpacked.read(0, min(tars.BLOCK, unpacked.nbytes))
    if tars.is_tar(head):
        return Inside(unpacked, tarred=tars.read_members(unpacked), held=(spool,))
    name = os.path.basename(reader.path.rpartition(MARK)[2])
    return Inside(unpacked, alone=name.removesuffix(".gz") or name, held=(spool,))


def _spooled(stack: ExitStack, blocks: Iterator[bytes], shown: str) -> tuple[Reader, Spool]:
    spool = Spool(blocks)
    reader = stack.enter_context(Reader(spool.path))
    reader.path = shown
    return reader, spool


@contextmanager
def opened(path: str, suffixes: Suffixes) -> Iterator[tuple[Reader, Reader, tuple[object, ...]]]:
    """Open a member of an archive for reading.

    Gives the readers of the member and of the archive itself, and what must be held while the
    member's bytes are used. Raises `NoSuchFile` where the archive, or the member, is not there.
    """
    file, names = split(path)
    held: list[object] = []
    with ExitStack() as stack:
        reader = archive = stack.enter_context(Reader(file))
        for name in names:
            try:
                reader = _member(stack, reader, name, held, suffixes)
            except FormatError as error:
                if str(reader.path) not in error.message:
                    error.message = f"{reader.path}: {error.message}"
                raise
        yield reader, archive, tuple(held)


def _member(
    stack: ExitStack, reader: Reader, name: str, held: list[object], suffixes: Suffixes
) -> Reader:
    inside = enter(stack, reader)
    if inside is None:
        what = f"{reader.path} is no archive that is looked into (zip, tar, gzip)"
        raise NoSuchFile(what, hint=_PLACE)
    held += inside.held
    shown = f"{reader.path}{MARK}{name}"
    if name and name == inside.alone:
        inside.reader.path = shown
        return inside.reader
    if name in inside.tarred:
        found = inside.tarred[name]
        if found.kind != "file":
            raise Unsupported(f"{shown} is a {found.kind}, not a file")
        return inside.reader.part(found.start, found.nbytes, shown)
    if name not in inside.zipped:
        raise _missing(reader, name, inside.members(suffixes))
    member = inside.zipped[name]
    if member.method == zips.STORED:
        for _ in zips.blocks(reader, member):
            pass  # its checksum is verified
        return reader.part(member.start, member.nbytes, shown)
    if member.nbytes > limit(member.packed_nbytes):
        raise LimitExceeded(
            f"{shown} would unpack from {readable(member.packed_nbytes)} to "
            f"{readable(member.nbytes)}",
            hint="if that is meant, unpack it by hand",
        )
    unpacked, spool = _spooled(stack, zips.blocks(reader, member), shown)
    held.append(spool)
    return unpacked


def _missing(reader: Reader, name: str, members: list[ArchiveMember]) -> NoSuchFile:
    from difflib import get_close_matches

    names = [each.name for each in members]
    close = get_close_matches(name, names, n=1, cutoff=0.6)
    hint = _PLACE if any(os.path.basename(each) == "data.pkl" for each in names) else ""
    if close:
        hint = f"did you mean {quoted(reader.path + MARK + close[0])}?"
    what = f"there is no {name} in {reader.path}"
    if not name:
        what = f"nothing stands after {MARK}, which names a file in {reader.path}"
    return NoSuchFile(what, evidence=lines(members), hint=hint)


def lines(members: list[ArchiveMember]) -> list[str]:
    """Show members in a few lines, the rest as a count."""
    rows = [
        (each.name, readable(each.nbytes) if each.kind == "file" else each.kind)
        for each in members[:SHOWN]
    ]
    more = len(members) - SHOWN
    return table(rows) + ([f"and {counted(more, 'more file')}"] if more > 0 else [])


def look(reader: Reader, suffixes: Suffixes) -> tuple[list[str], str]:
    """Show what is in a file that is no checkpoint, and the command that gets at it.

    Both are empty for what is no archive, or holds nothing that looks like a checkpoint; what
    cannot be unpacked says why.
    """
    with ExitStack() as stack:
        try:
            inside = enter(stack, reader)
        except FormatError as error:
            return [f"it cannot be looked into: {error.message}"], error.hint
        members = inside.members(suffixes) if inside else []
    if not members or not members[0].likely:
        return [], ""
    return lines(members), f"ckptool keys {quoted(reader.path + MARK + members[0].name)}"
