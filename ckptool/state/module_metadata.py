"""`_metadata`, the versions of modules that a state_dict carries as an attribute, under an edit.

Its keys are module paths and follow the keys of the parameters. Losing it breaks quantized
modules and hides a missing `num_batches_tracked` (torch/nn/modules/module.py,
`_load_from_state_dict`).
"""

from __future__ import annotations

from ckptool.pickles.tree import Dict, Node
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
    entries = {new: fresh if old is None else old_entries[old] for old, new in moved}
    return replacing.make_state_dict(entries, None, metadata)


def cleaned(metadata: Node) -> Node:
    """Take out the flag that `load_state_dict(assign=True)` leaves in `_metadata`."""
    pairs = places.text_items(metadata)
    if pairs is None or not any(_flagged(entry) for _, entry in pairs):
        return metadata
    entries = {path: _unflagged(entry) for path, entry in pairs}
    return replacing.make_state_dict(entries, None, metadata)


_FLAG = "assign_to_params_buffers"


def _flagged(entry: Node) -> bool:
    return isinstance(entry, Dict) and any(key == _FLAG for key, _ in entry.pairs)


def _unflagged(entry: Node) -> Node:
    if not _flagged(entry):
        return entry
    return Dict([pair for pair in entry.pairs if pair[0] != _FLAG])
