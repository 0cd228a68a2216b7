"""JSON as data from anywhere: no repeated keys, no NaN, bounded in size and depth."""

from __future__ import annotations

import json
import re
from typing import Any

from ckptool.errors import LimitExceeded, Malformed

MAX_DEPTH = 64


def load(data: bytes, what: str, offset: int | None = None) -> dict[str, Any]:
    """Parse an object; `what` names it in messages: `the header`.

    Raises `LimitExceeded`, or `Malformed` with the `offset`.
    """
    if _is_deep(data):
        raise LimitExceeded(f"{what} is nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Malformed(f"{what} is damaged: {why}", offset=offset) from None
    if not isinstance(value, dict):
        raise Malformed(f"{what} is not an object", offset=offset)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key stands twice")
    return members


def _refuse(token: str) -> Any:
    raise ValueError(f"the token {token}")


# Possessive, so that a text without its closing quote is passed over once and not again and again.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def _is_deep(data: bytes) -> bool:
    """Check how deep brackets nest outside of texts: what would make the JSON parser recurse."""
    depth = 0
    for token in _TOKEN.finditer(data):
        depth += {b"[": 1, b"{": 1, b"]": -1, b"}": -1}.get(token[0], 0)
        if depth > MAX_DEPTH:
            return True
    return False
