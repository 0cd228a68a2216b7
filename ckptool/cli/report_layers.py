"""The `Layers` of a model -> lines of text; returns strings, prints and opens nothing."""

from __future__ import annotations

from ckptool.model.layers import Layer, Layers
from ckptool.text import counted, listed, shape, table, visible

ITSELF = "(the model itself)"
_HEAD = ("NAME", "CLASS", "KERNEL", "OUTPUT", "PARAMETERS", "MULT-ADDS", "DTYPE")
_RIGHT = (4, 5)


def rows(found: Layers, *, wide: bool) -> list[str]:
    """List the layers, as a table or with tabs between."""
    cells = [_cells(layer) for layer in found]
    if not wide:
        return ["\t".join(row) for row in cells]
    head = (*_HEAD, *(("FILLED",) if found.file else ()))
    return table([head, *cells], _RIGHT)


def _cells(layer: Layer) -> tuple[str, ...]:
    filled = () if layer.filled is None else (f"{layer.filled}/{len(layer.keys)}",)
    return (
        visible(layer.name) or ITSELF,
        visible(layer.kind),
        "" if layer.kernel is None else shape(layer.kernel),
        "not called" if layer.output is None else shape(layer.output),
        "repeated" if layer.repeated else str(layer.parameters),
        str(layer.multiply_adds),
        layer.dtype,
        *filled,
    )


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
