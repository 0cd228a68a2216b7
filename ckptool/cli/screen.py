"""What fits a terminal: sentences that wrap, keys cut in the middle, tables that shrink.

Widths are columns as displayed: a CJK character takes two, a combining mark none (Unicode
Standard Annex #11). Commands and paths are never cut, nor broken, so that they can be pasted.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from ckptool.text import measured, table as aligned

CUT = "..."
MORE = "  "  # before what a line goes on with
LEAST = 8  # columns that a column of a table keeps
ENOUGH = 24  # columns of a key that are worth the room of a column that can be missed
_PASTED = ("ckptool ", "/")
# A command up to the words behind it, a text in backticks, a word.
_ATOM = r"( *)(`[^`]*`\S*|ckptool (?:(?!   |; ).)*|\S+)"


def shortened(text: str, width: int) -> str:
    """Cut a text in the middle, where it has the fewest digits: those of a key number layers."""
    if measured(text) <= width:
        return text
    sizes = [measured(character) for character in text]
    ends = [0, *accumulate(sizes)]
    digits = [0, *accumulate(character.isdecimal() or character in "{}" for character in text)]
    keep = max(width - len(CUT), 2)
    cuts = []
    stop = 0
    for start in range(1, len(text)):
        if not min(3, keep // 2) <= ends[start] <= keep - keep // 4 or not sizes[start]:
            continue
        stop = max(stop, start)
        while stop < len(text) and (ends[start] + ends[-1] - ends[stop] > keep or not sizes[stop]):
            stop += 1
        cuts.append((digits[stop] - digits[start], abs(3 * ends[start] - keep), start, stop))
    if not cuts:
        return text[:width]
    _, _, start, stop = min(cuts)
    return text[:start] + CUT + text[stop:]


def wrapped(line: str, width: int | None) -> list[str]:
    """Break a line between words, and a word that is too long anywhere; what follows is indented.

    Nothing is left out: it may be what a file would run. Of an indent that leaves no room, as that
    of a deep value, the rest is.
    """
    if width is None or measured(line) <= width:
        return [line]
    width = max(width, LEAST)
    indent = line[: min(len(line) - len(line.lstrip()), width - LEAST)]
    line = indent + line.lstrip()
    lines, current = [], ""
    for gap, atom in re.findall(_ATOM, line):
        if measured(current + gap + atom) > width and current.strip():
            lines.append(current)
            current, gap = "", indent + MORE
        current += gap + atom
        while measured(current) > width and not any(sign in atom for sign in _PASTED):
            fits = bisect_right(range(len(current)), width, key=lambda at: measured(current[:at]))
            lines.append(current[: fits - 1])
            current = indent + MORE + current[fits - 1 :]
    return [*lines, current]


def table(
    rows: Sequence[Sequence[str]],
    width: int | None,
    right: Sequence[int] = (),
    spare: Sequence[int] = (),
    key: int | None = None,
) -> list[str]:
    """Align columns within a width, if any; those in `right` are numbers, which are never cut.

    Of `spare` columns the first are left out where keys would be cut to less than `ENOUGH`. What
    holds spaces is a sentence, which wraps, but in the column that has keys.
    """
    natural = _natural(rows)
    if width is None or sum(natural) + len(MORE) * (len(natural) - 1) <= width:
        return aligned(rows, right)
    rows = [[_compact(cell) for cell in row] for row in rows]
    natural, shown = _natural(rows), list(range(len(natural)))
    for left_out in (None, *spare):
        shown = [at for at in shown if at != left_out]
        right_now = [at for at, column in enumerate(shown) if column in right]
        wanted = [natural[column] for column in shown]
        widths = fitted(wanted, width, right_now)
        if all(got >= min(size, ENOUGH) for got, size in zip(widths, wanted, strict=True)):
            break
    names = shown.index(key) if key is not None else None
    cut = [line for row in rows for line in pieces([row[at] for at in shown], widths, names)]
    return aligned(cut, right_now)


def _natural(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(measured, column)) for column in zip(*rows, strict=True)]


def listed(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    width: int | None,
    right: Sequence[int] = (),
    spare: Sequence[int] = (),
    key: int = 0,
) -> list[str]:
    """Write rows below a head for people, with tabs between for programs, who have no width.

    Of `spare` columns for people, those are left out that say nothing, too.
    """
    if width is None:
        return ["\t".join(row) for row in rows]
    kept = [at for at in range(len(head)) if at not in spare or any(row[at] for row in rows)]
    chosen = [[row[at] for at in kept] for row in (head, *rows)]
    right, spare = ([kept.index(at) for at in each if at in kept] for each in (right, spare))
    return table(chosen, width, right, spare, kept.index(key))


def fitted(natural: Sequence[int], width: int, right: Sequence[int] = ()) -> list[int]:
    """Return widths of columns within a width: the widest shrink first, to one width."""
    flexible = [at for at in range(len(natural)) if at not in right]
    room = width - len(MORE) * (len(natural) - 1) - sum(natural[at] for at in right)
    level = max((natural[at] for at in flexible), default=0)
    while level > LEAST and sum(min(natural[at], level) for at in flexible) > room:
        level -= 1
    widths = [size if at in right else min(size, level) for at, size in enumerate(natural)]
    rest = room - sum(widths[at] for at in flexible)
    for at in sorted(flexible, key=lambda at: natural[at] - widths[at]):
        more = max(min(rest, natural[at] - widths[at]), 0)
        widths[at] += more
        rest -= more
    return widths


def pieces(row: Sequence[str], widths: Sequence[int], key: int | None = None) -> list[list[str]]:
    """Divide a row in those of a screen: sentences wrap; keys, which may hold spaces, are cut."""
    cells = [
        _cell(cell, width, wraps=at != key)
        for at, (cell, width) in enumerate(zip(row, widths, strict=True))
    ]
    height = max(map(len, cells))
    return [[cell[at] if at < len(cell) else "" for cell in cells] for at in range(height)]


def _cell(cell: str, width: int, *, wraps: bool) -> list[str]:
    if measured(cell) <= width:
        return [cell]
    if wraps and " " in cell.strip() and not cell.startswith("["):
        return [line.removeprefix(MORE) for line in wrapped(cell, width)]
    return [shortened(cell, width)]


def _compact(cell: str) -> str:
    """Write a shape without spaces."""
    return cell.replace(", ", ",") if cell.startswith("[") else cell
