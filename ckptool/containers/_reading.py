"""A file read by the first container that recognises it, or named for what it is."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ckptool.containers._container import Container
from ckptool.containers._registry import built_in, plugins, suffixes
from ckptool.errors import FormatError, NotACheckpoint
from ckptool.files.fileio import Reader
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.walk import refuse_deep

HEAD = 4096


def read(reader: Reader, *, shard: bool = False, use_plugins: bool = False) -> Checkpoint:
    """Read a file by the first container that recognises it; a `shard` is no set itself."""
    head = reader.read(0, min(HEAD, reader.nbytes))
    for containers in (built_in, plugins) if use_plugins else (built_in,):
        for container in containers():
            if (shard and container.traits.beside_files) or not container.sniff(head):
                continue
            checkpoint = _read(container, reader)
            if checkpoint is not None:
                return checkpoint
    from ckptool.containers import _others
    from ckptool.files import archives

    what, hint = _others.describe(reader, head)
    inside, command = archives.look(reader, suffixes)
    raise NotACheckpoint(
        f"{reader.path} is {what}", path=reader.path, evidence=inside, hint=command or hint
    )


def read_shard(path: str) -> Checkpoint:
    """Read a file of a set."""
    with Reader(path) as reader:
        return read(reader, shard=True)


def _read(container: Container, reader: Reader) -> Checkpoint | None:
    try:
        with _growing():
            checkpoint = container.read(reader)
            if checkpoint is None:
                return None
            refuse_deep(checkpoint.tree)
        return replace(checkpoint, files=checkpoint.files or ((reader.file, reader.stamp),))
    except FormatError as error:
        error.path = error.path or reader.path
        if type(error) is not NotACheckpoint and str(error.path) not in error.message:
            place = f", byte {error.offset}" if error.offset is not None else ""
            error.message = f"{error.path} ({container.title}{place}): {error.message}"
        raise


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
