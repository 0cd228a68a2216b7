"""JSON as data from anywhere: no repeated keys, bounded in size and depth.

Nothing that Python takes and others do not (serde_json, which safetensors is read by): NaN, numbers
beyond the floats, `-0` for an integer, halves of characters.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from math import isfinite
from typing import Any, Never

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files import budget

MAX_DEPTH = 64
_WIDEST = 4  # bytes of a letter in memory


def load(data: bytes, what: str, offset: int | None = None) -> dict[str, Any]:
    """Parse an object; `what` names it in messages: `the header`.

    Raises `LimitExceeded`, or `Malformed` with the `offset`.
    """
    count(data, what)
    try:
        if any(found[1] for found in _HALF.finditer(data)):
            raise ValueError("it holds half a character")
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse,
            parse_float=_finite,
            parse_int=_integer if _ODD_INTEGER.search(data) else None,
        )
    except (ValueError, RecursionError) as error:
        why = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
        raise Malformed(f"{what} is damaged: {why}", offset=offset) from None
    if not isinstance(value, dict):
        raise Malformed(f"{what} is not an object", offset=offset)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a key appears twice")
    return members


def _refuse(token: str) -> Never:
    raise ValueError(f"the token {token}")


def _finite(token: str) -> float:
    return float(token) if isfinite(float(token)) else _refuse(token)


def _integer(token: str) -> int:
    return int(token) if token != "-0" and isfinite(float(token)) else _refuse(token)


_ODD_INTEGER = re.compile(rb"-0|\d{300}")  # all others are spared a call


# An escaped backslash, a whole pair of surrogates, or one without the other.
_HALF = re.compile(rb"\\\\|\\u[dD][89abAB]..\\u[dD][c-fC-F]..|(\\u[dD][89a-fA-F])", re.DOTALL)
# Possessive, so that a text without its closing quote is passed over once and not again and again.
_TEXT = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_PIECE = re.compile(rb'(?:[^"]*+%b){1,4096}+|.+' % _TEXT.pattern, re.DOTALL)
_BRACKET = re.compile(rb"[\[{]|[\]}]")
# What signs outside of texts stand for, in bytes of memory; a dict of five is as small as an empty.
_SIZES = {b"{": 240, b"[": 90, b",": budget.NUMBER, b'"': budget.TEXT, b":": 0}
_SMALL_DICT = 5


def count(data: bytes, what: str) -> None:
    """Count what a text will take once it is parsed, by what is outside of its texts.

    Raises `TooCostly`, and `LimitExceeded` for one that is nested deeply.
    """
    depth = 0
    counts = Counter[bytes]()
    for piece in _PIECE.finditer(data):
        outside = _TEXT.sub(b'"', piece[0])
        counts.update({sign: outside.count(sign) for sign in _SIZES})
        for bracket in _BRACKET.finditer(outside):
            depth += 1 if bracket[0] in b"[{" else -1
            if depth > MAX_DEPTH:
                raise LimitExceeded(f"{what} is nested more than {MAX_DEPTH} deep")
    letters = len(data) * (2 if data.isascii() else 2 * _WIDEST)
    pairs = max(counts[b":"] - _SMALL_DICT * counts[b"{"], 0)
    values = sum(number * _SIZES[sign] for sign, number in counts.items())
    budget.current().spend(letters + values + pairs * budget.PAIR)
