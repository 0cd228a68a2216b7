"""The `Layers` of a model -> lines of text; returns strings, prints and opens nothing."""

from __future__ import annotations

from ckptool.cli import screen
from ckptool.model.layers import Layer, Layers
from ckptool.text import counted, listed, shape, visible

ITSELF = "(the model itself)"
_HEAD = ("NAME", "CLASS", "KERNEL", "OUTPUT", "PARAMS", "MULT-ADDS", "DTYPE")
_RIGHT = (4, 5)
_SPARE = (6, 5)  # columns that a narrow terminal can miss


def rows(found: Layers, width: int | None) -> list[str]:
    """List the layers, as a table or with tabs between."""
    head = (*_HEAD, *(("FILLED",) if found.file else ()))
    return screen.listed(head, [_cells(layer, width) for layer in found], width, _RIGHT, _SPARE)


def _cells(layer: Layer, width: int | None) -> tuple[str, ...]:
    filled = () if layer.filled is None else (f"{layer.filled}/{len(layer.keys)}",)
    return (
        visible(layer.name) or ITSELF,
        visible(layer.kind),
        "" if layer.kernel is None else shape(layer.kernel),
        "not called" if layer.output is None else shape(layer.output),
        "repeated" if layer.repeated else _count(layer.parameters, width),
        _count(layer.multiply_adds, width),
        layer.dtype,
        *filled,
    )


def _count(number: int, width: int | None) -> str:
    """Write a count with three digits for people: `2.36 M`."""
    if width is None or number < 10_000:
        return str(number)
    power = min((len(str(number)) - 1) // 3, 4)
    return f"{number / 1000**power:#.3g} {' kMGT'[power]}".replace(". ", " ")


def lines(found: Layers) -> list[str]:
    """Return the totals, and what a file fills and does not."""
    fixed = found.parameters - found.trainable
    told = [
        f"{visible(found.model)} on {found.inputs}: {counted(len(found), 'layer')}, "
        f"{found.parameters:,} parameters ({found.trainable:,} trainable, {fixed:,} not), "
        f"{found.multiply_adds:,} multiply-adds"
    ]
    if found.file is None:
        return told
    file, whole = visible(found.file), [row for row in found if row.filled == len(row.keys)]
    count = sum(bool(row.keys) for row in found)
    full = sum(bool(row.keys) for row in whole)
    told.append(f"{file} fills {full} of {counted(count, 'layer')} that have tensors")
    groups = [
        ("not filled", found.missing),
        ("of another shape", found.mismatched),
        (f"only in {file}, no layer has it", found.unexpected),
    ]
    return [*told, *(f"{what}: {listed(keys)}" for what, keys in groups if keys)]
