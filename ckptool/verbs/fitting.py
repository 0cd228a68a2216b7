"""Pretrained transfer: keep of a checkpoint what fits a target, and say what does not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from dataclasses import field, replace
from math import prod
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import PoorFit
from ckptool.files.copying import Begin, no_progress
from ckptool.records import dataclass, grouped, plain
from ckptool.state import adapting, checkpoint as places, edits
from ckptool.state.adapting import Adapted, Asked
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.edits import Edit, Value
from ckptool.state.layouts import Layout, layout_of
from ckptool.state.matching import match
from ckptool.state.renaming import Renaming, Rule
from ckptool.state.wrappers import peeling
from ckptool.tensors.tensor import shapes_of
from ckptool.text import (
    argument as file_argument,
    at_most,
    counted,
    listed,
    percent,
    quoted,
    shape,
    visible,
)
from ckptool.verbs import surgery
from ckptool.verbs.options import MIN_MATCH
from ckptool.verbs.plan import argument
from ckptool.verbs.surgery import Options, Rewrite

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.documents import editing
    from ckptool.model.initial import Fill

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """The keys and shapes of a target, without wrapper prefixes; `name` is for reports.

    `ties` map keys to those that are the same tensor, `dtypes` to torch's names; `option` is how a
    command names it.
    """

    name: str
    shapes: dict[str, Shape]
    ties: Mapping[str, str] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    option: str = ""


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A key that both sides have, in different shapes."""

    key: str
    here: Shape
    there: Shape


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint fits a target; `filled` is the share of the target's elements.

    A tensor that is tied counts once in it. `adapted` are among those that match, and were
    brought into the target's shape.
    """

    target: str
    matched: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    absent: tuple[str, ...]
    filled: float
    adapted: tuple[Adapted, ...] = ()

    def __repr__(self) -> str:
        counts = f"{len(self.matched)} match, {len(self.mismatched)} differ in shape"
        counts += f", {len(self.missing)} missing, {len(self.absent)} absent"
        return f"<Fit to {visible(self.target)}: {counts}, {percent(self.filled)} filled>"


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer wrote, and how it fits its target, if it had one.

    `initialised` are the keys that the source did not fill and that were written all the same.
    """

    rewrite: Rewrite
    fit: Fit | None
    initialised: tuple[str, ...] = ()

    def to_dict(self) -> editing.Transfer:
        """Return the document `transfer/1`."""
        fit = self.fit
        return {
            **self.rewrite.to_dict(),
            "schema": "transfer/1",
            "matched": len(fit.matched) if fit else None,
            "mismatched": plain(fit.mismatched) if fit else [],
            "missing": list(fit.missing) if fit else [],
            "filled": fit.filled if fit else None,
            "adapted": plain(fit.adapted) if fit else [],
            "initialised": list(self.initialised),
        }


def reference(name: str, layout: Layout, *, anywhere: bool = False, option: str = "") -> Reference:
    """Make a reference of a layout, wrappers peeled."""
    peel = peeling(layout.shapes, anywhere=anywhere)
    named = ((peel(key), sizes) for key, sizes in layout.shapes.items())
    return Reference(
        name,
        {key: sizes for key, sizes in named if key is not None},
        {peel.name(key): peel.name(first) for key, first in layout.ties.items()},
        {peel.name(key): dtype for key, dtype in layout.dtypes.items()},
        option,
    )


def reference_of(
    checkpoint: Checkpoint, at: str | None = None, *, anywhere: bool = False
) -> Reference:
    """Take the layout of another checkpoint."""
    layout = layout_of(places.find(checkpoint, at, "--like-at").entries)
    where = f" --like-at {quoted(at)}" if at else ""
    option = f"--like {file_argument(checkpoint.path)}{where}"
    return reference(checkpoint.path, layout, anywhere=anywhere, option=option)


def fit(shapes: Mapping[str, Shape], target: Reference) -> Fit:
    """Compare the keys and shapes of a checkpoint with a target's."""
    matched = tuple(key for key, shape in target.shapes.items() if shapes.get(key) == shape)
    mismatched = tuple(
        Mismatch(key, shape, target.shapes[key])
        for key, shape in shapes.items()
        if key in target.shapes and target.shapes[key] != shape
    )
    total = _elements(target, target.shapes)
    filled = _elements(target, matched)
    return Fit(
        target=target.name,
        matched=matched,
        mismatched=mismatched,
        missing=tuple(key for key in target.shapes if key not in shapes),
        absent=tuple(key for key in shapes if key not in target.shapes),
        filled=filled / total if total else 1.0,
    )


def _elements(target: Reference, keys: Iterable[str]) -> int:
    """Count the elements under keys, those of a tied tensor once."""
    return sum(prod(target.shapes[key]) for key in {target.ties.get(key, key) for key in keys})


def transfer(
    source: str | Path,
    target: str | Path | None,
    *,
    like: Reference | None = None,
    steps: Sequence[Edit] = (),
    min_match: float = MIN_MATCH,
    options: Options | None = None,
    progress: Begin = no_progress,
    fill: Fill | None = None,
    adapt: Asked | None = None,
    opened: Checkpoint | None = None,
) -> Transferred:
    """Write the bare state_dict with what fits the target alone.

    `steps` come first; `adapt` says what is brought into the target's shape,
    `fill` gives what the source lacks; `opened` is the source where it was read before. Raises
    `PoorFit` where less than `min_match` of the target's elements would be filled, and what
    `rewrite` raises.
    """
    options = options or Options()
    checkpoint, found, unfilled = opened or containers.read(source), None, list[str]()
    if like is not None:
        entries, given = _entries_after(checkpoint, steps, options), steps
        found = fit(shapes_of(entries), like)
        if adapt is not None:
            step, found = _adapted(entries, found, like, adapt)
            steps = [*steps, *step]
        if found.filled < min_match:
            where = f" --at {quoted(options.at)}" if options.at else ""
            named = f"{file_argument(checkpoint.path)}{where}"
            renamed = set[str]()
            if given and given[-1].name == "rename":
                renamed = entries.keys() - _entries_after(checkpoint, given[:-1], options).keys()
            raise _poor(found, shapes_of(entries), like, min_match, named, renamed)
        mismatched = [each.key for each in found.mismatched]
        unfilled = [*mismatched, *found.missing]
        dropped = edits.without(mismatched, edits.SHAPE_DIFFERS)
        steps = [*steps, dropped, edits.without(found.absent, f"not in {like.name}")]
    with fill(unfilled) if like and fill else nullcontext({}) as added:
        result = surgery.rewrite(
            source,
            target,
            steps,
            bare=True,
            options=options,
            progress=progress,
            opened=checkpoint,
            added=added,
            order=list(like.shapes) if like and added else (),
        )
        return Transferred(result, found, tuple(added))


def _entries_after(
    checkpoint: Checkpoint, steps: Sequence[Edit], options: Options
) -> dict[str, Value]:
    """Return what is there after the first edits."""
    state = places.find(checkpoint, options.at)
    return edits.apply(steps, state.entries, argument(checkpoint, options))[0].entries


def _adapted(
    entries: Mapping[str, Value], found: Fit, like: Reference, asked: Asked
) -> tuple[list[Edit], Fit]:
    """Return the edit that adapts what was asked for, if there is any of it, and the fit then."""
    wanted = {each.key: each.there for each in found.mismatched}
    wanted |= adapting.regridded(entries, found.matched, asked)
    kinds = adapting.plan(entries, wanted, asked)
    if not kinds:
        return [], found
    step, done = adapting.edit(kinds, wanted, asked)
    after = edits.apply([step], entries)[0].entries
    return [step], replace(fit(shapes_of(after), like), adapted=tuple(done))


def _poor(
    found: Fit,
    shapes: Mapping[str, Shape],
    like: Reference,
    min_match: float,
    source: str,
    renamed: Set[str],
) -> PoorFit:
    total = len(like.shapes)
    option, share, others = _mending(shapes, like, found.filled, renamed)
    lower = int((share or found.filled) * 100) / 100
    hint = f"would fill {percent(share)}{others}" if share else "accepts that" if lower else ""
    paired = _paired(shapes, like, max(share, found.filled, min_match))
    if paired:
        command = f"ckptool match {source} {like.option} -o map.toml"
        option, hint = "", f"{command}   {paired} pair up under other names"
    elif lower and not (option and share >= min_match):
        option = f"{option} --min-match {lower}".strip()
    differing = [
        f"{each.key}: {shape(each.here)} here, {shape(each.there)} in {like.name}"
        for each in found.mismatched
    ]
    return PoorFit(
        f"only {percent(found.filled)} of the parameters of {like.name} would be filled; "
        "nothing was written",
        evidence=[
            f"{len(found.matched)} of {counted(total, 'tensor')} match, "
            f"{len(found.mismatched)} differ in shape, {len(found.missing)} missing",
            *at_most(differing, SHOWN, " of another shape"),
            *_compared("here", found.absent),
            *_compared("there", found.missing),
        ],
        option=option,
        hint=hint,
    )


def _paired(shapes: Mapping[str, Shape], like: Reference, least: float) -> str:
    """Say how many tensors of a target pair up with others under other names, if many more do."""
    if not like.option:
        return ""
    found = match(shapes, like.shapes)
    units = [pair.there for pair in found.pairs]
    for group in found.ambiguous:
        units += [unit for node in group.there[: len(group.here)] for unit in node.all_units]
    for each in found.fused:
        units += [each.whole] if each.back else each.parts
    keys = {key for unit in units for key in unit.keys.values()}
    total = _elements(like, like.shapes)
    if not total or _elements(like, keys) / total <= least:
        return ""
    every = len(keys) == len(like.shapes)
    return f"all {len(keys)} shapes" if every else f"{len(keys)} of {len(like.shapes)} shapes"


SHOWN = 8  # keys in another shape


def _compared(side: str, keys: Sequence[str]) -> list[str]:
    return [f"keys only {side} look like {key}" for key in keys[:1]]


def _mending(
    shapes: Mapping[str, Shape], like: Reference, filled: float, renamed: Set[str]
) -> tuple[str, float, str]:
    """Find the move of one prefix to another that would fill most, and much more; and how much.

    The last text names other prefixes that would fill as much: a model has an encoder of keys too.
    Another --rename would be of the step that has `renamed` keys, and each is renamed once.
    """
    best, options, to = max(2 * filled, filled + 0.2), list[str](), ""
    for old, new in _moves(shapes, like.shapes):
        move = Renaming([Rule(old, new)])
        if any(move(key) != key for key in renamed):
            continue
        moved = {move(key): sizes for key, sizes in shapes.items()}
        share = fit(moved, like).filled
        again = bool(options) and share == best and new == to
        if (share > best or again) and len(moved) == len(shapes):
            options = [*(options if again else ()), f"--rename {quoted(f'{old}={new}')}"]
            best, to = share, new
    others = f", as would {listed(options[1:])}" if options[1:] else ""
    return "".join(options[:1]), best if options else 0.0, others


def _moves(here: Mapping[str, Shape], there: Mapping[str, Shape]) -> list[tuple[str, str]]:
    """List the moves of a prefix that would bring most elements to keys of their shape."""
    wanted = grouped(
        ((rest, sizes), new) for key, sizes in there.items() for new, rest in _cut(key)
    )
    found: Counter[tuple[str, str]] = Counter()
    for key, sizes in here.items():
        for old, rest in _cut(key):
            for new in wanted.get((rest, sizes), ())[:MOVES]:
                found[old, new] += prod(sizes) + 1
    return [move for move, _ in found.most_common(MOVES) if move[0] != move[1]]


MOVES = 32


def _cut(key: str) -> Iterator[tuple[str, str]]:
    """Yield the zero to three components that a key starts with, and the rest of it."""
    steps = key.split(".")
    for depth in range(min(4, len(steps))):
        yield ".".join(steps[:depth]), ".".join(steps[depth:])
