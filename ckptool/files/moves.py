"""Move what was written to its place, and remove what is temporary; see `publish`."""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Self

from ckptool.errors import OutputExists, of_system, reason
from ckptool.files.target import Output, Target

ASIDE = "old"  # the folder for what is replaced, in the temporary one
TEMPORARY = re.compile(r"\..{1,40}\.[0-9a-f]{12}\.tmp", re.DOTALL)  # as `beside` names it


def names(target: Target) -> list[str]:
    """List what a target holds that is a folder already."""
    if not target.inside:
        return []
    try:
        return sorted(os.listdir(target.path))
    except OSError as error:
        raise of_system(error, target.path, "written") from None


def index_first(names: Iterable[str]) -> list[str]:
    """Sort names, those of an index before all others."""
    return sorted(names, key=lambda name: not name.endswith((".json", ".metadata")))


def be_as(made: int | str, old: os.stat_result) -> None:
    """Set owner and group as far as this user may (root both, others a group of theirs), and mode.

    Of a file by its descriptor, of a folder by its path.
    """
    found = os.stat(made)
    for owner in (old.st_uid, -1):
        if (found.st_uid, found.st_gid) == (old.st_uid, old.st_gid):
            break
        with suppress(OSError):  # and not every file system has owners
            os.chown(made, owner, old.st_gid)
            break
    os.chmod(made, stat.S_IMODE(old.st_mode))  # which a change of the owner takes bits from


class Folder:
    """The folder that an output goes into, as it is when writing begins; nothing for others.

    Of two writers one waits while the other moves files and tidies up, where system and file system
    have locks.
    """

    def __init__(self, place: Target) -> None:
        self._path, self._fd = place.path, -1
        self._stat: os.stat_result | None = None
        if place.inside:
            with suppress(OSError):  # what is written says so
                self._stat = os.stat(place.path)

    def lock(self) -> None:
        """Wait for other writers, until the folder is closed."""
        if self._fd < 0:
            return
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def replaced(self) -> OutputExists | None:
        """Return the error if someone else has put another folder in its place."""
        if self._stat is None or is_file(self._path, self._stat):
            return None
        return OutputExists(
            f"{self._path} was replaced by another process meanwhile; it was not changed",
            hint="run it again",
        )

    def __enter__(self) -> Self:
        if self._stat is not None:
            with suppress(OSError):  # Windows opens no folders
                self._fd = os.open(self._path, os.O_RDONLY)
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            with suppress(OSError):
                os.close(self._fd)


def move_file(temporary: str, place: Target) -> None:
    """Move a file to its place, over another only by force."""
    if place.force:
        os.replace(temporary, place.path)
    else:
        _link(temporary, place.path)


def _link(temporary: str, path: str) -> None:
    """Publish without replacing: a link fails where a file has appeared meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise OutputExists(
            f"{path} was made by another process meanwhile; it was not changed",
            hint="name another output, or use --force",
        ) from None
    except OSError:  # a file system without hard links
        if os.path.exists(path):
            raise OutputExists(f"{path} exists", hint="use --force") from None
        os.rename(temporary, path)


def old_files(place: Target, output: Output) -> list[str]:
    """List the files of a folder that an output replaces, their index first."""
    return index_first(filter(output.owns, names(place)))


def swapped(temporary: str, place: Target, output: Output) -> bool:
    """Exchange a folder for the new one at once; return whether the system can, and did.

    Files in it that are others' go with it, under a second name until the old folder is removed.
    """
    outside, here = _outside(temporary, place), os.path.basename(temporary)
    others = [name for name in names(place) if name != here and not output.owns(name)]
    try:
        if os.path.samefile(os.getcwd(), place.path):  # which a shell would stay in
            return False
        for name in others:  # not for a folder
            source, path = os.path.join(place.path, name), os.path.join(temporary, name)
            os.link(source, path, follow_symlinks=False)
        be_as(temporary, os.stat(place.path))
        os.rename(temporary, outside)
        if others and place.sync:
            flush_folder(outside)
        swap(outside, place.path)
    except (OSError, NotImplementedError):  # the latter of `os.link` where it follows links
        if os.path.lexists(outside):
            os.rename(outside, temporary)
        for name in others:
            with suppress(FileNotFoundError):
                os.unlink(os.path.join(temporary, name))
        return False
    return True


def _outside(temporary: str, place: Target) -> str:
    """Return the path of what is temporary, beside the folder instead of in it."""
    return os.path.join(os.path.dirname(place.path), os.path.basename(temporary))


def swap(one: str, other: str) -> None:
    """Exchange two paths at once, on Linux (renameat2(2), 3.15); raises `OSError` elsewhere."""
    import ctypes
    import sys

    libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
    rename = getattr(libc, "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    if rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), one, None, other)


_HERE, _EXCHANGE = -100, 2  # AT_FDCWD (fcntl.h), RENAME_EXCHANGE (linux/fs.h)


def exchange(temporary: str, place: Target, output: Output) -> None:
    """Move old files aside and new ones in, one by one; undo it all where a step fails.

    The old ones are all aside before the first is gone from its place, if there are hard links.
    """
    new = sorted((file.name for file in output.files), key=lambda name: name == output.last)
    aside = os.path.join(temporary, ASIDE)
    os.mkdir(aside)
    undo: list[Callable[[], None]] = []
    try:
        old = [
            (os.path.join(place.path, name), os.path.join(aside, name))
            for name in old_files(place, output)
        ]
        for path, away in old:
            undo.append(lambda path=path, away=away: _back(away, path))  # type: ignore[misc]
            with suppress(OSError):
                os.link(path, away, follow_symlinks=False)
        for path, away in old:
            os.rename(path, away) if not os.path.lexists(away) else os.unlink(path)
        for name in new:
            if place.sync and name in (new[0], output.last):
                flush_folder(place.path)
            source, path = os.path.join(temporary, name), os.path.join(place.path, name)
            made = os.stat(source)
            undo.append(lambda path=path, made=made: _unlink(path, made))  # type: ignore[misc]
            _link(source, path)
    except BaseException:
        for step in reversed(undo):
            with suppress(OSError):
                step()
        raise


def _back(away: str, path: str) -> None:
    """Move a file back, over nothing that someone else has put there meanwhile."""
    if not os.path.lexists(path):
        os.rename(away, path)
    elif is_file(path, os.lstat(away)):  # a second name of what never left
        os.unlink(away)


def _unlink(path: str, made: os.stat_result) -> None:
    """Remove a file that was moved in, not one that someone else has made there."""
    if is_file(path, made):
        os.unlink(path)


def is_file(path: str, made: os.stat_result) -> bool:
    """Return whether a path names the file, or folder, that was made."""
    try:
        return os.path.samestat(os.stat(path), made)
    except OSError:
        return False


# Tidying up.


def remove(temporary: str, place: Target, output: Output, *, replaced: bool) -> None:
    """Remove what is temporary; an interruption comes after that, not instead of it."""
    try:
        _clear(temporary, place, output, replaced=replaced)
    except (KeyboardInterrupt, SystemExit):
        _clear(temporary, place, output, replaced=replaced)
        raise


def _clear(temporary: str, place: Target, output: Output, *, replaced: bool) -> None:
    """Remove a temporary file or folder, and with `replaced` the old files in it.

    Those that could not be moved back stay, and others' files go back. Raises the first error when
    all was tried.
    """
    outside = _outside(temporary, place) if place.inside else temporary
    errors = []
    for folder in (*([os.path.join(temporary, ASIDE)] if replaced else []), temporary, outside):
        for name in _inside(folder):
            try:
                path, there = os.path.join(folder, name), os.path.join(place.path, name)
                if folder != outside or outside == temporary or _is_old(output, path, there):
                    _removed_one(path)
                elif os.path.lexists(there):
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                else:  # made by someone else meanwhile
                    os.rename(path, there)
            except OSError as error:
                errors.append(error)
        try:
            _removed_one(folder)
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _removed_one(path: str) -> None:
    with suppress(FileNotFoundError, NotADirectoryError):
        try:
            os.unlink(path)
        except (IsADirectoryError, PermissionError):  # the latter on macOS and Windows
            os.rmdir(path)


def _inside(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:  # a file, for one; what cannot be listed cannot be removed either
        return []


def _is_old(output: Output, path: str, there: str) -> bool:
    """Return whether a file of the old folder is replaced, or has its name in the new one."""
    same = os.path.lexists(there) and os.path.samestat(os.lstat(path), os.lstat(there))
    return same or output.owns(os.path.basename(path))


def removed(temporary: str, place: Target, output: Output) -> Iterator[str]:
    """Remove what is temporary after publishing; yield a warning where that fails."""
    folder = bool(output.head)
    try:
        remove(temporary, place, output, replaced=True)
    except OSError as error:
        left = error.filename or temporary
        what = "what it replaced" if folder else f"its temporary name {temporary}"
        where = f" ({left})" if folder else "; remove that name: the file stays"
        yield f"{place.path} was written, but {what} cannot be removed: {reason(error)}{where}"


def flushed(place: Target, made: Iterable[str] = ()) -> Iterator[str]:
    """Flush the folder of what has been published, and those in which folders were `made`.

    Yields a warning where that fails.
    """
    try:
        around = map(os.path.dirname, [place.path, *made])
        for folder in dict.fromkeys([place.folder, *around]):
            if place.sync:
                flush_folder(folder)
    except OSError as error:
        yield (
            f"{place.path} was written, but its folder could not be flushed: {reason(error)}; "
            "check the disk before you rely on the file"
        )


def flush_folder(path: str) -> None:
    """Flush a folder, where its file system knows how to and it may be opened."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT):
            raise
    finally:
        with suppress(OSError):  # it was only looked at
            os.close(folder)
