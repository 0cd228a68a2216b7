"""A file argument that may be a URL: downloaded to a temporary place first, and said so."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptool import talk
from ckptool.text import readable, visible


@contextmanager
def local(source: str, *, quiet: bool) -> Iterator[str]:
    """Give the path of a file, or of the temporary copy of what a URL holds.

    Raises `DownloadFailed` or `HashMismatch`; the copy goes when the block ends.
    """
    if not source.lower().startswith(("http://", "https://")):
        yield source
        return
    from ckptool.model import hub

    with talk.Progress(source, quiet=quiet) as progress:

        def show(done: int, total: int | None) -> None:
            progress.reached(done, total or 0)

        with hub.temporary(source, progress=show) as found:
            size = readable(found.nbytes)
            checked = f"checked: {found.checked}"
            talk.say(
                [f"downloaded {visible(found.url)} ({size}) to a temporary place; {checked}"],
                quiet=quiet,
            )
            yield found.path
