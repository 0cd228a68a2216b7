"""A tree with another node in it; what is not on the way to that is shared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ckptool.pickles.tree import (
    ORDERED_DICT,
    Dict,
    Node,
    Object,
    Pairs,
    items,
    named_items,
    python2_items,
)
from ckptool.state import modules
from ckptool.state.walk import Path


def replaced(tree: Node, at: Path, node: Node) -> Node:
    """Return the tree with another node at a place; what is not on the way is shared."""
    if not at:
        return node
    step, rest = at[0], at[1:]
    if isinstance(tree, list | tuple):
        place = int(step)
        return type(tree)([*tree[:place], replaced(tree[place], rest, node), *tree[place + 1 :]])
    given = None if named_items(tree) else modules.attributes(tree)
    pairs = items(tree) or [] if given is None else given
    last = next(value for key, value in reversed(pairs) if key == step)

    def swap(pairs: Pairs) -> Pairs:
        return [
            (key, replaced(value, rest, node) if value is last and key == step else value)
            for key, value in pairs
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


def _with_attributes(node: Object, attributes: Dict) -> Object:
    state = node.state
    new = (attributes, state[1]) if isinstance(state, tuple) else attributes
    steps = [(kind, new if payload is state else payload) for kind, payload in node.steps]
    return replace(node, steps=steps)


def make_state_dict(entries: dict[str, Node], metadata: Node, like: Node = None) -> Node:
    """Make the node of a state_dict: an OrderedDict, or what `like` is, with these entries."""
    pairs = list(entries.items())
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
