"""What `diff` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from ckptool.cli import report
from ckptool.tensors.summaries import Values
from ckptool.text import counted, listed, readable, shape, visible
from ckptool.verbs.difference import Change, Difference, Found, Side

_HEAD = ("WHAT", "KEY", "RELATIVE", "COSINE", "MAX ABS", "DIFFERENCE")
_FAR = (3, 4, 2)  # the columns of how far: those that a narrow terminal lacks first
_BESIDE = "beside-"
MANY_ULP = 1_000_000  # from here on they tell people nothing


def differences(found: Difference, width: int | None) -> list[str]:
    """List what differs: for people, with how far, or the two sides with tabs between."""
    if width is None:
        rows = [*_rows(found.state, ""), *_rows(found.beside, _BESIDE)]
        return ["\t".join(row) for row in rows]
    told = [*_told(found.state), *_told(found.beside)]
    return report.folded_table(_HEAD, told, width, key=1, right=_FAR, spare=_FAR) if told else []


def _rows(found: Found, prefix: str) -> Iterator[list[str]]:
    for what, keys in (("only-left", found.only_left), ("only-right", found.only_right)):
        yield from ([prefix + what, visible(key)] for key in keys)
    for change in found.changed:
        yield [prefix + change.what, visible(change.key), *map(visible, _cells(change))]


def _cells(change: Change) -> list[str]:
    values = change.values
    if change.what == "dtype":
        equal = {None: "", True: "equal-after-rounding", False: "differs-after-rounding"}
        far = [_number(values.max_abs) if values else "", *_far(change)]
        return [change.left, change.right, *far, equal[change.equal_after_rounding]]
    if values is None:
        return [change.left, change.right]
    first = "" if change.first is None else shape(change.first)
    special = ",".join(f"{name}={count}" for name, count in _special(values).items())
    numbers = [_number(values.max_abs), _number(values.max_ulp)]
    return [str(values.count), str(values.of), first, *numbers, special, *_far(change)]


def _far(change: Change) -> list[str]:
    """Write how far a tensor is, as exactly as Python does."""
    return ["" if each is None else repr(each) for each in (change.relative, change.cosine)]


def _special(values: Values) -> dict[str, int]:
    return {name: count for name in _WORDS if (count := getattr(values, name))}


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.6g}" if isinstance(number, float) else str(number)


def _told(found: Found) -> Iterator[tuple[str, ...]]:
    for side, alone in (("left", found.only_left), ("right", found.only_right)):
        for key, what in alone.items():
            yield f"only {side}", visible(key), "", "", "", visible(what)
    for change in found.changed:
        numbers = change.relative, change.values and change.values.max_abs
        relative, most = ("" if each is None else f"{each:.2g}" for each in numbers)
        far = relative, _cosine(change.cosine), most
        yield change.what, visible(change.key), *far, visible(_detail(change))


def _cosine(cosine: float | None) -> str:
    """Write a cosine in a few characters; only that of the same direction is `1`."""
    if cosine is None:
        return ""
    return f"{cosine:.0f}" if abs(cosine) == 1 else f"{max(-0.9999, min(cosine, 0.9999)):.4f}"


def _detail(change: Change) -> str:
    values = change.values
    if values is None:
        return f"{change.left} -> {change.right}"
    if change.what == "dtype":
        rounded = f"{values.count} differ" if values.count else "equal rounded"
        parts = [f"{change.left} -> {change.right}", rounded]
    else:
        parts = [_count(change, values)]
    if (values.max_ulp or MANY_ULP) < MANY_ULP:
        parts.append(f"{values.max_ulp} ulp")
    return ", ".join([*parts, *_special_words(values)])


def _count(change: Change, values: Values) -> str:
    """Count what differs, and say where the first is, unless nearly all do."""
    if values.count == values.of > 1:
        return f"all {values.of}"
    known = change.first is not None and 2 * values.count < values.of
    first = f", first at {shape(change.first or ())}" if known else ""
    return f"{values.count} of {values.of}{first}"


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
    counts = Counter(change.what for change in state.changed)
    rounded = [change.equal_after_rounding for change in state.changed]
    compared = len(rounded) - rounded.count(None)
    equal = f", {rounded.count(True)} of them equal after rounding" if compared else ""
    for what in filter(counts.get, _ORDER):
        count = counts[what]
        if what == "value":
            differ = "is not a tensor and differs" if count == 1 else "are not tensors and differ"
            yield f"{counted(count, 'entry')} {differ}"
        else:
            tensors = counted(found.tensors, "tensor")
            name = "how their integers are read" if what == "quantizer" else what
            yield f"{count} of {tensors} differ in {name}{equal if what == 'dtype' else ''}"
    beside = found.beside
    count = len(beside.only_left) + len(beside.only_right) + len(beside.changed)
    if count:
        yield f"{counted(count, 'place')} outside the state_dict"


_ORDER = ("layout", "dtype", "shape", "quantizer", "attributes", "value", "values")


def _within_lines(found: Difference) -> Iterator[str]:
    within = [*found.state.within, *found.beside.within]
    if within:
        gaps = [change.values.max_abs for change in within if change.values]
        most = max((gap for gap in gaps if gap is not None), default=None)
        apart = "" if most is None else f", by up to {_number(most)}"
        names = listed(change.key for change in within)
        yield f"within the tolerance {counted(len(within), 'tensor')} differ{apart}: {names}"
