"""A page to draw on by matplotlib: the only place that imports it.

Figures are made without pyplot, so that no display and no backend is asked for, and without what
a user has set, a date or a random name: the same picture has the same bytes. Lengths are in points,
1/72 inch, from the upper left corner.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from ckptool.cli.treemap import Box
from ckptool.errors import MissingExtra

DPI = 160  # pixels of a PNG in an inch
POINTS = 72  # in an inch
INK, GREY, RULE, PAPER = "#1a1a1a", "#5f6368", "#d5d7da", "#ffffff"
ELLIPSIS = "\u2026"
FAMILIES = ("DejaVu Sans", "Verdana", "Arial")  # the first comes with matplotlib
# Of those with characters that it lacks, what is installed.
FURTHER = ("Noto Sans CJK SC", "Noto Sans CJK JP", "Source Han Sans SC", "WenQuanYi Micro Hei")
_PLAIN = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None},
    "png": {"Software": None},
}
FORMATS = (*_PLAIN,)
_NOT_IN_XML = {0xFFFE: "?", 0xFFFF: "?"}  # of what `visible` leaves


@contextmanager
def drawing() -> Iterator[None]:
    """Load matplotlib, and draw with its own settings, in silence; raises `MissingExtra`.

    It says where it puts a cache of fonts when it may not write to the folder of a user, and which
    characters a font lacks.
    """
    import logging

    logging.getLogger("matplotlib").setLevel(logging.CRITICAL)
    given = os.environ.pop("MPLBACKEND", None)  # it may name one that is not there
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError as error:
        raise MissingExtra(
            f"pictures need matplotlib: {error}", hint="pip install 'ckptool[plot]'"
        ) from error
    finally:
        if given is not None:
            os.environ["MPLBACKEND"] = given
    known = {font.name for font in font_manager.fontManager.ttflist}
    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        matplotlib.rcdefaults()
        matplotlib.rcParams["font.family"] = "sans-serif"
        matplotlib.rcParams["font.sans-serif"] = [*FAMILIES, *known.intersection(FURTHER)]
        matplotlib.rcParams["text.hinting"] = "none"  # letters are as wide as they measure
        matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text
        matplotlib.rcParams["svg.hashsalt"] = "ckptool"
        matplotlib.rcParams["pdf.fonttype"] = 42
        yield


class Page:
    """A figure of so many pixels of a PNG; to be used while `drawing`."""

    def __init__(self, width: int, height: int) -> None:
        from matplotlib.backends.backend_agg import RendererAgg
        from matplotlib.figure import Figure

        inches = width / DPI, height / DPI
        self.width, self.height = (each * POINTS for each in inches)
        self._figure = Figure(figsize=inches, dpi=DPI, facecolor=PAPER)
        self._axes = self._figure.add_axes((0, 0, 1, 1))
        self._axes.set_axis_off()
        self._axes.set_xlim(0, self.width)
        self._axes.set_ylim(self.height, 0)
        self._meter: Any = cast(Any, RendererAgg)(1, 1, 10 * POINTS)
        self._layer = 0
        self._fonts: dict[tuple[float, bool], Any] = {}
        self._widths: dict[tuple[str, float, bool], float] = {}

    def text_width(self, text: str, size: float, *, bold: bool = False) -> float:
        """Measure a line of text."""
        from matplotlib.font_manager import FontProperties

        if (size, bold) not in self._fonts:
            self._fonts[size, bold] = FontProperties(size=size, weight="bold" if bold else "normal")
        if (text, size, bold) not in self._widths:
            width, _, _ = self._meter.get_text_width_height_descent(
                text, self._fonts[size, bold], ismath=False
            )
            self._widths[text, size, bold] = float(width) / 10
        return self._widths[text, size, bold]

    def shortened(self, text: str, size: float, room: float, *, bold: bool = False) -> str:
        """Cut a text in its middle so that it fits; an empty one where no four letters do."""
        if self.text_width(text, size, bold=bold) <= room:
            return text
        few, many = 4, len(text)
        best = ""
        while few <= many:
            count = (few + many) // 2
            tried = f"{text[: count - count // 2]}{ELLIPSIS}{text[len(text) - count // 2 :]}"
            if self.text_width(tried, size, bold=bold) <= room:
                best, few = tried, count + 1
            else:
                many = count - 1
        return best

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        *,
        colour: str = INK,
        bold: bool = False,
        align: str = "left",
        turned: bool = False,
    ) -> None:
        """Write a line whose baseline is at y, or `turned`, upwards, at x."""
        self._layer += 1
        self._axes.text(
            x,
            y,
            text.translate(_NOT_IN_XML),
            fontsize=size,
            color=colour,
            weight="bold" if bold else "normal",
            ha="right" if turned else align,
            va="center" if turned else "baseline",
            rotation=90 if turned else 0,
            parse_math=False,
            zorder=self._layer,
        )

    def boxes(
        self,
        boxes: Sequence[Box],
        colours: Sequence[str] | str,
        *,
        edge: str = "none",
        line: float = 0.0,
    ) -> None:
        """Fill boxes, each in its colour."""
        from matplotlib.collections import PolyCollection

        corners = [
            [(x, y), (x + wide, y), (x + wide, y + high), (x, y + high)]
            for x, y, wide, high in boxes
        ]
        made = PolyCollection(
            corners, facecolors=colours, edgecolors=edge, linewidths=line, joinstyle="miter"
        )
        self._add(made)

    def lines(
        self,
        ends: Sequence[tuple[tuple[float, float], tuple[float, float]]],
        colour: str,
        width: float,
    ) -> None:
        """Draw straight lines."""
        from matplotlib.collections import LineCollection

        self._add(LineCollection(ends, colors=colour, linewidths=width, capstyle="butt"))

    def dots(
        self, places: Sequence[tuple[float, float]], size: float, colours: Sequence[str] | str
    ) -> None:
        """Draw discs of a diameter, with a thin dark edge."""
        from matplotlib.collections import CircleCollection

        made = CircleCollection(
            [0.785 * size * size] * len(places),
            offsets=places,
            offset_transform=self._axes.transData,
            facecolors=colours,
            edgecolors=INK,
            linewidths=min(0.4, 0.1 * size),
        )
        self._add(made)

    def _add(self, made: Any) -> None:
        self._layer += 1
        made.set_zorder(self._layer)
        self._axes.add_collection(made, autolim=False)

    def data(self, form: str) -> bytes:
        """Return the file, in one of `FORMATS`."""
        made = io.BytesIO()
        self._figure.savefig(made, format=form, metadata=_PLAIN[form], dpi=DPI)
        return made.getvalue()
