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
    others = [name for name in inside if not owns(name)]
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
    if not os.path.isdir(target.folder):
        raise WriteError(
            f"the folder of {shown} does not exist", hint=f"mkdir -p {quoted(target.folder)}"
        )
    if not os.access(target.folder, os.W_OK):
        raise WriteError(f"the folder of {shown} cannot be written to")


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
            _remove(temporary, replaced=done)
        if done and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{place.path} was written") from None
        if isinstance(error, OSError):
            raise write_error(error, place) from error
        raise
    try:
        return [*_removed(temporary, place), *flushed(place)]
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
    if output.head:
        os.mkdir(temporary)
    for file in output.files:
        path = os.path.join(temporary, file.name) if file.name else temporary
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        fd = os.open(path, flags, 0o666)
        try:
            done = write_file(fd, file, progress, sync=place.sync)
            finish(fd, place if not file.name else None, sync=place.sync)
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


def finish(fd: int, replaced: Target | None, *, sync: bool) -> None:
    """Set on a written file the mode of the one it replaces, and flush it."""
    if replaced and hasattr(os, "fchmod") and os.path.exists(replaced.path):
        os.fchmod(fd, stat.S_IMODE(os.stat(replaced.path).st_mode))
    if sync:
        os.fsync(fd)


def _move(temporary: str, place: Target, output: Output) -> None:
    """Move what was written to its place."""
    if not output.head:
        move_file(temporary, place)
    elif place.inside:
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


def _exchange(temporary: str, place: Target, output: Output) -> None:
    """Move old files aside and new ones in; undo it all where a step fails."""
    new = sorted((file.name for file in output.files), key=lambda name: name == output.last)
    aside = os.path.join(temporary, ASIDE)
    os.mkdir(aside)
    undo: list[Callable[[], None]] = []
    try:
        for name in _index_first(filter(output.owns, _names(place))):
            old, away = os.path.join(place.path, name), os.path.join(aside, name)
            undo.append(lambda old=old, away=away: os.rename(away, old))  # type: ignore[misc]
            os.rename(old, away)
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


def _remove(temporary: str, *, replaced: bool) -> None:
    """Remove what is temporary; an interruption comes after that, not instead of it."""
    try:
        _clear(temporary, replaced=replaced)
    except (KeyboardInterrupt, SystemExit):
        _clear(temporary, replaced=replaced)
        raise


def _clear(temporary: str, *, replaced: bool) -> None:
    """Remove a temporary file or folder, and with `replaced` the old files in it.

    Those that could not be moved back stay. Raises the first error when all was tried.
    """
    folders = (os.path.join(temporary, ASIDE), temporary) if replaced else (temporary,)
    paths = [
        os.path.join(folder, name)
        for folder in folders
        if os.path.isdir(folder)
        for name in os.listdir(folder)
    ]
    errors = []
    for path in (*paths, temporary):
        try:
            os.rmdir(path) if os.path.isdir(path) and not os.path.islink(path) else os.unlink(path)
        except FileNotFoundError:
            pass
        except OSError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _removed(temporary: str, place: Target) -> Iterator[str]:
    """Remove what is temporary after publishing; yield a warning where that fails."""
    folder = os.path.isdir(temporary)
    try:
        _remove(temporary, replaced=True)
    except OSError as error:
        what = "what it replaced" if folder else f"its temporary name {temporary}"
        where = f" ({temporary})" if folder else "; remove that name: the file stays"
        yield f"{place.path} was written, but {what} cannot be removed: {reason(error)}{where}"


def flushed(place: Target) -> Iterator[str]:
    """Flush the folder of what has been published; yield a warning where that fails."""
    try:
        if place.sync:
            flush_folder(place.folder)
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
    if error.errno == errno.EFBIG:
        return NoSpace(
            f"{target.path} cannot be written: it is over a limit on the size of files; nothing "
            "was kept",
            hint="ulimit -f shows the limit of the shell; file systems have theirs",
        )
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(
            f"no space left while writing {target.path}; nothing was kept",
            hint="make room, or name an output on another file system",
        )
    return WriteError(f"{target.path} cannot be written: {reason(error)}; nothing was kept")
