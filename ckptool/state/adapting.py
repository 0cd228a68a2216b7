"""Tensors in the shape that a target wants: which are adapted, how, and what they become.

Position embeddings and input channels become what timm makes of them (timm/layers/pos_embed.py,
`resample_abs_pos_embed`; timm/models/_manipulate.py, `adapt_input_conv`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import isqrt, prod

from ckptool.errors import EditError, NothingMatched
from ckptool.pickles.subclasses import class_of
from ckptool.records import dataclass
from ckptool.state.changes import Change, Edit, Entries
from ckptool.state.classes import NEW, Rows
from ckptool.state.groups import Group, changed, tensor_of, tried
from ckptool.state.selecting import select
from ckptool.tensors import numbers, values
from ckptool.tensors.dtype import DType
from ckptool.tensors.resampling import Channels, Interpolation, Total, bicubic
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, length, listed, shape as shown

Shape = tuple[int, ...]
Grid = tuple[int, int]
POSITIONS, CHANNELS, CLASSES, VOCABULARY = "pos-embed", "in-chans", "classes", "vocab"

_POSITION_NAMES = re.compile(r"(abs(olute)?_)?pos(ition(al)?)?_?emb(ed(ding)?s?)?")
_PREFIXES = (  # tokens before those of the grid, in their order
    ("cls_token", "class_token", "class_embedding"),
    ("dist_token", "distillation_token"),
    ("reg_token", "register_tokens"),
)
_VOCABULARY_NAMES = frozenset(
    "wte embed_tokens word_embeddings tok_embeddings token_embedding token_embeddings embed_in "
    "embed_out shared lm_head vocab_embed tok_embed word_embed".split()
)
_BOXES = re.compile(r"box|reg|delta")  # rows of a class follow each other there


@dataclass(frozen=True, slots=True)
class Asked:
    """What is to be adapted: kinds, and patterns of keys, each with its kind where one is given.

    `classes` are the rows of a head, `old` and `new` the grids of position embeddings, `prefix`
    the tokens before them.
    """

    kinds: tuple[str, ...] = ()
    patterns: tuple[tuple[str, str], ...] = ()
    classes: Rows | None = None
    old: Grid | None = None
    new: Grid | None = None
    prefix: int | None = None


@dataclass(frozen=True, slots=True)
class Adapted:
    """A tensor in another shape, and how it got there."""

    key: str
    kind: str
    here: Shape
    there: Shape
    how: str


Made = tuple[TensorInfo, str]  # and how
Wanted = Mapping[str, Shape]


def read_asked(
    texts: Iterable[str],
    *,
    classes: Rows | None = None,
    grid: str | None = None,
    prefix: int | None = None,
) -> Asked:
    """Read `--adapt`: kinds, patterns of keys, and `PATTERN=KIND`, with commas between them."""
    kinds, patterns = [], []
    for word in (word.strip() for text in texts for word in text.split(",")):
        pattern, sign, kind = word.rpartition("=")
        if word in _MAKERS:
            kinds.append(word)
        elif sign and kind not in _MAKERS:
            raise EditError(f"--adapt {word}: `{kind}` is not one of {', '.join(_MAKERS)}")
        elif pattern if sign else kind:
            patterns.append((pattern, kind) if sign else (word, ""))
    old, new = _grids(grid)
    return Asked(tuple(kinds), tuple(patterns), classes, old, new, prefix)


def _grids(text: str | None) -> tuple[Grid | None, Grid | None]:
    """Read `16x24`, a grid in the target, or `14x14:16x24`, with that in the file."""
    if text is None:
        return None, None
    found = [[length(side, 10) or 0 for side in each.split("x")] for each in text.split(":")]
    grids = [(sides[0], sides[1]) for sides in found if len(sides) == 2 and all(sides)]
    if len(grids) != len(found) or len(grids) > 2:
        raise EditError(f"`{text}` is not a grid", hint="--pos-grid 16x24, or 14x14:16x24")
    return grids[0] if grids[1:] else None, grids[-1]


Pair = tuple[Shape, Shape]  # in the file, in the target


def plan(entries: Entries, wanted: Wanted, asked: Asked) -> dict[str, str]:
    """Return the kind of each key that is to be adapted; `wanted` are those of another shape.

    Raises `NothingMatched` for a pattern that selects none of them, `EditError` for one of which
    no kind is known.
    """
    pairs = {
        key: (value.shape, there)
        for key, there in wanted.items()
        if isinstance(value := entries[key], TensorInfo)
    }
    chosen: dict[str, str] = {}
    for pattern, kind in asked.patterns:
        keys = select([pattern], list(entries))
        if not keys & pairs.keys():
            raise NothingMatched(
                f"--adapt {pattern}: no shape differs in {listed(sorted(keys), 3)}"
            )
        for key in keys & pairs.keys():
            chosen[key] = kind or _guessed(key, *pairs[key], asked)
    for key, kind in _recognised(pairs, asked).items():
        if kind in asked.kinds:
            chosen.setdefault(key, kind)
    return {key: chosen[key] for key in pairs if key in chosen}


def regridded(entries: Entries, matched: Iterable[str], asked: Asked) -> dict[str, Shape]:
    """Return the position embeddings that fit by their count alone: another grid was given."""
    new = asked.new
    if not new or asked.old == new or (asked.old is None and new[0] == new[1]):
        return {}
    found = {key: entries[key].shape for key in matched if _is_position(key)}
    return {key: shape for key, shape in found.items() if len(shape) in (2, 3)}


def _recognised(pairs: Mapping[str, Pair], asked: Asked) -> dict[str, str]:
    """Return the kinds of keys by their names and shapes; the first convolution comes first."""
    found = {key: POSITIONS for key in pairs if _is_position(key)}
    others = {key: pair for key, pair in pairs.items() if key not in found}
    convolutions = {key: both for key, pair in others.items() if (both := _channels(*pair))}
    inputs = next(iter(convolutions.values()), None)
    found |= {key: CHANNELS for key, both in convolutions.items() if both == inputs}
    rows = {
        key: (here[0], there[0]) for key, (here, there) in others.items() if _is_rows(here, there)
    }
    words = {counts for key, counts in rows.items() if _has_word(key)}
    found |= {key: VOCABULARY for key, counts in rows.items() if counts in words}
    if CLASSES in asked.kinds:
        found |= _heads({key: counts for key, counts in rows.items() if counts not in words}, asked)
    return found


def _heads(rows: Mapping[str, Grid], asked: Asked) -> dict[str, str]:
    """Return the keys that have rows of classes; raises `EditError` where that is not sure."""
    times = {key: count for key, (_, there) in rows.items() if (count := _times(there, asked))}
    counts = {rows[key][0] / times[key]: key for key in times}
    if len(counts) > 1:
        raise EditError(
            "--adapt classes: heads of several numbers of classes",
            evidence=[f"{key}: {count:g} classes" for count, key in counts.items()],
            hint="name the keys: --adapt KEY=classes",
        )
    return dict.fromkeys(times, CLASSES)


def _guessed(key: str, here: Shape, there: Shape, asked: Asked) -> str:
    """Return the kind of a key that was named: by its name, or by the dimension that differs."""
    if _is_position(key) or (here[:1] == (1,) and here[::2] == there[::2] and len(here) == 3):
        return POSITIONS
    if _channels(here, there):
        return CHANNELS
    if _is_rows(here, there):
        return CLASSES if asked.classes and not _has_word(key) else VOCABULARY
    raise EditError(f"{key}: {shown(here)} cannot be adapted to {shown(there)}")


def _is_position(key: str) -> bool:
    steps = [step for step in key.split(".") if step != "weight"]
    return bool(steps and _POSITION_NAMES.fullmatch(steps[-1]))


def _has_word(key: str) -> bool:
    return not _VOCABULARY_NAMES.isdisjoint(key.split("."))


def _is_rows(here: Shape, there: Shape) -> bool:
    """Check whether two shapes differ in their rows alone."""
    return len(here) == len(there) > 0 and here[1:] == there[1:]


def _channels(here: Shape, there: Shape) -> Grid | None:
    """Return the input channels of two convolutions that differ in nothing else."""
    same = len(here) == len(there) >= 3 and (here[0], here[2:]) == (there[0], there[2:])
    return (here[1], there[1]) if same else None


def _times(rows: int, asked: Asked) -> int:
    """Return how many rows of a head are of one class, 0 where the classes do not fit."""
    if asked.classes is None:
        raise EditError(
            "--adapt classes: which rows become which is not said",
            option="--classes map.txt",
            hint="has a line for each class of the target: the row or the name of what it was",
        )
    count = len(asked.classes)
    return 0 if rows % count else rows // count


def edit(kinds: Mapping[str, str], wanted: Wanted, asked: Asked) -> tuple[Edit, list[Adapted]]:
    """Return the edit that adapts keys, each of its kind, and what it does once it was made."""
    done: list[Adapted] = []

    def change(entries: Entries) -> Change:
        done.clear()
        known: dict[tuple[object, ...], Made] = {}
        groups = []
        for key, kind in kinds.items():
            value, there = tensor_of(entries, key), wanted[key]
            if (value.view, there) not in known:
                known[value.view, there] = _made(key, kind, value, there, entries, asked)
            made, how = known[value.view, there]
            done.append(Adapted(key, kind, value.shape, there, how))
            groups.append(Group((key,), ((key, made),)))
        return changed("adapt", listed([*dict.fromkeys(kinds.values())]), entries, groups)

    return Edit("adapt", change=change), done


def _made(
    key: str, kind: str, value: TensorInfo, there: Shape, entries: Entries, asked: Asked
) -> Made:
    """Adapt a tensor; one tensor under two keys is made once."""
    if value.dtype not in numbers.ROUNDED or class_of(value):
        raise EditError(f"{key}: {class_of(value) or value.dtype.label} is not adapted")

    def make(value: TensorInfo) -> Made:
        made, how = _MAKERS[kind](key, value, there, entries, asked)
        if made.shape != there:
            raise ValueError(f"{shown(value.shape)} cannot be adapted to {shown(there)} ({kind})")
        return made, how

    made, how = tried(key, make, value)
    made = values.in_byteorder(made, value.storage.byteorder)
    return replace(made, requires_grad=value.requires_grad), how


# Position embeddings.


def _positions(key: str, value: TensorInfo, there: Shape, entries: Entries, asked: Asked) -> Made:
    """Interpolate a grid of tokens, what is before it stays: [1, N, D], [N, D], [1, H, W, D]."""
    if len(value.shape) == len(there) == 4:
        at = 1 if value.shape[3] == there[3] else 2
        old, new = value.shape[at : at + 2], there[at : at + 2]
        return _resized(value, at, new), f"bicubic, {_of(old)} to {_of(new)}"
    axis = len(value.shape) - 2
    if axis < 0 or len(there) != len(value.shape) or there[-1] != value.shape[-1]:
        raise ValueError(f"{shown(value.shape)} and {shown(there)} are not tokens of one length")
    count, wanted = value.shape[axis], there[axis]
    prefix, old, new = _found_grids(key, count, wanted, entries, asked)
    before, after = value.shape[:axis], value.shape[axis + 1 :]
    grid = values.shaped(values.part(value, axis, prefix, count), (*before, *old, *after))
    tokens = values.shaped(_resized(grid, axis, new), (*before, prod(new), *after))
    parts = [values.part(value, axis, 0, prefix), tokens] if prefix else [tokens]
    kept = f", {counted(prefix, 'prefix token')} kept" if prefix else ""
    return values.joined(parts, axis), f"bicubic, {_of(old)} to {_of(new)}{kept}"


def _of(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


def _resized(value: TensorInfo, dim: int, sizes: Sequence[int]) -> TensorInfo:
    """Interpolate a dimension and the next: each of the grid is made of those around it."""
    height, width = value.shape[dim : dim + 2]
    lines = [values.part(value, dim, at, at + 1) for at in range(height)]
    cells = [[values.part(line, dim + 1, at, at + 1) for at in range(width)] for line in lines]
    columns = bicubic(width, sizes[1])

    def cell(
        row: int, down: tuple[float, ...], column: int, across: tuple[float, ...]
    ) -> TensorInfo:
        taken = [line[column : column + len(across)] for line in cells[row : row + len(down)]]
        kernel = Interpolation(down, across, value.dtype)
        return values.computed(kernel, [each for line in taken for each in line], value.dtype)

    return values.joined(
        [
            values.joined([cell(*row, *column) for column in columns], dim + 1)
            for row in bicubic(height, sizes[0])
        ],
        dim,
    )


def _found_grids(
    key: str, count: int, wanted: int, entries: Entries, asked: Asked
) -> tuple[int, Grid, Grid]:
    """Find how many tokens come before the grid, and the grids; raises `EditError`."""
    prefixes = [asked.prefix] if asked.prefix is not None else _prefixes(key, entries)
    found = []
    for prefix in prefixes:
        old, new = asked.old or _square(count - prefix), asked.new or _square(wanted - prefix)
        if old and new and (prod(old), prod(new)) == (count - prefix, wanted - prefix):
            found.append((prefix, old, new))
    if len(found) == 1:
        return found[0]
    tokens = f"{key}: {count} tokens to {wanted}, "
    if found:
        choices = listed([str(prefix) for prefix, _, _ in found])
        raise EditError(f"{tokens}of which {choices} come before the grid", option="--pos-prefix N")
    before = f"with {listed([str(prefix) for prefix in prefixes])} before the grid"
    raise EditError(
        f"{tokens}{before}, are not the grids that were given"
        if asked.new
        else f"{tokens}{before}, are not both a square",
        option="--pos-grid HxW",
        hint="is the grid of the target; OLD:NEW gives both, --pos-prefix N what is before it",
    )


def _prefixes(key: str, entries: Entries) -> list[int]:
    """Return how many tokens may come before a grid: of the classes and registers beside it."""
    names = {name.rpartition(".")[2]: value for name, value in entries.items()}
    counts, found = [0], False
    for choices in _PREFIXES:
        tokens = [names[name] for name in choices if name in names]
        tokens = [each for each in tokens if isinstance(each, TensorInfo)]
        if tokens:
            found = True
            sizes = tokens[0].shape
            counts.append(counts[-1] + (sizes[-2] if len(sizes) > 1 else 1))
    return counts if found else [0, 1, 2]


def _square(count: int) -> Grid | None:
    side = isqrt(max(count, 0))
    return (side, side) if side and side * side == count else None


# Input channels.


def _input_channels(
    key: str, value: TensorInfo, there: Shape, entries: Entries, asked: Asked
) -> Made:
    """Sum the channels to one, or repeat them and scale what was repeated."""
    have, want = value.shape[1], there[1]
    one = [values.part(value, 1, at, at + 1) for at in range(have)]
    if want == 1:
        return values.computed(Channels(value.dtype), one, value.dtype), f"{have} channels summed"
    if have > 3 and have == 3 * want:  # space to depth (timm)
        sums = [
            values.computed(Channels(value.dtype), one[at : at + 3], value.dtype)
            for at in range(0, have, 3)
        ]
        return values.joined(sums, 1), "every 3 channels summed"
    if have not in (1, 3):
        raise ValueError(f"{have} channels are summed, not repeated: {want} are wanted")
    kernel = Channels(value.dtype, have / want)
    scaled = values.computed(kernel, [value], value.dtype)
    ranges = [(0, min(have, want - at)) for at in range(0, want, have)]
    how = f"{have} channels repeated, times {have}/{want}"
    return values.taken(scaled, 1, ranges), how


# Rows.


def _classes(key: str, value: TensorInfo, there: Shape, entries: Entries, asked: Asked) -> Made:
    """Take the rows of classes; a class may have several, beside each other or apart."""
    times = _times(there[0], asked)
    if not times or value.shape[0] % times or asked.classes is None:
        raise ValueError(f"{shown(value.shape)} to {shown(there)} are not rows of as many classes")
    count = value.shape[0] // times
    beside = bool(_BOXES.search(key))
    shape = (count, times) if beside else (times, count)
    dim = 0 if beside else 1
    whole = values.shaped(value, (*shape, *value.shape[1:]))
    rows = asked.classes.of(count)
    parts = [
        values.part(whole, dim, row, row + 1) if row != NEW else _mean(whole, dim) for row in rows
    ]
    new = rows.count(NEW)
    how = f"{len(rows) - new} of {count} classes" + (f", {new} new: the mean" if new else "")
    return values.shaped(values.joined(parts, dim), there), how


def _vocabulary(key: str, value: TensorInfo, there: Shape, entries: Entries, asked: Asked) -> Made:
    """Keep the rows that both have; new ones are the mean of all."""
    kept = min(value.shape[0], there[0])
    parts, new = [values.part(value, 0, 0, kept)], there[0] - kept
    if new:
        mean = _mean(value, 0)
        again = replace(mean, shape=(new, *mean.shape[1:]), stride=(0, *mean.stride[1:]))
        parts.append(again)
    return values.joined(parts, 0), f"{kept} rows kept" + (f", {new} new: the mean" if new else "")


AT_ONCE = 512  # rows that are summed in one go


def _mean(value: TensorInfo, dim: int) -> TensorInfo:
    """Return the mean of the rows in a dimension, summed in double precision."""
    count = value.shape[dim]
    rows = [values.part(value, dim, at, at + 1) for at in range(count)]
    some = [rows[at : at + AT_ONCE] for at in range(0, count, AT_ONCE)]
    sums = [values.computed(Total(value.dtype, DType.F64), few, DType.F64) for few in some]
    return values.computed(Total(DType.F64, value.dtype, 1 / count), sums, value.dtype)


_MAKERS: dict[str, Callable[[str, TensorInfo, Shape, Entries, Asked], Made]] = {
    POSITIONS: _positions,
    CHANNELS: _input_channels,
    CLASSES: _classes,
    VOCABULARY: _vocabulary,
}
