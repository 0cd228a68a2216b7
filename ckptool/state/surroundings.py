"""What is beside a state_dict, left out by name; its path stays the same."""

from __future__ import annotations

from collections.abc import Sequence

from ckptool.errors import NothingMatched
from ckptool.pickles.tree import Node, items
from ckptool.state import checkpoint as places, replacing, selecting
from ckptool.state.walk import Path, dotted, label
from ckptool.text import listed, several


def named(tree: Node, at: Path) -> dict[str, tuple[int, str]]:
    """Map the dotted names of what dicts hold beside a place to their depth and last step."""
    names: dict[str, tuple[int, str]] = {}
    for depth, step in enumerate(at):
        for key, _ in items(places.state_dict_node(tree, at[:depth])) or ():
            if key != step:
                names.setdefault(dotted((*at[:depth], label(key))), (depth, label(key)))
    return names


def without(tree: Node, at: Path, patterns: str | Sequence[str]) -> tuple[Node, list[str]]:
    """Return a tree without what patterns select beside the place `at`, and the names of that.

    A pattern is matched with the whole path of a name, and with its last step. Items of lists and
    attributes of objects stay: others would move up, or code would miss them. Raises
    `NothingMatched` for a pattern that selects nothing.
    """
    names = named(tree, at)
    chosen: dict[str, tuple[int, str]] = {}
    for pattern in several(patterns):
        matches = selecting.matcher(pattern)
        found = {name: way for name, way in names.items() if matches(name) or matches(way[1])}
        if not found:
            raise NothingMatched(
                f"`{pattern}` selects nothing outside the state_dict",
                evidence=[f"also contains: {listed(names)}" if names else "it is all there is"],
            )
        chosen |= found
    for depth in reversed(range(len(at))):
        gone = {name for level, name in chosen.values() if level == depth}
        if gone:
            tree = replacing.replaced(tree, at[:depth], _left(tree, at[:depth], at[depth], gone))
    return tree, [name for name in names if name in chosen]


def _left(tree: Node, path: Path, step: str, gone: set[str]) -> Node:
    node = places.state_dict_node(tree, path)
    return replacing.with_pairs(
        node,
        lambda pairs: [pair for pair in pairs if pair[0] == step or label(pair[0]) not in gone],
    )
