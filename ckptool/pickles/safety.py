"""What loading a file elsewhere would do, judged by its names and calls: the worst counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, Protocol

from ckptool.pickles import calls as shapes
from ckptool.pickles.names import Level, import_for, level, torch_for
from ckptool.pickles.tree import ByteArray, Dict, Global, Node, Object, OldString, Pairs, children
from ckptool.records import dataclass

SHOWN = 8  # dangerous calls in a message
MAX_CALLS = 100  # that are looked for by their shape


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a file names beyond the plain, each with the offset where it is first.

    `calls` are the first that are dangerous by their shape, and `dangerous` has the names that they
    would call, too. `imports` are modules without which `torch.load(weights_only=True)` does not
    accept the rest; `versions` say which torch alone accepts one of the names.
    """

    level: Level
    foreign: dict[Global, int]
    dangerous: dict[Global, int]
    imports: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    calls: tuple[Object, ...] = ()

    def word(self, program: str) -> str:
        """Return what JSON calls it; a program is one whatever it names besides."""
        return "program" if program else self.level.name.lower()


def judge(named: Mapping[Global, int], calls: Iterable[Object] = ()) -> Verdict:
    """Judge all names and calls of a file."""
    foreign, dangerous = {}, {}
    for each, offset in named.items():
        found = level(each)
        if found is Level.DANGEROUS:
            dangerous[each] = offset
        elif found is Level.FOREIGN:
            foreign[each] = offset
    shaped = list(islice(shapes.dangerous(calls), MAX_CALLS))
    for call, called in shaped:
        name = shapes.innermost(called)
        if name is not None and name not in dangerous:
            dangerous[name] = foreign.pop(name, call.offset)
    worst = Level.FOREIGN if foreign else Level.PLAIN
    worst = Level.DANGEROUS if dangerous or shaped else worst
    imports = dict.fromkeys(filter(None, map(import_for, named)))
    versions = tuple(f"only {torch_for(each)} accepts {each}" for each in named if torch_for(each))
    held = tuple(call for call, _ in shaped)
    return Verdict(worst, foreign, dangerous, tuple(imports), versions, held)


def judge_file(checkpoint: Pickled) -> Verdict:
    """Judge all that a checkpoint names and calls, in its tree or not."""
    named, calls = without_nested(checkpoint)
    return judge(named, calls)


def without_nested(checkpoint: Pickled) -> tuple[dict[Global, int], list[Object]]:
    """Return the names and calls of a checkpoint but for what names nested classes of torch."""
    calls = list(checkpoint.calls)
    if all(each.name != "getattr" for each in checkpoint.globals):
        return dict(checkpoint.globals), calls
    inert, kept = shapes.only_nested(calls, checkpoint.tree)
    return {each: at for each, at in checkpoint.globals.items() if each not in inert}, kept


def judge_tree(tree: Node) -> Verdict:
    """Judge what a tree would carry on."""
    return judge(names_in(tree), (node for node in nodes(tree) if isinstance(node, Object)))


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

    At which byte of its pickle, and under which key if any; `text` is as Python would write it.
    """

    named: Global
    arguments: tuple[str, ...] | None
    offset: int
    where: str
    text: str


def evidence(
    verdict: Verdict, calls: Iterable[Object], tree: Node, limit: int = SHOWN
) -> list[Call]:
    """List the dangerous calls with their arguments, then names that nothing calls."""
    shaped = set(map(id, verdict.calls))
    by_name = {each for each in verdict.dangerous if level(each) is Level.DANGEROUS}
    found: list[tuple[Node, Global, tuple[str, ...] | None, str, int]] = []
    named: set[Node] = set()
    for call in calls:
        a_name = isinstance(call.callee, Global) and call.callee in by_name
        if a_name or id(call) in shaped:
            name = shapes.innermost(call.callee) or _NAMELESS
            named.add(name)
            if len(found) < limit:
                text = _called(call, whole=id(call) in shaped)
                found.append((call, name, _arguments(call), text, call.offset))
    uncalled = [each for each in verdict.dangerous if each in by_name and each not in named]
    for name in uncalled[: limit - len(found)]:
        found.append((name, name, None, str(name), verdict.dangerous[name]))
    where = _where(tree, [node for node, *_ in found])
    return [
        Call(name, arguments, offset, where.get(id(node), ""), text)
        for node, name, arguments, text, offset in found
    ]


_NAMELESS = Global("", "")  # what is called is not a name, nor made by calling one
_DEEPEST, _WIDEST, _LONGEST_CALL = 3, 8, 400  # levels, members of each, and letters shown


def _called(call: Object, depth: int = _DEEPEST, *, whole: bool = False) -> str:
    """Write a call as Python would; `whole`, with what is done to its result."""
    method = f".{shapes.METHODS[call.how]}" if call.how in shapes.METHODS else ""
    text = f"{_shown(call.callee, depth)}{method}({', '.join(_arguments(call, depth))})"
    for kind, payload in call.steps[:_WIDEST] if whole else ():
        text += f".{shapes.METHODS[kind]}({_shown(payload, depth)})"
    return text if len(text) <= _LONGEST_CALL else f"{text[:_LONGEST_CALL]}..."


def _arguments(call: Object, depth: int = _DEEPEST) -> tuple[str, ...]:
    named = _pairs(call.kwargs, "=", depth) if isinstance(call.kwargs, Dict) else []
    return (*_several(call.args, depth), *named)


def _several(nodes: Sequence[Node], depth: int) -> list[str]:
    more = ["..."] if len(nodes) > _WIDEST else []
    return [_shown(each, depth) for each in nodes[:_WIDEST]] + more


def _pairs(node: Dict, between: str, depth: int) -> list[str]:
    more = ["..."] if len(node.pairs) > _WIDEST else []
    rows = [(_shown(key, 0), _shown(value, depth)) for key, value in node.pairs[:_WIDEST]]
    keys = (key.strip("'") if between == "=" else key for key, _ in rows)
    return [f"{key}{between}{value}" for key, (_, value) in zip(keys, rows, strict=True)] + more


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
        found = evidence(replace(verdict, dangerous=here), part.calls, part.tree)
        lines += [evidence_line(call, part.pickle_name) for call in found]
    return lines[:SHOWN]


def _shown(node: Node, depth: int = _DEEPEST) -> str:
    """Write an argument in a few characters."""
    match node:
        case ByteArray() | OldString():
            return _shown(node.data)
        case str() | bytes():
            text = repr(node[:60])
            return text if len(node) <= 60 else f"{text}..."
        case bool() | int() | float() | None:
            return str(node)[:40]
        case Global():
            return str(node)[:60]
        case Object() if depth:
            return _called(node, depth - 1)
        case list() | tuple() if depth:
            text = ", ".join(_several(node, depth - 1))
            comma = "," if len(node) == 1 else ""
            return f"[{text}]" if isinstance(node, list) else f"({text}{comma})"
        case Dict() if depth:
            return f"{{{', '.join(_pairs(node, ': ', depth - 1))}}}"
        case _:
            origin = getattr(node, "origin", None)  # of a tensor: the call that made it
            return _called(origin, depth - 1) if depth and origin is not None else "..."


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
