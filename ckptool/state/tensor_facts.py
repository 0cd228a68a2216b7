"""What Python keeps on a tensor, and a format of plain tensors has no place for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptool.pickles.torch_objects import attributes, is_parameter, python_type
from ckptool.pickles.tree import Node
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import listed


def lost(entries: Iterable[tuple[str, Node]]) -> Iterator[str]:
    """Say which of the tensors lose their class, requires_grad or attributes."""
    parameters, trained, typed, extra = [], [], [], []
    for key, value in entries:
        if not isinstance(value, TensorInfo):  # composite ones are not written at all
            continue
        named = python_type(value)
        if is_parameter(value):
            parameters.append(key)
        elif value.requires_grad:
            trained.append(key)
        if named is not None:
            typed.append(f"{key} ({named})")
        if attributes(value) is not None:
            extra.append(key)
    if parameters:
        yield f"Parameters become plain tensors: {listed(parameters, 4)}"
    for what, keys in (("requires_grad", trained), ("class", typed), ("attributes", extra)):
        if keys:
            yield f"not written, {what} of tensors: {listed(keys, 4)}"
