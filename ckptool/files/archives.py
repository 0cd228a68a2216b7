"""Archives around a checkpoint: zip, tar, gzip; what is inside, and a member by its name.

`archive.zip::policy.pth` names a member, `a.tar.gz::b.zip::c.pth` one in an archive in an archive;
a real file of the very name wins. Members that are stored as they are (in a tar, or in a zip that
does not pack them) are read in place, others from a temporary file. No path of an archive ever
becomes one on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from ckptool.errors import FormatError, LimitExceeded, NoSuchFile, Unsupported
from ckptool.files import paths, tars, zips
from ckptool.files.fileio import MARK, Reader
from ckptool.files.spool import Spool, gunzipped, limit
from ckptool.records import dataclass
from ckptool.text import argument, counted, quoted, readable, table

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


@dataclass(frozen=True, slots=True)
class Inside:
    """An archive that is open, and what is in it; a gzip file holds one file, read as of a tar."""

    reader: Reader
    entries: Mapping[str, zips.Member | tars.TarMember]

    def members(self, suffixes: Suffixes) -> list[ArchiveMember]:
        """List all members, those that look like checkpoints first, the largest first of all."""
        endings = (*suffixes(), *SUFFIXES)
        members = []
        for name, entry in self.entries.items():
            kind = "file" if isinstance(entry, zips.Member) else entry.kind
            likely = kind == "file" and name.lower().endswith(endings)
            if kind != "folder":
                members.append(ArchiveMember(name, entry.nbytes, kind, likely))
        return sorted(members, key=lambda member: (not member.likely, -member.nbytes))


def split(path: str) -> tuple[str, list[str]]:
    """Split what may name a member into the file and the names in it; none for a plain file."""
    if isinstance(path, paths.Url):
        return path.members()
    if MARK not in path or os.path.lexists(path):
        return path, []
    steps = path.split(MARK)
    for count in range(1, len(steps)):
        file = MARK.join(steps[:count])
        if os.path.isfile(file):
            return file, steps[count:]
    return steps[0], steps[1:]


def enter(stack: ExitStack, reader: Reader) -> Inside | None:
    """Look into an archive, None for any other file; what it opens is closed with `stack`."""
    if _head(reader).startswith(b"PK\3\4"):
        return Inside(reader, zips.read_directory(reader).members)
    packed = _head(reader).startswith(_GZIP)
    if packed:
        reader = _spooled(stack, gunzipped(reader), reader.path)
    if tars.is_tar(_head(reader)):
        return Inside(reader, tars.read_members(reader))
    if not packed:
        return None
    name = paths.name_of(reader.path.rpartition(MARK)[2])
    name = name.removesuffix(".gz") or name
    return Inside(reader, {name: tars.TarMember(name, 0, reader.nbytes, "file")})


def is_archive(path: str) -> bool:
    """Check by its first bytes whether a file is an archive that could be looked into."""
    try:
        with Reader(path) as reader:
            head = _head(reader)
    except FormatError:
        return False
    return head.startswith((b"PK\3\4", _GZIP)) or tars.is_tar(head)


def _head(reader: Reader) -> bytes:
    return reader.read(0, min(tars.BLOCK, reader.nbytes))


def _spooled(stack: ExitStack, blocks: Iterator[bytes], shown: str) -> Reader:
    spool = Spool(blocks)
    reader = stack.enter_context(Reader(spool.path))
    reader.path, reader.held = shown, (spool,)
    return reader


@contextmanager
def opened(path: str, suffixes: Suffixes) -> Iterator[tuple[Reader, Reader]]:
    """Open a member of an archive, and yield its reader and that of the archive itself.

    Raises `NoSuchFile` where the archive, or the member, does not exist.
    """
    file, names = split(path)
    with ExitStack() as stack:
        reader = archive = stack.enter_context(Reader(file))
        for name in names:
            try:
                reader = _member(stack, reader, name, suffixes)
            except FormatError as error:
                if str(reader.path) not in error.message:
                    error.message = f"{reader.path}: {error.message}"
                raise
        yield reader, archive


def _member(stack: ExitStack, reader: Reader, name: str, suffixes: Suffixes) -> Reader:
    inside = enter(stack, reader)
    if inside is None:
        what = f"{reader.path} is not an archive that ckptool reads (zip, tar, gzip)"
        raise NoSuchFile(what, hint=_PLACE)
    shown = f"{reader.path}{MARK}{name}"
    match inside.entries.get(name):
        case None:
            raise _missing(reader, name, inside.members(suffixes))
        case tars.TarMember(kind="file") as member:
            return inside.reader.part(member.start, member.nbytes, shown)
        case tars.TarMember() as member:
            raise Unsupported(f"{shown} is a {member.kind}, not a file")
        case member:
            return _unzipped(stack, reader, member, shown)


def _unzipped(stack: ExitStack, reader: Reader, member: zips.Member, shown: str) -> Reader:
    """Return a reader of a record, in place if it is stored; check its checksum."""
    if member.method == zips.STORED:
        for _ in zips.blocks(reader, member):
            pass
        return reader.part(member.start, member.nbytes, shown)
    if member.nbytes > limit(member.packed_nbytes):
        raise LimitExceeded(
            f"{shown} would unpack from {readable(member.packed_nbytes)} to "
            f"{readable(member.nbytes)}",
            hint="if that is intended, unpack it yourself",
        )
    return _spooled(stack, zips.blocks(reader, member), shown)


def _missing(reader: Reader, name: str, members: list[ArchiveMember]) -> NoSuchFile:
    from difflib import get_close_matches

    names = [member.name for member in members]
    hint = _PLACE if any(os.path.basename(path) == "data.pkl" for path in names) else ""
    if close := get_close_matches(name, names, n=1, cutoff=0.6):
        hint = f"did you mean {quoted(reader.path + MARK + close[0])}?"
    what = f"there is no {name} in {reader.path}"
    if not name:
        what = f"nothing follows {MARK}, which names a file in {reader.path}"
    return NoSuchFile(what, evidence=lines(members), hint=hint)


def lines(members: list[ArchiveMember]) -> list[str]:
    """Show members in a few lines, the rest as a count."""
    rows = [
        (member.name, readable(member.nbytes) if member.kind == "file" else member.kind)
        for member in members[:SHOWN]
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
    return lines(members), f"ckptool info {argument(reader.path + MARK + members[0].name)}"
