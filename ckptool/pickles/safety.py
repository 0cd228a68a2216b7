"""What loading a file elsewhere would do, judged by the names in it: the worst of them counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from ckptool.pickles.names import Level, import_for, level, torch_for
from ckptool.pickles.tree import Dict, Global, Node, Object, OldString, Pairs, children

SHOWN = 8  # dangerous calls in a message


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file names beyond the plain, each with the offset where it is first.

    `imports` are modules without which `torch.load(weights_only=True)` does not accept the rest;
    `versions` say which torch alone accepts one of the names.
    """

    level: Level
    foreign: dict[Global, int]
    dangerous: dict[Global, int]
    imports: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()

    def word(self, program: str) -> str:
        """Return what JSON calls it; a program is one whatever it names besides."""
        return "program" if program else self.level.name.lower()


def judge(named: Mapping[Global, int]) -> Verdict:
    """Judge all names of a file."""
    foreign, dangerous = {}, {}
    for each, offset in named.items():
        found = level(each)
        if found is Level.DANGEROUS:
            dangerous[each] = offset
        elif found is Level.FOREIGN:
            foreign[each] = offset
    worst = Level.DANGEROUS if dangerous else Level.FOREIGN if foreign else Level.PLAIN
    imports = dict.fromkeys(filter(None, map(import_for, named)))
    versions = [f"only {torch_for(each)} accepts {each}" for each in named if torch_for(each)]
    return Verdict(worst, foreign, dangerous, tuple(imports), tuple(versions))


def names_in(tree: Node) -> dict[Global, int]:
    """Collect the names that a tree would carry on, each node visited once."""
    found: dict[Global, int] = {}
    for node in nodes(tree):
        if isinstance(node, Global):
            found.setdefault(node, 0)
    return found


def has_old_text(tree: Node) -> bool:
    """Check for text of Python 2 that is not UTF-8, which `torch.load` refuses by itself."""
    return any(isinstance(node, OldString) for node in nodes(tree))


def nodes(tree: Node) -> Iterator[Node]:
    """Iterate over the nodes of a tree but for plain values, each once."""
    seen: set[int] = set()
    stack = [tree]
    while stack:
        node = stack.pop()
        if isinstance(node, _LEAVES):
            if isinstance(node, Global):
                yield node
            continue
        if id(node) not in seen:
            seen.add(id(node))
            yield node
            stack.extend(children(node))


_LEAVES = (str, int, float, bytes, type(None), Global)


_LONGEST_KEY = 200  # characters that are shown of one


@dataclass(frozen=True, slots=True)
class Call:
    """A dangerous call, or a name that nothing calls (`arguments` None), as people read it.

    At which byte of its pickle, and under which key if any.
    """

    named: Global
    arguments: tuple[str, ...] | None
    offset: int
    where: str

    @property
    def text(self) -> str:
        """Write it as Python would."""
        if self.arguments is None:
            return str(self.named)
        return f"{self.named}({', '.join(self.arguments)})"


def evidence(
    verdict: Verdict, calls: Iterable[Object], tree: Node, limit: int = SHOWN
) -> list[Call]:
    """List the dangerous calls with their arguments, then names that nothing calls."""
    found: list[tuple[Node, Global, tuple[str, ...] | None, int]] = []
    named: set[Global] = set()
    for call in calls:
        callee = call.callee
        if isinstance(callee, Global) and callee in verdict.dangerous:
            named.add(callee)
            if len(found) < limit:
                arguments = tuple(_shown(argument) for argument in call.args)
                found.append((call, callee, arguments, call.offset))
    for name, offset in verdict.dangerous.items():
        if name not in named and len(found) < limit:
            found.append((name, name, None, offset))
    where = _where(tree, [node for node, *_ in found])
    return [
        Call(callee, arguments, offset, where.get(id(node), ""))
        for node, callee, arguments, offset in found
    ]


def evidence_lines(
    verdict: Verdict, calls: Iterable[Object], tree: Node, pickle_name: str
) -> list[str]:
    """Show what is dangerous in a file, a line for each call."""
    return [evidence_line(call, pickle_name) for call in evidence(verdict, calls, tree)]


def evidence_line(call: Call, pickle_name: str) -> str:
    """Show one call, and where it is."""
    where = f"   at `{call.where}`" if call.where else ""
    return f"{pickle_name}, byte {call.offset}: {call.text}{where}"


class Pickled(Protocol):
    """What safety looks at in a checkpoint."""

    @property
    def tree(self) -> Node:
        """Return all that the pickle holds."""

    @property
    def globals(self) -> Mapping[Global, int]:
        """Return the names in it, each with its offset."""

    @property
    def calls(self) -> Iterable[Object]:
        """Return the calls in it."""

    @property
    def pickle_name(self) -> str:
        """Return its name."""

    @property
    def shards(self) -> Sequence[Pickled]:
        """Return the files of a set."""


def evidence_of(verdict: Verdict, checkpoint: Pickled) -> list[str]:
    """Show what is dangerous in a checkpoint; each file of a set by its own name."""
    lines: list[str] = []
    for part in checkpoint.shards or (checkpoint,):
        here = {name: at for name, at in part.globals.items() if name in verdict.dangerous}
        found = replace(verdict, dangerous=here)
        lines += evidence_lines(found, part.calls, part.tree, part.pickle_name)
    return lines[:SHOWN]


def _shown(node: Node) -> str:
    """Write an argument in a few characters."""
    match node:
        case str() | bytes():
            text = repr(node[:60])
            return text if len(node) <= 60 else f"{text}..."
        case bool() | int() | float() | None:
            return str(node)[:40]
        case Global():
            return str(node)[:60]
        case _:
            return "..."


_Way = tuple[Any, str] | None  # the way to the parent, and a key


def _where(tree: Node, wanted: Sequence[Node]) -> dict[int, str]:
    """Name the keys above nodes, the first way to each, by their `id`."""
    left = {id(node) for node in wanted}
    found: dict[int, str] = {}
    seen: set[int] = set()
    stack: list[tuple[_Way, Node]] = [(None, tree)]
    while stack and left:
        way, node = stack.pop()
        if id(node) in left:
            left.discard(id(node))
            found[id(node)] = _dotted(way)
        if isinstance(node, _LEAVES) or id(node) in seen:
            continue
        seen.add(id(node))
        keyed = {id(value): key for key, value in _keyed(node) if isinstance(key, str)}
        for child in children(node):
            key = keyed.get(id(child))
            stack.append(((way, key) if key else way, child))
    return found


def _dotted(way: _Way) -> str:
    """Write a way; joined only here, as keys may be long and ways many."""
    keys: list[str] = []
    while way is not None:
        way, key = way
        keys.append(key[:_LONGEST_KEY])
    return ".".join(reversed(keys))


def _keyed(node: Node) -> Pairs:
    if isinstance(node, Dict):
        return node.pairs
    if isinstance(node, Object):
        return [pair for kind, payload in node.steps if kind == "setitem" for pair in payload]
    return []
