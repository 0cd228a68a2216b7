"""`ckptool check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from ckptool.cli import talk
from ckptool.cli._options import Command
from ckptool.errors import is_out_of_memory
from ckptool.text import visible

if TYPE_CHECKING:
    from ckptool.verbs.checking import Checked


@click.command("check", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--sha256", is_flag=True, help="Print the sha256 of each file too.")
@click.option("--finite", is_flag=True, help="Count NaN and infinity in every tensor.")
@click.option("--strict", is_flag=True, help="Foreign names and TorchScript code are unsafe, too.")
@click.option("--plugins", is_flag=True, help="Let plugins read what ckptool does not know.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No talk, only errors and warnings.")
def command(files: Sequence[str], as_json: bool, quiet: bool, **how: bool) -> int:
    """Check structure, checksums and safety of files; nothing in them is loaded.

    \b
    ckptool check model_best.pth.tar
    ckptool check --finite --sha256 *.safetensors
    ckptool check downloads/                     (files with known suffixes)
    ckptool check --strict --json from_a_stranger.pth

    A line for each file: ok, damaged, unsafe, not-a-checkpoint or unsupported. Exit code 1 for
    damaged, 3 for no checkpoint, 4 for unsafe; over several files the highest.
    """
    from ckptool.cli import report, report_check
    from ckptool.verbs import checking

    paths = list(checking.expanded(files))
    results = []
    if not as_json and talk.on_terminal():
        talk.put([report_check.aligned(None, paths, _paint)])
    bugs: list[Exception] = []
    for found in _checked(paths, quiet, how, bugs):
        results.append(found)
        if not as_json:
            wide = talk.on_terminal()
            line = report_check.aligned(found, paths, _paint) if wide else report_check.row(found)
            talk.put([line])
    if as_json:
        talk.put([report.document(checking.document(results))])
    for found in results:
        _tell(found, quiet)
    talk.say(report_check.last_lines(results), quiet=quiet)
    if bugs:
        raise bugs[0]
    return max((found.status.exit_code for found in results), default=0)


def _paint(text: str, colour: str) -> str:
    return talk.coloured(text, colour, data=True)


def _checked(
    paths: Sequence[str], quiet: bool, how: dict[str, bool], bugs: list[Exception]
) -> Iterator[Checked]:
    """Check one file after the other; a defect of ours at one of them hides none of the others."""
    from ckptool.verbs import checking

    for path in paths:
        try:
            with talk.Progress(path, quiet=quiet) as progress:
                found = checking.check(path, progress=progress.begin, **how)
        except Exception as error:
            slug = "out-of-memory" if is_out_of_memory(error) else "bug"
            talk.say([f"{visible(path)}: error[{slug}]: {type(error).__name__}: not checked"])
            bugs.append(error)
        else:
            yield found


def _tell(found: Checked, quiet: bool) -> None:
    from ckptool.cli import report_check

    warning, *evidence = report_check.evidence_lines(found) or [""]
    if warning:
        talk.warn([warning])
        talk.say(evidence)
    talk.say(report_check.note_lines(found), quiet=quiet)
