"""`ckptool info`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from ckptool.cli import _many, talk
from ckptool.cli._options import INPUT, Command, answers

if TYPE_CHECKING:
    from ckptool.cli._many import Put


@click.command("info", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=INPUT)
@click.option("--at", metavar="NAME", help="Describe this state_dict (dotted; . is the top).")
@answers
def command(files: Sequence[str], at: str | None) -> int:
    """Say what a file is, what is in it, and which commands would help.

    \b
    ckptool info mystery.pth
    ckptool info --json model_best.pth.tar
    ckptool info --at teacher dino.pth
    ckptool info *.pth

    For a file that is not a checkpoint it says what the file is, exit 3.
    """
    return _many.each(files, partial(_show, at=at))


def _show(file: str, put: Put, *, at: str | None) -> None:
    from ckptool.cli import report_info
    from ckptool.verbs import api

    facts = api.info(file, at=at)
    width = talk.columns()
    lines = report_info.info_table(facts, width) if width else report_info.info_rows(facts)
    put(facts.to_dict() if talk.speaks_json() else lines)
