"""Optimizer states around a state_dict, under an edit of its keys.

torch counts parameters by index in `state` and `params`, and may list `param_names`. FSDP, composer
and distributed checkpoints name them instead, without the prefixes of wrappers
(torch/distributed/checkpoint/state_dict.py); flattened there, `state.NAME.exp_avg` is one key.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import field
from itertools import islice

from ckptool.pickles.tree import Dict, Node, Object, Pairs, items, named_items
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, replacing, surroundings
from ckptool.state.edits import KeyMap
from ckptool.state.walk import Path, dotted
from ckptool.text import listed, quoted

MAX_DEPTH = 8
MAX_PREFIXES = 100  # that are tried
Moves = Mapping[str, str | None]  # old names to new ones, None for dropped
_NAMING = ("params", "param_names")
_FLAT = ("state.", "param_groups.")


def followed(tree: Node, at: Path, key_map: KeyMap) -> tuple[Node, list[str]]:
    """Rename the parameters that optimizers around a state_dict name; say what was done."""
    state_dict = places.state_dict_node(tree, at)
    beside = list(surroundings.named(tree, at))
    first = reversed(key_map.pairs)  # the name of a copy comes second
    moves = {old: old if old in key_map.remade else new for old, new in first}
    follower = _Follower(moves, key_map.remade, beside, {id(state_dict): state_dict})
    return follower.visit(tree, ()), list(dict.fromkeys(follower.notes))


def _known(names: Iterable[str], moves: Moves) -> Moves:
    """Return what becomes of names: keys, or keys without one prefix that all of them lack.

    Nothing where they are neither.
    """
    if not moves.keys().isdisjoint(names):
        return moves
    first, *_ = names
    for key in islice((key for key in moves if key.endswith(f".{first}")), MAX_PREFIXES):
        prefix = key.removesuffix(first)
        if all(prefix + name in moves for name in names):
            found = {name: moves[prefix + name] for name in names}
            return {name: new and new.removeprefix(prefix) for name, new in found.items()}
    return {}


@dataclass(slots=True)
class _Follower:
    """Walks dicts and lists; `done` maps nodes by their id to what they became."""

    moves: Moves
    remade: Collection[str]
    beside: list[str]
    done: dict[int, Node]
    met: list[Node] = field(default_factory=list)  # which keeps ids apart
    notes: list[str] = field(default_factory=list)

    def visit(self, node: Node, path: tuple[str, ...]) -> Node:
        """Return a node with its optimizers renamed; the very node where there are none."""
        if not isinstance(node, Dict | Object | list | tuple) or len(path) > MAX_DEPTH:
            return node
        if id(node) in self.done:
            return self.done[id(node)]
        self.met.append(node)
        self.done[id(node)] = node  # where it holds itself
        self.done[id(node)] = self._changed(node, path)
        return self.done[id(node)]

    def _changed(self, node: Node, path: tuple[str, ...]) -> Node:
        if isinstance(node, list | tuple):
            members = [self.visit(each, (*path, str(at))) for at, each in enumerate(node)]
            same = all(new is old for new, old in zip(members, node, strict=True))
            return node if same else type(node)(members)
        named = dict(named_items(node))
        if items(named.get("state")) is not None and isinstance(named.get("param_groups"), list):
            return self._optimizer(node, path, named["state"], named["param_groups"])
        if all(any(key.startswith(head) for key in named) for head in _FLAT):
            return self._flat(node, path, [key for key in named if key.startswith(_FLAT)])
        new = {key: self.visit(value, (*path, key)) for key, value in named.items()}
        if all(new[key] is value for key, value in named.items()):
            return node
        return _with_values(node, new)

    def _optimizer(
        self, node: Node, path: tuple[str, ...], state: Node, groups: list[Node]
    ) -> Node:
        keys = [key for key, _ in items(state) or ()]
        lists = [
            value
            for group in groups
            for key, value in named_items(group)
            if key in _NAMING and isinstance(value, list)
        ]
        every = [*keys, *(each for names in lists for each in names)]
        if any(isinstance(each, int) for each in every):
            self._by_index(path)
        moved = self._moved([each for each in every if isinstance(each, str)], path)
        if not moved:
            return node

        def group_pairs(pairs: Pairs) -> Pairs:
            return [
                (key, [_looked_up(moved, each, each) for each in value])
                if key in _NAMING and isinstance(value, list)
                else (key, value)
                for key, value in pairs
            ]

        new = {
            "state": _with_keys(state, moved),
            "param_groups": [
                group if items(group) is None else replacing.with_pairs(group, group_pairs)
                for group in groups
            ],
        }
        return _with_values(node, new)

    def _flat(self, node: Node, path: tuple[str, ...], keys: list[str]) -> Node:
        names = {key: key.partition(".")[2].rpartition(".")[0] for key in keys}
        moved = self._moved(list(names.values()), path)
        new = {
            key: f"{key.partition('.')[0]}.{moved[name]}.{key.rpartition('.')[2]}"
            for key, name in names.items()
            if name in moved
        }
        return _with_keys(node, new) if new else node

    def _by_index(self, path: tuple[str, ...]) -> None:
        if None not in self.moves.values() and not self.remade:
            return
        what = "after dropping some" if None in self.moves.values() else "as some were remade"
        here = {dotted(path[:depth]) for depth in range(1, len(path) + 1)}
        name = next((each for each in self.beside if each in here), None)
        self.notes.append(
            f"the optimizer at `{dotted(path)}` counts parameters by index: {what}, its state "
            "no longer fits" + (f"; --drop-beside {quoted(name)} leaves it out" if name else "")
        )

    def _moved(self, names: list[str], path: tuple[str, ...]) -> dict[str, str]:
        """Return the new names of the parameters of an optimizer, of those that get another."""
        distinct = dict.fromkeys(names)
        known = _known(distinct, self.moves) if distinct else {}
        what = f"the optimizer at `{dotted(path)}` names its parameters"
        if distinct and not known and any(new != old for old, new in self.moves.items()):
            self.notes.append(f"{what} differently from the state_dict: left as they are")
        if remade := [name for name in distinct if name in self.remade]:
            self.notes.append(
                f"{what}: it still has the state of {len(remade)} as they were before they were "
                f"cut, joined or rearranged: {listed(remade, 3)}"
            )
        if gone := [name for name in distinct if known.get(name, name) is None]:
            self.notes.append(
                f"{what}: it still has the state of {len(gone)} "
                f"that the state_dict no longer has: {listed(gone, 3)}"
            )
        pairs = ((name, known.get(name)) for name in distinct)
        moved = {name: new for name, new in pairs if new not in (None, name)}
        if len({moved.get(name, name) for name in distinct}) < len(distinct):
            self.notes.append(f"{what}, and two would get one name: left as they are")
            return {}
        if moved:
            self.notes.append(f"{what}: {len(moved)} of {len(distinct)} renamed with the keys")
        return moved


def _with_keys(node: Node, new: Mapping[str, str]) -> Node:
    return replacing.with_pairs(
        node, lambda pairs: [(_looked_up(new, key, key), value) for key, value in pairs]
    )


def _with_values(node: Node, new: Mapping[str, Node]) -> Node:
    return replacing.with_pairs(
        node, lambda pairs: [(key, _looked_up(new, key, value)) for key, value in pairs]
    )


def _looked_up(known: Mapping[str, Node], key: Node, otherwise: Node) -> Node:
    """Look up a key that a file chose: only text is hashed."""
    return known.get(key, otherwise) if isinstance(key, str) else otherwise
