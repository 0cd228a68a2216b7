"""What a state_dict carries as attributes: `_metadata`, and the texts of a safetensors file.

Its keys are module paths and follow the keys of the parameters. Losing it breaks quantized
modules and hides a missing `num_batches_tracked` (torch/nn/modules/module.py,
`_load_from_state_dict`).

`__metadata__` of a safetensors file (LoRA files keep their training record there) is the attribute
`_safetensors_metadata`, but for what every file of torch says: `{"format": "pt"}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from ckptool.pickles.tree import Dict, Node, Object, attribute, items
from ckptool.state import checkpoint as places, edits, replacing
from ckptool.state.edits import KeyEdit, KeyMap


def rekeyed(metadata: Node, key_map: KeyMap, edit: KeyEdit) -> Node:
    """Move the entries of `_metadata` with the keys."""
    pairs = places.text_items(metadata)
    if pairs is None:
        return metadata
    old_entries = dict(pairs)
    moved = edits.rekey_modules(list(old_entries), key_map, edit)
    fresh = Dict([("version", 1)])  # as nn.Module.state_dict writes for nn.DataParallel
    entries: dict[str, Node] = {}
    used = set()
    for old, new in moved:
        entry = fresh if old is None else old_entries[old]
        again = old in used and items(entry) is not None
        entries[new] = replacing.with_pairs(entry, list) if again else entry
        used.add(old)
    return replacing.make_state_dict(entries, None, metadata)


def cleaned(metadata: Node) -> Node:
    """Take out the flag that `load_state_dict(assign=True)` leaves in `_metadata`."""
    pairs = places.text_items(metadata)
    if pairs is None or not any(_flagged(entry) for _, entry in pairs):
        return metadata
    entries = {path: _unflagged(entry) for path, entry in pairs}
    return replacing.make_state_dict(entries, None, metadata)


TEXTS = "_safetensors_metadata"
NOTE = "ckptool"  # of the text in which ckptool notes what has no place
ATTRIBUTES = ("_metadata", TEXTS)
_FORMAT = {"format": "pt"}
MAX_LETTERS = 64 << 20  # of `_metadata` as JSON: a pickle may name one value in many places
LETTERS = 64  # that a value counts for which is not text
MAX_DEPTH = 16
_SURROGATE = "[\ud800-\udfff]"


def with_texts(state_dict: Node, texts: Mapping[str, str]) -> Node:
    """Return a state_dict that carries the texts of a safetensors file."""
    kept = [pair for pair in texts.items() if pair not in _FORMAT.items()]
    if not kept:
        return state_dict
    attributes = state_dict.state.pairs if state_dict.state is not None else []
    steps = [step for step in state_dict.steps if step[0] != "build"]
    steps.append(("build", Dict([*attributes, (TEXTS, Dict(list(kept)))])))
    return Object(state_dict.callee, state_dict.args, steps=steps)


def texts(state_dict: Node) -> dict[str, str]:
    """Return what the `__metadata__` of a safetensors file is to say."""
    return _FORMAT | own_texts(state_dict)


def own_texts(state_dict: Node) -> dict[str, str]:
    """Return the texts of a safetensors file that a state_dict carries."""
    pairs = places.text_items(attribute(state_dict, TEXTS)) or []
    return {key: text for key, text in pairs if is_text(key) and is_text(text) and key != NOTE}


def carried(state_dict: Node) -> list[str]:
    """Name the attributes of a state_dict."""
    return [name for name, _ in _attributes(state_dict)]


def _attributes(state_dict: Node) -> list[tuple[str, Node]]:
    return places.named_items(state_dict.state) if isinstance(state_dict, Object) else []


def left(state_dict: Node) -> list[str]:
    """Name the attributes, and parts of them, that a format of tensors and texts cannot hold."""
    named = _attributes(state_dict)
    found = [name for name, _ in named if name not in ATTRIBUTES]
    for name, node in named:
        if name == "_metadata" and places.text_items(node) is None:
            found.append(name)
        elif name == "_metadata":
            found += [f"_metadata of {path or 'the root'}" for path in as_json(node)[1]]
        elif name == TEXTS:
            kept = texts(state_dict)
            pairs = places.items(node) or [(TEXTS, node)]
            found += [f"{TEXTS} {key}" for key, text in pairs if kept.get(key) != text]
    return found


def as_json(metadata: Node) -> tuple[dict[str, Any], list[str]]:
    """Return `_metadata` as JSON holds it, and the paths of modules whose entry it cannot hold."""
    budget = [MAX_LETTERS]
    held, unfit = {}, []
    for path, entry in places.text_items(metadata) or []:
        try:
            held[_plain(path, budget)] = _plain(entry, budget)
        except ValueError:
            unfit.append(path)
    return held, unfit


def _plain(node: Node, budget: list[int], depth: int = 0) -> Any:
    """Return a value as JSON gives it back; raises `ValueError` for one that it does not."""
    budget[0] -= len(node) if isinstance(node, str) else LETTERS
    if budget[0] < 0 or depth > MAX_DEPTH:
        raise ValueError
    match node:
        case None | bool():
            return node
        case int() if abs(node) < 1 << 63:
            return node
        case float() if math.isfinite(node):
            return node
        case str() if is_text(node):
            return node
        case list():
            return [_plain(each, budget, depth + 1) for each in node]
        case Dict() if all(isinstance(key, str) for key, _ in node.pairs):
            inner = depth + 1
            return {_plain(k, budget, inner): _plain(v, budget, inner) for k, v in node.pairs}
    raise ValueError


def is_text(node: Node) -> bool:
    """Return whether a value is text that JSON can hold: without half a character."""
    return isinstance(node, str) and (node.isascii() or not re.search(_SURROGATE, node))


def from_json(metadata: Mapping[str, Any]) -> Node:
    """Return `_metadata` of what JSON held; raises `ValueError` for what `as_json` cannot make."""
    entries = {path: _node(entry) for path, entry in metadata.items()}
    return replacing.make_state_dict(entries, None)


def _node(value: Any, depth: int = 0) -> Node:
    if depth > MAX_DEPTH or (isinstance(value, int) and abs(value) >= 1 << 63):
        raise ValueError
    if isinstance(value, dict):
        return Dict([(key, _node(each, depth + 1)) for key, each in value.items()])
    return [_node(each, depth + 1) for each in value] if isinstance(value, list) else value


_FLAG = "assign_to_params_buffers"


def _flagged(entry: Node) -> bool:
    return isinstance(entry, Dict) and any(key == _FLAG for key, _ in entry.pairs)


def _unflagged(entry: Node) -> Node:
    if not _flagged(entry):
        return entry
    return Dict([pair for pair in entry.pairs if pair[0] != _FLAG])
