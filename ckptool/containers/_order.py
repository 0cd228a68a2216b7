"""Key order, ties and `_metadata`, noted as text where a format has no place for them.

The note is the JSON text `{"v": 1, "order": [keys], "ties": {alias: kept}, "metadata": {module:
versions}}`, each part only where it says something. A note that does not agree with the keys is
ignored, and that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

from ckptool.pickles.tree import Node, text_items
from ckptool.state import module_metadata
from ckptool.state.module_metadata import NOTE as NOTE

Entry = TypeVar("Entry")


def noted(
    order: Sequence[str], ties: Mapping[str, str], held: Sequence[str], metadata: Node = None
) -> dict[str, str]:
    """Return the note under its name; nothing where keys are `held` in `order`, without the rest.

    What of `_metadata` JSON cannot hold is left out.
    """
    is_dict = text_items(metadata) is not None
    parts: dict[str, object] = {
        "order": list(order) if [*held, *ties] != list(order) else None,
        "ties": dict(ties) or None,
        "metadata": module_metadata.as_json(metadata)[0] if is_dict else None,
    }
    note = {name: part for name, part in parts.items() if part is not None}
    if not note:
        return {}
    return {NOTE: json.dumps({"v": 1, **note}, ensure_ascii=False, separators=(",", ":"))}


def restored(
    entries: dict[str, Entry], note: str | None
) -> tuple[dict[str, Entry], Node, tuple[str, ...]]:
    """Return the entries in their order and with their ties, and `_metadata`.

    Entries are as they are, with a note for the user, where what is noted does not fit them.
    """
    if note is None:
        return entries, None, ()
    try:
        parsed = json.loads(note)
        ties = parsed.get("ties", {})
        order = parsed.get("order", [*entries, *ties])
        metadata = parsed.get("metadata")
        agreed = (
            parsed["v"] == 1
            and all(kept in entries and alias not in entries for alias, kept in ties.items())
            and len(order) == len(set(order))
            and set(order) == entries.keys() | ties.keys()
        )
        versions = None if metadata is None else module_metadata.from_json(metadata)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        agreed = False
    if not agreed:
        return entries, None, ("the order and ties noted in the file do not fit its keys: ignored",)
    return {key: entries[ties.get(key, key)] for key in order}, versions, ()
