"""The containers ckptool knows, chosen by the bytes of a file, never by its name."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool.containers import _registry
from ckptool.containers._container import (
    Container as Container,
    Left as Left,
    Traits as Traits,
    Writer as Writer,
)
from ckptool.containers._registry import (
    HEAD as HEAD,
    OTHER_FORMATS as OTHER_FORMATS,
    built_in as built_in,
    by_name as by_name,
    by_suffix as by_suffix,
    by_word as by_word,
    is_index as is_index,
    plugins as plugins,
    suffixes as suffixes,
    without_collection as without_collection,
)
from ckptool.errors import CkptoolError, EditError, FormatError, Malformed
from ckptool.files import budget, paths, sites
from ckptool.files.fileio import MARK, OpenFile, Reader, refuse_changed
from ckptool.state.checkpoint import Checkpoint

if TYPE_CHECKING:  # a file that is read as it is needs none of it
    from pathlib import Path

    from ckptool.files.archives import ArchiveMember


@budget.run()
def read(
    path: str | Path, *, plugins: bool = True, alone: bool = False, values: str = ""
) -> Checkpoint:
    """Read a checkpoint as data: its tree, and where its bytes lie.

    Any file of a set that ranks wrote, or their folder, is the checkpoint that they make, with its
    `values` where there are several; `alone` reads a file as it is. What no container of ckptool
    recognises is read by `plugins`, the installed ones. Raises a `FormatError` that names what the
    file is, or what is wrong with it and where.

    >>> ckptool.read("model_best.pth.tar")
    <Checkpoint model_best.pth.tar: torch-zip, 6.6 KiB>
    """
    place = sites.of(path)
    shown = place if paths.is_url(place) else str(place)
    if not isinstance(path, OpenFile) and _split(shown)[1]:
        return _read_member(shown, plugins)
    checkpoint, file = _read_whole(place, plugins, alone, values)
    far = dict.fromkeys(getattr(each, "note", "") for each, _ in checkpoint.files)
    notes = (*checkpoint.notes, *_notes(shown, file), *filter(None, far))
    return replace(checkpoint, path=shown, notes=notes)


def _read_whole(path: str, plugins: bool, alone: bool, values: str) -> tuple[Checkpoint, str]:
    """Read a file, or the files of a set, which are opened one after the other: all of one time.

    Where its names are those of other files by then, the set was replaced, and is read anew.
    Returns the file that was read first, too.
    """
    shown, reader = path if paths.is_url(path) else str(path), None
    for _ in paths.tries():
        before = paths.inode(shown)
        try:
            is_folder = paths.is_folder(shown)
            reader = Reader(_file_in(shown) if is_folder else path)
            joined = None if alone and not is_folder else _joined(reader, values)
            if values and joined is None:
                raise EditError(f"{shown} holds one value of each tensor: leave out --values")
            checkpoint = joined or _registry.read(reader, use_plugins=plugins)
            files = [file for file, _ in checkpoint.files if isinstance(file, OpenFile)]
            if len(files) < 2 or not any(file.replaced() for file in files):
                for file in files:
                    refuse_changed(file)
                return checkpoint, shown if joined else reader.path
        except FormatError:
            if paths.inode(shown) == before and not (reader and reader.file.replaced()):
                raise
        path = shown
    raise Malformed(f"{shown} was replaced each time while its files were read", path=shown)


def _joined(reader: Reader, values: str) -> Checkpoint | None:
    """Read the set of files that a file is one of; None for a file that is none of a set."""
    from ckptool.containers import _sets

    files = _sets.of_file(reader.file)
    return files.join(reader, values) if files else None


def _split(path: str) -> tuple[str, list[str]]:
    """Split a path into a file and the names of a member in it; none for a plain file."""
    if MARK not in path:
        return path, []
    from ckptool.files import archives

    return archives.split(path)


def _read_member(path: str, plugins: bool) -> Checkpoint:
    from ckptool.files import archives

    with archives.opened(path, suffixes) as (reader, archive):
        checkpoint = _registry.read(reader, shard=True, use_plugins=plugins)
    held = (*reader.held, *checkpoint.held)
    return replace(checkpoint, path=path, files=((archive.file, archive.stamp),), held=held)


def _file_in(folder: str) -> str:
    from ckptool.containers import _folder

    return _folder.checkpoint_in(folder)


def _notes(path: str, file: str) -> list[str]:
    """Note which file was read for a folder, and a file that is one shard of a set."""
    name = paths.name_of(file)
    notes = []
    if file != path and not is_index(name):
        notes.append(f"{path} is a folder; this is {name} in it")
    if "-of-" in file:
        from ckptool.containers import _folder

        notes += _folder.shard_notes(file)
    return notes


def members(path: str) -> list[ArchiveMember]:
    """List what is in an archive, what looks like a checkpoint first; nothing for other files."""
    from contextlib import ExitStack

    from ckptool.files import archives

    with ExitStack() as stack:
        archive = archives.enter(stack, stack.enter_context(Reader(sites.of(path))))
        return archive.members(suffixes) if archive else []


def member_of(path: str) -> str:
    """Return the archive that a path names a member of; an empty text for any other path."""
    file, names = _split(path)
    return file if names and paths.is_file(file) else ""


def sets_of_ranks(folder: str) -> list[tuple[str, ...]]:
    """List the files of each set that ranks wrote into a folder, by their names alone."""
    from ckptool.containers import _sets

    return [each.files for each in _sets.in_folder(folder)]


def is_read_from(folder: str, file: str) -> bool:
    """Check by their names alone whether a file is the one that a folder is read from."""
    try:
        return _file_in(folder) == file
    except CkptoolError:
        return False


def is_joined(path: str) -> bool:
    """Check for a file that makes one checkpoint with others that ranks wrote, which are there."""
    from ckptool.containers import _sets

    try:
        return not _split(path)[1] and bool(_sets.of_file(path) and read(path).shards)
    except CkptoolError:
        return False


def lacks_index(folder: str) -> bool:
    """Check for shards of a checkpoint in a folder without the index that joins them."""
    from ckptool.containers import _folder

    return _folder.lacks_index(folder)
