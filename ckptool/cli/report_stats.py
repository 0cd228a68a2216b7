"""What the values of tensors are on the whole, for people and for programs."""

from __future__ import annotations

from ckptool.cli import screen
from ckptool.cli.report import key_rows
from ckptool.tensors.statistics import histogram
from ckptool.tensors.summaries import Statistics
from ckptool.text import percent, shape, visible
from ckptool.verbs.listing import Listing

BAR = 10  # characters of a histogram
_LEVELS = " .:-=+*#"
WIDE = 110  # columns of a terminal that has room for four digits
_SPARE = (1, 2, 9, 8, 7)  # columns that a narrow one can miss
_HEAD = ("KEY", "DTYPE", "SHAPE", "MIN", "MAX", "MEAN", "STD", "ZEROS", "NAN", "INF", "MIN TO MAX")


def stat_rows(found: Listing) -> list[str]:
    """List tensors for programs: what `key_rows` has, then min, max, mean, std, zeros, nan, inf."""
    rows = []
    for (key, _), row in zip(found.entries, key_rows(found.entries), strict=True):
        figures = _statistics(found, key)
        numbers = _numbers(figures) if figures.count else ("", "", "", "")
        cells = (row, *numbers, figures.zeros, figures.nan, figures.inf)
        rows.append("\t".join(map(str, cells)))
    return rows


def stat_table(found: Listing, width: int) -> list[str]:
    """List tensors for people, each with a bar: where between least and largest elements are."""
    rows: list[tuple[str, ...]] = []
    digits = 4 if width >= WIDE else 3
    for key, info in found.entries:
        figures = _statistics(found, key)
        known = _numbers(figures) if figures.count else ()
        numbers = [f"{each:.{digits}g}" for each in known] or [""] * 4
        zeros = percent(figures.zeros / figures.count) if figures.zeros else ""
        others = [str(each) if each else "" for each in (figures.nan, figures.inf)]
        what = (visible(key), info.dtype.label, shape(info.shape))
        rows.append((*what, *numbers, zeros, *others, bar(figures)))
    return screen.listed(_HEAD, rows, width, range(3, 10), _SPARE)


def bar(figures: Statistics) -> str:
    """Draw a histogram in characters, the fuller the more elements, from least to largest."""
    counts = histogram(figures, BAR)
    most = max(counts, default=0)
    if not most or figures.least == figures.largest:
        return ""
    drawn = (_LEVELS[-(-count * (len(_LEVELS) - 1) // most)] for count in counts)
    return f"|{''.join(drawn)}|"


def _statistics(found: Listing, key: str) -> Statistics:
    return (found.statistics or {}).get(key, Statistics())


def _numbers(figures: Statistics) -> tuple[float, float, float, float]:
    return figures.least, figures.largest, figures.mean, figures.std
