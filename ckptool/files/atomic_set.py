"""Files that belong together, published into one folder as a whole.

A new folder is written under a temporary name beside its place, and renamed: it is there with all
its files or not at all. A folder that exists keeps its other files, and no rename can exchange
several files at once. So the new ones are written into a temporary folder inside it; then what
they replace is moved aside, its index first, and the new files are moved in, their index last: at
no time does an index stand beside files of another set. What fails is undone; a run that is killed
in between leaves the old files in the temporary folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool.errors import OutputExists, SameFile, WriteError
from ckptool.files import atomic
from ckptool.files.atomic import Target
from ckptool.files.fileio import reason
from ckptool.text import counted

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

Owns = Callable[[str], bool]  # whether a file in the folder is of what was written before


def refuse_set(
    path: str | Path, sources: Iterable[str], owns: Owns, *, force: bool, sync: bool
) -> Target:
    """Say into which folder files go, beside what others keep there, or why they cannot.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if shown == "-":
        raise WriteError("output goes to files, not to stdout", hint="./- is a folder of that name")
    if os.path.exists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is no folder", hint="name a folder as the output")
    target = Target(real, force, sync, inside=os.path.isdir(real))
    if target.inside:
        _refuse_old(shown, target, sources, owns)
    atomic.refuse_unwritable(shown, target)
    return target


def _refuse_old(shown: str, target: Target, sources: Iterable[str], owns: Owns) -> None:
    old = [os.path.join(target.path, name) for name in _owned(target, owns)]
    used = [path for path in sources if os.path.exists(path)]
    for path in old:
        if any(os.path.exists(path) and os.path.samefile(path, source) for source in used):
            raise SameFile(
                f"{os.path.join(shown, os.path.basename(path))} is an input itself",
                hint="name another folder",
            )
    if old and not target.force:
        raise OutputExists(
            f"{shown} holds {os.path.basename(old[0])} already"
            + (f", and {counted(len(old) - 1, 'more file')}" if len(old) > 1 else ""),
            hint="name another folder, or use --force to replace them",
        )


def _owned(target: Target, owns: Owns) -> list[str]:
    """Name what is replaced, an index first."""
    try:
        found = [name for name in sorted(os.listdir(target.path)) if owns(name)]
    except OSError as error:
        raise WriteError(f"{target.path} cannot be opened: {reason(error)}") from None
    return sorted(found, key=lambda name: not name.endswith(".json"))


@contextmanager
def new_file(path: str, *, sync: bool) -> Iterator[int]:
    """Open a new file of a temporary folder; it is flushed when the block ends well."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
        if sync:
            os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def atomic_set(target: Target, owns: Owns, last: str) -> Iterator[str]:
    """Make a temporary folder; publish what is in it when the block ends well.

    Yields its path. `owns` says what it replaces in a folder that exists, `last` is the file that
    is published after all others. Whatever fails, the target stays as it was. Raises `NoSpace`,
    `OutputExists` or `WriteError`.
    """
    if not target.inside:  # a folder made by someone else meanwhile is not to be replaced
        with atomic.atomic_folder(replace(target, force=False)) as temporary:
            yield temporary
        return
    temporary = atomic.beside(target)
    published = False
    try:
        try:  # before the folder is made: a signal may come right after
            os.mkdir(temporary)
            yield temporary
            if target.sync:
                atomic.flush_folder(temporary)
            _move_in(temporary, target, owns, last)
            published = True
        finally:
            _remove(temporary, replaced=published)
        if target.sync:
            atomic.flush_published(target)
        if os.path.exists(temporary):
            raise WriteError(
                f"{target.path} was written, but what it replaced cannot be removed",
                evidence=[temporary],
            )
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target.path} was written" if published else "") from None
    except OSError as error:
        raise atomic.write_error(error, target) from error


def _move_in(temporary: str, target: Target, owns: Owns, last: str) -> None:
    """Move old files aside and new ones in; undo it all where a step fails."""
    new = sorted(os.listdir(temporary), key=lambda name: name == last)
    aside = os.path.join(temporary, "old")
    os.mkdir(aside)
    undo: list[Callable[[], None]] = []
    try:
        for name in _owned(target, owns):
            _rename(os.path.join(target.path, name), os.path.join(aside, name), undo)
        for name in new:
            if target.sync and name in (new[0], last):
                atomic.flush_folder(target.path)
            place = os.path.join(target.path, name)
            atomic.publish_new(os.path.join(temporary, name), place)
            undo.append(_unlinking(place))
    except BaseException:
        for step in reversed(undo):
            with suppress(OSError):
                step()
        raise


def _rename(old: str, new: str, undo: list[Callable[[], None]]) -> None:
    os.rename(old, new)
    undo.append(lambda: os.rename(new, old))


def _unlinking(path: str) -> Callable[[], None]:
    return lambda: os.unlink(path)


def _remove(temporary: str, *, replaced: bool) -> None:
    """Remove a temporary folder; old files that could not be moved back stay in it.

    With `replaced` they are what the new ones stand for, and go too.
    """
    aside = os.path.join(temporary, "old")
    for folder in (aside, temporary) if replaced else (temporary,):
        with suppress(OSError):
            for name in os.listdir(folder):
                path = os.path.join(folder, name)
                with suppress(OSError):
                    os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    with suppress(OSError):
        os.rmdir(temporary)
