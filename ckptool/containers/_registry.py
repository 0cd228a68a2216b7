"""The containers in the order in which a file is tried; the first that recognises it reads it.

A module is imported at its turn. torch tries its tar before the legacy container, and so does
ckptool.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cache
from importlib import import_module
from itertools import chain
from types import ModuleType

from ckptool.containers._container import Container
from ckptool.errors import EditError, FormatError, NotACheckpoint
from ckptool.files.fileio import Reader
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Object
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.walk import refuse_deep

MODULES = (
    "torch_zip safetensors torch_tar torch_legacy torchscript torch_export dcp sharded "
    "torch_folder plain_pickle rank_files zero dcp_safetensors "
    "megatron"
).split()
HEAD = 4096
# Of formats that ckptool does not write, in names of outputs.
OTHER_FORMATS = frozenset(
    ".gguf .onnx .npz .npy .h5 .hdf5 .keras .tflite .mnn .pb .msgpack .mlmodel .pdparams "
    ".caffemodel .pte .ort".split()
)


def module(name: str) -> ModuleType:
    """Import the module of a container."""
    return import_module(f"ckptool.containers.{name}")


def built_in() -> Iterator[Container]:
    """Iterate over the containers of ckptool, those that are most common first."""
    for name in MODULES:
        yield from module(name).CONTAINERS


def plugins() -> tuple[Container, ...]:
    """Return the containers of installed plugins."""
    from ckptool.containers import _plugins

    return _plugins.load()


def _every(*, use_plugins: bool = True) -> Iterator[Container]:
    """Iterate over the containers of ckptool, then over those of plugins, loaded only then."""
    yield from built_in()
    if use_plugins:
        yield from plugins()


def by_name(name: str) -> Container:
    """Return the container that a `Checkpoint` names."""
    return next(container for container in _every() if container.name == name)


def by_word(word: str) -> Container:
    """Return the container that `--to` names; raises `EditError`."""
    for container in _every():
        if container.writer and container.word == word:
            return container
    raise EditError(f"there is no container `{word}` to write")


def by_suffix(suffix: str) -> Container | None:
    """Return the container that is written under names with this suffix."""
    return next((each for each in built_in() if each.writer and suffix in each.suffixes), None)


@cache
def suffixes(*, written: bool = False) -> tuple[str, ...]:
    """Return what names of checkpoints end in, or those of the containers that are `written`."""
    chosen = (each for each in built_in() if each.writer or not written)
    return tuple(suffix for each in chosen for suffix in each.suffixes)


def is_index(name: str) -> bool:
    """Check for the name of a file that lists the other files of a checkpoint."""
    return any(fnmatchcase(name, pattern) for each in built_in() for pattern in each.index_patterns)


def head_of(reader: Reader) -> bytes:
    """Return the bytes that `sniff` of a container sees."""
    return reader.read(0, min(HEAD, reader.nbytes))


def read(
    reader: Reader,
    *,
    shard: bool = False,
    use_plugins: bool = False,
    first: Container | None = None,
) -> Checkpoint:
    """Read a file by the first container that recognises it; a `shard` is no set itself.

    One that is `first` is tried before all others.
    """
    head = head_of(reader)
    for container in chain(filter(None, [first]), _every(use_plugins=use_plugins)):
        if (shard and container.traits.beside_files) or not container.sniff(head):
            continue
        checkpoint = read_by(container, container.read, reader)
        if checkpoint is not None:
            checkpoint = _as_others_read(checkpoint, reader, head, container)
            reader.refuse_change()
            return checkpoint
    reader.refuse_change()
    raise _refusal(reader, head)


def _as_others_read(
    checkpoint: Checkpoint, reader: Reader, head: bytes, container: Container
) -> Checkpoint:
    """Add to a checkpoint what else its file is."""
    from ckptool.containers import _readings

    named, flaws = _readings.others(reader, head, container.traits.read_as)
    calls: list[Object] = []
    if head.startswith(b"PK\3\4"):
        try:
            more, calls = _readings.unread(reader, checkpoint)
            named |= more
        except FormatError as error:
            flaws.append(f"a record that nothing refers to: {error.message}")
    if not (named or flaws):
        return checkpoint
    return replace(
        checkpoint,
        globals={**named, **checkpoint.globals},
        calls=[*checkpoint.calls, *calls],
        pickle_name=checkpoint.pickle_name or "the file as a pickle",
        flaws=(*checkpoint.flaws, *flaws),
    )


def _refusal(reader: Reader, head: bytes) -> NotACheckpoint:
    from ckptool.containers import _others, _pickles
    from ckptool.files import archives

    what, hint = _others.describe(reader, head)
    members, command = archives.look(reader, suffixes)
    error = NotACheckpoint(
        f"{reader.path} is {what}", path=reader.path, evidence=members, hint=command or hint
    )
    error.named, error.calls = _pickles.pickled(reader, head)
    return error


def read_by(
    container: Container, read: Callable[[Reader], Checkpoint | None], reader: Reader
) -> Checkpoint | None:
    """Read a file by one container, and name both in the errors that it raises without."""
    checkpoint: Checkpoint | None = None
    try:
        with without_collection():
            checkpoint = read(reader)
            if checkpoint is None:
                return None
            with remembered([checkpoint]):
                refuse_deep(checkpoint.tree)
        return replace(checkpoint, files=checkpoint.files or ((reader.file, reader.stamp),))
    except FormatError as error:
        if checkpoint is not None:  # whatever loads the file elsewhere gets as far
            error.named, error.calls = checkpoint.globals, list(checkpoint.calls)
        error.path = error.path or reader.path
        if reader.file.changed():  # which is why it is invalid, then
            error.message, error.hint = f"{reader.path} was changed while it was read", ""
        if type(error) is not NotACheckpoint and str(error.path) not in error.message:
            place = f", byte {error.offset}" if error.offset is not None else ""
            error.message = f"{error.path} ({container.title}{place}): {error.message}"
        raise


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect no garbage while a tree grows: there is none in it, and the search takes long."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
