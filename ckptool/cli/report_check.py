"""What `check` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ckptool.cli import screen
from ckptool.pickles.safety import evidence_line
from ckptool.text import at_most, counted, listed, measured, table, visible
from ckptool.verbs.checked import BYTES_UNSEEN, Checked, Status

HEAD = ("FILE", "STATUS", "DETAIL")
SHOWN_CALLS = 8
FOREIGN = (
    "foreign names are imported by no command of ckptool; torch.load refuses them by default, and "
    "whatever does load them imports the code that they name"
)
_COLOURS = {Status.OK: "green", Status.DAMAGED: "red", Status.UNSAFE: "red"}
_DETAIL = 36  # columns for it, beside names of files
_WIDEST_STATUS = max(len(status.value) for status in Status)


def aligned(
    found: Checked | None,
    files: Iterable[str],
    width: int | None,
    paint: Callable[[str, str], str],
) -> list[str]:
    """Write the lines of a file, the head for None; `files` are all there will be.

    For programs, who have no width, it is a line with tabs between. `paint` gives a text its
    colour.
    """
    cells = HEAD if found is None else _cells(found)
    if width is None:
        return ["\t".join(cells)]
    name, status, detail = cells
    names = max(measured(visible(each)) for each in (HEAD[0], *files))
    if names + _WIDEST_STATUS + _DETAIL > width:  # long paths are above what is said of them
        names = len(HEAD[0])
    widths = screen.fitted([names, _WIDEST_STATUS, width], width, right=[0, 1])
    alone = [name] if measured(name) > names else []
    lines = screen.pieces(["" if alone else name, status, detail], widths)
    if found is not None:
        lines[0][1] = paint(f"{status:{_WIDEST_STATUS}}", _COLOURS.get(found.status, "yellow"))
    blank = [" " * each for each in widths]
    return [*alone, *table([blank, *lines])[1:]]


def _cells(found: Checked) -> tuple[str, str, str]:
    return visible(found.file), found.status.value, visible(found.detail)


def evidence_lines(found: Checked) -> list[str]:
    """Show the dangerous calls of a file; nothing where there are none."""
    if not found.calls:
        return []
    calls = [evidence_line(call, found.pickle_name) for call in found.calls]
    lines = at_most(calls, SHOWN_CALLS, " (--json lists them)")
    first = f"{visible(found.file)} would run code when loaded; nothing was executed"
    return [first, *(f"    {visible(line)}" for line in lines)]


def note_lines(found: Checked) -> list[str]:
    """Return what is odd about a file, and what helps."""
    name = visible(found.file)
    hint = [f"hint: {found.hint}"] if found.hint else []
    return [f"{name}: {visible(line)}" for line in (*found.notes, *hint)]


def last_lines(
    results: Sequence[Checked], others: Sequence[Checked] = (), skipped: Mapping[str, str] = {}
) -> list[str]:
    """Count, where there are several, and say what nobody looked at."""
    counts = [
        f"{sum(found.status is status for found in results)} {status.value}"
        for status in Status
        if any(found.status is status for found in results)
    ]
    lines = [f"{counted(len(results), 'file')}: {', '.join(counts)}"] if len(results) > 1 else []
    if others:
        named = listed(f"{each.file} ({each.detail})" for each in others)
        lines.append(f"{counted(len(others), 'other file')}, not checkpoints: {named}")
    if any(found.status is not Status.UNSAFE and found.safety == "foreign" for found in results):
        lines.append(FOREIGN)
    lines += [f"not looked at: {visible(path)} ({visible(skipped[path])})" for path in skipped]
    unseen = dict.fromkeys(line for found in results for line in found.not_checked)
    unhashed = [line for line in unseen if line.startswith(BYTES_UNSEEN)]
    if len(unhashed) > 1:
        count = sum(any(line in found.not_checked for line in unhashed) for found in results)
        merged = f"{BYTES_UNSEEN} in {counted(count, 'file')} (without checksums)"
        unseen = dict.fromkeys(merged if line in unhashed else line for line in unseen)
    return [*lines, f"not checked: {visible('; '.join(unseen))}"] if unseen else lines
