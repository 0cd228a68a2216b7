"""The containers ckptool knows, chosen by the bytes of a file, never by its name."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ckptool.containers import (
    _folders,
    _others,
    _pickles,
    _stand_in,
    dcp,
    safetensors,
    sharded,
    torch_legacy,
    torch_tar,
    torch_zip,
    torchscript,
)
from ckptool.errors import CkptoolError, FormatError, Malformed, NotACheckpoint
from ckptool.files import archives as _archives
from ckptool.files.archives import ArchiveMember
from ckptool.files.fileio import Reader
from ckptool.pickles.tree import Global, Object
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.walk import refuse_deep

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

HEAD = 4096


@dataclass(frozen=True, slots=True)
class Format:
    """One container: how to tell it from its first bytes, and how to read it.

    `read` gives None for a file of another container that starts with the same bytes.
    A container of many files is read from one of them, its index: a folder that holds a file
    which one of `folder_patterns` matches is that container. What is not `writable` is written
    again as another container, `written_as`.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes], bool]
    read: Callable[[Reader], Checkpoint | None]
    writable: bool
    folder_patterns: tuple[str, ...] = ()
    written_as: str = "torch-zip"


FORMATS = (
    Format(
        "torch-zip",
        "torch zip",
        (".pth", ".pt", ".bin", ".ckpt", ".tar", ".th", ".pkl"),
        torch_zip.sniff,
        torch_zip.read,
        writable=True,
    ),
    Format("torchscript", "TorchScript", (), torchscript.sniff, torchscript.read, False),
    Format("torch-tar", "torch tar", (), torch_tar.sniff, torch_tar.read, False),
    Format("torch-legacy", "legacy torch", (), torch_legacy.sniff, torch_legacy.read, False),
    Format(
        "safetensors",
        "safetensors",
        (".safetensors",),
        safetensors.sniff,
        safetensors.read,
        writable=True,
    ),
    Format(
        "torch-dcp",
        "distributed checkpoint",
        (),
        dcp.sniff,
        dcp.read,
        writable=False,
        folder_patterns=(".metadata", "__*.metadata"),
    ),
    Format(
        "safetensors-sharded",
        "sharded safetensors",
        (),
        sharded.sniff_safetensors,
        lambda reader: sharded.read(reader, _read_shard),
        writable=False,
        folder_patterns=sharded.PATTERNS,
        written_as="safetensors",
    ),
    Format(
        "torch-sharded",
        "sharded torch",
        (),
        sharded.sniff_torch,
        lambda reader: sharded.read(reader, _read_shard),
        writable=False,
        folder_patterns=sharded.PATTERNS,
    ),
)
BY_NAME = {each.name: each for each in FORMATS}


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint as data: its tree, and where its bytes lie.

    Raises a `FormatError` that names what the file is, or what is wrong with it and where.
    """
    shown = str(path)
    if _archives.split(shown)[1]:
        return _read_member(shown)
    found = _stand_in.file_of(shown, is_index)
    if os.path.isdir(found):
        raise _folders.refuse(shown)
    checkpoint = _read_file(found, FORMATS)
    notes = checkpoint.notes
    if found != shown and not is_index(os.path.basename(found)):
        notes = (*notes, f"{shown} is a folder; this is {os.path.basename(found)} in it")
    note = _stand_in.shard_note(found)
    return replace(checkpoint, path=shown, notes=(*notes, note) if note else notes)


def _read_member(path: str) -> Checkpoint:
    with _archives.opened(path) as (reader, archive, held):
        checkpoint = _read_open(reader, _of_one_file())
    return replace(checkpoint, path=path, files=((archive.file, archive.stamp),), held=held)


def _read_file(path: str, known: Iterable[Format]) -> Checkpoint:
    with Reader(path) as reader:
        return _read_open(reader, known)


def _read_open(reader: Reader, known: Iterable[Format]) -> Checkpoint:
    head = reader.read(0, min(HEAD, reader.nbytes))
    for each in known:
        found = _read(each, reader) if each.sniff(head) else None
        if found is not None:
            return found
    what, hint = _others.describe(reader, head)
    inside, command = _archives.look(reader)
    raise NotACheckpoint(
        f"{reader.path} is {what}", path=reader.path, evidence=inside, hint=command or hint
    )


def _of_one_file() -> list[Format]:
    return [each for each in FORMATS if not each.folder_patterns]


def _read_shard(path: str) -> Checkpoint:
    """Read a file of a set, which is no set itself."""
    return _read_file(path, _of_one_file())


def members(path: str) -> list[ArchiveMember]:
    """List what is in an archive, what looks like a checkpoint first; nothing for other files."""
    with ExitStack() as stack:
        inside = _archives.enter(stack, stack.enter_context(Reader(path)))
        return inside.members() if inside else []


def member_of(path: str) -> str:
    """Give the archive that a path names a member of; an empty text for any other path."""
    file, names = _archives.split(path)
    return file if names and os.path.isfile(file) else ""


def pickled(path: str) -> tuple[dict[Global, int], list[Object]]:
    """Give what the pickle names and calls that a file is, or starts as, which is no checkpoint."""
    with Reader(path) as reader:
        return _pickles.pickled(reader, reader.read(0, min(HEAD, reader.nbytes)))


def is_index(name: str) -> bool:
    """Tell whether a file of that name stands for the folder that it is in."""
    return any(fnmatchcase(name, pattern) for each in FORMATS for pattern in each.folder_patterns)


def lacks_index(folder: str) -> bool:
    """Tell whether a folder holds shards of a checkpoint, and nothing that joins them."""
    try:
        _stand_in.file_of(folder, is_index)
    except Malformed:
        return True
    except CkptoolError:
        return False
    return False


@contextmanager
def _growing() -> Iterator[None]:
    """Look for no garbage while a tree grows: there is none in it, and the time is lost."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _read(each: Format, reader: Reader) -> Checkpoint | None:
    try:
        with _growing():
            checkpoint = each.read(reader)
            if checkpoint is None:
                return None
            refuse_deep(checkpoint.tree)
        return replace(checkpoint, files=checkpoint.files or ((reader.file, reader.stamp),))
    except FormatError as error:
        error.path = error.path or reader.path
        if type(error) is not NotACheckpoint and str(error.path) not in error.message:
            place = f", byte {error.offset}" if error.offset is not None else ""
            error.message = f"{error.path} ({each.title}{place}): {error.message}"
        raise
