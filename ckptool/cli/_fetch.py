"""A file argument that may be a URL: downloaded to a temporary place first, and said so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ckptool.cli import talk
from ckptool.errors import CkptoolError
from ckptool.text import readable, visible

if TYPE_CHECKING:
    from ckptool.files.hub import Downloaded


@contextmanager
def local(source: str, *, quiet: bool) -> Iterator[str]:
    """Give the path of a file, or of the temporary copy of what a URL holds.

    Raises `DownloadFailed` or `HashMismatch`; the copy goes when the block ends.
    """
    if not source.lower().startswith(("http://", "https://")):
        yield source
        return
    from ckptool.files import hub

    with talk.Progress(source, quiet=quiet) as progress:

        def show(done: int, total: int | None) -> None:
            progress.reached(done, total or 0)

        with hub.temporary(source, progress=show) as found:
            size = readable(found.nbytes)
            what = f"downloaded {visible(found.url)} ({size}) to a temporary place"
            talk.say([f"{what}; {checked(found)}"], quiet=quiet)
            try:
                yield found.path
            except CkptoolError as error:  # which names the copy, that nobody will find
                error.message = error.message.replace(found.path, source)
                error.evidence = tuple(line.replace(found.path, source) for line in error.evidence)
                error.hint = error.hint.replace(found.path, source)
                raise


def checked(found: Downloaded) -> str:
    """Say what a download was checked against."""
    if found.checked in ("nothing to check against", "size"):
        return "not checked: no hash is known"
    return f"checked: {found.checked}"
