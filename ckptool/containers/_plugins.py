"""Containers that other distributions bring: entry points of the group `ckptool.containers`.

An entry point names a `Container`. Its module is imported when this one is asked, which happens
for files that no container of ckptool recognises, and for a `--to` that names none of them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, wraps
from importlib.metadata import EntryPoint, entry_points
from typing import ParamSpec, TypeVar

from ckptool.containers._container import Container
from ckptool.errors import CkptoolError, PluginFailed

GROUP = "ckptool.containers"
OFF = "CKPTOOL_NO_PLUGINS"

P = ParamSpec("P")
R = TypeVar("R")


def load() -> tuple[Container, ...]:
    """Return the containers of all plugins; raises `PluginFailed`, which names the plugin."""
    return () if os.environ.get(OFF) else _load()


@cache
def _load() -> tuple[Container, ...]:
    points = sorted(entry_points(group=GROUP), key=lambda point: point.name)
    return tuple(_container(point) for point in points)


def _container(point: EntryPoint) -> Container:
    plugin = point.dist.name if point.dist else point.name
    with _blaming(plugin):
        container = point.load()
        if not isinstance(container, Container):
            raise TypeError(f"{point.value} is not a ckptool.containers.Container")
    writer = container.writer and container.writer._replace(
        lay_out=_blamed(plugin, container.writer.lay_out),
        unfit=container.writer.unfit and _blamed(plugin, container.writer.unfit),
    )
    return container._replace(
        title=f"{container.title}, plugin {plugin}",
        sniff=_blamed(plugin, container.sniff),
        read=_blamed(plugin, container.read),
        writer=writer,
        plugin=plugin,
    )


def _blamed(plugin: str, function: Callable[P, R]) -> Callable[P, R]:
    @wraps(function)
    def call(*args: P.args, **options: P.kwargs) -> R:
        with _blaming(plugin):
            return function(*args, **options)

    return call


@contextmanager
def _blaming(plugin: str) -> Iterator[None]:
    """Name the plugin in whatever its code raises, save for the errors of ckptool."""
    try:
        yield
    except (CkptoolError, MemoryError):
        raise
    except Exception as error:
        raise PluginFailed(
            f"the plugin {plugin} failed: {type(error).__name__}: {error}",
            hint=f"{OFF}=1 turns plugins off",
        ) from error
