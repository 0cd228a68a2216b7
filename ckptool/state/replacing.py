"""A tree with another node in it; what is not on the way to that is shared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from ckptool.errors import EditError, KeyCollision
from ckptool.pickles.subclasses import as_pickled
from ckptool.pickles.tree import (
    ORDERED_DICT,
    Dict,
    Node,
    Object,
    Pairs,
    attribute,
    items,
    python2_items,
    text_items,
)
from ckptool.state import modules
from ckptool.state.walk import Path, labelled
from ckptool.text import length


def replaced(tree: Node, at: Path, node: Node) -> Node:
    """Return the tree with another node at a place; what is not on the way is shared."""
    if not at:
        return node
    step, rest = at[0], at[1:]
    if isinstance(tree, list | tuple):
        place = int(step)
        return type(tree)([*tree[:place], replaced(tree[place], rest, node), *tree[place + 1 :]])
    given = None if items(tree) else modules.attributes(tree)
    pairs = items(tree) or [] if given is None else given
    named = reversed(list(zip(pairs, labelled(pairs), strict=True)))
    last, value = next(pair for pair, (name, _) in named if name == step)

    def swap(pairs: Pairs) -> Pairs:
        return [
            (key, replaced(value, rest, node) if here is value and _is(key, last) else here)
            for key, here in pairs
        ]

    return with_pairs(tree, swap) if given is None else _with_attributes(tree, Dict(swap(given)))


def with_pairs(node: Dict | Object, change: Callable[[Pairs], Pairs]) -> Node:
    """Return a dict, or an object that was filled like one, with its pairs changed."""
    if isinstance(node, Dict):
        return Dict(change(node.pairs))
    args, rows = node.args, python2_items(node)
    if rows:
        args = ([list(pair) for pair in change(rows)],)
    steps = [
        (kind, change(payload) if kind == "setitem" else payload) for kind, payload in node.steps
    ]
    return replace(node, args=args, steps=steps)


def _is(key: Node, other: Node) -> bool:
    return key is other or (isinstance(key, str) and key == other)


def _with_attributes(node: Object, attributes: Dict) -> Object:
    state = node.state
    new = (attributes, state[1]) if isinstance(state, tuple) else attributes
    steps = [(kind, new if payload is state else payload) for kind, payload in node.steps]
    return replace(node, steps=steps)


def make_state_dict(entries: dict[str, Node], metadata: Node, like: Node = None) -> Node:
    """Make the node of a state_dict: an OrderedDict, or what `like` is, with these entries.

    An entry that is named as an odd key of `like` gets that key.
    """
    if isinstance(like, list | tuple):
        if any(length(name, 10) is None for name in entries):
            raise EditError("a list cannot hold names", hint="ckptool unwrap makes a dict of it")
        return type(like)(map(as_pickled, entries.values()))
    given = items(like) or []
    keys = {name: key for (key, _), (name, _) in zip(given, labelled(given), strict=True)}
    pairs: Pairs = [(keys.get(name, name), as_pickled(each)) for name, each in entries.items()]
    if isinstance(like, Dict) and metadata is None:
        return Dict(pairs)
    steps: list[tuple[str, Any]] = [("setitem", pairs)] if pairs else []
    if not isinstance(like, Object):
        like = Object(ORDERED_DICT, ())
    attributes = like.state.pairs if isinstance(like.state, Dict) else []
    attributes = [pair for pair in attributes if pair[0] != "_metadata"]
    if metadata is not None:
        attributes.append(("_metadata", metadata))
    if attributes:
        steps.append(("build", Dict(attributes)))
    elif like.state is not None and not isinstance(like.state, Dict):
        steps.append(("build", like.state))
    args = () if python2_items(like) else like.args
    return replace(like, args=args, steps=steps)


def put_back(
    node: Node, inner: Mapping[str, Node], entries: Mapping[str, Node], metadata: Node
) -> Node:
    """Make the dict of dicts anew that keys were joined of.

    Each entry goes into the dict that its name begins with, `inner` by name; one that lost all its
    entries is not made.
    """
    own = attribute(node, "_metadata") is not None
    held: dict[str, dict[str, Node]] = {"": {}}
    for name in entries:
        _hold(name, inner, held)
    if clash := next(iter(held.keys() & entries.keys() - {""}), None):
        raise KeyCollision(f"{clash} would be a tensor, and a dict of others")
    versions: dict[str, dict[str, Node]] = {}
    for path, entry in text_items(metadata) or []:
        place = "" if own else _place_of(path, inner)
        versions.setdefault(place, {})[path.removeprefix(place).removeprefix(".")] = entry

    def make(place: str, like: Node) -> Node:
        made = {}
        for step in held[place]:
            name = f"{place}.{step}" if place else step
            made[step] = make(name, inner[name]) if name in held else entries[name]
        meant = versions.get(place)
        return make_state_dict(made, make_state_dict(meant, None) if meant else None, like)

    return make("", node)


def _place_of(path: str, inner: Mapping[str, Node]) -> str:
    """Return the innermost dict that a path begins with, an empty text for the one around all."""
    while path and path not in inner:
        path = path.rpartition(".")[0]
    return path


def _hold(name: str, inner: Mapping[str, Node], held: dict[str, dict[str, Node]]) -> None:
    """Note in which dict an entry is, and that one in the dict around it."""
    place = _place_of(name.rpartition(".")[0], inner)
    if place and place not in held:
        held[place] = {}
        _hold(place, inner, held)
    held[place][name[len(place) + 1 :] if place else name] = None
