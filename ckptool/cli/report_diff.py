"""What `diff` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ckptool.tensors.counts import Values
from ckptool.text import counted, listed, readable, shape, table, visible
from ckptool.verbs.compare import Change, Difference, Found, Side

_BESIDE = "beside-"
MANY_ULP = 1_000_000  # from here on they tell people nothing


def difference_rows(found: Difference) -> list[str]:
    """List what differs for programs, with tabs between: what, the key, and the two sides."""
    rows = [*_rows(found.state, ""), *_rows(found.beside, _BESIDE)]
    return ["\t".join(row) for row in rows]


def _rows(found: Found, prefix: str) -> Iterator[list[str]]:
    for what, keys in (("only-left", found.only_left), ("only-right", found.only_right)):
        yield from ([prefix + what, visible(key)] for key in keys)
    for change in found.changed:
        yield [prefix + change.what, visible(change.key), *map(visible, _cells(change))]


def _cells(change: Change) -> list[str]:
    values = change.values
    if values is None:
        return [change.left, change.right]
    first = "" if change.first is None else shape(change.first)
    special = ",".join(f"{name}={count}" for name, count in _special(values).items())
    numbers = [_number(values.max_abs), _number(values.max_ulp)]
    return [str(values.count), str(values.of), first, *numbers, special]


def _special(values: Values) -> dict[str, int]:
    counts = {
        "nan_payloads": values.nan_payloads,
        "nan_one_side": values.nan_one_side,
        "zero_signs": values.zero_signs,
        "infinities": values.infinities,
    }
    return {name: count for name, count in counts.items() if count}


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def difference_table(found: Difference) -> list[str]:
    """List what differs for people."""
    rows = [*_told(found.state), *_told(found.beside)]
    return table([("WHAT", "KEY", "DIFFERENCE"), *rows]) if rows else []


def _told(found: Found) -> Iterator[tuple[str, str, str]]:
    for side, alone in (("left", found.only_left), ("right", found.only_right)):
        yield from ((f"only {side}", visible(key), visible(what)) for key, what in alone.items())
    for change in found.changed:
        yield change.what, visible(change.key), visible(_detail(change))


def _detail(change: Change) -> str:
    values = change.values
    if values is None:
        return f"{change.left} -> {change.right}"
    parts = [f"{values.count} of {values.of}"]
    if change.first is not None and values.of > 1:
        parts.append(f"first at {shape(change.first)}")
    if values.max_abs is not None:
        parts.append(f"up to {_apart(values)} apart")
    return ", ".join([*parts, *_special_words(values)])


def _apart(values: Values) -> str:
    ulp = "" if (values.max_ulp or MANY_ULP) >= MANY_ULP else f" ({values.max_ulp} ulp)"
    return f"{_number(values.max_abs)}{ulp}"


_WORDS = {
    "nan_payloads": "NaN of other bits",
    "nan_one_side": "NaN on one side",
    "zero_signs": "-0.0 against 0.0",
    "infinities": "infinite on one side",
}


def _special_words(values: Values) -> list[str]:
    return [f"{count} {_WORDS[name]}" for name, count in _special(values).items()]


def difference_lines(found: Difference) -> list[str]:
    """Return what was compared, what came of it, and what decides nothing."""
    lines = [_verdict(found), *_within_lines(found)]
    if not found.whole and found.left.at != found.right.at:
        lines.append(f"compared {_place(found.left)} with {_place(found.right)}")
    if found.whole:
        lines.append("all tensors were compared, by their path")
    return [*lines, *map(visible, found.notes)]


def _place(side: Side) -> str:
    at = ".".join(side.at or ())
    where = f"the state_dict at `{at}` in" if at else "the bare state_dict"
    return visible(f"{where} {side.path}")


def _verdict(found: Difference) -> str:
    tensors, nbytes = counted(found.tensors, "tensor"), readable(found.nbytes)
    if not found.equal:
        return f"different: {'; '.join(_counts(found))}"
    if found.asked.structure:
        return f"equal in structure: {tensors}, {nbytes}; no values were compared"
    if found.state.within or found.beside.within:
        return f"equal within the tolerance: {tensors}, {nbytes}"
    return f"equal: {tensors}, {nbytes} compared byte for byte"


def _counts(found: Difference) -> Iterator[str]:
    state = found.state
    sides = (found.left.path, found.right.path)
    names = sides if sides[0] != sides[1] else ("the left", "the right")
    for keys, name in zip((state.only_left, state.only_right), names, strict=True):
        if keys:
            yield f"{counted(len(keys), 'key')} only in {visible(name)}"
    for what, count in Counter(change.what for change in state.changed).items():
        if what == "value":
            yield (
                f"{count} entry is not a tensor and differs"
                if count == 1
                else (f"{count} entries are not tensors and differ")
            )
        else:
            yield f"{count} of {counted(found.tensors, 'tensor')} differ in {_NAMES[what]}"
    beside = found.beside
    count = len(beside.only_left) + len(beside.only_right) + len(beside.changed)
    if count:
        yield f"{counted(count, 'place')} outside the state_dict"


_NAMES = {
    "layout": "layout",
    "dtype": "dtype",
    "shape": "shape",
    "quantizer": "how their integers are read",
    "attributes": "attributes",
    "values": "values",
}


def _within_lines(found: Difference) -> Iterator[str]:
    within = [*found.state.within, *found.beside.within]
    if within:
        gaps = [change.values.max_abs for change in within if change.values]
        most = max((gap for gap in gaps if gap is not None), default=None)
        apart = "" if most is None else f", by up to {_number(most)}"
        names = listed(change.key for change in within)
        yield f"within the tolerance {counted(len(within), 'tensor')} differ{apart}: {names}"
