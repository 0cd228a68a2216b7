"""Publish output as a whole: a file, a new folder, or a set of files in a folder that exists.

Output is written beside its place under a temporary name, checked, flushed, and then moved in by
one link or rename: the target is old or new, never partial. A folder that exists keeps its other
files, and no rename can exchange several files at once. So what the new files replace is moved
aside into the temporary folder, its index first, and the new files are moved in, their index last:
no index is ever beside files of another set. What fails is undone; a run that is killed in between
leaves the old files in the temporary folder. Nothing that fails after the move fails the run.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptool.errors import (
    CkptoolError,
    NoSpace,
    OutputExists,
    SameFile,
    WriteError,
    is_out_of_memory,
    of_system,
    out_of_memory,
    reason,
)
from ckptool.files.copying import Job, Moved, PlannedFile, Progress, write_file
from ckptool.text import counted, listed, quoted, readable

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

Owns = Callable[[str], bool]  # whether a file of a folder is of a set that was written before

ASIDE = "old"  # the folder for what is replaced, in the temporary one
TEMPORARY = re.compile(r"\..{1,40}\.[0-9a-f]{12}\.tmp", re.DOTALL)  # as `beside` names it


@dataclass(frozen=True, slots=True)
class Target:
    """A place for output: the file behind any symlink, and whether it may be replaced.

    With `inside` it is a folder that exists, and output goes into it.
    """

    path: str
    force: bool = False
    sync: bool = True
    inside: bool = False

    @property
    def folder(self) -> str:
        """Return the folder of the output and of what is temporary."""
        return self.path if self.inside else os.path.dirname(self.path) or "."


@dataclass(frozen=True, slots=True)
class Output:
    """Planned files: one without a name, which is the target, or those of a folder.

    `last` names the index, which is published after all others; `owns` says what they replace in a
    folder that exists.
    """

    files: tuple[PlannedFile, ...]
    last: str = ""
    owns: Owns = lambda name: False

    @property
    def jobs(self) -> list[Job]:
        """List the jobs of all files."""
        return [job for file in self.files for job in file.jobs]

    @property
    def nbytes(self) -> int:
        """Count the bytes of all files."""
        return sum(file.nbytes for file in self.files)

    @property
    def job_nbytes(self) -> int:
        """Count the bytes that the jobs move, for a progress bar."""
        return sum(job.nbytes for job in self.jobs)

    @property
    def head(self) -> str:
        """Name the file to read the output by: its index, or its only file."""
        names = [file.name for file in self.files]
        return self.last if self.last in names else names[0]


# What can be refused before a byte is written.

_FOLDERS = (
    "name a file as the output; ckptool convert writes folders with --max-shard-size SIZE (shards) "
    "or --to dcp (distributed)"
)


def refuse_target(path: str | Path, sources: Iterable[str], *, force: bool, sync: bool) -> Target:
    """Return where a file goes.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if shown.endswith(("/", os.sep)):
        raise WriteError(f"{shown} names a folder", hint=_FOLDERS)
    if shown == "-":
        raise WriteError("output goes to files, not to stdout", hint="./- is a file of that name")
    if os.path.exists(real):
        if any(os.path.exists(source) and os.path.samefile(source, real) for source in sources):
            raise SameFile(
                f"{shown} is the input itself", hint="name another output, or use --in-place"
            )
        if os.path.isdir(real):
            raise WriteError(f"{shown} is a folder", hint=_FOLDERS)
        if not os.path.isfile(real):
            raise WriteError(f"{shown} is not a regular file", hint="name a file as the output")
        if not force:
            raise OutputExists(f"{shown} exists", hint="name another output, or use --force")
    target = Target(real, force, sync)
    _refuse_unwritable(shown, target)
    return target


def refuse_set(
    path: str | Path, sources: Iterable[str], owns: Owns, *, force: bool, sync: bool
) -> Target:
    """Return the folder for files that may be beside those of others.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if shown == "-":
        raise WriteError("output goes to files, not to stdout", hint="./- is a folder of that name")
    if os.path.exists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is no folder", hint="name a folder as the output")
    target = Target(real, force, sync, inside=os.path.isdir(real))
    old = [name for name in _names(target) if owns(name)]
    used = [source for source in sources if os.path.exists(source)]
    for name in old:
        place = os.path.join(real, name)
        if os.path.exists(place) and any(os.path.samefile(place, source) for source in used):
            raise SameFile(
                f"{os.path.join(shown, name)} is an input itself", hint="name another folder"
            )
    if old and not force:
        raise OutputExists(
            f"{shown} holds {_index_first(old)[0]} already"
            + (f", and {counted(len(old) - 1, 'more file')}" if len(old) > 1 else ""),
            hint="name another folder, or use --force to replace them",
        )
    _refuse_unwritable(shown, target)
    return target


def refuse_folder(
    path: str | Path, sources: Iterable[str], owns: Owns, *, force: bool, sync: bool
) -> Target:
    """Return the folder for files that are alone in it: one that is absent, empty, or all ours.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is not a folder", hint="name a folder as the output")
    target = Target(real, force, sync, inside=os.path.isdir(real))
    inside = _names(target)
    if inside and any(os.path.realpath(os.path.dirname(source)) == real for source in sources):
        raise SameFile(f"the input lies in {shown}", hint="name another folder as the output")
    others = [name for name in inside if not owns(name) and not TEMPORARY.fullmatch(name)]
    if others:
        raise OutputExists(
            f"{shown} holds other files: {listed(others, 4)}",
            hint="name a folder that is not there yet",
        )
    if inside and not force:
        raise OutputExists(f"{shown} is not empty", hint="name another output, or use --force")
    _refuse_unwritable(shown, target)
    return target


def _names(target: Target) -> list[str]:
    """List what a target holds that is a folder already."""
    if not target.inside:
        return []
    try:
        return sorted(os.listdir(target.path))
    except OSError as error:
        raise of_system(error, target.path, "written") from None


def _index_first(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: not name.endswith((".json", ".metadata")))


def _refuse_unwritable(shown: str, target: Target) -> None:
    """Raise `WriteError` for a place where nothing can be made, before anything is."""
    try:
        if not stat.S_ISDIR(os.stat(target.folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(target.folder, os.W_OK):
            code = errno.EROFS if _is_read_only(target.folder) else errno.EACCES
            raise OSError(code, os.strerror(code))
    except FileNotFoundError:
        raise WriteError(
            f"the folder of {shown} does not exist", hint=f"mkdir -p {quoted(target.folder)}"
        ) from None
    except OSError as error:
        raise of_system(error, shown, "written") from None
    try:
        os.stat(target.path)
    except FileNotFoundError:
        pass
    except OSError as error:  # a link to itself, a name too long
        raise of_system(error, shown, "written") from None


def _is_read_only(folder: str) -> bool:
    return hasattr(os, "statvfs") and bool(os.statvfs(folder).f_flag & os.ST_RDONLY)


def free_space(target: Target) -> int | None:
    """Count the bytes free for output, None where the system does not tell."""
    if not hasattr(os, "statvfs"):
        return None
    try:
        system = os.statvfs(target.folder)
    except OSError:
        return None
    return system.f_bavail * system.f_frsize


def refuse_full(target: Target, nbytes: int) -> None:
    """Raise `NoSpace` where the output cannot fit."""
    free = free_space(target)
    if free is not None and nbytes > free:
        raise NoSpace(
            f"{target.path} needs {readable(nbytes)}; {readable(free)} are free",
            hint="make room, or name an output on another file system",
        )


# Writing and publishing.


def publish(
    place: Target, output: Output, progress: Progress, check: Callable[[str, Moved], None]
) -> list[str]:
    """Write, check and publish an output; return warnings about what failed after that.

    `check` reads what was written by its `head`, and raises where it is not what was meant or not
    what the jobs have moved. Whatever fails, the target stays as it was and what is temporary is
    removed. Raises `NoSpace`, `OutputExists` or `WriteError`; an interruption says where all was
    done already.
    """
    temporary = beside(place)
    written = None
    try:  # before anything is made: a signal may come right after
        moved, output = _write(temporary, place, output, progress)
        check(os.path.join(temporary, output.head) if output.head else temporary, moved)
        written = os.stat(temporary)
        _move(temporary, place, output)
    except BaseException as error:
        done = written is not None and _is(place.path, written)
        with suppress(OSError):  # the first error is the one to report
            _remove(temporary, place, output, replaced=done)
        if done and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{place.path} was written") from None
        if isinstance(error, OSError):
            raise write_error(error, place) from error
        raise
    try:
        return [*_removed(temporary, place, output), *flushed(place)]
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{place.path} was written") from None


def beside(target: Target) -> str:
    """Return a path that is not there yet, beside a target."""
    name = os.path.basename(target.path)[:40]  # of up to four bytes each; 255 are allowed
    return os.path.join(target.folder, f".{name}.{os.urandom(6).hex()}.tmp")


def _write(
    temporary: str, place: Target, output: Output, progress: Progress
) -> tuple[Moved, Output]:
    """Write all files; return what was moved, and the output without its jobs.

    Those of many tensors take as much memory as reading the output back does.
    """
    moved: Moved = {}
    old = _old(place, output)
    if output.head:
        os.mkdir(temporary)
    for file in output.files:
        path = os.path.join(temporary, file.name) if file.name else temporary
        like = file.name if file.name in old else (old or [file.name])[0]
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags, 0o666)
        try:
            done = write_file(fd, file, progress, sync=place.sync)
            finish(fd, os.path.join(place.path, like) if like else place.path, sync=place.sync)
        finally:
            os.close(fd)
        moved[os.path.basename(path)] = {
            job.target: each
            for job, each in zip(file.jobs, done, strict=True)
            if job.target is not None and job.nbytes
        }
    if output.head and place.sync:
        flush_folder(temporary)
    files = tuple(PlannedFile(file.name, file.nbytes) for file in output.files)
    return moved, replace(output, files=files)


def finish(fd: int, replaced: str, *, sync: bool, private: bool = False) -> None:
    """Set on a written file owner, group and mode of the one it replaces, and flush it.

    A new one that was `private` until now gets the mode of the umask.
    """
    if hasattr(os, "fchown") and os.path.exists(replaced):
        _be_as(fd, os.stat(replaced))
    elif private and hasattr(os, "fchmod"):
        os.chmod(fd, 0o666 & ~_umask())
    if sync:
        os.fsync(fd)


def _umask() -> int:
    umask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(umask)
    return umask


def _be_as(made: int | str, old: os.stat_result) -> None:
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


def _move(temporary: str, place: Target, output: Output) -> None:
    """Move what was written to its place."""
    if not output.head:
        move_file(temporary, place)
    elif place.inside:
        if not _old(place, output) or not _swapped(temporary, place, output):
            _exchange(temporary, place, output)
    else:
        try:
            os.rename(temporary, place.path)
        except OSError:
            if os.path.lexists(place.path):
                raise OutputExists(
                    f"{place.path} was filled by someone else meanwhile; it was left alone",
                    hint="name another output, or use --force",
                ) from None
            raise


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
            f"{path} was made by someone else meanwhile; it was left alone",
            hint="name another output, or use --force",
        ) from None
    except OSError:  # a file system without hard links
        if os.path.exists(path):
            raise OutputExists(f"{path} exists", hint="use --force") from None
        os.rename(temporary, path)


def _old(place: Target, output: Output) -> list[str]:
    """List the files of a folder that an output replaces, their index first."""
    return _index_first(filter(output.owns, _names(place)))


def _swapped(temporary: str, place: Target, output: Output) -> bool:
    """Exchange a folder for the new one at once; return whether the system can, and did.

    Files in it that are others' go with it, under a second name until the old folder is removed.
    """
    outside, here = _outside(temporary, place), os.path.basename(temporary)
    others = [name for name in _names(place) if name != here and not output.owns(name)]
    try:
        if os.path.samefile(os.getcwd(), place.path):  # which a shell would stay in
            return False
        for name in others:  # not for a folder
            source, path = os.path.join(place.path, name), os.path.join(temporary, name)
            os.link(source, path, follow_symlinks=False)
        _be_as(temporary, os.stat(place.path))
        os.rename(temporary, outside)
        if others and place.sync:
            flush_folder(outside)
        swap(outside, place.path)
    except (OSError, NotImplementedError):
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


def _exchange(temporary: str, place: Target, output: Output) -> None:
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
            for name in _old(place, output)
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
    """Move a file back; `rename` of one name of a file to another leaves both."""
    os.rename(away, path)
    with suppress(FileNotFoundError):
        os.unlink(away)


def _unlink(path: str, made: os.stat_result) -> None:
    """Remove a file that was moved in, not one that someone else has made there."""
    if _is(path, made):
        os.unlink(path)


def _is(path: str, made: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), made)
    except OSError:
        return False


# Tidying up.


def _remove(temporary: str, place: Target, output: Output, *, replaced: bool) -> None:
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


def _removed(temporary: str, place: Target, output: Output) -> Iterator[str]:
    """Remove what is temporary after publishing; yield a warning where that fails."""
    folder = bool(output.head)
    try:
        _remove(temporary, place, output, replaced=True)
    except OSError as error:
        left = error.filename or temporary
        what = "what it replaced" if folder else f"its temporary name {temporary}"
        where = f" ({left})" if folder else "; remove that name: the file stays"
        yield f"{place.path} was written, but {what} cannot be removed: {reason(error)}{where}"


def flushed(place: Target) -> Iterator[str]:
    """Flush the folder of what has been published; yield a warning where that fails."""
    try:
        for folder in dict.fromkeys([place.folder, os.path.dirname(place.path)]):
            if place.sync:
                flush_folder(folder)
    except OSError as error:
        yield (
            f"{place.path} was written, but its folder could not be flushed: {reason(error)}; "
            "look whether the disk is sound before you rely on the file"
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


def write_error(error: OSError, target: Target) -> CkptoolError:
    """Return the error that says why output could not be written."""
    if is_out_of_memory(error):  # which is not the fault of the disk
        return out_of_memory()
    raised = of_system(error, target.path, "written")
    raised.message += "; nothing was kept"
    return raised
