"""Key order and ties, noted as text where a format has no place for them.

The note is the JSON text `{"v": 1, "order": [keys], "ties": {alias: kept}}`. A note that does not
agree with the keys is ignored, and that is reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TypeVar

NOTE = "ckptool"

Entry = TypeVar("Entry")


def noted(order: Sequence[str], ties: Mapping[str, str]) -> str:
    """Write the note."""
    note = {"v": 1, "order": list(order), "ties": dict(ties)}
    return json.dumps(note, ensure_ascii=False, separators=(",", ":"))


def restored(
    entries: dict[str, Entry], note: str | None
) -> tuple[dict[str, Entry], tuple[str, ...]]:
    """Return the entries in their order and with their ties; as they are, with a note, if not."""
    if note is None:
        return entries, ()
    try:
        parsed = json.loads(note)
        order, ties = parsed["order"], parsed["ties"]
        agreed = (
            parsed["v"] == 1
            and all(kept in entries and alias not in entries for alias, kept in ties.items())
            and len(order) == len(set(order))
            and set(order) == entries.keys() | ties.keys()
        )
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        agreed = False
    if not agreed:
        return entries, ("the order and ties noted in the file do not fit its keys: ignored",)
    return {key: entries[ties.get(key, key)] for key in order}, ()
