"""The steps of recipes that make several tensors of one, one of several, or a second of one.

Each returns an edit. Templates match whole keys, and those of one group hold the same in their
fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate, count

from ckptool.errors import EditError, KeyCollision
from ckptool.state.edits import Change, Count, Edit, Entries, Value
from ckptool.state.groups import (
    MAX_DIGITS,
    Group,
    changed,
    dimension,
    refuse_no_count,
    tensor_of,
    tried,
)
from ckptool.state.renaming import Renaming, Rule
from ckptool.state.selecting import nothing_matched
from ckptool.state.templates import DIGITS, Matcher, Template, refuse_fields, template
from ckptool.tensors import values
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, listed, shape as shown


def split(
    from_: str, to: Sequence[str], dim: int = 0, sizes: Sequence[int] = (), optional: bool = False
) -> Edit:
    """Cut a tensor along a dimension, into equal parts or by sizes."""
    source, targets = Matcher(from_), _templates(to)
    refuse_fields(source.template, targets)
    _refuse_sizes(sizes, to)

    def parts(value: TensorInfo) -> list[TensorInfo]:
        return _parts(value, dim, sizes or len(to))

    def name(held: Mapping[str, str], number: int) -> str:
        return targets[number].fill(held)

    what = "" if sizes else " of equal size"
    return _parted("split", source, parts, name, what, optional=optional)


def _parted(
    step: str,
    source: Matcher,
    parts: Callable[[TensorInfo], list[TensorInfo]],
    name: Callable[[Mapping[str, str], int], str],
    what: str = "",
    *,
    optional: bool,
) -> Edit:
    """Cut each tensor that a template matches; one tensor under two keys is cut once."""

    def change(entries: Entries) -> Change:
        known: dict[tuple[object, ...], list[TensorInfo]] = {}
        groups = []
        for key, held in _matches(source, entries, optional=optional):
            value = tensor_of(entries, key)
            if value.view not in known:
                known[value.view] = tried(key, parts, value)
            made = enumerate(known[value.view])
            groups.append(Group((key,), tuple((name(held, at), each) for at, each in made)))
        return changed(step, source.template.text, entries, groups, what)

    return Edit(step, change=change)


def _refuse_sizes(sizes: Sequence[int], parts: Sequence[str]) -> None:
    if sizes and len(sizes) != len(parts):
        raise EditError(f"{counted(len(sizes), 'size')} for {counted(len(parts), 'part')}")
    refuse_no_count("sizes", *sizes)


def _templates(texts: Sequence[str]) -> list[Template]:
    if len(texts) < 2:
        raise EditError(f"{list(texts)}: at least two parts are needed")
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise EditError(f"`{twice[0]}` is named twice")
    return [template(text) for text in texts]


def _parts(value: TensorInfo, dim: int, sizes: Sequence[int] | int) -> list[TensorInfo]:
    at = dimension(value, dim)
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


def _matches(
    matcher: Matcher, entries: Entries, *, optional: bool
) -> list[tuple[str, dict[str, str]]]:
    """Return the keys that a template matches, and what its fields hold."""
    found = [(key, held) for key in entries if (held := matcher(key)) is not None]
    if not found and not optional:
        raise nothing_matched(matcher.template.text, list(entries))
    return found


def fuse(
    from_: Sequence[str], to: str, dim: int = 0, sizes: Sequence[int] = (), optional: bool = False
) -> Edit:
    """Join tensors along a dimension; `sizes` are those that they must have."""
    sources, target = _templates(from_), template(to)
    refuse_fields(target, sources)
    _refuse_sizes(sizes, from_)

    def join(parts: Sequence[TensorInfo]) -> TensorInfo:
        at = dimension(parts[0], dim)
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
        return fused if sizes else replace(fused, notes=[*fused.notes, *_unequal(entries, bound)])

    return Edit("fuse", change=change)


def _unequal(entries: Entries, bound: Mapping[str, tuple[str, ...]]) -> Iterator[str]:
    """Say which group is not of equal parts, which a split without `sizes` would make of it."""
    for new, keys in bound.items():
        shapes = [value.shape for key in keys if isinstance(value := entries[key], TensorInfo)]
        if len(set(shapes)) > 1:
            each = listed(map(shown, shapes))
            yield f"fuse: {new} is of {each}: it can be reversed only with `sizes`"
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
    groups, notes = [], list[str]()
    for new, keys in bound.items():
        missing = [key for key in keys if key not in entries]
        if missing:
            raise EditError(
                f"{new} lacks {listed(missing)}",
                evidence=[f"{key}   is there" for key in keys if key in entries][:8],
            )
        parts = [tensor_of(entries, key) for key in keys]
        views = tuple(value.view for value in parts)
        one = [key for key, view in zip(keys, views, strict=True) if views.count(view) > 1]
        if one and parts[0].numel and not notes:
            notes.append(f"{step}: {listed(one)} are one tensor; in {new} each has its own bytes")
        if views not in known:
            known[views] = tried(f"{new} of {listed(keys)}", join, parts)
        groups.append(Group(keys, ((new, known[views]),)))
    return replace(changed(step, rule, entries, groups), notes=notes)


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
        return values.stacked(parts, dimension(parts[0], dim, 1))

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

    def name(held: Mapping[str, str], number: int) -> str:
        return target.fill({**held, over: str(number)})

    return _parted("unstack", source, partial(_rows_of, dim=dim), name, optional=optional)


def _rows_of(value: TensorInfo, dim: int) -> list[TensorInfo]:
    at = dimension(value, dim)
    rows = [values.part(value, at, row, row + 1) for row in range(value.shape[at])]
    if not rows:
        raise ValueError(f"dimension {dim} of {shown(value.shape)} has nothing to unstack")
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


# A second name.


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
