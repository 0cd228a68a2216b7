"""The containers ckptool knows, chosen by the bytes of a file, never by its name."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ckptool.checkpoint import Checkpoint, refuse_deep
from ckptool.errors import AmbiguousStateDict, FormatError, NoSuchFile, NotACheckpoint
from ckptool.fileio import Reader, reason
from ckptool.formats import (
    _folders,
    _others,
    _pickles,
    dcp,
    safetensors,
    torch_legacy,
    torch_zip,
    torchscript,
)
from ckptool.tree import Global, Object

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

HEAD = 4096


@dataclass(frozen=True, slots=True)
class Format:
    """One container: how to tell it from its first bytes, and how to read it.

    `read` gives None for a file of another container that starts with the same bytes.
    A container of many files is read from one of them, its index: a folder that holds a file
    which one of `folder_patterns` matches is that container.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    sniff: Callable[[bytes], bool]
    read: Callable[[Reader], Checkpoint | None]
    writable: bool
    folder_patterns: tuple[str, ...] = ()


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
)
BY_NAME = {each.name: each for each in FORMATS}


def read(path: str | Path) -> Checkpoint:
    """Read a checkpoint as data: its tree, and where its bytes lie.

    Raises a `FormatError` that names what the file is, or what is wrong with it and where.
    """
    index = index_of(str(path))
    if os.path.isdir(index):
        raise _folders.refuse(str(path))
    with Reader(index) as reader:
        head = reader.read(0, min(HEAD, reader.nbytes))
        for each in FORMATS:
            found = _read(each, reader) if each.sniff(head) else None
            if found is not None:
                return replace(found, path=str(path))
        what, hint = _others.describe(reader, head)
        raise NotACheckpoint(f"{path} is {what}", path=str(path), hint=hint)


def index_of(path: str) -> str:
    """Give the file that stands for a folder which is a checkpoint; any other path as it is.

    Raises `AmbiguousStateDict` for a folder with several.
    """
    if not os.path.isdir(path):
        return path
    try:
        found = sorted(filter(is_index, os.listdir(path)))
    except OSError as error:
        raise NoSuchFile(f"{path} cannot be opened: {reason(error)}", path=path) from None
    if len(found) > 1:
        raise AmbiguousStateDict(
            f"{path} holds {len(found)} checkpoints: {', '.join(found)}", hint="name one of them"
        )
    return os.path.join(path, found[0]) if found else path


def pickled(path: str) -> tuple[dict[Global, int], list[Object]]:
    """Give what the pickle names and calls that a file is, or starts as, which is no checkpoint."""
    with Reader(path) as reader:
        return _pickles.pickled(reader, reader.read(0, min(HEAD, reader.nbytes)))


def is_index(name: str) -> bool:
    """Tell whether a file of that name stands for the folder that it is in."""
    return any(fnmatchcase(name, pattern) for each in FORMATS for pattern in each.folder_patterns)


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
