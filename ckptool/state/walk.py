"""Ways through a tree: every tensor by its path, and how deep a tree may be."""

from __future__ import annotations

from collections.abc import Iterator

from ckptool.errors import LimitExceeded
from ckptool.pickles.subclasses import array
from ckptool.pickles.tree import (
    MAX_NESTING,
    Dict,
    Node,
    Object,
    Pairs,
    PersistentId,
    Set,
    children,
    items,
    python2_items,
)
from ckptool.tensors.tensor import TENSORS, AnyTensor, TensorInfo

Path = tuple[str, ...]


def dotted(path: Path) -> str:
    """Write a path as `--at` takes it."""
    return ".".join(path)


def refuse_deep(tree: Node) -> None:
    """Raise `LimitExceeded` for a tree nested more deeply than any real checkpoint.

    Later rooms walk the tree by recursion, in this order and each node once, and rely on it.
    """
    seen: set[int] = set()
    stack = [iter((tree,))]
    while stack:
        for node in stack[-1]:
            if type(node) is TensorInfo and node.origin is None:
                continue
            if isinstance(node, INNER) and id(node) not in seen:
                seen.add(id(node))
                stack.append(children(node))
                break
        else:
            stack.pop()
        if len(stack) > MAX_NESTING:
            raise LimitExceeded(f"values nested more than {MAX_NESTING} deep")


def tensors(tree: Node) -> Iterator[tuple[Path, AnyTensor]]:
    """Yield every tensor of a tree with its path, each container once."""
    return ((path, node) for path, node in _values(tree) if isinstance(node, TENSORS))


def arrays(tree: Node) -> Iterator[tuple[Path, TensorInfo]]:
    """Yield every array of numpy of a tree with its path, as the tensor it would be."""
    found = ((path, array(node)) for path, node in _values(tree) if type(node) is Object)
    return ((path, info) for path, info in found if info is not None)


def _values(tree: Node) -> Iterator[tuple[Path, Node]]:
    """Yield the tensors and objects of a tree with their paths, each container once."""
    seen: set[int] = set()
    stack: list[tuple[Path, Iterator[tuple[str | None, Node]]]] = [((), iter([(None, tree)]))]
    while stack:
        path, level = stack[-1]
        for name, node in level:
            here = path if name is None else (*path, name)
            if isinstance(node, TENSORS):
                yield here, node
            elif isinstance(node, _CONTAINERS) and id(node) not in seen:
                seen.add(id(node))
                if type(node) is Object:
                    yield here, node
                stack.append((here, iter(list(_members(node)))))
                break
        else:
            stack.pop()


_CONTAINERS = (Dict, Object, Set, list, tuple)
INNER = (*_CONTAINERS, *TENSORS, PersistentId)


def _members(node: Node) -> Iterator[tuple[str | None, Node]]:
    """Yield what is inside a node with the name a user would write for it, None for no name."""
    match node:
        case Dict():
            yield from labelled(node.pairs)
        case list() | tuple():
            for index, value in enumerate(node):
                yield str(index), value
        case Set():
            for index, value in enumerate(node.items):
                yield str(index), value
        case Object():
            yield from _object_members(node)


def _object_members(node: Object) -> Iterator[tuple[str | None, Node]]:
    if not python2_items(node):
        yield None, node.args
    yield None, node.kwargs
    yield from labelled(items(node) or [])
    for kind, payload in node.steps:
        if kind == "append":
            yield from ((str(index), value) for index, value in enumerate(payload))
        elif kind != "setitem":
            yield None, payload


def label(key: Node) -> str:
    """Write a key as `--at` and lists do; an object that holds one text is named by it.

    Such are members of enums, and keys of classes of their own; `?` is any other.
    """
    match key:
        case str():
            return key
        case int() | float() | None:
            return str(key)
        case tuple():
            return f"({', '.join(map(label, key))})"
        case Object():
            state = key.state.pairs if isinstance(key.state, Dict) else []
            texts = [each for each in (*key.args, *(value for _, value in state)) if each]
            texts = [each for each in texts if isinstance(each, str)]
            return texts[0] if len(texts) == 1 else "?"
    return "?"


def labelled(pairs: Pairs) -> list[tuple[str, Node]]:
    """Name the values of a dict, no two with odd keys alike."""
    if all(type(key) is str for key, _ in pairs):
        return pairs
    taken = {key for key, _ in pairs if isinstance(key, str)}
    named = []
    for key, value in pairs:
        name = text = label(key)
        number = 1
        while not isinstance(key, str) and name in taken:
            number += 1
            name = f"{text}#{number}"
        taken.add(name)
        named.append((name, value))
    return named
