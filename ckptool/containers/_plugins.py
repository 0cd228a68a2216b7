"""Containers that other distributions bring: entry points of the group `ckptool.containers`.

An entry point names a `Container`. It is imported for a file that no container of ckptool
recognises, and for a `--to` that names none of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from ckptool.containers._container import Container
from ckptool.errors import CkptoolError, PluginFailed

GROUP = "ckptool.containers"
OFF = "CKPTOOL_NO_PLUGINS"


def load() -> tuple[Container, ...]:
    """Return the containers of all plugins; raises `PluginFailed`, which names the plugin."""
    return () if os.environ.get(OFF) else _load()


@cache
def _load() -> tuple[Container, ...]:
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return tuple(_container(point) for point in points)


def _container(point: EntryPoint) -> Container:
    """Load the container of an entry point; what its functions raise names the plugin."""
    plugin = point.dist.name if point.dist else point.name
    with _blaming(plugin):
        container = point.load()
        if not isinstance(container, Container):
            raise TypeError(f"{point.value} is not a ckptool.containers.Container")
    blamed = _blaming(plugin)  # as a decorator it blames in every call
    writer = container.writer and container.writer._replace(
        lay_out=blamed(container.writer.lay_out),
        unfit=container.writer.unfit and blamed(container.writer.unfit),
    )
    return container._replace(
        title=f"{container.title}, plugin {plugin}",
        sniff=blamed(container.sniff),
        read=blamed(container.read),
        writer=writer,
        plugin=plugin,
    )


@contextmanager
def _blaming(plugin: str) -> Iterator[None]:
    """Raise `PluginFailed` for what the code of a plugin raises, but for the errors of ckptool."""
    try:
        yield
    except (CkptoolError, MemoryError):
        raise
    except Exception as error:
        raise PluginFailed(
            f"the plugin {plugin} failed: {type(error).__name__}: {error}",
            hint=f"{OFF}=1 turns plugins off",
        ) from error
