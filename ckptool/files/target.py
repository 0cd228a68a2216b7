"""What is written, and where it goes."""

from __future__ import annotations

import os
from collections.abc import Callable

from ckptool.files import temporary
from ckptool.files.copying import PlannedFile
from ckptool.files.jobs import Copy
from ckptool.files.paths import Url
from ckptool.files.stream import Pipe
from ckptool.records import dataclass

Owns = Callable[[str], bool]  # whether a file of a folder is of a set that was written before


@dataclass(frozen=True, slots=True)
class Target:
    """A place for output: the file behind any symlink, and whether it may be replaced.

    With `inside` it is a folder that exists, and output goes into it. With `parents` the folders
    that it is in are made where they are not there. With `url` it is in a store, and `path` is how
    that is shown; with `pipe` it is no place on a disk.
    """

    path: str
    force: bool = False
    sync: bool = True
    inside: bool = False
    parents: bool = False
    url: Url | None = None
    pipe: Pipe | None = None

    @property
    def folder(self) -> str:
        """Return the folder of the output and of what is temporary."""
        if self.url is not None:
            return temporary.where()
        return self.path if self.inside else os.path.dirname(self.path) or "."

    @property
    def missing(self) -> list[str]:
        """List the folders that will be made, the outermost first."""
        found, folder = list[str](), self.folder
        while self.parents and not os.path.lexists(folder):
            found.insert(0, folder)
            folder = os.path.dirname(folder)
        return found

    @property
    def standing(self) -> str:
        """Return the folder that is there, in which the output or folders around it are made."""
        missing = self.missing
        return os.path.dirname(missing[0]) if missing else self.folder


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
    def jobs(self) -> list[Copy]:
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
