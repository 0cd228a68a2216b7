"""The part of a download: it grows beside its target, and a later run may go on with it."""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import field

from ckptool.errors import reason
from ckptool.files import moves, publish
from ckptool.files.fileio import write_at
from ckptool.files.publish import Target
from ckptool.records import dataclass

WINDOWS = os.name == "nt"
PRIVATE = 0o600  # while it grows: the file has the mode of the umask once it is whole


@dataclass(slots=True)
class Part:
    """The growing part of a target, which a later run may go on with.

    `kept` says whether it stays when this run fails; `warnings` what failed after it was
    published. What a later run must know of it is beside it, in `record`.
    """

    fd: int
    path: str
    kept: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def record(self) -> str:
        """Name the file beside the part."""
        return f"{self.path}.json"

    def note(self, text: str) -> None:
        """Write the record."""
        with suppress(FileNotFoundError):
            os.unlink(self.record)
        fd = os.open(self.record, _flags(os.O_WRONLY | os.O_EXCL), PRIVATE)
        try:
            write_at(fd, text.encode(), 0)
        finally:
            os.close(fd)

    def noted(self) -> str:
        """Return the record of an earlier run, an empty text where it is not this user's own."""
        try:
            fd = os.open(self.record, _flags(os.O_RDONLY) & ~os.O_CREAT)
            with open(fd, encoding="utf-8") as file:
                return file.read(1 << 16) if _is_ours(os.fstat(fd)) else ""
        except (OSError, ValueError):
            return ""

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
    published = False
    try:
        part = _open_alone(path)
        if part is None:
            yield None
            return
        try:
            yield part
            part.kept = False
            publish.finish(part.fd, target.path, sync=target.sync, private=True)
            if WINDOWS:  # where an open file can be neither renamed nor removed
                part.close()
            moves.move_file(path, target)
            published = True
            part.warnings += moves.flushed(target)
        except OSError:  # a full disk is given back
            part.kept = False
            raise
        finally:
            if WINDOWS:
                part.close()
            if not part.kept:
                _remove(part, target, published=published)
            part.close()
    except OSError as error:
        raise publish.write_error(error, target) from error


def _remove(part: Part, target: Target, *, published: bool) -> None:
    """Remove a part; once its content is published, a failure is a warning alone."""
    try:
        part.remove()
    except OSError as error:
        if not published:
            raise
        left = f"{part.path} cannot be removed: {reason(error)}"
        part.warnings.append(f"{target.path} was written, but {left}; remove it: the file stays")


def _open_alone(path: str) -> Part | None:
    """Open a part and lock it; one that somebody else may write is not gone on with, but removed.

    None where another process has it.
    """
    while True:
        if os.path.islink(path):  # which open(2) would call a loop
            raise FileExistsError(errno.EEXIST, "it is a symbolic link", path)
        part = Part(os.open(path, _flags(os.O_RDWR), PRIVATE), path)
        try:
            found = os.fstat(part.fd)
            if not stat.S_ISREG(found.st_mode):
                raise FileExistsError(errno.EEXIST, "it is not a regular file", path)
            if not _locked(part.fd):
                part.close()
                return None
            if os.path.exists(path) and os.path.samestat(os.stat(path), found):
                if _is_ours(found):
                    return part
                os.unlink(path)
        except BaseException:
            part.close()
            raise
        part.close()  # published or removed by another process between the open and the lock


def _flags(flags: int) -> int:
    """Add to the flags of `os.open`: make a file that is absent, follow no link, wait for none."""
    for name in ("O_BINARY", "O_NOFOLLOW", "O_CLOEXEC", "O_NONBLOCK"):
        flags |= getattr(os, name, 0)
    return flags | os.O_CREAT


def _is_ours(found: os.stat_result) -> bool:
    """Return whether a file is this user's, under one name, and nobody else may write it."""
    if WINDOWS:
        return True
    alone = found.st_uid == os.geteuid() and found.st_nlink == 1
    return stat.S_ISREG(found.st_mode) and alone and not found.st_mode & 0o022


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
