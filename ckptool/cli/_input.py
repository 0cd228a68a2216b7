"""What `-` is: standard input where a file is read, standard output where one is written."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import talk

if TYPE_CHECKING:
    from ckptool.files.stream import Pipe

STANDARD = "-"
_TAKEN = "ckptool.standard_input"


class Input(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4
    """A file to read. `-` becomes what standard input gives, once."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path as it is, or standard input as an open file."""
        if type(value) is not str or value != STANDARD or (ctx and ctx.resilient_parsing):
            return value
        if sys.stdin is None or sys.stdin.isatty():
            what = "which is a terminal" if sys.stdin else "which is closed"
            self.fail(f"- is standard input, {what}: pipe a file into it", param, ctx)
        meta = ctx.meta if ctx else {}
        if meta.get(_TAKEN):
            self.fail("- is standard input, which can be read once", param, ctx)
        from ckptool.files.spool import streamed

        meta[_TAKEN] = True
        return streamed(STANDARD, sys.stdin.fileno())


INPUT = Input()


def standard_output(*, is_data: bool) -> Pipe:
    """Return standard output as a place for bytes; it takes no document with them."""
    from ckptool.files.stream import Pipe

    if is_data and talk.speaks_json():
        raise click.UsageError("--json and an output that is - both go to stdout")
    if is_data and sys.stdout.isatty():
        what = "- is standard output, which is a terminal: pipe it into a command or a file"
        raise click.UsageError(what)
    sys.stdout.flush()
    return Pipe(STANDARD, sys.stdout.fileno() if is_data else -1)
