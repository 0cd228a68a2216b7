"""Ways through a tree: every tensor by its path, and how deep a tree may be."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import field

from ckptool.errors import LimitExceeded
from ckptool.files import budget
from ckptool.pickles.subclasses import array
from ckptool.pickles.torch_objects import attributes
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
from ckptool.records import dataclass
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
    spending = budget.current()
    stack = [iter((tree,))]
    while stack:
        for node in stack[-1]:
            if type(node) is TensorInfo and node.origin is None:
                continue
            if isinstance(node, INNER) and id(node) not in seen:
                seen.add(id(node))
                spending.spend(budget.SEEN)
                stack.append(children(node))
                break
        else:
            stack.pop()
        if len(stack) > MAX_NESTING:
            raise LimitExceeded(f"values nested more than {MAX_NESTING} deep")


def tensors(tree: Node) -> Iterator[tuple[Path, AnyTensor]]:
    """Yield every tensor of a tree with its path, each container once.

    What a tensor has on it (an attribute, the gradient of a Variable of 2017) comes after it.
    """
    return ((path, node) for path, node in _values(tree) if isinstance(node, TENSORS))


def arrays(tree: Node) -> Iterator[tuple[Path, TensorInfo]]:
    """Yield every array of numpy of a tree with its path, as the tensor it would be."""
    found = ((path, array(node)) for path, node in _values(tree) if type(node) is Object)
    return ((path, info) for path, info in found if info is not None)


def _values(tree: Node) -> Iterator[tuple[Path, Node]]:
    """Yield the tensors and objects of a tree with their paths, each container once."""
    seen: set[int] = set()
    numbers: Numbers = {}
    stack: list[tuple[Path, Iterator[tuple[str | None, Node]]]] = [((), iter([(None, tree)]))]
    while stack:
        path, level = stack[-1]
        for name, node in level:
            here = path if name is None else (*path, name)
            holder, inside = node, node
            if isinstance(node, TENSORS):
                yield here, node
                plain = type(node) is not TensorInfo or node.origin is None
                holder, inside = node.origin, None if plain else attributes(node)
            elif type(node) is Object and id(node) not in seen:
                yield here, node
            if isinstance(inside, _CONTAINERS) and id(holder) not in seen:
                seen.add(id(holder))
                stack.append((here, _members(inside, numbers)))
                break
        else:
            stack.pop()


_CONTAINERS = (Dict, Object, Set, list, tuple)
INNER = (*_CONTAINERS, *TENSORS, PersistentId)


def named(tree: Node) -> Iterator[tuple[str, AnyTensor]]:
    """Yield every tensor of a tree by its path, dotted; no two have the same."""
    names = _Names(set())
    for path, tensor in tensors(tree):
        yield names.free(dotted(path) or "."), tensor


@dataclass(slots=True)
class _Names:
    """Names that are taken, and how often a text was asked for."""

    taken: set[str]
    counts: dict[str, int] = field(default_factory=dict)

    def free(self, text: str) -> str:
        """Take a name that nothing has: the text, else `text#2` and so on."""
        name = text
        while name in self.taken:
            self.counts[text] = self.counts.get(text, 1) + 1
            name = f"{text}#{self.counts[text]}"
        self.taken.add(name)
        return name


def _members(node: Node, numbers: Numbers) -> Iterator[tuple[str | None, Node]]:
    """Yield what is inside a node with the name a user would write for it, None for no name."""
    match node:
        case Dict():
            yield from labelled(node.pairs, number(node, node.pairs, numbers))
        case list() | tuple():
            yield from _placed(node)
        case Set():
            yield from _placed(node.items)
        case Object():
            yield from _object_members(node, numbers)


def _placed(values: Sequence[Node]) -> Iterator[tuple[str | None, Node]]:
    """Name values by their place, but for those that hold nothing."""
    return ((str(place), each) for place, each in enumerate(values) if isinstance(each, INNER))


def _object_members(node: Object, numbers: Numbers) -> Iterator[tuple[str | None, Node]]:
    if not python2_items(node):
        yield None, node.args
    yield None, node.kwargs
    pairs = items(node) or []
    yield from labelled(pairs, number(node, pairs, numbers))
    for kind, payload in node.steps:
        if kind == "append":
            yield from _placed(payload)
        elif kind != "setitem":
            yield None, payload


MAX_MEMBERS = 100  # of a tuple as a key that are written: each may hold the next twice


def label(key: Node) -> str:
    """Write a key as `--at` and lists do; an object that holds one text is named by it.

    Such are members of enums, and keys of classes of their own; `?` is any other.
    """
    return _written(key, iter(range(MAX_MEMBERS)))


def _written(key: Node, room: Iterator[int]) -> str:
    """Write a key, and of tuples in it so many members as there is room for."""
    match key:
        case str():
            return key
        case int() | float() | None:
            return str(key)
        case tuple():
            members = [_written(each, room) for each, _ in zip(key, room, strict=False)]
            return f"({', '.join([*members, *['...'][: len(members) < len(key)]])})"
        case Object():
            state = key.state.pairs if isinstance(key.state, Dict) else []
            texts = [each for each in (*key.args, *(value for _, value in state)) if each]
            texts = [each for each in texts if isinstance(each, str)]
            return texts[0] if len(texts) == 1 else "?"
    return "?"


Numbers = dict[int, dict[int, str]]  # by the `id` of a dict, then of a key: the key's number


def number(node: Node, pairs: Pairs, numbers: Numbers) -> dict[int, str]:
    """Return the numbers of the parameters that are keys of a node, by their `id`.

    The state of an optimizer that was pickled whole is keyed by Parameters; its `state_dict()`
    has their numbers in `param_groups` instead (torch/optim/optimizer.py), and so have we.
    `numbers` remembers what was met on the way to the node.
    """
    groups = next((value for key, value in pairs if key == "param_groups"), None)
    if isinstance(groups, list):
        state = next((value for key, value in pairs if key == "state"), None)
        params = [
            each
            for group in groups
            for key, value in items(group) or []
            if key == "params" and isinstance(value, list)
            for each in value
        ]
        numbers[id(state)] = {
            id(each): str(index)
            for index, each in enumerate(params)
            if not isinstance(each, str | int)  # a state_dict's own
        }
    return numbers.get(id(node), {})


def labelled(pairs: Pairs, numbers: dict[int, str] | None = None) -> list[tuple[str, Node]]:
    """Name the values of a dict, no two with odd keys alike."""
    if all(type(key) is str for key, _ in pairs):
        return pairs
    names = _Names({key for key, _ in pairs if isinstance(key, str)})
    return [
        (key, value)
        if isinstance(key, str)
        else (names.free((numbers or {}).get(id(key)) or label(key)), value)
        for key, value in pairs
    ]
