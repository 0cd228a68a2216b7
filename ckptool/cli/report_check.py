"""What `check` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from ckptool.pickles.safety import evidence_line
from ckptool.text import counted, listed, visible
from ckptool.verbs.checking import BYTES_UNSEEN, Checked, Status

HEAD = ("FILE", "STATUS", "DETAIL")
SHOWN_CALLS = 8
_WIDEST_NAME = 56  # what is longer moves its own line alone
_COLOURS = {Status.OK: "green", Status.DAMAGED: "red", Status.UNSAFE: "red"}
_WIDEST_STATUS = max(len(status.value) for status in Status)


def row(found: Checked) -> str:
    """Write the line of a file for programs, with tabs between."""
    return "\t".join(_cells(found))


def aligned(found: Checked | None, files: Iterable[str], paint: Callable[[str, str], str]) -> str:
    """Write the line of a file for people, the head for None; `files` are all there will be.

    `paint` gives a text its colour.
    """
    name, status, detail = HEAD if found is None else _cells(found)
    width = min(_WIDEST_NAME, max(len(HEAD[0]), *(len(visible(each)) for each in files)))
    status = f"{status:{_WIDEST_STATUS}}"
    if found is not None:
        status = paint(status, _COLOURS.get(found.status, "yellow"))
    return f"{name:{width}}  {status}  {detail}"


def _cells(found: Checked) -> tuple[str, str, str]:
    return visible(found.file), found.status.value, visible(found.detail)


def evidence_lines(found: Checked) -> list[str]:
    """Show the dangerous calls of a file; nothing where there are none."""
    if not found.calls:
        return []
    lines = [evidence_line(call, found.pickle_name) for call in found.calls[:SHOWN_CALLS]]
    more = len(found.calls) - SHOWN_CALLS
    lines += [f"and {more} more (--json lists them)"] if more > 0 else []
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
    lines += [f"not looked at: {visible(path)} ({visible(skipped[path])})" for path in skipped]
    unseen = dict.fromkeys(line for found in results for line in found.not_checked)
    unhashed = [line for line in unseen if line.startswith(BYTES_UNSEEN)]
    if len(unhashed) > 1:
        count = sum(any(line in found.not_checked for line in unhashed) for found in results)
        merged = f"{BYTES_UNSEEN} in {counted(count, 'file')} (without checksums)"
        unseen = dict.fromkeys(merged if line in unhashed else line for line in unseen)
    return [*lines, f"not checked: {visible('; '.join(unseen))}"] if unseen else lines
