"""Output that is atomic: a target is old or new, never partial.

The only room that opens a file for writing. A file is written beside its target under a temporary
name and published by one link or rename; a download grows in a part that a later run may go on
with.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from ckptool.errors import (
    NoSpace,
    OutputExists,
    SameFile,
    WriteError,
)
from ckptool.files.fileio import reason, write_at
from ckptool.text import listed, quoted, readable

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path


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
        """Name the folder that output, and what is temporary, lie in."""
        return self.path if self.inside else os.path.dirname(self.path) or "."


def refuse_target(path: str | Path, sources: Iterable[str], *, force: bool, sync: bool) -> Target:
    """Say where output goes, or why it cannot go there, before a byte is written.

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
    refuse_unwritable(shown, target)
    return target


_FOLDERS = (
    "name a file as the output; ckptool convert writes folders with --max-shard-size SIZE (shards) "
    "or --to dcp (distributed)"
)


def refuse_folder(
    path: str | Path, sources: Iterable[str], *, force: bool, sync: bool, ours: Sequence[str]
) -> Target:
    """Say where a folder goes that is written as a whole, or why it cannot go there.

    It must be absent or empty, or hold nothing but what matches the patterns `ours` and be
    replaced by force. Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    shown, real = str(path), os.path.realpath(path)
    if os.path.lexists(real) and not os.path.isdir(real):
        raise WriteError(f"{shown} is not a folder", hint="name a folder as the output")
    inside = sorted(os.listdir(real)) if os.path.isdir(real) else []
    if inside and any(os.path.realpath(os.path.dirname(source)) == real for source in sources):
        raise SameFile(f"the input lies in {shown}", hint="name another folder as the output")
    others = [name for name in inside if not any(fnmatchcase(name, each) for each in ours)]
    if others:
        raise OutputExists(
            f"{shown} holds other files: {listed(others, 4)}",
            hint="name a folder that is not there yet",
        )
    if inside and not force:
        raise OutputExists(f"{shown} is not empty", hint="name another output, or use --force")
    target = Target(real, force, sync)
    refuse_unwritable(shown, target)
    return target


def refuse_unwritable(shown: str, target: Target) -> None:
    """Raise `WriteError` where the folder that output lies in is not there, or closed."""
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
        found = os.statvfs(target.folder)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def refuse_full(target: Target, nbytes: int) -> None:
    """Raise `NoSpace` where the file cannot fit."""
    free = free_space(target)
    if free is not None and nbytes > free:
        raise NoSpace(
            f"{target.path} needs {readable(nbytes)}; {readable(free)} are free",
            hint="make room, or name an output on another file system",
        )


@contextmanager
def atomic_output(target: Target) -> Iterator[tuple[int, str]]:
    """Open a temporary file beside the target; publish it when the block ends well.

    Yields its descriptor and path. Whatever fails, the target stays as it was and the temporary
    file goes. Raises `NoSpace`, `OutputExists` or `WriteError`.
    """
    temporary = beside(target)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    try:
        try:  # before the file is made: a signal may come right after
            fd = os.open(temporary, flags, 0o666)
            try:
                yield fd, temporary
                _finish(fd, target)
                made = os.fstat(fd)
            finally:
                os.close(fd)
            _publish_whole(_publish, temporary, target, made)
        except BaseException:
            with suppress(OSError):  # what went wrong first is what to tell
                _remove(temporary)
            raise
        _remove_link(temporary, target)
    except OSError as error:
        raise write_error(error, target) from error


def _publish_whole(
    publish: Callable[[str, Target], None], temporary: str, target: Target, made: os.stat_result
) -> None:
    """Publish; whoever interrupts that is told whether it was done already."""
    try:
        publish(temporary, target)
    except KeyboardInterrupt:
        with suppress(OSError):
            if os.path.samestat(os.stat(target.path), made):
                raise KeyboardInterrupt(f"{target.path} was written") from None
        raise


def _remove(path: str) -> None:
    """Remove a file that may be gone; an interruption comes after that, not instead of it."""
    with suppress(FileNotFoundError):
        try:
            os.unlink(path)
        except (KeyboardInterrupt, SystemExit):
            os.unlink(path)
            raise


def _remove_link(temporary: str, target: Target) -> None:
    """Remove the other name of a file that was published by a link."""
    try:
        _remove(temporary)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{target.path} was written") from None
    except OSError as error:
        raise WriteError(
            f"{target.path} was written, but its temporary name {temporary} cannot be removed: "
            f"{reason(error)}",
            hint="remove that name; the file stays",
        ) from error


def beside(target: Target) -> str:
    """Name something that is not there yet beside a target."""
    name = os.path.basename(target.path)[:40]  # of up to four bytes each; 255 are allowed
    return os.path.join(target.folder, f".{name}.{os.urandom(6).hex()}.tmp")


@contextmanager
def atomic_folder(target: Target) -> Iterator[str]:
    """Make a temporary folder beside the target; publish it when the block ends well.

    Yields its path, for files to be written into. Whatever fails, the target stays as it was and
    the temporary folder goes. Raises `NoSpace`, `OutputExists` or `WriteError`.
    """
    temporary = beside(target)
    try:
        try:
            os.mkdir(temporary)
            yield temporary
            if target.sync:
                _flush_files(temporary)
            _publish_whole(_publish_folder, temporary, target, os.stat(temporary))
        except BaseException:
            with suppress(OSError):  # what went wrong first is what to tell
                _remove_folder(temporary)
            raise
    except OSError as error:
        raise write_error(error, target) from error


def _flush_files(folder: str) -> None:
    for name in os.listdir(folder):
        fd = os.open(os.path.join(folder, name), os.O_RDWR | getattr(os, "O_BINARY", 0))
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
    flush_folder(folder)


def _remove_folder(path: str) -> None:
    """Remove a folder of files, if it is there; an interruption comes after that."""
    try:
        _clear(path)
    except (KeyboardInterrupt, SystemExit):
        _clear(path)
        raise


def _clear(path: str) -> None:
    with suppress(FileNotFoundError):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        os.rmdir(path)


def _publish_folder(temporary: str, target: Target) -> None:
    """Rename a folder to its place; what is replaced there is put aside first, and removed last."""
    old = None
    try:
        if os.path.isdir(target.path):
            os.chmod(temporary, stat.S_IMODE(os.stat(target.path).st_mode))
            old = beside(target)
            os.rename(target.path, old)
        if old is not None and os.listdir(old) and not target.force:
            raise OutputExists(
                f"{target.path} was filled by someone else meanwhile; it was left alone",
                hint="name another output, or use --force",
            )
        os.rename(temporary, target.path)
    except BaseException:
        if old is not None and os.path.isdir(old):
            _put_back(old, target)
        raise
    if old is not None:
        _remove_replaced(old, target)
    if target.sync:
        flush_published(target)


def _put_back(old: str, target: Target) -> None:
    """Bring back what was put aside, unless the new folder is in its place already."""
    if os.path.isdir(target.path):
        _remove_folder(old)
    else:
        os.rename(old, target.path)


def _remove_replaced(old: str, target: Target) -> None:
    try:
        _remove_folder(old)
    except OSError as error:
        raise WriteError(
            f"{target.path} was written, but what it replaced cannot be removed: {reason(error)}",
            evidence=[old],
        ) from error


def write_error(error: OSError, target: Target) -> WriteError:
    """Say in words why output could not be written."""
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


def _finish(fd: int, target: Target) -> None:
    """Give the file the mode of the one it replaces, and bring it to the disk."""
    if hasattr(os, "fchmod") and os.path.exists(target.path):
        os.fchmod(fd, stat.S_IMODE(os.stat(target.path).st_mode))
    if target.sync:
        os.fsync(fd)


def _publish(temporary: str, target: Target) -> None:
    if target.force:
        os.replace(temporary, target.path)
    else:
        publish_new(temporary, target.path)
    if target.sync:
        flush_published(target)


def flush_published(target: Target) -> None:
    """Flush the folder of what has been published; where that fails, the file stays."""
    try:
        flush_folder(target.folder)
    except OSError as error:
        raise WriteError(
            f"{target.path} was written, but its folder could not be flushed: {reason(error)}",
            hint="look whether the disk is sound before you rely on the file",
        ) from error


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


def publish_new(temporary: str, path: str) -> None:
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


WINDOWS = os.name == "nt"


@dataclass(slots=True)
class Part:
    """The growing part of a target, which a later run may go on with.

    `kept` says whether it stays when this run fails. What a later run must know of it lies beside
    it, in `record`.
    """

    fd: int
    path: str
    kept: bool = False

    @property
    def record(self) -> str:
        """Name the file beside the part."""
        return f"{self.path}.json"

    def note(self, text: str) -> None:
        """Write the record."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0)
        fd = os.open(self.record, flags, 0o666)
        try:
            write_at(fd, text.encode(), 0)
        finally:
            os.close(fd)

    def remove(self) -> None:
        """Remove the part and its record."""
        for path in (self.path, self.record):
            with suppress(FileNotFoundError):
                os.unlink(path)

    def close(self) -> None:
        """Close the part, and give up its lock."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


@contextmanager
def part_output(path: str, target: Target) -> Iterator[Part | None]:
    """Open the part of a target for this process alone; publish it when the block ends well.

    Yields None where another process has it. Whatever fails, the target stays as it was. The lock
    is held until the part is gone, so that nobody grows a file that is published already.
    Raises `NoSpace`, `OutputExists` or `WriteError`.
    """
    try:
        part = _open_alone(path)
        if part is None:
            yield None
            return
        try:
            yield part
            part.kept = False
            _finish(part.fd, target)
            if WINDOWS:  # where an open file can be neither renamed nor removed
                part.close()
            _publish(path, target)
        except OSError:  # a full disk is given back
            part.kept = False
            raise
        finally:
            if WINDOWS:
                part.close()
            if not part.kept:
                part.remove()
            part.close()
    except OSError as error:
        raise write_error(error, target) from error


def _open_alone(path: str) -> Part | None:
    flags = os.O_RDWR | os.O_CREAT
    for name in ("O_BINARY", "O_NOFOLLOW", "O_CLOEXEC"):
        flags |= getattr(os, name, 0)
    while True:
        part = Part(os.open(path, flags, 0o666), path)
        try:
            if not stat.S_ISREG(os.fstat(part.fd).st_mode):
                raise FileExistsError(errno.EEXIST, f"{path} is not a regular file")
            if not _locked(part.fd):
                part.close()
                return None
            if os.path.exists(path) and os.path.samestat(os.stat(path), os.fstat(part.fd)):
                return part
        except BaseException:
            part.close()
            raise
        part.close()  # published or removed by another process between the open and the lock


def _locked(fd: int) -> bool:
    """Lock a file without waiting; a file system that knows no locks is taken as it is."""
    try:
        if sys.platform == "win32":
            import msvcrt

            os.lseek(fd, 1 << 40, os.SEEK_SET)  # beyond the data: a locked byte cannot be read
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
    return True
