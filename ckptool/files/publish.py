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
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from functools import partial
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
)
from ckptool.files import moves
from ckptool.files.copying import Done, Moved, PlannedFile, Progress, no_progress
from ckptool.files.group import ALONE, Group
from ckptool.files.target import Output as Output, Owns, Target as Target
from ckptool.files.writing import WRITING, Work, reserve, write_file
from ckptool.text import counted, listed, quoted, readable

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

PUBLISHED: list[str] = []  # last by this process: an interruption after that wrote it

# What can be refused before a byte is written.

_FOLDERS = (
    "name a file as the output, or ckptool convert IN FOLDER/ for one in a folder; it writes "
    "folders with --max-shard-size SIZE (shards) or --to dcp (distributed)"
)


def refuse_target(
    path: str | Path, sources: Iterable[str], *, force: bool, sync: bool, parents: bool = False
) -> Target:
    """Return where a file goes.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if shown.endswith(("/", os.sep)):
        raise WriteError(f"{shown} names a folder", hint=_FOLDERS)
    if shown == "-":
        raise WriteError("output goes to files, not to stdout", hint="a file named - is ./-")
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
    target = Target(real, force, sync, parents=parents)
    _refuse_unwritable(shown, target)
    return target


def refuse_set(
    path: str | Path,
    sources: Iterable[str],
    owns: Owns,
    *,
    force: bool,
    sync: bool,
    parents: bool = False,
) -> Target:
    """Return the folder for files that may be beside those of others.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if shown == "-":
        raise WriteError("output goes to files, not to stdout", hint="a folder named - is ./-")
    if os.path.exists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is not a folder", hint="name a folder as the output")
    target = Target(real, force, sync, os.path.isdir(real), parents)
    old = [name for name in moves.names(target) if owns(name)]
    used = [source for source in sources if os.path.exists(source)]
    for name in old:
        place = os.path.join(real, name)
        if os.path.exists(place) and any(os.path.samefile(place, source) for source in used):
            raise SameFile(
                f"{os.path.join(shown, name)} is an input itself", hint="name another folder"
            )
    if old and not force:
        raise OutputExists(
            f"{shown} holds {moves.index_first(old)[0]} already"
            + (f", and {counted(len(old) - 1, 'more file')}" if len(old) > 1 else ""),
            hint="name another folder, or use --force to replace them",
        )
    _refuse_unwritable(shown, target)
    return target


def refuse_folder(
    path: str | Path,
    sources: Iterable[str],
    owns: Owns,
    *,
    force: bool,
    sync: bool,
    parents: bool = False,
) -> Target:
    """Return the folder for files that are alone in it: one that is absent, empty, or all ours.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is not a folder", hint="name a folder as the output")
    target = Target(real, force, sync, os.path.isdir(real), parents)
    inside = moves.names(target)
    if inside and any(os.path.realpath(os.path.dirname(source)) == real for source in sources):
        raise SameFile(f"the input is in {shown}", hint="name another folder as the output")
    others = [name for name in inside if not owns(name) and not moves.TEMPORARY.fullmatch(name)]
    if others:
        raise OutputExists(
            f"{shown} holds other files: {listed(others, 4)}",
            hint="name a new folder",
        )
    if inside and not force:
        raise OutputExists(f"{shown} is not empty", hint="name another output, or use --force")
    _refuse_unwritable(shown, target)
    return target


def _refuse_unwritable(shown: str, target: Target) -> None:
    """Raise `WriteError` for a place where nothing can be made, before anything is."""
    folder = target.standing
    try:
        if not stat.S_ISDIR(os.stat(folder).st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        if not os.access(folder, os.W_OK):
            code = errno.EROFS if _is_read_only(folder) else errno.EACCES
            raise OSError(code, os.strerror(code))
    except FileNotFoundError:
        raise WriteError(
            f"the folder of {shown} does not exist", hint=f"mkdir -p {quoted(folder)}"
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
    if target.pipe is not None or not hasattr(os, "statvfs"):
        return None
    try:
        system = os.statvfs(target.standing)
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


def write(place: Target, data: bytes) -> None:
    """Write and publish a file from memory; raises `NoSpace`, `OutputExists` or `WriteError`."""
    output = Output((PlannedFile("", len(data), [(0, data)]),))
    publish(place, output, no_progress(0), lambda *_: None)
    PUBLISHED[:] = [place.path]


def publish(
    place: Target,
    output: Output,
    progress: Progress,
    check: Callable[[str, Moved], None],
    group: Group = ALONE,
) -> list[str]:
    """Write, check and publish an output; return warnings about what failed after that.

    `check` reads what was written by its `head`, and raises where it is not what was meant or not
    what the jobs have moved. Whatever fails, the target stays as it was and what is temporary is
    removed. All ranks of a group write, and rank 0 checks and publishes. Raises `NoSpace`,
    `OutputExists` or `WriteError`; an interruption says where all was done already.
    """
    if group.rank:
        return _take_part(place, output, progress, group)
    temporary, published, missing = beside(place), False, place.missing
    try:
        with moves.Folder(place) as folder:
            planned = [output]
            del output  # what jobs copy goes with them, before the output is read back
            output = _publish(temporary, place, planned.pop(), progress, check, folder, group)
            published = True
            late = [*moves.removed(temporary, place, output), *moves.flushed(place, missing)]
        return group.share(lambda: late)
    except KeyboardInterrupt:  # when the folder is closed, too
        if published:
            raise KeyboardInterrupt(f"{place.path} was written") from None
        raise


def _publish(
    temporary: str,
    place: Target,
    output: Output,
    progress: Progress,
    check: Callable[[str, Moved], None],
    folder: moves.Folder,
    group: Group,
) -> Output:
    """Write, check and move an output; return it without its jobs."""
    written, made = None, place.missing
    try:  # before anything is made: a signal may come right after
        for each in made:
            os.makedirs(each, exist_ok=True)
        moved, output = _write(temporary, place, output, progress, group)
        check(os.path.join(temporary, output.head) if output.head else temporary, moved)
        written = os.stat(temporary)
        folder.lock()
        if other := folder.replaced():
            raise other
        group.begin_publishing()
        _move(temporary, place, output)
    except BaseException as error:
        group.fail(write_error(error, place) if isinstance(error, OSError) else error)
        done = written is not None and moves.is_file(place.path, written)
        folder.lock()  # who has moved the folder away brings back what is not theirs
        with suppress(OSError):  # the first error is the one to report
            moves.remove(temporary, place, output, replaced=done)
            for each in reversed([] if done else made):
                os.rmdir(each)
        if done and isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"{place.path} was written") from None
        if not done and isinstance(error, Exception) and (other := folder.replaced()):
            raise other from error
        if isinstance(error, OSError):
            raise write_error(error, place) from error
        raise
    return output


def beside(target: Target) -> str:
    """Return a path that is not there yet, beside a target."""
    name = os.path.basename(target.path)[:40]  # of up to four bytes each; 255 are allowed
    return os.path.join(target.folder, f".{name}.{os.urandom(6).hex()}.tmp")


def _take_part(place: Target, output: Output, progress: Progress, group: Group) -> list[str]:
    """Write what is this rank's of what rank 0 publishes, and wait until it has."""
    temporary = os.path.join(place.folder, group.share(str))
    try:
        try:
            Work(group, output, partial(_path, temporary), progress, sync=place.sync).done()
        except OSError as error:
            if os.path.exists(temporary):
                raise write_error(error, place) from error
            raise WriteError(
                f"what rank 0 has made in {place.folder} is missing",
                hint="name an output on a file system that all machines share",
            ) from error
        group.begin_publishing()
        return group.share(list)
    except BaseException as error:
        group.fail(error)
        if group.may_remove:
            with suppress(OSError):  # the first error is the one to report
                moves.remove(temporary, place, output, replaced=False)
        raise


def _path(temporary: str, file: PlannedFile) -> str:
    return os.path.join(temporary, file.name) if file.name else temporary


def _write(
    temporary: str, place: Target, output: Output, progress: Progress, group: Group
) -> tuple[Moved, Output]:
    """Write all files; return what was moved, and the output without its jobs.

    Those of many tensors take as much memory as reading the output back does.
    """
    moved: Moved = {}
    old, paths = moves.old_files(place, output), partial(_path, temporary)
    if output.head:
        os.mkdir(temporary)
    together: list[list[Done]] = []
    if group.size > 1:
        for file in output.files:
            _make(paths(file), file.nbytes)
        group.share(lambda: os.path.basename(temporary))
        together = Work(group, output, paths, progress, sync=place.sync).done()
    for number, file in enumerate(output.files):
        like = file.name if file.name in old else (old or [file.name])[0]
        fd = os.open(paths(file), WRITING if together else WRITING | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            if together and file.jobs:
                done = together[number]
            else:
                done = write_file(fd, file, progress, sync=place.sync)
            finish(fd, os.path.join(place.path, like) if like else place.path, sync=place.sync)
        finally:
            os.close(fd)
        moved[os.path.basename(paths(file))] = {
            job.target: each
            for job, each in zip(file.jobs, done, strict=True)
            if job.target is not None and job.nbytes
        }
    if output.head and place.sync:
        moves.flush_folder(temporary)
    files = tuple(PlannedFile(file.name, file.nbytes) for file in output.files)
    return moved, replace(output, files=files)


def _make(path: str, nbytes: int) -> None:
    """Make a file that several ranks write to."""
    fd = os.open(path, WRITING | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        reserve(fd, nbytes)
    finally:
        os.close(fd)


def finish(fd: int, replaced: str, *, sync: bool, private: bool = False) -> None:
    """Set on a written file owner, group and mode of the one it replaces, and flush it.

    A new one that was `private` until now gets the mode of the umask.
    """
    if hasattr(os, "fchown") and os.path.exists(replaced):
        moves.be_as(fd, os.stat(replaced))
    elif private and hasattr(os, "fchmod"):
        os.chmod(fd, 0o666 & ~_umask())
    if sync:
        os.fsync(fd)


def _umask() -> int:
    umask = os.umask(0o077)  # there is no other way to ask for it
    os.umask(umask)
    return umask


def _move(temporary: str, place: Target, output: Output) -> None:
    """Move what was written to its place."""
    if not output.head:
        moves.move_file(temporary, place)
    elif place.inside:
        if not moves.old_files(place, output) or not moves.swapped(temporary, place, output):
            moves.exchange(temporary, place, output)
    else:
        try:
            os.rename(temporary, place.path)
        except OSError:
            if os.path.lexists(place.path):
                raise OutputExists(
                    f"{place.path} was filled by another process meanwhile; it was not changed",
                    hint="name another output, or use --force",
                ) from None
            raise


def write_error(error: OSError, target: Target) -> CkptoolError:
    """Return the error that says why output could not be written."""
    if is_out_of_memory(error):  # which is not the fault of the disk
        return out_of_memory()
    raised = of_system(error, target.path, "written")
    raised.message += "; nothing was kept"
    return raised
