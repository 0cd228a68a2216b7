"""JSON as data from anywhere: no repeated keys, no NaN, bounded in size and depth."""

from __future__ import annotations

import json
import re
from typing import Any

from ckptool.errors import LimitExceeded, Malformed

MAX_DEPTH = 64


def load(data: bytes, what: str, path: str, offset: int | None = None) -> dict[str, Any]:
    """Parse an object; `what` names it in messages: `the header`.

    Raises `Malformed` or `LimitExceeded` with `path` and `offset`.
    """
    if _depth(data) > MAX_DEPTH:
        raise LimitExceeded(f"{what} is nested more than {MAX_DEPTH} deep", path=path)
    try:
        found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        why = str(error) if not isinstance(error, UnicodeDecodeError) else "it is not UTF-8"
        raise Malformed(f"{what} is damaged: {why}", path=path, offset=offset) from None
    if not isinstance(found, dict):
        raise Malformed(f"{what} is not an object", path=path, offset=offset)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _refuse(token: str) -> Any:
    raise ValueError(f"the token {token}")


# Possessive, so that a text without its closing quote is passed over once and not again and again.
_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[{]|[\]}]', re.DOTALL)


def _depth(data: bytes) -> int:
    """Count how deep brackets nest, text aside: what would make the JSON parser recurse."""
    deepest = depth = 0
    for token in _TOKEN.finditer(data):
        if token[0][:1] in b"[{":
            depth += 1
            deepest = max(deepest, depth)
            if deepest > MAX_DEPTH:
                break
        elif token[0][:1] in b"]}":
            depth -= 1
    return deepest
