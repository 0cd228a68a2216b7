"""Leaving behind what is not plain: a tree of tensors and plain values alone."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from ckptool.pickles.calls import Shapes, innermost
from ckptool.pickles.names import is_accepted
from ckptool.pickles.safety import nodes
from ckptool.pickles.subclasses import number
from ckptool.pickles.tree import (
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
from ckptool.tensors.tensor import CompositeTensor, TensorInfo


class _Left:
    """Stands for a node that is left behind."""


_LEFT = _Left()
_PLAIN_VALUES = (str, int, float, bytes, type(None), ByteArray, LongInteger)
LONGEST = 255  # bytes of an integer; for more, pickle has an opcode that weights_only lacks


def only_plain(tree: Node) -> tuple[Node, list[str], Counter[str]]:
    """Return the tree with tensors and plain values alone, the places that were left behind, and
    how many dicts of which class are plain ones in it.

    What holds something left behind goes with it, up to the nearest dictionary entry. A root
    that is itself not plain leaves an empty dictionary.
    """
    pruner = _Pruner()
    pruned = pruner.node(tree, "")
    kept = Dict() if isinstance(pruned, _Left) else pruned
    flat = pruner.flattened
    return kept, pruner.left, Counter(flat[id(each)] for each in nodes(kept) if id(each) in flat)


class _Pruner:
    def __init__(self) -> None:
        self.left: list[str] = []
        self.shapes = Shapes()
        self.done: dict[int, Any] = {}
        self.kept: list[Node] = []
        self.flattened: dict[int, str] = {}  # classes of what is a plain dict now; `done` keeps it

    def node(self, node: Node, path: str) -> Node | _Left:
        if isinstance(node, OldString):  # what torch.load makes of it with encoding="latin1"
            return node.data.decode("latin-1")
        if isinstance(node, LongInteger) and len(node.data) > LONGEST:
            return _LEFT
        if isinstance(node, _PLAIN_VALUES):
            return node
        if isinstance(node, Global):
            return node if is_accepted(node) else _LEFT
        if id(node) not in self.done:
            self.kept.append(node)
            self.done[id(node)] = _LEFT  # what contains itself is not plain
            self.done[id(node)] = self.composed(node, path)
        return self.done[id(node)]

    def composed(self, node: Node, path: str) -> Node | _Left:
        plain = number(node)
        if plain is not None:  # of numpy
            return plain
        match node:
            case Dict():
                return Dict(self.pairs(node.pairs, path))
            case list() | tuple():
                members = [self.node(item, path) for item in node]
                if any(member is _LEFT for member in members):
                    return _LEFT
                return type(node)(members)
            case Set():
                members = [self.node(item, path) for item in node.items]
                return _LEFT if _LEFT in members or node.frozen else Set(members)
            case PersistentId():
                return _LEFT
            case Object():
                return self.object(node, path)
            case TensorInfo():
                return self.tensor(node, path)
            case CompositeTensor():
                origin = self.node(node.origin, path)
                return _LEFT if origin is _LEFT else replace(node, origin=origin)
        return node

    def pairs(self, pairs: Pairs, path: str) -> Pairs:
        kept = []
        for key, value in pairs:
            here = f"{path}.{key}".lstrip(".") if isinstance(key, str) else path or "a key"
            new_key, new_value = self.node(key, here), self.node(value, here)
            if new_key is _LEFT or new_value is _LEFT:
                self.left.append(here)
            else:
                kept.append((new_key, new_value))
        return kept

    def object(self, node: Object, path: str) -> Node | _Left:
        callee, args, kwargs = (
            self.node(part, path) for part in (node.callee, node.args, node.kwargs)
        )
        dangerous = callee is _LEFT or self.shapes.called(node) is not None
        if dangerous or isinstance(args, _Left) or kwargs is _LEFT:
            filled = [pair for kind, payload in node.steps if kind == "setitem" for pair in payload]
            # A dict of a class that is not plain (defaultdict ...) is kept as a plain one.
            return self.flat(node, Dict(self.pairs(filled, path))) if filled else _LEFT
        steps: list[tuple[str, Any]] = []
        for kind, payload in node.steps:
            if kind == "setitem":
                steps.append((kind, self.pairs(payload, path)))
            else:
                kept = self.node(payload, path)
                if kept is _LEFT:
                    return _LEFT
                steps.append((kind, kept))
        return replace(node, callee=callee, args=args, kwargs=kwargs, steps=steps)

    def flat(self, node: Object, plain: Dict) -> Dict:
        """Note of which class a dict was."""
        self.flattened[id(plain)] = str(innermost(node.callee) or "a dict of no named class")
        return plain

    def tensor(self, node: TensorInfo, path: str) -> TensorInfo | _Left:
        """Keep the tensor; what hangs on it only if that is plain."""
        origin = None if node.origin is None else self.node(node.origin, path)
        if origin is not _LEFT:
            return node if origin is None else replace(node, origin=origin)
        return _LEFT if node.dtype.quantized else replace(node, origin=None)
