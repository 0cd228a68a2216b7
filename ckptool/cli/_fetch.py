"""A file argument that may be a URL, which is downloaded to a temporary place first, in time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import talk
from ckptool.errors import CkptoolError
from ckptool.text import readable, visible

if TYPE_CHECKING:
    from ckptool.files.download import Downloaded

_TIMEOUT = "ckptool.timeout"


def takes_urls(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--timeout` to a command; `timeout` returns it."""
    option = click.option(
        "--timeout",
        type=click.IntRange(1, 86_400),
        metavar="SECONDS",
        default=60,
        show_default=True,
        expose_value=False,
        callback=lambda context, _, seconds: context.meta.update({_TIMEOUT: seconds}),
        help="Give up on a server that sends less than 1 KiB/s for so long.",
    )
    return option(function)


def timeout() -> int:
    """Return the seconds of `--timeout`."""
    seconds: int = click.get_current_context().meta[_TIMEOUT]
    return seconds


@contextmanager
def local(source: str, *, quiet: bool) -> Iterator[str]:
    """Yield the path of a file, or of the temporary copy of what a URL holds.

    Raises `DownloadFailed` or `HashMismatch`; the copy goes when the block ends.
    """
    if not source.lower().startswith(("http://", "https://")):
        yield source
        return
    from ckptool.files import download, http

    limits = http.Limits(timeout=timeout())
    with (
        talk.Progress(source, quiet=quiet) as progress,
        download.temporary(source, progress=progress.reached, limits=limits) as copy,
    ):
        what = f"downloaded {visible(copy.url)} ({readable(copy.nbytes)}) to a temporary place"
        talk.say([f"{what}; {checked(copy)}"], quiet=quiet)
        try:
            yield copy.path
        except CkptoolError as error:  # its words name the copy, which will be gone
            error.message = error.message.replace(copy.path, source)
            error.evidence = tuple(line.replace(copy.path, source) for line in error.evidence)
            error.hint = error.hint.replace(copy.path, source)
            raise


def checked(done: Downloaded) -> str:
    """Return what a download was checked against, in words."""
    if done.checked in ("nothing to check against", "size"):
        return "not checked: no hash is known"
    return f"checked: {done.checked}"
