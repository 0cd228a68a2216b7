"""The steps of recipes that make one tensor of one: other dimensions, another order, fewer rows.

Each returns an edit. Where torch would make a view, so do they.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from ckptool.errors import EditError
from ckptool.state.edits import Change, Edit, Entries
from ckptool.state.groups import (
    MAX_DIGITS,
    Group,
    Patterns,
    changed,
    dimension,
    refuse_no_count,
    tensor_of,
    tried,
)
from ckptool.state.selecting import select
from ckptool.tensors import values
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, listed, several, shape as shown

Shape = tuple[int, ...]
Remake = Callable[[TensorInfo], TensorInfo]


def _each(step: str, keys: Patterns, remake: Remake, *, optional: bool = False) -> Edit:
    """Remake each tensor that a pattern selects; one tensor under two keys stays one."""

    def change(entries: Entries) -> Change:
        chosen = _selected(keys, entries, optional=optional)
        known: dict[tuple[object, ...], TensorInfo] = {}
        groups = []
        for key in chosen:
            value = tensor_of(entries, key)
            if value.view not in known:
                known[value.view] = tried(key, remake, value)
            groups.append(Group((key,), ((key, known[value.view]),)))
        return changed(step, listed(several(keys)), entries, groups)

    return Edit(step, change=change)


def _selected(keys: Patterns, entries: Entries, *, optional: bool) -> list[str]:
    """Return the keys that patterns select, in order."""
    chosen = select(keys, list(entries), optional=optional)
    return [key for key in entries if key in chosen]


def transpose(keys: Patterns, dims: Sequence[int] = (0, 1), optional: bool = False) -> Edit:
    """Exchange two dimensions."""

    def remake(value: TensorInfo) -> TensorInfo:
        one, other = (dimension(value, dim) for dim in dims)
        order = list(range(len(value.shape)))
        order[one], order[other] = other, one
        return values.permuted(value, order)

    if len(dims) != 2:
        raise EditError(f"dims = {list(dims)}: transpose takes two dimensions")
    return _each("transpose", keys, remake, optional=optional)


def permute(keys: Patterns, dims: Sequence[int], optional: bool = False) -> Edit:
    """Put the dimensions in another order."""

    order = in_order(dims)

    def remake(value: TensorInfo) -> TensorInfo:
        if len(dims) != len(value.shape):
            raise ValueError(f"{shown(value.shape)} has {counted(len(value.shape), 'dimension')}")
        return values.permuted(value, order)

    return _each("permute", keys, remake, optional=optional)


def in_order(dims: Sequence[int]) -> list[int]:
    """Return dimensions counted from the front; raises `EditError` unless each is there once."""
    order = [dim + len(dims) if dim < 0 else dim for dim in dims]
    if sorted(order) != list(range(len(dims))):
        raise EditError(f"dims = {list(dims)}: permute takes each dimension once, from 0 on")
    return order


def reshape(
    keys: Patterns, shape: Sequence[int], was: Sequence[int] | None = None, optional: bool = False
) -> Edit:
    """Give the elements another shape, in which one size may be -1; `was` is the one before."""

    def remake(value: TensorInfo) -> TensorInfo:
        if was is not None and _whole(was, value.numel) != value.shape:
            raise ValueError(f"its shape is {shown(value.shape)}, not {list(was)}")
        return values.shaped(value, _whole(shape, value.numel))

    return _each("reshape", keys, remake, optional=optional)


def _whole(shape: Sequence[int], numel: int) -> Shape:
    """Return a shape with the size that -1 stands for."""
    known = prod(size for size in shape if size != -1)
    rest = numel // known if known else -1  # any size would do
    whole = tuple(rest if size == -1 else size for size in shape)
    if prod(whole) != numel or list(shape).count(-1) > 1 or min(whole, default=0) < 0:
        raise ValueError(f"{counted(numel, 'element')} cannot have the shape {list(shape)}")
    return whole


def squeeze(keys: Patterns, dim: int, optional: bool = False) -> Edit:
    """Take out a dimension of size 1."""

    def remake(value: TensorInfo) -> TensorInfo:
        at = dimension(value, dim)
        if value.shape[at] != 1:
            raise ValueError(f"dimension {dim} of {shown(value.shape)} is not 1")
        return values.shaped(value, value.shape[:at] + value.shape[at + 1 :])

    return _each("squeeze", keys, remake, optional=optional)


def unsqueeze(keys: Patterns, dim: int, optional: bool = False) -> Edit:
    """Put in a dimension of size 1."""

    def remake(value: TensorInfo) -> TensorInfo:
        at = dimension(value, dim, 1)
        return values.shaped(value, (*value.shape[:at], 1, *value.shape[at:]))

    return _each("unsqueeze", keys, remake, optional=optional)


def cut(keys: Patterns, rows: str, dim: int = 0, optional: bool = False) -> Edit:
    """Keep rows alone: `0:10,17` are the first ten and one more, in this order."""
    wanted = [_row_range(text.strip(), rows) for text in rows.split(",")]

    def remake(value: TensorInfo) -> TensorInfo:
        at = dimension(value, dim)
        size = value.shape[at]
        ranges = [(start, size if end is None else end) for start, end in wanted]
        for start, end in ranges:
            if not start < end <= size:
                raise ValueError(f"rows {start}:{end} of {size} in dimension {at}")
        return values.taken(value, at, ranges)

    return _each("slice", keys, remake, optional=optional)


def _row_range(text: str, rows: str) -> tuple[int, int | None]:
    start, colon, end = text.partition(":")
    numbers = [each for each in (start, end) if each]
    if not (numbers or colon) or not all(each.isdecimal() and each.isascii() for each in numbers):
        raise EditError(
            f"rows = `{rows}`: `{text}` is not a row or a range", hint="rows = '0:10,17'"
        )
    if any(len(each) > MAX_DIGITS for each in numbers):
        raise EditError(f"rows have at most {MAX_DIGITS} digits")
    first = int(start or 0)
    return first, (int(end) if end else None) if colon else first + 1


def rope(keys: Patterns, heads: int, to: str, optional: bool = False) -> Edit:
    """Reorder the rows of each head between the two layouts of rotary embeddings.

    In `interleaved` the two parts of a pair are neighbours (Llama of Meta), in `half` they are in
    the two halves of a head (Hugging Face, `permute_for_rope` of transformers).
    """
    if to not in ("half", "interleaved"):
        raise EditError(f"to = `{to}`: rope takes `half` or `interleaved`")
    refuse_no_count("heads", heads)

    def remake(value: TensorInfo) -> TensorInfo:
        rows, pairs = _rows(value), 2 * heads
        if rows % pairs:
            raise ValueError(f"{rows} rows are not {heads} heads of pairs")
        inner = (rows // pairs, 2) if to == "half" else (2, rows // pairs)
        return _exchanged(value, (heads, *inner), 1)

    return _each("rope", keys, remake, optional=optional)


def interleave(keys: Patterns, heads: int, parts: int, optional: bool = False) -> Edit:
    """Reorder rows from `parts` of all heads to the parts of each head, one after the other."""
    refuse_no_count("heads", heads)
    refuse_no_count("parts", parts)

    def remake(value: TensorInfo) -> TensorInfo:
        rows = _rows(value)
        if rows % (heads * parts):
            raise ValueError(f"{rows} rows are not {parts} parts of {heads} heads")
        return _exchanged(value, (parts, heads, rows // (heads * parts)), 0)

    return _each("interleave", keys, remake, optional=optional)


def _rows(value: TensorInfo) -> int:
    if not value.shape:
        raise ValueError("a number has no rows")
    return value.shape[0]


def _exchanged(value: TensorInfo, sizes: Shape, dim: int) -> TensorInfo:
    """Reorder rows: cut into sizes, of which one is exchanged with the next."""
    order = list(range(len(sizes) + len(value.shape) - 1))
    order[dim : dim + 2] = reversed(order[dim : dim + 2])
    cut = values.shaped(value, (*sizes, *value.shape[1:]))
    return values.shaped(values.permuted(cut, order), value.shape)
