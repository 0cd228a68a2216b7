"""The language of `lines.txt`.

A line is a case: steps, separated by ` ; `. A step is a command line of ckptool without its first
word, or a preparation, whose name starts with `+` (see `preparing.py`). Before a command line may
stand `NAME=VALUE` (environment) and `tty` (stdout and stderr are terminals); `ckptool` alone is a
step without words. Words that start with
`good/`, `hostile/`, `frameworks/` or `corpus/` name files that are copied into the folder of the
case under that name, a glob among them names several; `{url}` is a web server of all of them.
`{GLOB}` makes a case of each file or folder that matches.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

EACH = re.compile(r"\{((?:good|hostile|frameworks|corpus)/[^}]*)\}")
# Words of lines that load torch; these run after all others, so that the others run without.
WITH_TORCH = {"verify", "dcp", "--model", "--init-missing", "--list", "+net", "+ghost"}


@dataclass(frozen=True)
class Case:
    line: str

    @property
    def steps(self) -> list[list[str]]:
        steps: list[list[str]] = [[]]
        for word in shlex.split(self.line):
            if word == ";":
                steps.append([])
            else:
                steps[-1].append(word)
        return steps

    @property
    def with_torch(self) -> bool:
        return any(not WITH_TORCH.isdisjoint(step) for step in self.steps)

    @property
    def group(self) -> str:
        """Name the first command of the case."""
        for step in self.steps:
            if not step or step[0].startswith("+"):
                continue
            words = [word for word in step if word != "tty" and not is_variable(word)]
            return words[0] if words and re.fullmatch("[a-z][a-z-]+", words[0]) else "other"
        return "other"


def is_variable(word: str) -> bool:
    return re.match(r"[A-Z_]+=", word) is not None


def parsed(path: Path) -> list[str]:
    """Read the lines that are no comments."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def expanded(lines: Iterable[str], roots: Mapping[str, Path]) -> list[Case]:
    """Make the cases; lines over a root that is not there are left out."""
    absent = re.compile("|".join(f"{name}/" for name in ("corpus",) if name not in roots) or "(?!)")
    texts = [text for line in lines for text in _each(line, roots) if not absent.search(text)]
    return [Case(text) for text in dict.fromkeys(texts)]


def _each(line: str, roots: Mapping[str, Path]) -> Iterator[str]:
    place = EACH.search(line)
    if place is None:
        yield line
        return
    for name in matching(place[1], roots):
        yield line.replace(place[0], shlex.quote(name))


def matching(pattern: str, roots: Mapping[str, Path]) -> list[str]:
    """List the names of files under a root that a glob matches."""
    root, _, rest = pattern.partition("/")
    if root not in roots:
        return []
    return sorted(f"{root}/{path.relative_to(roots[root])}" for path in roots[root].glob(rest))
