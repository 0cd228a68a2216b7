"""`ckptool info`."""

from __future__ import annotations

from dataclasses import replace

import click

from ckptool.cli import talk
from ckptool.cli._fetch import local, takes_urls
from ckptool.cli._options import Command


@click.command("info", cls=Command)
@click.argument("file", metavar="FILE")
@click.option("--at", metavar="NAME", help="Describe this state_dict (dotted; . is the top).")
@takes_urls
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No talk, only errors and warnings.")
def command(file: str, at: str | None, as_json: bool, quiet: bool) -> None:
    """Say what a file is, what is in it, and which commands would help.

    \b
    ckptool info mystery.pth
    ckptool info --json model_best.pth.tar
    ckptool info --at teacher dino.pth

    A file that is no checkpoint is named for what it is, exit 3.
    """
    from ckptool import containers
    from ckptool.cli import report, report_info
    from ckptool.text import quoted
    from ckptool.verbs.suggestions import suggestions
    from ckptool.verbs.survey import Suggestion, survey

    with local(file, quiet=quiet) as path:
        checkpoint = replace(containers.read(path, alone=True), path=file)
    facts = survey(checkpoint, at)
    suggested = suggestions(facts)
    if path != file:  # the copy is gone: there is nothing yet to work on
        suggested = [Suggestion("to keep it", f"ckptool download {quoted(file)}")]
    facts = replace(facts, suggestions=tuple(suggested))
    if as_json:
        talk.put([report.document(facts.to_dict())])
    else:
        rows = report_info.info_table if talk.on_terminal() else report_info.info_rows
        talk.put(rows(facts))
