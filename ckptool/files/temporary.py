"""Temporary files and folders; where there is no room, the error says how to put them elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO

from ckptool.errors import is_out_of_memory, of_system

ELSEWHERE = "TMPDIR=FOLDER before the command puts temporary files elsewhere"


@contextmanager
def temporary() -> Iterator[None]:
    """Name the folder of temporary files, and how to choose another, where one cannot be had.

    Who reads a file says so itself: what the system refuses here, it refuses the temporary file.
    """
    try:
        yield
    except OSError as error:
        import tempfile

        if is_out_of_memory(error):
            raise
        folder = tempfile.tempdir or "TMPDIR or /tmp"
        raised = of_system(error, f"a temporary file in {folder}", "written")
        raised.hint = ELSEWHERE
        raise raised from error


def where() -> str:
    """Name the folder of temporary files."""
    from tempfile import gettempdir

    return gettempdir()


def unnamed() -> IO[bytes]:
    """Make a temporary file without a name, gone when it is closed."""
    from tempfile import TemporaryFile

    with temporary():
        return TemporaryFile()


@contextmanager
def temporary_file() -> Iterator[IO[bytes]]:
    """Make a temporary file without a name."""
    with temporary(), unnamed() as file:
        yield file


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Make a temporary folder, gone when the block ends."""
    from tempfile import TemporaryDirectory

    with temporary():
        made = TemporaryDirectory(prefix="ckptool-", ignore_cleanup_errors=True)
    with made as folder:
        yield folder
