"""Values as torch prints them (torch/_tensor_str.py), and plain values as Python writes them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from math import prod

from ckptool.cli.screen import wrapped
from ckptool.tensors.dtype import DType
from ckptool.text import measured, visible
from ckptool.verbs.showing import EDGE, Shown

WIDTH = 80
DIGITS = 4
STEP = "  "
_PREFIX = "tensor("
# Of numbers that are written without it: torch's default dtypes.
_UNSAID = (DType.F32, DType.C64, DType.I64, DType.BOOL)

Write = Callable[[object], str]


def value_lines(shown: Shown, width: int | None = None) -> list[str]:
    """Write the values of a tensor, or a plain value: closely, and broken, on a terminal."""
    if shown.dtype is None:
        lines = _plain_lines(shown.values, width or WIDTH)
        return [part for line in lines for part in wrapped(line, width)]
    assert isinstance(shown.values, list)
    text = _tensor(shown.dtype, shown.shape, shown.kept_shape, shown.values)
    return text.split("\n")


def _plain_lines(value: object, width: int) -> list[str]:
    if isinstance(value, str):
        return [visible(value)]
    return [visible(line) for line in _laid("", value, "", width)]


def _laid(before: str, value: object, after: str, room: int) -> list[str]:
    """Write a value in a line, or what is in it below, by a step to the right for each level.

    `pprint` would start what is in it behind its name, where a deep value has no room.
    """
    line = f"{before}{value!r}{after}"
    if not value or not isinstance(value, dict | list) or measured(line) <= room:
        return [line]
    room -= len(STEP)
    if isinstance(value, dict):
        opened, closed = "{}"
        parts = [_laid(f"{name!r}: ", each, ",", room) for name, each in value.items()]
    else:
        opened, closed = "[]"
        parts = _filled([_laid("", each, ",", room) for each in value], room)
    return [before + opened, *(STEP + line for part in parts for line in part), closed + after]


def _filled(parts: Sequence[list[str]], room: int) -> list[list[str]]:
    """Join parts of one line each as long as there is room."""
    lines: list[list[str]] = []
    for part in parts:
        if lines and len(part) == len(lines[-1]) == 1:
            joined = f"{lines[-1][0]} {part[0]}"
            if measured(joined) <= room:
                lines[-1] = [joined]
                continue
        lines.append(part)
    return lines


def _tensor(
    dtype: DType, whole: Sequence[int], kept: Sequence[int], values: Sequence[object]
) -> str:
    suffixes = [] if dtype in _UNSAID else [f"dtype=torch.{dtype.torch_name}"]
    if not prod(whole):
        suffixes = [f"dtype=torch.{dtype.torch_name}"] if dtype is not DType.F32 else []
        if len(whole) != 1:
            suffixes.insert(0, f"size={tuple(whole)}")
        return _with_suffixes(_PREFIX + "[]", suffixes)
    write, width = _writer(values, dtype)
    text = _rows(list(whole), list(kept), values, len(_PREFIX), write, width)
    return _with_suffixes(_PREFIX + text, suffixes)


def _with_suffixes(text: str, suffixes: Sequence[str]) -> str:
    last = len(text) - text.rfind("\n") + 1
    for suffix in suffixes:
        if last + len(suffix) + 2 > WIDTH:
            text += ",\n" + " " * len(_PREFIX) + suffix
            last = len(_PREFIX) + len(suffix)
        else:
            text += ", " + suffix
            last += len(suffix) + 2
    return text + ")"


def _rows(
    whole: list[int],
    kept: list[int],
    values: Sequence[object],
    indent: int,
    write: Write,
    width: int,
) -> str:
    """Write a tensor in brackets; `...` is where elements were left out."""
    if not whole:
        return write(values[0])
    cut = kept[0] != whole[0]
    if len(whole) == 1:
        texts = list(map(write, values))
        if cut:
            texts.insert(EDGE, " ...")
        a_line = max(1, (WIDTH - indent) // width)
        lines = [", ".join(texts[at : at + a_line]) for at in range(0, len(texts), a_line)]
        return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"
    size = prod(kept[1:])
    parts = [
        _rows(whole[1:], kept[1:], values[at : at + size], indent + 1, write, width)
        for at in range(0, len(values), size)
    ]
    if cut:
        parts.insert(EDGE, "...")
    return "[" + ("," + "\n" * (len(whole) - 1) + " " * (indent + 1)).join(parts) + "]"


def _writer(values: Sequence[object], dtype: DType) -> tuple[Write, int]:
    """Return what writes an element, all in one width, and what an element takes of a line."""
    if isinstance(values[0], complex):
        real, real_width = _floats([value.real for value in values])  # type: ignore[attr-defined]
        imaginary, width = _floats([value.imag for value in values])  # type: ignore[attr-defined]

        def both(value: object) -> str:
            assert isinstance(value, complex)
            second = f"{imaginary(value.imag)}j".lstrip()
            return real(value.real) + ("" if second[0] in "+-" else "+") + second

        return both, real_width + 2 + width + 1
    if isinstance(values[0], float):
        write, width = _floats(values)
        return write, width + 2
    width = max(len(str(value)) for value in values)
    return (lambda value: str(value).rjust(width)), width + 2


def _floats(values: Sequence[object]) -> tuple[Write, int]:
    """Return what writes floats: as integers with a dot, with four digits, or as powers of ten."""
    finite = [
        value for value in values if isinstance(value, float) and value and math.isfinite(value)
    ]
    known = [abs(value) for value in finite]
    whole = all(value.is_integer() for value in known)
    wide = bool(known) and (
        max(known) / min(known) > 1000.0
        or max(known) > 1.0e8
        or (not whole and min(known) < 1.0e-4)
    )
    form = f".{DIGITS}e" if wide else ".0f" if whole else f".{DIGITS}f"
    extra = whole and not wide  # the dot
    width = max((len(format(value, form)) + extra for value in finite), default=1)

    def write(value: object) -> str:
        assert isinstance(value, float)
        dot = "." if extra and math.isfinite(value) else ""
        return (format(value, form) + dot).rjust(width)

    return write, width
