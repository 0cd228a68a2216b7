"""`ckptool check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers
from ckptool.errors import EditError, is_out_of_memory
from ckptool.text import visible

if TYPE_CHECKING:
    from ckptool.verbs.check_folders import Group
    from ckptool.verbs.checked import Checked


@click.command("check", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=INPUT)
@click.option("--sha256", is_flag=True, help="Print the sha256 of each file too.")
@click.option("--finite", is_flag=True, help="Count NaN and infinity in every tensor.")
@click.option(
    "--as", "as_dtype", metavar="WORD", help="Count what a cast to bf16, f16 ... would lose."
)
@click.option("--max-size", metavar="SIZE", help="Larger files fail the check: 100MiB.")
@click.option("--strict", is_flag=True, help="Foreign names and TorchScript code are unsafe, too.")
@click.option("--plugins", is_flag=True, help="Let plugins read other formats.")
@answers
def command(files: Sequence[str], **how: Any) -> int:
    """Check structure, checksums and safety of files; nothing in them is loaded.

    \b
    ckptool check model_best.pth.tar
    ckptool check --finite --sha256 *.safetensors
    ckptool check --as f16 in.safetensors        (would a cast overflow?)
    ckptool check downloads/                     (every file, by its bytes)
    ckptool check --strict --json from_a_stranger.pth

    A line for each file: ok, damaged, too-large, unsafe, not-a-checkpoint or unsupported. Exit
    code 1 for damaged and too large, 3 for no checkpoint, 4 for unsafe; over several files the
    highest.
    """
    from ckptool.cli import report_check
    from ckptool.verbs import check_folders, checked

    groups = check_folders.groups(files)
    paths = [path for group in groups for path in group.files]
    results: list[Checked] = []
    others: list[Checked] = []
    width = None if talk.speaks_json() else talk.columns()
    if width:
        talk.put(report_check.aligned(None, paths, width, _paint))
    bugs: dict[str, Exception] = {}
    for found, listed in _checked(groups, how, bugs):
        (results if listed else others).append(found)
        if listed and not talk.speaks_json():
            talk.put(report_check.aligned(found, paths, width, _paint))
    unseen = {path: why for group in groups for path, why in group.unseen.items()}
    if talk.speaks_json():  # it has what is warned of
        failed = {path: _failure(error) for path, error in bugs.items()}
        talk.put_document(checked.document(results, others, unseen | failed))
    for found in results:
        _tell(found)
    talk.say(report_check.last_lines(results, others, unseen))
    if bugs:
        raise next(iter(bugs.values()))
    return max((found.status.exit_code for found in results), default=0)


def _paint(text: str, colour: str) -> str:
    return talk.coloured(text, colour, data=True)


def _checked(
    groups: Sequence[Group], how: dict[str, Any], bugs: dict[str, Exception]
) -> Iterator[tuple[Checked, bool]]:
    """Check one file after the other, and say which get a line.

    A folder without any gets one itself; a defect of ours at one file hides none of the others.
    """
    for group in groups:
        lines = 0
        for path in group.files:
            found = _one(path, {**how, "alone": path not in group.sets}, bugs)
            listed = found is not None and group.lists(found)
            lines += listed
            if found and (listed or group.other(found)):
                yield found, listed
        if not lines and group.folder and (found := _one(group.path, how, bugs)):
            yield found, True


def _one(path: str, how: dict[str, Any], bugs: dict[str, Exception]) -> Checked | None:
    from ckptool.verbs import checking

    try:
        with talk.Progress(path) as progress:
            return checking.check(path, progress=progress.begin, **how)
    except EditError:  # of an option: no file would fare better
        raise
    except Exception as error:
        if isinstance(error, OSError) and not is_out_of_memory(error):
            error = talk.refusal(error)
        talk.say([f"{visible(path)}: {_failure(error)}"], always=True)
        bugs[path] = error
        return None


def _failure(error: Exception) -> str:
    slug = "out-of-memory" if is_out_of_memory(error) else getattr(error, "slug", "bug")
    return f"error[{slug}]: {type(error).__name__}: not checked"


def _tell(found: Checked) -> None:
    from ckptool.cli import report_check

    if lines := report_check.evidence_lines(found):
        talk.warn(*lines)
    talk.say(report_check.note_lines(found))
