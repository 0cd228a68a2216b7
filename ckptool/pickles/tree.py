"""The nodes of an inert tree: what a pickle says, with nothing imported, resolved or called.

Plain values are plain Python values (`None`, `bool`, `int`, `float`, `str`, `bytes`, `list`,
`tuple`); everything else is one of the classes here. Dictionaries and sets stay lists of pairs
and items and are never hashed: a file chooses the keys. Identity is meaning: a node that a pickle
refers to twice is one object in the tree, and is written once again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field
from typing import Any

from ckptool.records import dataclass

MAX_NESTING = 200

Node = Any  # a plain value or one of the classes below
Pairs = list[tuple[Node, Node]]


@dataclass(frozen=True, slots=True)
class Global:
    """A name in a module: what loading would import.

    With `followed` it is of a function, and all that its calls would load was read as data.
    """

    module: str
    name: str
    followed: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


ORDERED_DICT = Global("collections", "OrderedDict")


@dataclass(slots=True, eq=False)
class Dict:
    """A dictionary as it was pickled: pairs in order, repeated keys included."""

    pairs: Pairs = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Set:
    """A set or frozenset as it was pickled."""

    items: list[Node]
    frozen: bool = False


@dataclass(slots=True, eq=False)
class ByteArray:
    """A bytearray."""

    data: bytes


@dataclass(slots=True, eq=False)
class OldString:
    """A Python 2 string that is not UTF-8."""

    data: bytes


@dataclass(slots=True, eq=False)
class LongInteger:
    """An integer of more than eight bytes, little-endian two's complement, kept as it was."""

    data: bytes


@dataclass(slots=True, eq=False)
class PersistentId:
    """A reference to something outside the pickle."""

    value: Node


@dataclass(slots=True, eq=False)
class Object:
    """A call that loading would make, and what would be done to its result.

    `how` is the opcode's name (`reduce`, `newobj`, `newobj_ex`, `obj`); `steps` are what follows:
    `("append", [items])`, `("setitem", [pairs])` and `("build", state)` in the order of the file.
    `offset` is that of the call in its pickle.
    """

    callee: Node
    args: tuple[Node, ...]
    how: str = "reduce"
    kwargs: Node = None
    steps: list[tuple[str, Any]] = field(default_factory=list)
    offset: int = 0

    @property
    def state(self) -> Node:
        """Return what the last BUILD gave the object, None if there was none."""
        return next((payload for kind, payload in reversed(self.steps) if kind == "build"), None)


def children(node: Node) -> Iterator[Node]:
    """Yield the nodes directly inside a node, in the order in which they are written."""
    match node:
        case list() | tuple():
            yield from node
        case Dict():
            for pair in node.pairs:
                yield from pair
        case Set():
            yield from node.items
        case PersistentId():
            yield node.value
        case Object():
            yield node.callee
            yield node.args
            if node.kwargs is not None:
                yield node.kwargs
            for kind, payload in node.steps:
                if kind == "setitem":
                    for pair in payload:
                        yield from pair
                elif kind == "append":
                    yield from payload
                else:
                    yield payload
        case _:
            # A leaf, or a record of a higher floor that carries the node it was made from.
            origin = getattr(node, "origin", None)
            if origin is not None:
                yield origin


def items(node: Node) -> Pairs | None:
    """Return the pairs of a dict or of an object that was filled like one, None for others."""
    if isinstance(node, Dict):
        return node.pairs
    if not isinstance(node, Object):
        return None
    pairs = [pair for kind, payload in node.steps if kind == "setitem" for pair in payload]
    return [*python2_items(node), *pairs] or ([] if node.callee == ORDERED_DICT else None)


def named_items(node: Node) -> list[tuple[str, Node]]:
    """Return those pairs of a dict whose keys are text; a way to the state_dict goes by names."""
    return [(key, value) for key, value in items(node) or [] if isinstance(key, str)]


def python2_items(node: Object) -> Pairs:
    """Python 2 makes an OrderedDict of a list of [key, value] lists (`__reduce__`, 2.7)."""
    if node.callee != ORDERED_DICT or not node.args or not isinstance(node.args[0], list):
        return []
    rows = node.args[0]
    if any(not isinstance(row, list | tuple) or len(row) != 2 for row in rows):
        return []
    return [(row[0], row[1]) for row in rows]


def attribute(node: Node, name: str) -> Node:
    """Return an attribute that BUILD set on an object, at last; None if it set none so named."""
    state = node.state if isinstance(node, Object) else None
    if isinstance(state, Dict):
        return next((value for key, value in reversed(state.pairs) if key == name), None)
    return None


def text_items(node: Node) -> list[tuple[str, Node]] | None:
    """Return the pairs of a dict all of whose keys are text, None for anything else."""
    pairs = items(node)
    if pairs is None or not all(isinstance(key, str) for key, _ in pairs):
        return None
    return pairs
