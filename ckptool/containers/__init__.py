"""The containers ckptool knows, chosen by the bytes of a file, never by its name."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool.containers import _reading
from ckptool.containers._container import (
    Container as Container,
    Left as Left,
    Traits as Traits,
    Writer as Writer,
)
from ckptool.containers._reading import HEAD as HEAD
from ckptool.containers._registry import (
    built_in as built_in,
    by_name as by_name,
    by_suffix as by_suffix,
    by_word as by_word,
    plugins as plugins,
    suffixes as suffixes,
)
from ckptool.errors import CkptoolError, Malformed
from ckptool.files.fileio import MARK, Reader
from ckptool.state.checkpoint import Checkpoint

if TYPE_CHECKING:  # a file that is read as it is needs none of it
    from pathlib import Path

    from ckptool.files.archives import ArchiveMember
    from ckptool.pickles.tree import Global, Object


def read(path: str | Path, *, plugins: bool = True) -> Checkpoint:
    """Read a checkpoint as data: its tree, and where its bytes lie.

    What no container of ckptool recognises is read by `plugins`, the installed ones. Raises a
    `FormatError` that names what the file is, or what is wrong with it and where.

    >>> ckptool.read("model_best.pth.tar")
    <Checkpoint model_best.pth.tar: torch-zip, 6.6 KiB>
    """
    shown = str(path)
    if MARK in shown:
        from ckptool.files import archives

        if archives.split(shown)[1]:
            return _read_member(shown, plugins)
    found, notes = _file_of(shown) if os.path.isdir(shown) else (shown, ())
    with Reader(found) as reader:
        checkpoint = _reading.read(reader, use_plugins=plugins)
    return replace(checkpoint, path=shown, notes=(*checkpoint.notes, *notes, *_shard_notes(found)))


def _file_of(folder: str) -> tuple[str, tuple[str, ...]]:
    """Return the file that a folder is read from, and what there is to note."""
    from ckptool.containers import _folders, _stand_in

    found = _stand_in.file_of(folder, is_index)
    if found == folder:
        raise _folders.refuse(folder)
    name = os.path.basename(found)
    return found, () if is_index(name) else (f"{folder} is a folder; this is {name} in it",)


def _shard_notes(path: str) -> list[str]:
    if "-of-" not in path:
        return []
    from ckptool.containers import _stand_in

    return [note] if (note := _stand_in.shard_note(path)) else []


def _read_member(path: str, plugins: bool) -> Checkpoint:
    from ckptool.files import archives

    with archives.opened(path, suffixes) as (reader, archive):
        checkpoint = _reading.read(reader, shard=True, use_plugins=plugins)
    return replace(checkpoint, path=path, files=((archive.file, archive.stamp),), held=reader.held)


def members(path: str) -> list[ArchiveMember]:
    """List what is in an archive, what looks like a checkpoint first; nothing for other files."""
    from contextlib import ExitStack

    from ckptool.files import archives

    with ExitStack() as stack:
        inside = archives.enter(stack, stack.enter_context(Reader(path)))
        return inside.members(suffixes) if inside else []


def member_of(path: str) -> str:
    """Return the archive that a path names a member of; an empty text for any other path."""
    if MARK not in path:
        return ""
    from ckptool.files import archives

    file, names = archives.split(path)
    return file if names and os.path.isfile(file) else ""


def pickled(path: str) -> tuple[dict[Global, int], list[Object]]:
    """Give what the pickle names and calls that a file is, or starts as, which is no checkpoint."""
    from ckptool.containers import _pickles

    with Reader(path) as reader:
        return _pickles.pickled(reader, reader.read(0, min(HEAD, reader.nbytes)))


def is_index(name: str) -> bool:
    """Tell whether a file of that name stands for the folder that it is in."""
    from fnmatch import fnmatchcase

    return any(fnmatchcase(name, pattern) for each in built_in() for pattern in each.index_patterns)


def lacks_index(folder: str) -> bool:
    """Tell whether a folder holds shards of a checkpoint, and nothing that joins them."""
    from ckptool.containers import _stand_in

    try:
        _stand_in.file_of(folder, is_index)
    except Malformed:
        return True
    except CkptoolError:
        return False
    return False
