"""An inert tree -> pickle bytes, protocol 2 alone: all that `torch.load(weights_only=True)` reads.

What protocol 2 has no opcode for becomes the call that Python's own protocol-2 pickler makes
(`Lib/pickle.py`: `save_bytes`, `save_set` ...). `NEWOBJ_EX` and `OBJ` keep their opcodes, which
every unpickler takes under any protocol.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container, Iterable
from typing import Any, Protocol

from ckptool.errors import LimitExceeded, NotRepresentable
from ckptool.pickles.tree import (
    MAX_NESTING,
    ByteArray,
    Dict,
    Global,
    LongInteger,
    Node,
    Object,
    OldString,
    PersistentId,
    Set,
)

BATCH = 1000  # as Lib/pickle.py: items between a MARK and its SETITEMS or APPENDS

_U32 = struct.Struct("<I").pack
_ENCODE = Global("_codecs", "encode")
_BYTEARRAY = Global("__builtin__", "bytearray")
_SETS = {False: Global("__builtin__", "set"), True: Global("__builtin__", "frozenset")}
_CALL_OPCODES = {"reduce": b"R", "newobj": b"\x81", "newobj_ex": b"\x92"}


Written = tuple[bytes, str, int]  # opcodes, the text that they memoize first, how much in all


class Lower(Protocol):
    """What is known of nodes of a higher floor."""

    def __call__(self, node: Any) -> Node:
        """Return the nodes of this floor that a node is made of."""

    def phrase(self, node: Any, memo: Container[object], first: int) -> Written | None:
        """Write a node at once, as others like it were; its first number in the memo is given.

        None writes it opcode by opcode. The last that is memoized is the node itself.
        """

    def learn(self, node: Any, written: bytes) -> None:
        """See how a node was written opcode by opcode."""


def dump(tree: Node, lower: Lower) -> bytes:
    """Write a tree; `lower` turns each node of a higher floor into nodes of this one.

    Raises `LimitExceeded` for a tree nested too deeply, `NotRepresentable` for a name, a
    length or a cycle that protocol 2 cannot hold.
    """
    writer = _Writer(lower)
    writer.node(tree)
    writer.emit(b".")
    return bytes(writer.out)


class _Writer:
    """The output and the memo; a node is memoized by identity, text and names by value."""

    def __init__(self, lower: Lower) -> None:
        self.out = bytearray(b"\x80\x02")
        self.emit = self.out.extend
        self.lower = lower
        self.depth = 0
        self.memo: dict[Any, int] = {}
        self.memoized = 0  # entries of the pickle's memo; `memo` holds those to be found again
        self.being_made: set[int] = set()  # ids of calls whose arguments are being written
        self.kept: list[Node] = []  # what the memo knows by id must not be freed

    def node(self, node: Node) -> None:
        handler = _HANDLERS.get(type(node))
        if handler is None:
            self.lowered(node)
            return
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise LimitExceeded(f"values nested more than {MAX_NESTING} deep")
        handler(self, node)
        self.depth -= 1

    def known(self, key: Any) -> bool:
        """Write a reference to what was written before; tell whether there was any."""
        index = self.memo.get(key)
        if index is None:
            return False
        self.emit(b"h" + bytes((index,)) if index < 256 else b"j" + _U32(index))
        return True

    def remember(self, key: Any) -> None:
        index = self.memoized
        self.memo[key] = index
        self.memoized += 1
        self.emit(b"q" + bytes((index,)) if index < 256 else b"r" + _U32(index))

    def lowered(self, node: Node) -> None:
        """Write a node of a higher floor as what it is made of, and remember it as itself."""
        if self.known(id(node)):
            return
        phrase = self.lower.phrase(node, self.memo, self.memoized)
        if phrase is not None:
            opcodes, text, count = phrase
            self.emit(opcodes)
            self.memo[text] = self.memoized
            self.memo[id(node)] = self.memoized + count - 1
            self.memoized += count + 1
            self.kept.append(node)
            return
        start, lower = len(self.out), self.lower(node)
        self.kept += (node, lower)
        self.node(lower)
        index = self.memo.get(id(lower))
        if index is not None:
            self.memo[id(node)] = index
            self.memoized += 1  # a number left out, as files always had it here
            self.lower.learn(node, bytes(self.out[start:]))

    def boolean(self, node: bool) -> None:
        self.emit(b"\x88" if node else b"\x89")

    def integer(self, node: int) -> None:
        if 0 <= node < 1 << 8:
            self.emit(b"K" + bytes((node,)))
        elif 0 <= node < 1 << 16:
            self.emit(b"M" + struct.pack("<H", node))
        elif -(1 << 31) <= node < 1 << 31:
            self.emit(b"J" + struct.pack("<i", node))
        else:
            self.long(node.to_bytes(node.bit_length() // 8 + 1, "little", signed=True))

    def long(self, data: bytes) -> None:
        self.sized(data, b"\x8a", b"\x8b")

    def sized(self, data: bytes, short: bytes, long: bytes) -> None:
        if len(data) < 256:
            self.emit(short + bytes((len(data),)) + data)
        else:
            self.emit(long + self.length(data) + data)

    def length(self, data: bytes) -> bytes:
        if len(data) >= 1 << 31:
            raise NotRepresentable("a value of 2 GiB or more does not fit pickle protocol 2")
        return _U32(len(data))

    def text(self, node: str) -> None:
        if not self.known(node):
            data = node.encode("utf-8", "surrogatepass")
            self.emit(b"X" + self.length(data) + data)
            self.remember(node)

    def name(self, node: Global) -> None:
        if not self.known(node):
            if "\n" in node.module + node.name:
                raise NotRepresentable("a global with a line break in its name")
            self.emit(f"c{node.module}\n{node.name}\n".encode())
            self.remember(node)

    def tuple_(self, node: tuple[Node, ...]) -> None:
        if not node:
            self.emit(b")")
        elif not self.known(id(node)):
            if len(node) > 3:
                self.emit(b"(")
            for item in node:
                self.node(item)
            if id(node) in self.memo:  # a tuple inside itself, through something mutable
                self.emit(b"0" * len(node) if len(node) <= 3 else b"1")
                self.known(id(node))
                return
            self.emit(b"t" if len(node) > 3 else b"\x85\x86\x87"[len(node) - 1 : len(node)])
            self.remembered(node)

    def remembered(self, node: Node) -> None:
        self.kept.append(node)
        self.remember(id(node))

    def list_(self, node: list[Node]) -> None:
        if not self.known(id(node)):
            self.emit(b"]")
            self.remembered(node)
            self.appends(node)

    def dict_(self, node: Dict) -> None:
        if not self.known(id(node)):
            self.emit(b"}")
            self.remembered(node)
            self.setitems(node.pairs)

    def appends(self, items: list[Node]) -> None:
        for start in range(0, len(items), BATCH):
            self.batch(items[start : start + BATCH], b"e")

    def setitems(self, pairs: list[tuple[Node, Node]]) -> None:
        for start in range(0, len(pairs), BATCH):
            self.batch((node for pair in pairs[start : start + BATCH] for node in pair), b"u")

    def batch(self, nodes: Iterable[Node], opcode: bytes) -> None:
        self.emit(b"(")
        for node in nodes:
            self.node(node)
        self.emit(opcode)

    def call(self, node: Node, callee: Global, *args: Node) -> None:
        """Write a value that protocol 2 lacks as the call that makes it."""
        if not self.known(id(node)):
            self.node(callee)
            self.node(args)
            self.emit(b"R")
            self.remembered(node)

    def bytes_(self, node: bytes) -> None:
        self.call(node, _ENCODE, node.decode("latin-1"), "latin1")

    def object(self, node: Object) -> None:
        if self.known(id(node)):
            return
        if id(node) in self.being_made:
            raise NotRepresentable(
                "a call that is one of its own arguments cannot be pickled",
                hint="--tensors-only leaves it out",
            )
        self.being_made.add(id(node))
        if node.how == "obj":
            self.batch((node.callee, *node.args), b"o")
        else:
            self.node(node.callee)
            self.node(node.args)
            if node.how == "newobj_ex":
                self.node(node.kwargs)
            self.emit(_CALL_OPCODES[node.how])
        self.being_made.remove(id(node))
        self.remembered(node)
        for kind, payload in node.steps:
            if kind == "append":
                self.appends(payload)
            elif kind == "setitem":
                self.setitems(payload)
            else:
                self.node(payload)
                self.emit(b"b")

    def persistent(self, node: PersistentId) -> None:
        self.node(node.value)
        self.emit(b"Q")


_HANDLERS: dict[type, Callable[[_Writer, Any], None]] = {
    type(None): lambda writer, node: writer.emit(b"N"),
    bool: _Writer.boolean,
    int: _Writer.integer,
    LongInteger: lambda writer, node: writer.long(node.data),
    float: lambda writer, node: writer.emit(b"G" + struct.pack(">d", node)),
    str: _Writer.text,
    OldString: lambda writer, node: writer.sized(node.data, b"U", b"T"),
    bytes: _Writer.bytes_,
    ByteArray: lambda writer, node: writer.call(node, _BYTEARRAY, node.data),
    tuple: _Writer.tuple_,
    list: _Writer.list_,
    Dict: _Writer.dict_,
    Set: lambda writer, node: writer.call(node, _SETS[node.frozen], node.items),
    Global: _Writer.name,
    Object: _Writer.object,
    PersistentId: _Writer.persistent,
}
