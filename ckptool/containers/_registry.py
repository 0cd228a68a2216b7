"""The containers, in the order in which a file is tried: a module is imported at its turn.

torch tries its tar before the legacy container, and so does ckptool.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib import import_module

from ckptool.containers._container import Container
from ckptool.errors import EditError

MODULES = "torch_zip safetensors torch_tar torch_legacy torchscript dcp sharded".split()


def built_in() -> Iterator[Container]:
    """Iterate over the containers of ckptool, those that are most common first."""
    for module in MODULES:
        yield from import_module(f"ckptool.containers.{module}").CONTAINERS


def plugins() -> tuple[Container, ...]:
    """Return the containers of installed plugins."""
    from ckptool.containers import _plugins

    return _plugins.load()


def by_name(name: str) -> Container:
    """Return the container that a `Checkpoint` names."""
    for containers in (built_in, plugins):
        for container in containers():
            if container.name == name:
                return container
    raise LookupError(f"there is no container {name}")


def by_word(word: str) -> Container:
    """Return the container that `--to` names; raises `EditError`."""
    for containers in (built_in, plugins):
        for container in containers():
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
