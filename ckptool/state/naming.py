"""What a node of a tree is, in a few words; what comes from the file is not escaped here."""

from __future__ import annotations

from ckptool.pickles.tree import (
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    Set,
    items,
)
from ckptool.tensors.tensor import CompositeTensor, Storage, TensorInfo
from ckptool.text import counted, shape

MAX_VALUE = 60  # characters of a plain value that are shown


def what(node: Node) -> str:
    """Describe a node in a few words; plain values are shown."""
    match node:
        case Dict():
            return f"dict of {len(node.pairs)}"
        case list() | tuple():
            return f"{type(node).__name__} of {len(node)}"
        case Set():
            return f"set of {len(node.items)}"
        case Global():
            return str(node)
        case Object():
            return _object(node)
        case TensorInfo() | CompositeTensor():
            return f"{node.dtype.label} {shape(node.shape)}"
        case Storage():
            return "storage"
        case bytes() | ByteArray() | OldString():
            data = node if isinstance(node, bytes) else node.data
            return counted(len(data), "byte")
    return plain(node)


def plain(node: Node) -> str:
    """Write a plain value, cut where it is long."""
    match node:
        case str():
            return repr(node[:MAX_VALUE]) + ("..." if len(node) > MAX_VALUE else "")
        case LongInteger():
            return "a long integer"
        case None | bool() | int() | float():
            text = str(node)
            return text if len(text) <= MAX_VALUE else "a long number"
    return "?"


_CALLED = {"_codecs.encode": "bytes", "copyreg._reconstructor": "an object"}
_NUMPY = {"_reconstruct": "numpy array", "_frombuffer": "numpy array", "scalar": "numpy scalar"}


def _object(node: Object) -> str:
    pairs = items(node)
    if not isinstance(node.callee, Global):
        said = "an object"
    elif node.callee.module in ("copyreg", "copy_reg") and isinstance(_first(node), Global):
        said = str(_first(node))
    else:
        said = _called(node.callee)
    if pairs is None and isinstance(node.state, Dict):
        pairs = node.state.pairs
    return said if pairs is None else f"{said} of {len(pairs)}"


def _first(node: Object) -> Node:
    return node.args[0] if node.args else None


def _called(name: Global) -> str:
    """Name what a call makes; the everyday names are shortened."""
    if name.module.startswith("numpy") and name.name in _NUMPY:
        return _NUMPY[name.name]
    if name.module in ("builtins", "__builtin__", "collections"):
        return name.name
    return _CALLED.get(str(name), str(name))
