"""Two inert trees side by side: where plain values, names and calls differ, and which tensors pair.

Nodes are visited in pairs, and two that were once paired, directly or through others, are taken
for equal from then on (Hopcroft and Karp's test of equivalence): cycles end, shared nodes cost
once, and the time stays linear whatever refers to what.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from ckptool.errors import LimitExceeded
from ckptool.pickles.torch_objects import StorageView
from ckptool.pickles.tree import (
    MAX_NESTING,
    ORDERED_DICT,
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    Pairs,
    PersistentId,
    Set,
)
from ckptool.records import dataclass
from ckptool.state import checkpoint as places
from ckptool.state.walk import Numbers, Path, labelled, number
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TENSORS, Storage, TensorInfo
from ckptool.text import shape

MAX_DEPTH = 2 * MAX_NESTING  # rings of two lengths are followed until they meet again
SHOWN = 60  # characters of a value
LONG = 127  # bits of an integer that is shown


@dataclass(frozen=True, slots=True)
class Place:
    """Two nodes at one place: `what` is `only-left`, `only-right`, `value` or `tensors`.

    `value` are two that differ; `tensors` are two that are still to be compared.
    """

    path: Path
    what: str
    left: Node = None
    right: Node = None


TAKEN = object()  # stands for what is compared elsewhere
_ABSENT = object()
_SCALARS = (str, bytes, bool, int, float, complex, type(None))
_LEAVES = (Global, ByteArray, OldString, LongInteger)
_SETS = {
    Global(module, name) for module in ("builtins", "__builtin__") for name in ("set", "frozenset")
}


def places_of(left: Node, right: Node, path: Path = ()) -> Iterator[Place]:
    """Yield the places where two trees differ, and their tensors in pairs, in the left's order.

    Raises `LimitExceeded` where values refer to each other in rings that are longer than deep.
    """
    joined = _Joined()
    numbers: Numbers = {}
    stack: list[tuple[Path, Node, Node]] = [(path, left, right)]
    while stack:
        path, one, other = stack.pop()
        one, other = _value(one), _value(other)
        if one is TAKEN or other is TAKEN:
            continue
        if one is _ABSENT or other is _ABSENT:
            found = Place(path, "only-right", right=other) if one is _ABSENT else None
            yield found or Place(path, "only-left", left=one)
        elif isinstance(one, TENSORS) and isinstance(other, TENSORS):
            yield Place(path, "tensors", one, other)
        elif _is_leaf(one) or _is_leaf(other) or _kind(one) != _kind(other):
            if not _same_leaf(one, other):
                yield Place(path, "value", one, other)
        elif joined.anew(one, other):
            if len(path) > MAX_DEPTH:
                raise LimitExceeded("values refer to each other too deeply to be compared")
            stack += reversed(_paired(path, one, other, numbers))


class _Joined:
    """Classes of nodes that were paired (union and find)."""

    def __init__(self) -> None:
        self._above: dict[int, int] = {}

    def anew(self, one: Node, other: Node) -> bool:
        """Join the classes of two nodes; tell whether they were two."""
        first, second = self._root(2 * id(one)), self._root(2 * id(other) + 1)
        self._above[first] = second
        return first != second

    def _root(self, node: int) -> int:
        here = node
        while (above := self._above.get(here, here)) != here:
            here = above
        while (above := self._above.get(node, here)) != here:
            self._above[node], node = here, above
        return here


def _value(node: Node) -> Node:
    """Return what a node stands for where protocols spell it in several ways; or the node itself.

    Before protocol 3, bytes are a call of `_codecs.encode`, and empty ones of `bytes`; a bytearray
    is a call on bytes, or on text and its encoding (`object.__reduce__` and `save_bytes`). Before
    protocol 2 an integer is text, of any length.
    """
    match node:
        case int() if node.bit_length() > LONG:
            return _shortest(node)
        case LongInteger(data=data):
            return _shortest(int.from_bytes(data, "little", signed=True))
        case Object(callee=Global("_codecs", "encode"), args=(str(text), "latin1"), steps=[]):
            return text.encode("latin-1") if text.isascii() or max(text) < "\u0100" else node
        case Object(callee=Global("builtins" | "__builtin__", kind), steps=[]):
            return _bytes(node, kind)
    return _as_tensor(node)


def _shortest(number: int) -> Node:
    """Write an integer in one of two ways, by its size alone."""
    if number.bit_length() <= LONG:
        return number
    return LongInteger(number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True))


def _bytes(node: Object, kind: str) -> Node:
    args = tuple(_value(each) for each in node.args[:1])
    match kind, args:
        case "bytes", ():
            return b""
        case "bytearray", ():
            return ByteArray(b"")
        case "bytearray", (bytes(data),):
            return ByteArray(data)
        case "bytearray", (str(text),) if max(text, default="") < "\u0100":
            return ByteArray(text.encode("latin-1"))
    return node


def _as_tensor(node: Node) -> Node:
    """Return a storage that no tensor explains as a flat tensor; any other node as it is."""
    start, numel = 0, None
    if isinstance(node, StorageView):
        node, start, numel = node.storage, node.offset, node.numel
    if not isinstance(node, Storage):
        return node
    dtype = node.dtype or DType.U8
    size = node.nbytes // dtype.itemsize if numel is None else numel
    return TensorInfo(dtype, (size,), (1,), node, start)


def _is_leaf(node: Node) -> bool:
    return isinstance(node, (*_SCALARS, *_LEAVES, *TENSORS))


def _same_leaf(one: Node, other: Node) -> bool:
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack("<d", one) == struct.pack("<d", other)
    if isinstance(one, ByteArray | OldString | LongInteger):
        return bool(one.data == other.data)
    return isinstance(one, (*_SCALARS, Global)) and bool(one == other)


def _kind(node: Node) -> str:
    """Name what two nodes must both be for their insides to be compared."""
    if _set_items(node) is not None:
        return "frozenset" if _is_frozen(node) else "set"
    if isinstance(node, Dict):
        return "dict"
    if isinstance(node, Object):
        return "dict" if node.callee == ORDERED_DICT else "object"
    return type(node).__name__


def _set_items(node: Node) -> list[Node] | None:
    match node:
        case Set():
            return node.items
        case Object(callee=Global() as callee, args=(list() as items,)) if callee in _SETS:
            return items
    return None


def _is_frozen(node: Node) -> bool:
    return node.frozen if isinstance(node, Set) else node.callee.name == "frozenset"


_Member = tuple[str | None, Node]  # the step of the path that leads there, if it has one


def _paired(path: Path, one: Node, other: Node, numbers: Numbers) -> list[tuple[Path, Node, Node]]:
    left, right = _members(one, numbers), _members(other, numbers)
    pairs = []
    for name in dict.fromkeys([*left, *right]):
        step, a = left.get(name, (None, _ABSENT))
        other_step, b = right.get(name, (None, _ABSENT))
        step = other_step if step is None else step
        pairs.append((path if step is None else (*path, step), a, b))
    return pairs


def _members(node: Node, numbers: Numbers) -> dict[str, _Member]:
    """Name what is inside a node, so that two nodes of a kind name the same things alike."""
    items = _set_items(node)
    if items is not None:
        return {_tag(item) or f"?{at}": (shown(item), item) for at, item in enumerate(items)}
    match node:
        case list() | tuple():
            return {str(at): (str(at), item) for at, item in enumerate(node)}
        case Dict():
            return _keyed(node, node.pairs, numbers)
        case PersistentId():
            return {"": (None, node.value)}
        case Object():
            return _inside(node, numbers)
    return {}


def _keyed(node: Node, pairs: Pairs, numbers: Numbers) -> dict[str, _Member]:
    """Name pairs by their keys; of a key that is there twice the last counts, as when loaded.

    Parameters that are keys have the numbers under which an optimizer holds them, too.
    """
    members: dict[str, _Member] = {}
    parameters = number(node, pairs, numbers)
    for at, (step, value) in enumerate(labelled(pairs, parameters)):
        key = pairs[at][0]
        tag = f"parameter {step}" if id(key) in parameters else _tag(key)
        if not tag:
            members[f"key ?{at}"] = (step, key)
        members[f"item {tag or f'?{at}'}"] = (step, value)
    return members


def _inside(node: Object, numbers: Numbers) -> dict[str, _Member]:
    members = _keyed(node, places.items(node) or [], numbers)
    if node.callee != ORDERED_DICT:
        members["class"] = ("(class)", node.callee)
        members["arguments"] = (None, node.args)
    appended = [item for kind, payload in node.steps if kind == "append" for item in payload]
    members |= {f"appended {at}": (str(at), item) for at, item in enumerate(appended)}
    if node.kwargs is not None:
        members["keywords"] = (None, node.kwargs)
    states = [payload for kind, payload in node.steps if kind == "build"]
    if node.callee == ORDERED_DICT and all(isinstance(state, Dict) for state in states):
        # Attributes of a state_dict, which one side may lack: each by its name.
        named = [pair for state in states for pair in places.named_items(state)]
        return members | {f"attribute {name}": (name, value) for name, value in named}
    return members | {f"state {at}": (None, state) for at, state in enumerate(states)}


def _tag(key: Node) -> str:
    """Write a key as text of which a file cannot choose the hash; an empty one for odd keys."""
    match key := _value(key):
        case str() | bytes() | bool() | int() | float() | complex() | None:
            return f"{type(key).__name__} {key!r}"
        case Global():
            return f"name {key}"
        case LongInteger() | OldString() | ByteArray():
            return f"{type(key).__name__} {key.data!r}"
        case tuple():
            members = tuple(map(_value, key))
            return f"tuple {members!r}" if all(isinstance(m, _SCALARS) for m in members) else ""
    return ""


def shown(node: Any) -> str:
    """Write a node in a few characters."""
    node = _value(node)
    match node:
        case str() | bytes():
            return repr(node) if len(node) <= SHOWN else f"{node[:SHOWN]!r}..."
        case bool() | int() | float() | complex() | None:
            return str(node)
        case Global():
            return str(node)[:SHOWN]
        case OldString() | ByteArray() | LongInteger():
            return f"{len(node.data)} bytes"
        case Object(callee=Global() as callee) if callee != ORDERED_DICT:
            return f"an object {callee}"[:SHOWN]
    if isinstance(node, TENSORS):
        return f"{node.dtype.label} {shape(node.shape)}"
    inside = places.items(node)
    if inside is not None:
        return f"a dict of {len(inside)}"
    return (
        f"a {type(node).__name__.lower()} of {len(node)}"
        if isinstance(node, list | tuple)
        else "..."
    )
