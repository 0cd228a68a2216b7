"""Tables: those of words that come with ckptool, and rows in groups of what they have in common."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from typing import TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")
_SECTION = re.compile(r"\[([\w. ]+)\]")
_BETWEEN = re.compile(r" {2,}")


@cache
def read(module: str, name: str) -> dict[str, list[list[str]]]:
    """Return the sections of a file next to a module; at least two spaces part the columns."""
    sections: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    with open(os.path.join(os.path.dirname(module), name), encoding="ascii") as lines:
        for line in (line.partition("#")[0].rstrip() for line in lines):
            if head := _SECTION.fullmatch(line):
                rows = sections[head[1]] = []
            elif line:
                rows.append(_BETWEEN.split(line))
    return sections


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Return the values of each key, in their order."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
