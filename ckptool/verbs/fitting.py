"""Pretrained transfer: keep of a checkpoint what fits a target, and say what does not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from ckptool import containers
from ckptool.errors import PoorFit
from ckptool.files.copying import Begin, no_progress
from ckptool.state import checkpoint as places, edits
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.edits import Edit
from ckptool.state.wrappers import peeling
from ckptool.tensors.tensor import TENSORS
from ckptool.text import percent, visible
from ckptool.verbs import surgery
from ckptool.verbs.plan import MIN_MATCH, argument
from ckptool.verbs.surgery import Options, Rewrite

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.model.initial import Fill

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Reference:
    """The keys and shapes of a target, without wrapper prefixes; `name` is for reports."""

    name: str
    shapes: dict[str, Shape]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A key that both sides have, in different shapes."""

    key: str
    here: Shape
    there: Shape


@dataclass(frozen=True, slots=True)
class Fit:
    """How a checkpoint fits a target; `filled` is the share of the target's elements."""

    target: str
    matched: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    absent: tuple[str, ...]
    filled: float

    def __repr__(self) -> str:
        counts = f"{len(self.matched)} match, {len(self.mismatched)} differ in shape"
        counts += f", {len(self.missing)} missing, {len(self.absent)} absent"
        return f"<Fit to {visible(self.target)}: {counts}, {percent(self.filled)} filled>"


@dataclass(frozen=True, slots=True)
class Transferred:
    """What a transfer wrote, and how it fits its target, if it had one."""

    rewrite: Rewrite
    fit: Fit | None

    def to_dict(self) -> dict[str, object]:
        """Return the document `transfer/1`."""
        fit = self.fit
        return {
            **self.rewrite.to_dict(),
            "schema": "transfer/1",
            "matched": len(fit.matched) if fit else None,
            "mismatched": [
                {"key": each.key, "here": list(each.here), "there": list(each.there)}
                for each in (fit.mismatched if fit else ())
            ],
            "missing": list(fit.missing) if fit else [],
            "filled": fit.filled if fit else None,
        }


def reference(name: str, shapes: Mapping[str, Shape], *, anywhere: bool = False) -> Reference:
    """Make a reference of keys and shapes, wrapper prefixes peeled."""
    return Reference(name, {key: tuple(shape) for key, shape in _peeled(shapes, anywhere)})


def reference_of(
    checkpoint: Checkpoint, at: str | None = None, *, anywhere: bool = False
) -> Reference:
    """Take keys and shapes from another checkpoint."""
    state = places.find(checkpoint, at, "--like-at")
    tensors = [each for each in _peeled(state.entries, anywhere) if isinstance(each[1], TENSORS)]
    return Reference(checkpoint.path, {key: value.shape for key, value in tensors})


def _peeled(entries: Mapping[str, Any], anywhere: bool) -> Iterator[tuple[str, Any]]:
    peel = peeling(entries, anywhere=anywhere)
    return ((key, value) for old, value in entries.items() if (key := peel(old)) is not None)


def fit(shapes: Mapping[str, Shape], target: Reference) -> Fit:
    """Compare the keys and shapes of a checkpoint with a target's."""
    matched = tuple(key for key, shape in target.shapes.items() if shapes.get(key) == shape)
    mismatched = tuple(
        Mismatch(key, shape, target.shapes[key])
        for key, shape in shapes.items()
        if key in target.shapes and target.shapes[key] != shape
    )
    total = _elements(target.shapes.values())
    filled = _elements(target.shapes[key] for key in matched)
    return Fit(
        target=target.name,
        matched=matched,
        mismatched=mismatched,
        missing=tuple(key for key in target.shapes if key not in shapes),
        absent=tuple(key for key in shapes if key not in target.shapes),
        filled=filled / total if total else 1.0,
    )


def _elements(shapes: Iterable[Shape]) -> int:
    return sum(prod(shape) for shape in shapes)


def first_steps(
    renames: Sequence[Edit],
    drop: str | Sequence[str],
    keep: str | Sequence[str],
    *,
    anywhere: bool = False,
    keep_bookkeeping: bool = False,
) -> list[Edit]:
    """Return the edits that come before a comparison: peel, drop, keep, rename."""
    flags = {"anywhere": anywhere, "keep_bookkeeping": keep_bookkeeping}
    steps = [edits.strip_wrappers(required=False, **flags)]
    if drop:
        steps.append(edits.drop(drop))
    if keep:
        steps.append(edits.keep(keep))
    return [*steps, *renames]


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
    opened: Checkpoint | None = None,
) -> Transferred:
    """Write the bare state_dict with what fits the target alone.

    `steps` come first (`first_steps`); `fill` gives what the source lacks; `opened` is the source
    where it was read before. Raises `PoorFit` where
    less than `min_match` of the target's elements would be filled, and what `rewrite` raises.
    """
    options = options or Options()
    checkpoint = opened or containers.read(source)
    if like is None:
        result = surgery.rewrite(
            source, target, steps, bare=True, options=options, progress=progress, opened=checkpoint
        )
        return Transferred(result, None)
    shapes = _shapes_after(checkpoint, steps, options)
    found = fit(shapes, like)
    if found.filled < min_match:
        raise _poor(found, shapes, like)
    mismatched = [each.key for each in found.mismatched]
    further = [
        edits.without(mismatched, edits.SHAPE_DIFFERS),
        edits.without(found.absent, f"not in {like.name}"),
    ]
    unfilled = [*mismatched, *found.missing]
    with fill(unfilled) if fill else nullcontext({}) as added:
        result = surgery.rewrite(
            source,
            target,
            [*steps, *further],
            bare=True,
            options=options,
            progress=progress,
            opened=checkpoint,
            added=added,
            order=list(like.shapes) if added else (),
        )
    return Transferred(result, found)


def _shapes_after(
    checkpoint: Checkpoint, steps: Sequence[Edit], options: Options
) -> dict[str, Shape]:
    """Return which keys and shapes are there after the first edits."""
    state = places.find(checkpoint, options.at)
    key_map, _ = edits.apply(steps, state.entries, argument(checkpoint, options))
    values = key_map.entries.items()
    return {key: value.shape for key, value in values if isinstance(value, TENSORS)}


def _poor(found: Fit, shapes: Mapping[str, Shape], like: Reference) -> PoorFit:
    total = len(like.shapes)
    lower = int(found.filled * 100) / 100
    return PoorFit(
        f"only {percent(found.filled)} of the parameters of {like.name} would be filled; "
        "nothing was written",
        evidence=[
            f"{len(found.matched)} of {total} tensors match, {len(found.mismatched)} differ in "
            f"shape, {len(found.missing)} are missing",
            *_compared("here", list(shapes)),
            *_compared("there", list(like.shapes)),
        ],
        hint=_mending_prefix(shapes, like, found.filled)
        or (f"--min-match {lower} accepts it" if lower else ""),
    )


def _compared(side: str, keys: Sequence[str]) -> list[str]:
    return [f"keys {side} are like {key}" for key in keys[:1]]


def _mending_prefix(shapes: Mapping[str, Shape], like: Reference, filled: float) -> str:
    """Find one prefix that, removed or added, would fill much more."""
    best, hint = max(2 * filled, filled + 0.2), ""
    for prefix in _first_components(shapes):
        moved = {key.removeprefix(prefix): shape for key, shape in shapes.items()}
        share = fit(moved, like).filled
        if share > best:
            best, hint = share, f"--rename {prefix[:-1]}=   would fill {percent(share)}"
    for prefix in _first_components(like.shapes):
        share = fit({prefix + key: shape for key, shape in shapes.items()}, like).filled
        if share > best:
            best, hint = (
                share,
                (f"ckptool add-prefix --prefix {prefix}   first would fill {percent(share)}"),
            )
    return hint


def _first_components(keys: Iterable[str]) -> list[str]:
    """List the one to three components that keys start with, each with its final dot."""
    found: dict[str, None] = {}
    for key in keys:
        steps = key.split(".")
        for depth in range(1, min(4, len(steps))):
            found[".".join(steps[:depth]) + "."] = None
    return list(found)[:64]
