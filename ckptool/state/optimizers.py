"""Optimizer states around a state_dict, under an edit of its keys.

torch counts parameters by index in `state` and `params`, and may list `param_names`. FSDP, composer
and distributed checkpoints name them instead, without the prefixes of wrappers
(torch/distributed/checkpoint/state_dict.py); flattened there, `state.NAME.exp_avg` is one key.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from ckptool.pickles.tree import Dict, Node, Object, Pairs, items, named_items
from ckptool.state import replacing
from ckptool.state.edits import KeyMap
from ckptool.state.walk import dotted
from ckptool.state.wrappers import peeling
from ckptool.text import listed

MAX_DEPTH = 8
_NAMING = ("params", "param_names")
_FLAT = ("state.", "param_groups.")


def followed(tree: Node, key_map: KeyMap, state_dict: Node) -> tuple[Node, list[str]]:
    """Rename the parameters that optimizers name, but in the state_dict; say what was done."""
    follower = _Follower(_moves(key_map), {id(state_dict): state_dict})
    return follower.visit(tree, ()), list(dict.fromkeys(follower.notes))


def _moves(key_map: KeyMap) -> list[dict[str, str | None]]:
    """Map old names to new ones, None for dropped: as keys are, and without their wrappers."""
    whole = dict(key_map.pairs)
    before, after = peeling(whole), peeling(key_map.written)
    bare = {before.name(old): new and after.name(new) for old, new in whole.items()}
    return [whole, bare]


@dataclass(slots=True)
class _Follower:
    """Walks dicts and lists; `done` maps nodes by their id to what they became."""

    moves: list[dict[str, str | None]]
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
        moved = self._renaming([each for each in every if isinstance(each, str)], path)
        if moved is None:
            return node
        renamed = moved

        def group_pairs(pairs: Pairs) -> Pairs:
            return [
                (key, [renamed(each) for each in value])
                if key in _NAMING and isinstance(value, list)
                else (key, value)
                for key, value in pairs
            ]

        new = {
            "state": replacing.with_pairs(
                state, lambda pairs: [(renamed(key), value) for key, value in pairs]
            ),
            "param_groups": [
                group if items(group) is None else replacing.with_pairs(group, group_pairs)
                for group in groups
            ],
        }
        return _with_values(node, new)

    def _flat(self, node: Node, path: tuple[str, ...], keys: list[str]) -> Node:
        names = {key: key.partition(".")[2].rpartition(".")[0] for key in keys}
        moved = self._renaming(list(names.values()), path)
        if moved is None:
            return node
        new = {
            key: f"{key.partition('.')[0]}.{moved(name)}.{key.rpartition('.')[2]}"
            for key, name in names.items()
        }
        return replacing.with_pairs(
            node, lambda pairs: [(_looked_up(new, key, key), value) for key, value in pairs]
        )

    def _by_index(self, path: tuple[str, ...]) -> None:
        if None in self.moves[0].values():
            self.notes.append(
                f"the optimizer at `{dotted(path)}` counts parameters by index: after dropping "
                f"some, its state no longer fits; --drop-beside {dotted(path)} leaves it out"
            )

    def _renaming(self, names: list[str], path: tuple[str, ...]) -> Callable[[Node], Node] | None:
        """Return what renames the parameters of an optimizer; None where all names stay."""
        distinct = dict.fromkeys(names)
        known = next((each for each in self.moves if not each.keys().isdisjoint(distinct)), None)
        if not distinct or known is None:
            if distinct and any(new != old for old, new in self.moves[0].items()):
                self.notes.append(
                    f"the optimizer at `{dotted(path)}` names parameters otherwise than the keys "
                    "of the state_dict: its names were left as they are"
                )
            return None
        what = f"the optimizer at `{dotted(path)}` names its parameters"
        if gone := [name for name in distinct if known.get(name, name) is None]:
            self.notes.append(
                f"{what}: it still has the state of {len(gone)} "
                f"that the state_dict no longer has: {listed(gone, 3)}"
            )
        moved = _new_names(distinct, known)
        if not moved:
            return None
        if len({moved.get(name, name) for name in distinct}) < len(distinct):
            self.notes.append(f"{what}, and two would get one name: they were left as they are")
            return None
        self.notes.append(f"{what}: {len(moved)} of {len(distinct)} renamed with the keys")
        return lambda name: _looked_up(moved, name, name)


def _new_names(names: Mapping[str, None], known: Mapping[str, str | None]) -> dict[str, str]:
    pairs = ((name, known.get(name)) for name in names)
    return {name: new for name, new in pairs if new is not None and new != name}


def _with_values(node: Node, new: Mapping[str, Node]) -> Node:
    return replacing.with_pairs(
        node, lambda pairs: [(key, _looked_up(new, key, value)) for key, value in pairs]
    )


def _looked_up(known: Mapping[str, Node], key: Node, otherwise: Node) -> Node:
    """Look up a key that a file chose: only text is hashed."""
    return known.get(key, otherwise) if isinstance(key, str) else otherwise
