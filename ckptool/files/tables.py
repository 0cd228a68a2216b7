"""Tables of words that come with ckptool, as text: a section each, a line for each row."""

from __future__ import annotations

import os
import re
from functools import cache

_SECTION = re.compile(r"\[([\w. ]+)\]")
_BETWEEN = re.compile(r" {2,}")


@cache
def read(module: str, name: str) -> dict[str, list[list[str]]]:
    """Return the sections of a file next to a module; at least two spaces part the columns."""
    sections: dict[str, list[list[str]]] = {}
    rows: list[list[str]] = []
    with open(os.path.join(os.path.dirname(module), name), encoding="utf-8") as lines:
        for line in (line.partition("#")[0].rstrip() for line in lines):
            if head := _SECTION.fullmatch(line):
                rows = sections[head[1]] = []
            elif line:
                rows.append(_BETWEEN.split(line))
    return sections
