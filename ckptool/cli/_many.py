"""Several files with one command: each for itself, and the worst exit code."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from ckptool.cli import talk
from ckptool.errors import CkptoolError
from ckptool.text import visible

SCHEMA = "many/1"
Data = Sequence[str] | Mapping[str, object]  # lines, or with --json a document
Put = Callable[[Data], None]


def each(files: Sequence[str], show: Callable[[str, Put], None]) -> int:
    """Show files one after the other; return the worst exit code.

    One alone is shown as it is, and what it raises is raised. Of several, lines begin with the
    file, or on a terminal come under it as a heading, and an error ends no other file.
    """
    if len(files) == 1:
        show(files[0], _put)
        return 0
    from ckptool.files import budget

    worst, wide = 0, talk.on_terminal()
    with documents() as add:
        for number, file in enumerate(files):

            def put(data: Data, file: str = file, first: bool = not number) -> None:
                if isinstance(data, Mapping):
                    add(data)
                else:
                    talk.put(_headed(file, data, first) if wide else _rows(file, data))

            try:
                with budget.run(anew=True):
                    show(file, put)
            except Exception as error:
                refused = refusal(error)
                worst = max(worst, refused.exit_code)
                add(failure(file, refused))
                if not talk.speaks_json():
                    talk.complain(refused)
    return worst


def _put(data: Data) -> None:
    if isinstance(data, Mapping):
        talk.put_document(data)
    else:
        talk.put(data)


def _headed(file: str, lines: Sequence[str], first: bool) -> list[str]:
    """Put a file over its lines, as head(1) and tail(1) do."""
    heading = f"==> {visible(talk.without_secrets(file))} <=="
    return [*([] if first else [""]), talk.coloured(heading, "cyan", data=True), *lines]


def _rows(file: str, lines: Sequence[str]) -> list[str]:
    name = visible(talk.without_secrets(file))
    return [f"{name}\t{line}" for line in lines]


def refusal(error: Exception) -> CkptoolError:
    """Return the error of one file of several, with an option that helps in place of a command."""
    if isinstance(error, BrokenPipeError):
        raise error
    refused = talk.spelled(talk.refusal(error))
    if refused.option:
        refused.hint, refused.option = f"{refused.option}   {refused.hint}".rstrip(), ""
    return refused


def failure(file: str, refused: CkptoolError) -> dict[str, object]:
    """Return the document of a file of several that failed."""
    return {"file": talk.without_secrets(file), **talk.failure(refused)}


@contextmanager
def documents(wanted: bool = True) -> Iterator[Callable[[Mapping[str, object]], None]]:
    """Print one document of several as they come: it is whole, too, where the block is left early.

    Gives what takes them, which does nothing without --json.
    """
    if not (wanted and talk.speaks_json()):
        yield lambda document: None
        return
    before = f'{{\n  "schema": "{SCHEMA}",\n  "files": ['

    def add(document: Mapping[str, object]) -> None:
        nonlocal before
        lines = talk.document(document).splitlines()
        talk.put([before, *(f"    {line}" for line in lines)], end="")
        before = ","

    try:
        yield add
    finally:
        talk.put(["" if before == "," else before, "  ]", "}"])
