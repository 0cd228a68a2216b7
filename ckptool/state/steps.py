"""The steps of recipes that make other tensors: cut, joined, reordered, copied.

Each is one function, which returns an edit, and one row of `STEPS`. What they make are values:
views of other tensors, joins of them, or copies that are gathered when they are written. Templates
match whole keys, and those of one group hold the same in their fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count
from math import prod
from typing import Any

from ckptool.errors import EditError, KeyCollision
from ckptool.state import edits
from ckptool.state.edits import Change, Count, Edit, Entries, Value
from ckptool.state.renaming import Renaming, Rule
from ckptool.state.selecting import nothing_matched, select
from ckptool.state.templates import DIGITS, Matcher, Template, refuse_fields, template
from ckptool.tensors import values
from ckptool.tensors.tensor import TensorInfo, ties
from ckptool.text import counted, listed, several, shape as shown

MAX_DIGITS = 18  # of a row, and of a number in a key
Shape = tuple[int, ...]
Remake = Callable[[TensorInfo], TensorInfo]
Patterns = str | Iterable[str]


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors that become others together: the keys that go in, and the entries that come out."""

    keys: tuple[str, ...]
    made: tuple[tuple[str, TensorInfo], ...]


def _change(
    step: str, rule: str, entries: Entries, groups: Sequence[_Group], more: str = ""
) -> Change:
    """Put what groups make where the first tensor of each was; `more` is said of what was made.

    Raises `EditError` for a tensor that is in two groups, and for one of two that are the same
    tensor where the other is in none.
    """
    at: dict[str, _Group] = {}
    for group in groups:
        for key in group.keys:
            if key in at or group.keys.count(key) > 1:
                raise EditError(f"{key} is used twice: {_both(at.get(key, group), group)}")
            at[key] = group
    for key, first in ties(entries).items():
        if (key in at) != (first in at):
            taken, left = (key, first) if key in at else (first, key)
            raise EditError(
                f"{taken} and {left} are one tensor, and the step takes {taken} alone",
                hint="name both in the step, or drop one before it",
            )
    moves: list[tuple[tuple[str, ...], str, Value]] = []
    done: set[int] = set()
    for key, value in entries.items():
        if key not in at:
            moves.append(((key,), key, value))
        elif id(at[key]) not in done:
            done.add(id(at[key]))
            moves += [(at[key].keys, new, tensor) for new, tensor in at[key].made]
    made = sum(len(group.made) for group in groups)
    did = f"{step}: {counted(len(at), 'tensor')} of {len(entries)}"
    said = [did if made == len(at) else f"{did} became {made}{more}"]
    remade = {new for group in groups for new, _ in group.made}
    numbers = [Count(step, rule, len(groups))]
    return Change(moves, said, remade=remade, matched=dict.fromkeys(at, rule), counts=numbers)


def _both(one: _Group, other: _Group) -> str:
    return " and ".join(dict.fromkeys(" + ".join(each.keys) for each in (one, other)))


def _tensor(entries: Entries, key: str) -> TensorInfo:
    """Return a tensor that can be cut; raises `EditError` for what cannot."""
    value = entries[key]
    if not isinstance(value, TensorInfo):
        what = "a tensor made of others" if hasattr(value, "layout") else "not a tensor"
        raise EditError(f"{key} is {what}: it stays whole", hint=f"leave {key} out of the step")
    return value


# Steps that make one tensor of one.


def _each(step: str, keys: Patterns, remake: Remake, *, optional: bool = False) -> Edit:
    """Remake each tensor that a pattern selects; one tensor under two keys stays one."""

    def change(entries: Entries) -> Change:
        chosen = _selected(keys, entries, optional=optional)
        known: dict[tuple[object, ...], TensorInfo] = {}
        groups = []
        for key in chosen:
            value = _tensor(entries, key)
            if value.view not in known:
                known[value.view] = _tried(key, lambda value=value: remake(value))  # type: ignore[misc]
            groups.append(_Group((key,), ((key, known[value.view]),)))
        return _change(step, listed(several(keys)), entries, groups)

    return Edit(step, change=change)


def _selected(keys: Patterns, entries: Entries, *, optional: bool) -> list[str]:
    """Return the keys that patterns select, in order."""
    chosen = select(keys, list(entries), optional=optional)
    return [key for key in entries if key in chosen]


def _tried(name: str, make: Callable[[], TensorInfo]) -> TensorInfo:
    try:
        return make()
    except ValueError as error:
        raise EditError(f"{name}: {error}") from None


def _dim(value: TensorInfo, dim: int, more: int = 0) -> int:
    """Return a dimension counted from the front; raises `ValueError` where there is none."""
    count = len(value.shape) + more
    if not -count <= dim < count:
        raise ValueError(f"{shown(value.shape)} has no dimension {dim}")
    return dim % count


def transpose(keys: Patterns, dims: Sequence[int] = (0, 1), optional: bool = False) -> Edit:
    """Exchange two dimensions."""

    def remake(value: TensorInfo) -> TensorInfo:
        one, other = (_dim(value, dim) for dim in dims)
        order = list(range(len(value.shape)))
        order[one], order[other] = other, one
        return values.permuted(value, order)

    if len(dims) != 2:
        raise EditError(f"dims = {list(dims)}: transpose takes two dimensions")
    return _each("transpose", keys, remake, optional=optional)


def permute(keys: Patterns, dims: Sequence[int], optional: bool = False) -> Edit:
    """Put the dimensions in another order."""

    order = _order(dims)

    def remake(value: TensorInfo) -> TensorInfo:
        if len(dims) != len(value.shape):
            raise ValueError(f"{shown(value.shape)} has {counted(len(value.shape), 'dimension')}")
        return values.permuted(value, order)

    return _each("permute", keys, remake, optional=optional)


def _order(dims: Sequence[int]) -> list[int]:
    """Return dimensions counted from the front; raises `EditError` unless each is there once."""
    order = [dim + len(dims) if dim < 0 else dim for dim in dims]
    if sorted(order) != list(range(len(dims))):
        raise EditError(f"dims = {list(dims)}: permute takes each dimension once, from 0 on")
    return order


def reshape(
    keys: Patterns,
    shape: Sequence[int],
    was: Sequence[int] | None = None,
    optional: bool = False,
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
        at = _dim(value, dim)
        if value.shape[at] != 1:
            raise ValueError(f"dimension {dim} of {shown(value.shape)} is not 1")
        return values.shaped(value, value.shape[:at] + value.shape[at + 1 :])

    return _each("squeeze", keys, remake, optional=optional)


def unsqueeze(keys: Patterns, dim: int, optional: bool = False) -> Edit:
    """Put in a dimension of size 1."""

    def remake(value: TensorInfo) -> TensorInfo:
        at = _dim(value, dim, 1)
        return values.shaped(value, (*value.shape[:at], 1, *value.shape[at:]))

    return _each("unsqueeze", keys, remake, optional=optional)


def cut(keys: Patterns, rows: str, dim: int = 0, optional: bool = False) -> Edit:
    """Keep rows alone: `0:10,17` are the first ten and one more, in this order."""
    wanted = [_row_range(text.strip(), rows) for text in rows.split(",")]

    def remake(value: TensorInfo) -> TensorInfo:
        at = _dim(value, dim)
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
    _refuse_no_count("heads", heads)

    def remake(value: TensorInfo) -> TensorInfo:
        rows, pairs = _rows(value), 2 * heads
        if rows % pairs:
            raise ValueError(f"{rows} rows are not {heads} heads of pairs")
        inner = (rows // pairs, 2) if to == "half" else (2, rows // pairs)
        return _exchanged(value, (heads, *inner), 1)

    return _each("rope", keys, remake, optional=optional)


def interleave(keys: Patterns, heads: int, parts: int, optional: bool = False) -> Edit:
    """Reorder rows from `parts` of all heads to the parts of each head, one after the other."""
    _refuse_no_count("heads", heads)
    _refuse_no_count("parts", parts)

    def remake(value: TensorInfo) -> TensorInfo:
        rows = _rows(value)
        if rows % (heads * parts):
            raise ValueError(f"{rows} rows are not {parts} parts of {heads} heads")
        return _exchanged(value, (parts, heads, rows // (heads * parts)), 0)

    return _each("interleave", keys, remake, optional=optional)


def _refuse_no_count(name: str, *counts: int) -> None:
    if any(count < 1 for count in counts):
        raise EditError(f"{name} = {listed(map(str, counts))}: it must be 1 or more")


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


# Steps that make several tensors of one, and one of several.


def split(
    from_: str,
    to: Sequence[str],
    dim: int = 0,
    sizes: Sequence[int] = (),
    optional: bool = False,
) -> Edit:
    """Cut a tensor along a dimension, into equal parts or by sizes."""
    source, targets = Matcher(from_), _templates(to)
    refuse_fields(source.template, targets)
    _refuse_sizes(sizes, to)

    def change(entries: Entries) -> Change:
        known: dict[tuple[object, ...], list[TensorInfo]] = {}
        groups = []
        for key, held in _matches(source, entries, optional=optional):
            value = _tensor(entries, key)
            if value.view not in known:
                known[value.view] = _parts(key, value, dim, sizes or len(to))
            names = (each.fill(held) for each in targets)
            made = tuple(zip(names, known[value.view], strict=True))
            groups.append(_Group((key,), made))
        return _change("split", from_, entries, groups, "" if sizes else " of equal size")

    return Edit("split", change=change)


def _refuse_sizes(sizes: Sequence[int], parts: Sequence[str]) -> None:
    if sizes and len(sizes) != len(parts):
        raise EditError(f"{counted(len(sizes), 'size')} for {counted(len(parts), 'part')}")
    _refuse_no_count("sizes", *sizes)


def _templates(texts: Sequence[str]) -> list[Template]:
    if len(texts) < 2:
        raise EditError(f"{list(texts)}: at least two parts are needed")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise EditError(f"`{twice[0]}` is named twice")
    return [template(text) for text in texts]


def _parts(key: str, value: TensorInfo, dim: int, sizes: Sequence[int] | int) -> list[TensorInfo]:
    try:
        at = _dim(value, dim)
        size = value.shape[at]
        if isinstance(sizes, int):
            if size % sizes:
                raise ValueError(f"{size} in dimension {at} are not {sizes} equal parts")
            sizes = [size // sizes] * sizes
        if sum(sizes) != size:
            raise ValueError(f"{size} in dimension {at} are not {' + '.join(map(str, sizes))}")
        ends = list(accumulate(sizes))
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        return [values.part(value, at, *pair) for pair in zip(starts, ends, strict=True)]
    except ValueError as error:
        raise EditError(f"{key}: {error}") from None


def _matches(
    matcher: Matcher, entries: Entries, *, optional: bool
) -> list[tuple[str, dict[str, str]]]:
    """Return the keys that a template matches, and what its fields hold."""
    found = [(key, held) for key in entries if (held := matcher(key)) is not None]
    if not found and not optional:
        raise nothing_matched(matcher.template.text, list(entries))
    return found


def fuse(
    from_: Sequence[str],
    to: str,
    dim: int = 0,
    sizes: Sequence[int] = (),
    optional: bool = False,
) -> Edit:
    """Join tensors along a dimension; `sizes` are those that they must have."""
    sources, target = _templates(from_), template(to)
    refuse_fields(target, sources)
    _refuse_sizes(sizes, from_)

    def join(parts: Sequence[TensorInfo]) -> TensorInfo:
        at = _dim(parts[0], dim)
        here = [value.shape[at] if at < len(value.shape) else 0 for value in parts]
        if sizes and here != list(sizes):
            raise ValueError(f"their sizes in dimension {at} are {here}, not {list(sizes)}")
        _refuse_unlike(parts, at)
        return values.joined(parts, at)

    def change(entries: Entries) -> Change:
        bound: dict[str, tuple[str, ...]] = {}
        for source in sources:
            for _, held in _matches(Matcher(source.text), entries, optional=optional):
                new, keys = target.fill(held), tuple(each.fill(held) for each in sources)
                if bound.setdefault(new, keys) != keys:
                    raise KeyCollision(
                        f"{listed(bound[new])} and {listed(keys)} would both become {new}"
                    )
        fused = _joined("fuse", to, entries, bound, join)
        return fused if sizes else replace(fused, said=[*fused.said, *_unequal(entries, bound)])

    return Edit("fuse", change=change)


def _unequal(entries: Entries, bound: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Say which group is not of equal parts, which a split without `sizes` would make of it."""
    for new, keys in bound.items():
        shapes = [value.shape for key in keys if isinstance(value := entries[key], TensorInfo)]
        if len(set(shapes)) > 1:
            each = listed(map(shown, shapes))
            yield f"fuse: {new} is of {each}: only `sizes` gives it a way back"
            return


def _joined(
    step: str,
    rule: str,
    entries: Entries,
    bound: Mapping[str, tuple[str, ...]],
    join: Callable[[Sequence[TensorInfo]], TensorInfo],
) -> Change:
    """Join the tensors of each group; the same tensors make one."""
    known: dict[tuple[object, ...], TensorInfo] = {}
    groups = []
    for new, keys in bound.items():
        missing = [key for key in keys if key not in entries]
        if missing:
            raise EditError(
                f"{new} lacks {listed(missing)}",
                evidence=[f"{key}   is there" for key in keys if key in entries][:8],
            )
        parts = [_tensor(entries, key) for key in keys]
        views = tuple(value.view for value in parts)
        if views not in known:
            named = f"{new} of {listed(keys)}"
            known[views] = _tried(named, lambda parts=parts: join(parts))  # type: ignore[misc]
        groups.append(_Group(keys, ((new, known[views]),)))
    return _change(step, rule, entries, groups)


def _refuse_unlike(parts: Sequence[TensorInfo], dim: int | None = None) -> None:
    """Raise `ValueError` for parts of other dtypes, or shapes but in a dimension."""
    facts = {
        (value.dtype.label, *(size for at, size in enumerate(value.shape) if at != dim))
        for value in parts
    }
    if len(facts) > 1 or len({len(value.shape) for value in parts}) > 1:
        each = [f"{value.dtype.label} {shown(value.shape)}" for value in parts]
        raise ValueError(f"unlike: {listed(list(dict.fromkeys(each)))}")


def stack(from_: str, to: str, over: str = "e", dim: int = 0, optional: bool = False) -> Edit:
    """Stack the tensors that a field counts from 0 on, in a new dimension."""
    source, target = Matcher(from_), template(to)
    _refuse_over(source.template, target, over)

    def join(parts: Sequence[TensorInfo]) -> TensorInfo:
        _refuse_unlike(parts)
        return values.stacked(parts, _dim(parts[0], dim, 1))

    def change(entries: Entries) -> Change:
        members: dict[str, dict[int, str]] = {}
        for key, held in _matches(source, entries, optional=optional):
            numbered = members.setdefault(target.fill(held), {})
            other = numbered.setdefault(int(held[over][-MAX_DIGITS:]), key)
            if other != key:
                raise KeyCollision(f"{other} and {key} have the same number")
        for new, keys in members.items():
            gap = next(number for number in range(len(keys) + 1) if number not in keys)
            if gap < len(keys):
                numbers = listed([str(number) for number in sorted(keys)])
                raise EditError(f"{new} lacks {{{over}}} = {gap}: there are {numbers}")
        bound = {new: tuple(keys[at] for at in sorted(keys)) for new, keys in members.items()}
        return _joined("stack", to, entries, bound, join)

    return Edit("stack", change=change)


def unstack(from_: str, to: str, over: str = "e", dim: int = 0, optional: bool = False) -> Edit:
    """Cut a dimension into tensors that a field counts from 0 on."""
    source, target = Matcher(from_), template(to)
    _refuse_over(target, source.template, over)

    def change(entries: Entries) -> Change:
        known: dict[tuple[object, ...], list[TensorInfo]] = {}
        groups = []
        for key, held in _matches(source, entries, optional=optional):
            value = _tensor(entries, key)
            if value.view not in known:
                known[value.view] = _rows_of(key, value, dim)
            made = known[value.view]
            names = (target.fill({**held, over: str(number)}) for number in range(len(made)))
            groups.append(_Group((key,), tuple(zip(names, made, strict=True))))
        return _change("unstack", from_, entries, groups)

    return Edit("unstack", change=change)


def _rows_of(key: str, value: TensorInfo, dim: int) -> list[TensorInfo]:
    try:
        at = _dim(value, dim)
        rows = [values.part(value, at, row, row + 1) for row in range(value.shape[at])]
    except ValueError as error:
        raise EditError(f"{key}: {error}") from None
    if not rows:
        raise EditError(f"{key}: dimension {dim} of {shown(value.shape)} has nothing to unstack")
    return [values.shaped(row, value.shape[:at] + value.shape[at + 1 :]) for row in rows]


def _refuse_over(numbered: Template, other: Template, over: str) -> None:
    if over not in DIGITS:
        raise EditError(f"over = `{over}`: it must be one of {', '.join(sorted(DIGITS))}")
    if over not in numbered.fields or over in other.fields:
        raise EditError(f"{{{over}}} must be in `{numbered.text}`, and not in `{other.text}`")
    rest = Template(
        numbered.text, tuple(part for part in numbered.parts if part != numbered.fields[over])
    )
    refuse_fields(rest, [other])


# Steps that put a tensor under a second name.


def tie(from_: str, to: str, optional: bool = False, back: bool = False) -> Edit:
    """Put a tensor under a second name: one tensor, two keys; `back` takes it out."""
    if back:
        return _once("tie", from_, to, optional=optional)
    return _again("tie", from_, to, lambda value, key: value, optional=optional)


_COPIES = count()


def copy(from_: str, to: str, optional: bool = False, back: bool = False) -> Edit:
    """Put a copy of a tensor under a second name; `back` takes it out."""
    if back:
        return _once("copy", from_, to, optional=optional)

    def own(value: Value, key: str) -> Value:
        if not isinstance(value, TensorInfo):
            return value
        return values.cut(value, f"{key} (copy {next(_COPIES)})")  # of which no two are one

    return _again("copy", from_, to, own, optional=optional)


def _again(
    step: str, from_: str, to: str, second: Callable[[Value, str], Value], *, optional: bool
) -> Edit:
    renaming = Renaming([Rule(from_, to)])

    def change(entries: Entries) -> Change:
        found = {key: match[1] for key in entries if (match := renaming.match(key))}
        if not found and not optional:
            raise nothing_matched(from_, list(entries))
        moves: list[tuple[tuple[str, ...], str, Value]] = []
        for key, value in entries.items():
            moves.append(((key,), key, value))
            if key in found:
                moves.append(((key,), found[key], second(value, found[key])))
        said = [f"{step}: {counted(len(found), 'tensor')} of `{from_}` also under `{to}`"]
        rule = f"{from_}={to}"
        matched = dict.fromkeys(found, rule)
        return Change(moves, said, matched=matched, counts=[Count(step, rule, len(found))])

    return Edit(step, change=change)


def _once(step: str, from_: str, to: str, *, optional: bool) -> Edit:
    """Drop the second names of tensors that have the first."""
    renaming = Renaming([Rule(from_, to)])

    def change(entries: Entries) -> Change:
        found = {key: match[1] for key in entries if (match := renaming.match(key))}
        twice = {key: new for key, new in found.items() if new in entries}
        gone = {new: (new, f"a second name: {step}, backwards") for new in twice.values()}
        if not gone and not optional:
            raise nothing_matched(to, list(entries))
        moves = [((key,), key, value) for key, value in entries.items() if key not in gone]
        rule = f"{from_}={to}"
        matched = dict.fromkeys([*twice, *gone], rule)
        return Change(moves, why=gone, matched=matched, counts=[Count(step, rule, len(gone))])

    return Edit(step, change=change)


# The table of steps.

Given = dict[str, Any]  # the fields of a step, as Python names them


@dataclass(frozen=True, slots=True)
class Step:
    """A step of recipes: what makes its edit, and how it is turned round.

    `back` returns the name and the fields of the step that undoes it, or why there is none. The
    fields are the parameters of `make`; with `alone` its value is that field, without a table.
    """

    name: str
    make: Callable[..., Edit]
    back: Callable[[Given], tuple[str, Given] | str]
    alone: str = ""


def _never(reason: str) -> Callable[[Given], str]:
    return lambda given: reason


def _to(name: str) -> Callable[[Given], tuple[str, Given]]:
    """Return what undoes a step by one that takes its names the other way round."""
    return lambda given: (name, {**given, "from_": given["to"], "to": given["from_"]})


def _same(name: str) -> Callable[[Given], tuple[str, Given]]:
    return lambda given: (name, given)


def _rename_back(given: Given) -> tuple[str, Given] | str:
    rules = [Rule(*pair) for pair in given["rules"]]
    for number, rule in enumerate(rules, 1):
        if rule.no_way_back:
            return f"rule {number}, `{rule}`: {rule.no_way_back}"
    turned = [(rule.new, rule.old) for rule in rules]
    return "rename", {**given, "rules": turned, "back": Renaming(rules)}


def _strip_back(given: Given) -> tuple[str, Given] | str:
    if given["prefix"] == edits.AUTO:
        return "`auto` does not say which prefix was there"
    return "add", {"prefix": given["prefix"]}


def _permute_back(given: Given) -> tuple[str, Given]:
    dims = _order(given["dims"])
    return "permute", {**given, "dims": [dims.index(at) for at in range(len(dims))]}


def _reshape_back(given: Given) -> tuple[str, Given] | str:
    if given.get("was") is None:
        return "without `was` the shape before is not known"
    return "reshape", {**given, "shape": given["was"], "was": given["shape"]}


def _rope_back(given: Given) -> tuple[str, Given]:
    other = {"half": "interleaved", "interleaved": "half"}
    return "rope", {**given, "to": other.get(given["to"], given["to"])}


def _interleave_back(given: Given) -> tuple[str, Given]:
    return "interleave", {**given, "heads": given["parts"], "parts": given["heads"]}


def _undone(name: str) -> Callable[[Given], tuple[str, Given]]:
    """Return what undoes a step by the step itself."""
    return lambda given: (name, {**given, "back": True})


def _strip(prefix: str, optional: bool = False) -> Edit:
    if prefix == edits.AUTO:
        return edits.strip_wrappers(required=not optional)
    return edits.strip_prefix(prefix, required=not optional)


def _add(prefix: str, optional: bool = False) -> Edit:
    return edits.add_prefix(prefix)


STEPS = {
    step.name: step
    for step in (
        Step("rename", edits.renames, _rename_back, alone="rules"),
        Step("drop", edits.drop, _never("what it drops is gone"), alone="patterns"),
        Step("keep", edits.keep, _never("what it drops is gone"), alone="patterns"),
        Step("strip", _strip, _strip_back, alone="prefix"),
        Step("add", _add, lambda given: ("strip", given), alone="prefix"),
        Step("split", split, _to("fuse")),
        Step("fuse", fuse, _to("split")),
        Step("stack", stack, _to("unstack")),
        Step("unstack", unstack, _to("stack")),
        Step("transpose", transpose, _same("transpose")),
        Step("permute", permute, _permute_back),
        Step("reshape", reshape, _reshape_back),
        Step("squeeze", squeeze, _same("unsqueeze")),
        Step("unsqueeze", unsqueeze, _same("squeeze")),
        Step("slice", cut, _never("the rows that it leaves out are gone")),
        Step("rope", rope, _rope_back),
        Step("interleave", interleave, _interleave_back),
        Step("cast", edits.cast, _never("what was rounded is gone")),
        Step("copy", copy, _undone("copy")),
        Step("tie", tie, _undone("tie")),
    )
}
