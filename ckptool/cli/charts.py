"""The pictures of `plot`: a treemap of sizes, and rows of layers with values or changes."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import asinh, ceil, floor, inf, isfinite, log10

from ckptool.cli.pictures import GREY, INK, PAPER, RULE, Page, drawing
from ckptool.cli.treemap import Box, Placed, placed, tree
from ckptool.records import NamedTuple
from ckptool.text import counted, readable, visible
from ckptool.verbs.plotting import Layer, Plot

MARGIN, HEAD, FOOT = 16.0, 46.0, 40.0
TITLE, TEXT, SMALL, LEAST = 13.0, 8.5, 7.0, 5.5  # sizes of type
# ColorBrewer's GnBu and YlGnBu, light to dark: the colour-blind, and grey paper, keep them apart.
AREAS = ("#f7fcf0", "#e0f3db", "#ccebc5", "#a8ddb5", "#7bccc4", "#4eb3d3")  # for dark type
DOTS = ("#c7e9b4", "#7fcdbb", "#41b6c4", "#2c7fb8", "#253494")
SPREAD = ("#d3e4f3", "#7fb3d8", "#2a6fb0")  # all, 98 %, half of the elements
ALERT = "#d55e00"  # of Okabe and Ito's palette
COSINES = (0.999, 0.99, 0.9, 0.5)
GAP = 9.5  # between lines of labels, at least


def picture(plot: Plot, form: str, size: tuple[int, int], *, by: str = "bytes") -> bytes:
    """Draw in a format of `pictures.FORMATS`, so many pixels wide and high; `by` sizes boxes."""
    with drawing():
        page = Page(*size)
        match plot.kind:
            case "sizes":
                _draw_sizes(page, plot, by)
            case "values":
                _draw_values(page, plot)
            case _:
                _draw_change(page, plot)
        return page.data(form)


def short(count: float) -> str:
    """Write a count in a few characters: `25.6 M`."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= unit:
            return f"{count / unit:.3g} {letter}"
    return f"{count:.0f}"


def _nbytes(size: float) -> str:
    return readable(int(size)).replace(".0 ", " ")


def _title(page: Page, plot: Plot, what: str) -> None:
    room = page.width - 2 * MARGIN
    names = [visible(name.rstrip("/").rpartition("/")[2]) for name in (plot.file, plot.other or "")]
    title = " \u2192 ".join(filter(None, names))
    page.text(MARGIN, MARGIN + 10, page.shortened(title, TITLE, room, bold=True), TITLE, bold=True)
    size = f"{counted(plot.tensors, 'tensor')}, {short(plot.parameters)} parameters"
    line = f"{what}   |   {size}, {readable(plot.nbytes)}"
    page.text(MARGIN, MARGIN + 23, page.shortened(line, TEXT, room), TEXT, colour=GREY)


def _legend(page: Page, what: str, items: Sequence[tuple[str, str]]) -> None:
    """Draw swatches with words behind them at the foot, smaller where the page is narrow."""
    swatch, gap = 15.0, 13.0
    words = [word for _, word in items]
    whole = sum(page.text_width(word, SMALL) + swatch + gap for word in words)
    whole += page.text_width(what, SMALL)
    scale = min(1.0, (page.width - 2 * MARGIN) / whole)
    x, y, size = MARGIN, page.height - MARGIN, SMALL * scale
    if what:
        page.text(x, y - scale, what, size, colour=GREY)
        x += page.text_width(what, size) + gap * scale / 2
    for colour, word in items:
        page.boxes([Box(x, y - 7.5 * scale, 11 * scale, 8 * scale)], [colour], edge=GREY, line=0.4)
        page.text(x + swatch * scale, y - scale, word, size)
        x += page.text_width(word, size) + (swatch + gap) * scale


# Sizes.


def _draw_sizes(page: Page, plot: Plot, by: str) -> None:
    in_bytes = by == "bytes"
    unit: Callable[[float], str] = _nbytes if in_bytes else short
    sizes = [layer.nbytes if in_bytes else layer.parameters for layer in plot.layers]
    leaves = [
        (layer.path, ", ".join(layer.tensors), size)
        for layer, size in zip(plot.layers, sizes, strict=True)
        if size
    ]
    _title(page, plot, f"{by} by module")
    area = Box(MARGIN, HEAD, page.width - 2 * MARGIN, page.height - HEAD - FOOT + 8)
    places = [*placed(tree(leaves), area)] if leaves else []
    boxes = [each for each in places if each.leaf]
    edges = _edges(max((each.branch.size for each in boxes), default=1.0), in_bytes)
    colours = [AREAS[bisect_right(edges, each.branch.size)] for each in boxes]
    page.boxes([each.box for each in boxes], colours, edge=PAPER, line=0.5)
    groups = [each for each in places if not each.leaf and each.names]
    for level in sorted({len(each.names) for each in groups}, reverse=True):
        outlined = [each.box for each in groups if len(each.names) == level]
        page.boxes(outlined, "none", edge=INK if level == 1 else GREY, line=1.2 / level**1.5)
    tags = _tag(page, groups, unit)
    for each in boxes:
        _name(page, each, unit(each.branch.size), _below(each.box, each.names, tags), INK)
    words = [f"< {unit(edges[0])}", *(f"\u2265 {unit(edge)}" for edge in edges)]
    _legend(page, "a module has", [*zip(AREAS, words, strict=True)])


def _edges(most: float, in_bytes: bool) -> list[float]:
    """Return where one colour ends and the next begins: round sizes, up to the largest there is."""
    if in_bytes:
        steps = [4.0**power for power in range(32)]
    else:
        steps = [digit * 10.0**power for power in range(16) for digit in (1, 3)]
    count = len(AREAS) - 1
    last = max(bisect_right(steps, most), count)
    return steps[last - count : last]


def _tag(
    page: Page, groups: Sequence[Placed], unit: Callable[[float], str]
) -> dict[tuple[str, ...], Box]:
    """Name groups in their upper left corner, below the names of those that they are in."""
    tags: dict[tuple[str, ...], Box] = {}
    words = []
    for each in groups:
        level, box = len(each.names), each.box
        size, bold = max(TEXT + 1 - level, SMALL - 1), level == 1
        high = size + 3
        y = _below(box, each.names, tags) + 1.5
        name = page.shortened(visible(each.branch.name), size, box.width - 9, bold=bold)
        if not name or box.y + box.height - y < (1.2 if bold else 2.2) * high:
            continue
        wide = page.text_width(name, size, bold=bold) + 6
        words.append((box.x + 4.5, y + size - 0.2, name, size, INK, bold))
        nbytes = unit(each.branch.size)
        further = page.text_width(nbytes, size - 1) + 4
        if wide + further < box.width - 4:
            words.append((box.x + 2 + wide, y + size - 0.2, nbytes, size - 1, GREY, False))
            wide += further
        tags[each.names] = Box(box.x + 1.5, y, wide, high)
    page.boxes([*tags.values()], PAPER + "e0")
    for x, y, word, size, colour, bold in words:
        page.text(x, y, word, size, colour=colour, bold=bold)
    return tags


def _below(box: Box, names: tuple[str, ...], tags: Mapping[tuple[str, ...], Box]) -> float:
    """Return where a box begins below the tags of those that it is in."""
    above = [tags[names[:at]] for at in range(1, len(names)) if names[:at] in tags]
    over = [tag for tag in above if tag.x < box.x + box.width and box.x < tag.x + tag.width]
    return max([box.y, *(tag.y + tag.height for tag in over if tag.y < box.y + box.height)])


def _name(page: Page, each: Placed, nbytes: str, top: float, colour: str) -> None:
    """Name a box in the middle of what is below `top`, with its size where that fits."""
    box = each.box
    wide, high = box.width - 3, box.y + box.height - top - 2
    x, y = box.x + box.width / 2, top + (high + 2) / 2
    turned = high > 2.5 * wide
    room, across = (high, wide) if turned else (wide, high)
    if across < LEAST * 1.1 or room < 2 * LEAST:
        return
    full = visible(each.branch.name)
    tries = [(name, size) for name in (full, full.rpartition(".")[2]) for size in (SMALL, LEAST)]
    fitting = [
        (name, size)
        for name, size in tries
        if across > 1.1 * size and page.text_width(name, size) <= room
    ]
    name, size = (fitting or [(page.shortened(tries[-1][0], LEAST, room), LEAST)])[0]
    if not name:
        return
    both = not turned and high > 2.4 * size and page.text_width(nbytes, LEAST) <= wide
    if turned:
        page.text(x + 0.36 * size, y, name, size, colour=colour, align="center", turned=True)
        return
    page.text(x, y + (-0.1 if both else 0.36) * size, name, size, colour=colour, align="center")
    if both:
        page.text(x, y + size, nbytes, LEAST, colour=colour, align="center")


# Rows of layers.


class _Rows(NamedTuple):
    """Where rows are: the area right of their names."""

    area: Box
    high: float  # of a row

    def middle(self, at: float) -> float:
        return self.area.y + (at + 0.5) * self.high


def _rows(page: Page, layers: Sequence[Layer]) -> _Rows:
    """Name rows, or groups of them where there are many, and shade every second group."""
    high = (page.height - HEAD - FOOT - 16) / len(layers)
    named = _named(_runs([layer.path for layer in layers], high), high)
    room = min(max(page.text_width(visible(name), SMALL) for *_, name in named), 0.3 * page.width)
    area = Box(MARGIN + room + 6, HEAD, page.width - 2 * MARGIN - room - 6, high * len(layers))
    rows = _Rows(area, high)
    starts = [first for first, *_ in named] + [len(layers)]
    bands = [
        Box(area.x, HEAD + first * high, area.width, (end - first) * high)
        for first, end in zip(starts[1::2], starts[2::2], strict=False)
    ]
    page.boxes(bands, "#f3f5f7")
    for first, end, name in named:
        text = page.shortened(visible(name), SMALL, room)
        page.text(
            MARGIN + room, rows.middle((first + end - 1) / 2) + 2.5, text, SMALL, align="right"
        )
    return rows


_Run = tuple[int, int, str]  # the first row, the one after the last, and their name


def _runs(paths: Sequence[tuple[str, ...]], high: float) -> list[_Run]:
    """Return runs of rows: the deepest modules whose names nearly all have room."""
    found: list[_Run] = []
    for depth in range(1, max(map(len, paths)) + 1):
        runs, start = [], 0
        for path, inside in groupby(path[:depth] for path in paths):
            end = start + len([*inside])
            runs.append((start, end, ".".join(path)))
            start = end
        room = len(paths) * high / GAP
        if found and len(runs) > room and len(found) > room / 4:
            break
        found = runs
        if len(runs) > room:
            break
    return found


def _named(runs: Sequence[_Run], high: float) -> list[_Run]:
    """Return the runs whose names do not overlap; with many of them, those at even distances."""
    every = max(1, ceil(len(runs) * GAP / (runs[-1][1] * high) - 0.5))
    named: list[_Run] = []
    for run in runs[::every] if every > 1 else runs:
        if not named or _middle(run, high) - _middle(named[-1], high) >= GAP - 0.5:
            named.append(run)
    return named


def _middle(run: _Run, high: float) -> float:
    return (run[0] + run[1]) / 2 * high


class _Axis(NamedTuple):
    """How numbers become places from left to right, and which are marked."""

    place: Callable[[float], float]
    ticks: Sequence[float]
    low: float
    high: float

    def x(self, area: Box, value: float) -> float:
        low, high = self.place(self.low), self.place(self.high)
        share = (self.place(min(max(value, self.low), self.high)) - low) / ((high - low) or 1)
        return area.x + 4 + share * (area.width - 8)


def _draw_axis(page: Page, axis: _Axis, area: Box, title: str) -> None:
    bottom = area.y + area.height
    below = -inf
    lines = []
    for tick in axis.ticks:
        x = axis.x(area, tick)
        text = f"{tick:g}"
        wide = page.text_width(text, SMALL)
        lines.append(((x, area.y), (x, bottom + 2)))
        if x - wide / 2 > below + 4:
            page.text(x, bottom + 10.5, text, SMALL, colour=GREY, align="center")
            below = x + wide / 2
    page.lines(lines, RULE, 0.6)
    if 0 in axis.ticks:
        x = axis.x(area, 0)
        page.lines([((x, area.y), (x, bottom))], GREY, 0.6)
    page.text(area.x + area.width, bottom + 20, title, SMALL, colour=GREY, align="right")


def _linear(low: float, high: float) -> _Axis:
    """Mark about eight round numbers."""
    rough = (high - low) / 8 or 1.0
    power = 10.0 ** floor(log10(rough))
    step = next(power * digit for digit in (1, 2, 5, 10) if power * digit >= rough)
    ticks = [round(at * step, 12) for at in range(ceil(low / step), floor(high / step) + 1)]
    return _Axis(lambda value: value, ticks, low, high)


def _decades(low: float, high: float, most: int) -> list[float]:
    """Return powers of ten between two numbers, so many at most."""
    first, last = ceil(log10(low) - 1e-9), floor(log10(high) + 1e-9)
    step = max(1, ceil((last - first + 1) / most))
    return [10.0**power for power in range(first, last + 1, step)]


def _both_signs(low: float, high: float, core: float) -> _Axis:
    """Scale numbers so that those smaller than `core` lie evenly, and others by their magnitude."""
    largest = max(abs(low), abs(high))
    if largest <= 20 * core:
        return _linear(low, high)
    marks = _decades(10.0 ** floor(log10(core)), largest, 5)
    ticks = [*(-mark for mark in reversed(marks) if -mark >= low), 0.0]
    ticks += [mark for mark in marks if mark <= high]
    return _Axis(lambda value: asinh(value / core), ticks, low, high)


# Values.


def _draw_values(page: Page, plot: Plot) -> None:
    _title(page, plot, "values by layer")
    rows = _rows(page, plot.layers)
    known = [(at, each) for at, each in enumerate(plot.layers) if each.quantiles and each.values]
    spans = [(each.values.least, each.values.largest) for _, each in known if each.values]
    low, high = (
        min((each[0] for each in spans), default=-1),
        max((each[1] for each in spans), default=1),
    )
    if low == high:
        low, high = low - 1, high + 1
    cores = sorted(max(abs(each.quantiles[1]), abs(each.quantiles[3])) for _, each in known)
    core = cores[len(cores) // 2] if cores else 0
    axis = _both_signs(min(low, 0), max(high, 0), core or max(abs(low), abs(high)))
    beyond = f", by magnitude beyond {core:.0e}" if axis.place(1) != 1 else ""
    _draw_axis(page, axis, rows.area, f"value{beyond}")
    dense = rows.high < 3
    for number, share in enumerate((0.28, 0.6, 0.86)):
        bars = []
        for (at, each), span in zip(known, spans, strict=True):
            ends = (
                span,
                (each.quantiles[0], each.quantiles[4]),
                (each.quantiles[1], each.quantiles[3]),
            )
            left, right = (axis.x(rows.area, end) for end in ends[number])
            tall = rows.high * (1.0 if dense else share)
            bars.append(Box(left, rows.middle(at) - tall / 2, max(right - left, 0.6), tall))
        page.boxes(bars, SPREAD[number])
    tall = 0.5 * rows.high if dense else 0.43 * rows.high
    medians = [(axis.x(rows.area, each.quantiles[2]), rows.middle(at)) for at, each in known]
    page.lines([((x, y - tall), (x, y + tall)) for x, y in medians], INK, 0.9)
    odd = [at for at, each in enumerate(plot.layers) if each.odd]
    x = rows.area.x + rows.area.width
    page.dots([(x, rows.middle(at)) for at in odd], 5, ALERT)
    items = [*zip((*SPREAD, INK), ("all", "98 %", "half of the values", "median"), strict=True)]
    if odd:
        items.append((ALERT, f"NaN or infinite in {counted(len(odd), 'layer')}"))
    _legend(page, "", items)


# Change.


def _draw_change(page: Page, plot: Plot) -> None:
    _title(page, plot, "change by layer")
    rows = _rows(page, plot.layers)
    moved = [(at, each.moved) for at, each in enumerate(plot.layers) if each.moved]
    far = {at: each.relative for at, each in moved}
    sizes = [each for each in far.values() if each and isfinite(each)]
    low, high = min(sizes, default=0.1), max(sizes, default=1.0)
    logarithmic = high > 30 * low
    if logarithmic:
        low, high = 10.0 ** floor(log10(low)), 10.0 ** ceil(log10(high))
        axis = _Axis(log10, _decades(low, high, 12), low, high)
    else:
        axis = _linear(0, high * 1.02)
    _draw_axis(page, axis, rows.area, "norm of the change / norm of the layer")
    cosines = {at: each.cosine for at, each in moved}
    size = max(1.5, min(6.0, 0.8 * rows.high))
    sticks, dots, colours, still, lost = [], [], [], [], []
    for at, value in far.items():
        y = rows.middle(at)
        if not value:
            still.append((rows.area.x + 4, y))
        elif not isfinite(value):
            lost.append((rows.area.x + rows.area.width - 4, y))
        else:
            x = axis.x(rows.area, value)
            sticks.append(((rows.area.x + 4, y), (x, y)))
            dots.append((x, y))
            colours.append(_colour(cosines[at]))
    page.lines(sticks, "#9aa0a6", max(0.3, min(1.0, 0.25 * rows.high)))
    page.dots(dots, size, colours)
    page.dots(still, size, PAPER)
    page.dots(lost, size, ALERT)
    least = f"< {COSINES[-1]}"
    items = [*zip(DOTS, [*(f"\u2265 {each}" for each in COSINES), least], strict=True)]
    items += [(PAPER, f"unchanged: {counted(len(still), 'layer')}")] if still else []
    items += [(ALERT, "zero, or not finite, before")] if lost else []
    _legend(page, "cosine", items)


def _colour(cosine: float | None) -> str:
    """Return the colour of a cosine; one that is not known has that of the least."""
    found = sum(cosine is None or cosine < each for each in COSINES)
    return DOTS[found]
