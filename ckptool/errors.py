"""Every way a run can be refused, as one tree of classes.

    CkptoolError                    what, where, and what to do
    |-- FormatError(path, offset)   NoSuchFile PermissionDenied NotACheckpoint Malformed exit 3
    |                               Unreadable Unsupported LimitExceeded TooCostly
    |                               PluginFailed PartialCheckpoint
    |-- UnsafePickle                                                                     exit 4
    |-- EditError                   NoSuchKey NothingMatched KeyCollision                exit 2
    |                               AmbiguousStateDict NoStateDict NoSuchCommand
    |                               BadRecipe RanksDiffer NameCollision
    |-- PoorFit NotAsExpected Overflow                                                   exit 1
    |-- WriteError                  OutputExists OutputDenied SameFile NotRepresentable  exit 5
    |                               NoSpace
    |-- DownloadError               DownloadFailed HashMismatch                          exit 6
    |-- ModelError                  MissingExtra NoDevice OutOfMemory RankLost           exit 7
    |                               NoSuchModel BadInput                                 exit 2
    |                               DoesNotLoad                                          exit 1
    `-- Bug                         a defect of ours                                     exit 70

An error is a sentence without a final period, evidence (lines that show it) and a hint (the
command or flag that helps). `option` is what the command that failed must be given to succeed:
the command line shows it as a whole command to paste. The slug is the class name in kebab case;
the exit code belongs to the class.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path


class CkptoolError(Exception):
    """Something the user can cause and mend."""

    exit_code = 70

    def __init__(
        self, message: str, *, evidence: Sequence[str] = (), hint: str = "", option: str = ""
    ) -> None:
        super().__init__(message)
        self.message, self._placed = message, False
        self.said_elsewhere = False  # by rank 0 of the processes that raise it
        self.evidence = tuple(evidence)
        self.hint = hint
        self.option = option

    def within(self, place: str) -> Self:
        """Return the error as it is said of a part: a rule, then its step, then its recipe."""
        if place:
            self.message = f"{place}{', ' if self._placed else ': '}{self.message}"
            self._placed = True
        return self

    @property
    def slug(self) -> str:
        """Name the class in kebab case: `key-collision`."""
        return re.sub(r"(?<=.)([A-Z])", r"-\1", type(self).__name__).lower()


class FormatError(CkptoolError):
    """The input cannot be read.

    `named` and `calls` are what its pickles had named and called before the fault: whatever loads
    the file elsewhere gets as far.
    """

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        path: Path | str | None = None,
        offset: int | None = None,
        evidence: Sequence[str] = (),
        hint: str = "",
        option: str = "",
    ) -> None:
        super().__init__(message, evidence=evidence, hint=hint, option=option)
        self.path = path
        self.offset = offset
        self.named: dict[Any, int] = {}
        self.calls: list[Any] = []


class NoSuchFile(FormatError):
    """The input is not there, or is not a file that can be opened."""


class PermissionDenied(FormatError):
    """The system does not let this user read the input."""


class NotACheckpoint(FormatError):
    """The input is something else; the message names what."""


class Malformed(FormatError):
    """The input claims to be a checkpoint and breaks the rules of its format."""


class Unreadable(Malformed):
    """The system does not give the bytes of the input: a disk that fails, too many open files."""


class Unsupported(FormatError):
    """A known thing that this version does not read."""


class LimitExceeded(FormatError):
    """The input is larger or deeper than any real checkpoint."""


class TooCostly(FormatError):
    """What the input says of itself takes more memory to read than the run may have."""


class PluginFailed(FormatError):
    """The code of a plugin cannot be imported, or fails."""


class PartialCheckpoint(FormatError):
    """The input is a part of a checkpoint: the weights are in several files together."""


class UnsafePickle(FormatError):
    """The input would run code when loaded, and the output would carry that on."""

    exit_code = 4


class EditError(CkptoolError):
    """The edit is refused."""

    exit_code = 2


class NoSuchKey(EditError):
    """A named key or place is not in the checkpoint."""


class NothingMatched(EditError):
    """An edit or a pattern changed or selected nothing."""


class KeyCollision(EditError):
    """Two keys would become one."""


class AmbiguousStateDict(EditError):
    """Several state_dicts where one is needed."""


class NoStateDict(EditError):
    """No state_dict where one is needed."""


class NoSuchCommand(EditError):
    """A command that ckptool does not have."""


class BadRecipe(EditError):
    """A recipe cannot be read, or says what no recipe can."""


class RanksDiffer(EditError):
    """Processes that are to write one output would write several."""


class NameCollision(EditError):
    """Two outputs would be written to one place."""


class PoorFit(CkptoolError):
    """Too little of the target would be filled."""

    exit_code = 1


class Overflow(CkptoolError):
    """Finite numbers would become infinite in a cast."""

    exit_code = 1


class NotAsExpected(CkptoolError):
    """What a recipe makes is not what it says that it makes."""

    exit_code = 1


class WriteError(CkptoolError):
    """The output cannot be written."""

    exit_code = 5


class OutputDenied(WriteError):
    """The system does not let this user write the output."""

    @property
    def slug(self) -> str:
        """Name it as what it is for an input: `permission-denied`."""
        return "permission-denied"


class OutputExists(WriteError):
    """The output is there already."""


class SameFile(WriteError):
    """Input and output are the same file."""


class NotRepresentable(WriteError):
    """The output container cannot hold what it was given."""


class NoSpace(WriteError):
    """The file system has too little room."""


class DownloadError(CkptoolError):
    """A download is refused."""

    exit_code = 6


class DownloadFailed(DownloadError):
    """The server or the network did not give the file.

    `status` is what the server answered, where that is why; what was `lost` may come again.
    """

    status = 0
    lost = False


class HashMismatch(DownloadError):
    """The file that came is not the one that was meant."""


class ModelError(CkptoolError):
    """The model side cannot do it here."""

    exit_code = 7


class MissingExtra(ModelError):
    """A library of an extra is not installed."""


class NoDevice(ModelError):
    """The device is not there."""


class OutOfMemory(ModelError):
    """This process, or the device, has too little memory."""


class RankLost(ModelError):
    """A process that was to write a part of the output has ended, or answers no more."""


class NoSuchModel(ModelError):
    """A model spec names nothing."""

    exit_code = 2


class BadInput(ModelError):
    """The model cannot take this input."""

    exit_code = 2


class DoesNotLoad(ModelError):
    """The state_dict does not load strictly into the model."""

    exit_code = 1


class Usage(CkptoolError):
    """A command line that click refuses."""

    exit_code = 2


class Interrupted(CkptoolError):
    """Ctrl-C."""

    exit_code = 130


class Bug(CkptoolError):
    """A defect in ckptool."""


def is_out_of_memory(error: BaseException) -> bool:
    """Check whether an exception says that this process ran out of memory."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, ImportError):  # dlopen has words alone (glibc, elf/dl-load.c)
        return re.search("failed to map|cannot allocate|out of memory", str(error)) is not None
    return isinstance(error, MemoryError)


def of_system(
    error: OSError, path: str, what: str, offset: int | None = None
) -> FormatError | WriteError:
    """Return the error for what the system refused at a path: it was to be `what`.

    That is `written` for output and temporary files, or else how an input was used.
    """
    written, code = what == "written", error.errno
    place = error.filename if isinstance(error.filename, str) else path
    where = "" if place == path or place.endswith(".tmp") else f"{place}: "
    message = f"{path} cannot be {what}: {where}{reason(error)}"
    hint = _REMEDIES.get(code or 0, "")
    if written and code in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"no space left while writing {path}", hint=hint)
    if written and code == errno.EFBIG:
        return NoSpace(
            f"{path} cannot be written: it is over a limit on the size of files", hint=hint
        )
    if code in (errno.EACCES, errno.EPERM, errno.EROFS):
        if written:
            return OutputDenied(message, hint=hint or "name an output elsewhere")
        return PermissionDenied(message, path=path, hint=hint or "ls -ld shows who may read it")
    if written:
        return WriteError(message, hint=hint)
    if code in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return NoSuchFile(message, path=path, hint=hint)
    return Unreadable(message, path=path, hint=hint, offset=offset)


def reason(error: Exception) -> str:
    """Return the system's words for an error."""
    return (getattr(error, "strerror", None) or str(error)).lower()


_LIMITED = "ulimit -n 65536   lets it have all files of a checkpoint open"
_REMEDIES = {
    errno.ENOSPC: "make room, or name an output on another file system",
    errno.EDQUOT: "make room within your quota, or name an output on another file system",
    errno.EFBIG: "ulimit -f shows the limit of the shell; file systems have theirs",
    errno.EROFS: "name an output on a file system that is not read-only",
    errno.EMFILE: _LIMITED,
    errno.ENFILE: "too many files are open on this machine: run it again when there are fewer",
    errno.EIO: "check the disk: dmesg shows its errors",
    errno.ELOOP: "ls -l shows where the link leads",
    errno.ENAMETOOLONG: "a file system takes names of 255 bytes, and paths of 4096",
    errno.EEXIST: "remove it, or name another output",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.ENOENT: "something on the path was removed meanwhile: run it again",
}


def out_of_memory() -> OutOfMemory:
    """Return the error of a process that ran out of memory."""
    return OutOfMemory(
        "there is too little memory, or no room for a thread, in this process",
        hint="ulimit -v and ulimit -u show the limits of the shell; a container has its own",
    )
