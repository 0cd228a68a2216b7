"""`ckptool info`."""

from __future__ import annotations

from dataclasses import replace

import click

from ckptool.cli import talk
from ckptool.cli._options import Command


@click.command("info", cls=Command)
@click.argument("file", metavar="FILE")
@click.option("--at", metavar="NAME", help="Describe this state_dict (dotted; . is the top).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Only data, errors and warnings.")
def command(file: str, at: str | None, as_json: bool, quiet: bool) -> None:
    """Say what a file is, what is in it, and which commands would help.

    \b
    ckptool info mystery.pth
    ckptool info --json model_best.pth.tar
    ckptool info --at teacher dino.pth

    For a file that is not a checkpoint it says what the file is, exit 3.
    """
    from ckptool import containers
    from ckptool.cli import report_info
    from ckptool.verbs.suggestions import suggestions
    from ckptool.verbs.survey import survey

    facts = survey(containers.read(file, alone=True), at)
    facts = replace(facts, suggestions=tuple(suggestions(facts)))
    if as_json:
        talk.put_document(facts.to_dict())
    else:
        rows = report_info.info_table if talk.on_terminal() else report_info.info_rows
        talk.put(rows(facts))
