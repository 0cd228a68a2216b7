"""What is written, and where it goes."""

from __future__ import annotations

import os
from collections.abc import Callable

from ckptool.files import temporary
from ckptool.files.copying import Copy, PlannedFile
from ckptool.files.paths import Url
from ckptool.records import dataclass

Owns = Callable[[str], bool]  # whether a file of a folder is of a set that was written before


@dataclass(frozen=True, slots=True)
class Target:
    """A place for output: the file behind any symlink, and whether it may be replaced.

    With `inside` it is a folder that exists, and output goes into it. With `url` it is in a store,
    and `path` is how that is shown.
    """

    path: str
    force: bool = False
    sync: bool = True
    inside: bool = False
    url: Url | None = None

    @property
    def folder(self) -> str:
        """Return the folder of the output and of what is temporary."""
        if self.url is not None:
            return temporary.where()
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
