"""A checkpoint: the whole inert tree of a file, and where in it the state_dict sits.

Nothing is guessed: with one candidate it is used, with several the caller must name one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ckptool.errors import (
    AmbiguousStateDict,
    FormatError,
    KeyCollision,
    LimitExceeded,
    Malformed,
    NoSuchKey,
)
from ckptool.pickles.tree import (
    Dict,
    Global,
    Node,
    Object,
    attribute as attribute,
    children,
    items as items,
    named_items as named_items,
    text_items as text_items,
)
from ckptool.state import modules, parts
from ckptool.state.replacing import make_state_dict
from ckptool.state.walk import INNER, Path, dotted, label, tensors
from ckptool.tensors.tensor import TENSORS, AnyTensor, Storage, TensorInfo
from ckptool.text import argument, counted, quoted, readable, table, visible

MAX_CANDIDATE_DEPTH = 4
MAX_LISTED = 100  # items of a list that are named one by one
KNOWN_NAMES = frozenset(
    (
        "state_dict model_state_dict model net network params weights module generator "
        "state_dict_ema model_ema ema ema_state_dict params_ema"
    ).split()
)
NOT_STATE_DICTS = ("optimizer*", "*scheduler*", "callbacks", "rng*", "loops", "scaler")
NOT_MODELS = (*NOT_STATE_DICTS, "hyper_parameters", "hparams")  # copies of modules to be trained


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds.

    `globals` and `calls` are all that its pickles name and call, reachable from the tree or not;
    `metadata` is the text that a safetensors file keeps beside its tensors; `generation` says in
    words which torch wrote it, where that can be told, and `protocol` is that of its pickle;
    `program` names what the tree was taken out of and cannot be put back into (a TorchScript
    module); `unread` names records that nothing in the tree uses, of `unread_nbytes` in all;
    `records` are all parts of the container that may have a checksum, by name, whether the tree
    uses them or not, and `kept` those that are written although it does not; `unlisted` counts the
    bytes that belong to nothing the container lists;
    `flaws` are what torch would not load it for; `files` are all that were read, with what tells
    whether each is still the same; `shards` are those of a set, each as it was read; `notes` are
    for the user; `held` lives as long as the bytes may be read (what an archive was unpacked to).
    """

    path: str
    container: str
    tree: Node
    nbytes: int
    globals: dict[Global, int] = field(default_factory=dict)
    calls: Sequence[Object] = ()
    pickle_name: str = ""
    byteorder: str = "little"
    metadata: dict[str, str] = field(default_factory=dict)
    generation: str = ""
    protocol: int | None = None
    unread: tuple[str, ...] = ()
    unread_nbytes: int = 0
    program: str = ""
    records: dict[str, Storage] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    unlisted: int = 0
    flaws: tuple[str, ...] = ()
    files: tuple[tuple[str, tuple[int, int, int]], ...] = ()
    shards: tuple[Checkpoint, ...] = ()
    notes: tuple[str, ...] = ()
    held: tuple[object, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"<Checkpoint {visible(self.path)}: {self.container}, {readable(self.nbytes)}>"


@dataclass(frozen=True, slots=True)
class StateDict:
    """The state_dict of a checkpoint: where it sits, its entries in order, its `_metadata`.

    `module` names the class where a whole module sits there, `classes` counts the modules in it by
    theirs; `missing` says which of its entries could not be told without its code.
    """

    at: Path
    entries: dict[str, Node]
    metadata: Node = None
    notes: tuple[str, ...] = ()
    module: str = ""
    missing: tuple[str, ...] = ()
    classes: dict[str, int] = field(default_factory=dict)

    def __repr__(self) -> str:
        entries = "entry" if len(self.entries) == 1 else "entries"
        return f"<StateDict at `{visible(dotted(self.at)) or '.'}`: {len(self.entries)} {entries}>"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A dict that may be the state_dict, or a module that has one; `module` names its class."""

    at: Path
    count: int
    nbytes: int
    prefix: str
    module: str = ""


def common_prefix(keys: Sequence[str]) -> str:
    """Return the dotted prefix that all keys share, with its final dot; often empty."""
    if not keys:
        return ""
    low, high = min(keys), max(keys)
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: low.rfind(".", 0, size) + 1]


@dataclass(frozen=True, slots=True)
class _Found:
    """A place that may be the state_dict, with its tensors."""

    at: Path
    tensors: dict[str, AnyTensor]
    module: str = ""


def candidates(tree: Node) -> list[Candidate]:
    """Find the dicts and modules that may be the state_dict, those under known names alone."""
    found = _search(tree).found
    known = [each for each in found if each.at and each.at[-1] in KNOWN_NAMES]
    hiding = known or [each for each in found if each.module]
    inner = {each.at[:depth] for each in hiding for depth in range(len(each.at))}
    return [
        Candidate(
            each.at,
            len(each.tensors),
            sum(info.nbytes for info in each.tensors.values()),
            common_prefix(list(each.tensors)),
            each.module,
        )
        for each in known or found
        if each.at not in inner
    ]


def whole_models(tree: Node) -> list[Path]:
    """List where modules stand that may be candidates, those under unknown names too."""
    return [each.at for each in _search(tree).found if each.module]


def _search(tree: Node) -> _Search:
    search = _Search()
    try:
        for each in search.visit(tree, ()):
            search.found.append(each)
    except LimitExceeded as error:
        search.problem = error
    return search


class _Search:
    """Looks for dicts of tensors by the keys of dicts, for modules in lists and objects too.

    `problem` says why a module has no state_dict: it contains itself, or repeats without end.
    """

    def __init__(self) -> None:
        self.seen: set[tuple[int, bool, bool]] = set()
        self.effort = modules.Effort()
        self.found: list[_Found] = []
        self.problem: FormatError | None = None

    def visit(
        self, node: Node, path: Path, *, dicts: bool = True, models: bool = True
    ) -> Iterator[_Found]:
        """Yield what is found in a node: dicts of tensors, modules, or both."""
        if not isinstance(node, _WAYS) or (id(node), dicts, models) in self.seen:
            return
        self.seen.add((id(node), dicts, models))
        if isinstance(node, Object) and modules.is_module(node, self.effort):
            if models and not {(id(node), not dicts, True)} & self.seen:
                yield from self.module(node, path)
            return
        named = named_items(node)
        tensors = _tensors_of(dict(named)) if dicts else {}
        if tensors and text_items(node) is not None:
            yield _Found(path, tensors)
        if len(path) < MAX_CANDIDATE_DEPTH:
            for key, value in ways(node, self.effort):
                if not isinstance(value, _WAYS):
                    continue
                deeper = dicts and bool(named) and not _matches(key, NOT_STATE_DICTS)
                also = models and not _matches(key, NOT_MODELS)
                if deeper or also:
                    yield from self.visit(value, (*path, key), dicts=deeper, models=also)

    def module(self, node: Object, path: Path) -> Iterator[_Found]:
        try:
            state = modules.state_of(node, self.effort)
        except Malformed as error:
            self.problem = error
            return
        tensors = _tensors_of(state.entries)
        if tensors:
            yield _Found(path, tensors, state.class_name)


def _matches(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, pattern) for pattern in patterns)


def _tensors_of(entries: dict[str, Node]) -> dict[str, AnyTensor]:
    return {key: value for key, value in entries.items() if isinstance(value, TENSORS)}


_WAYS = (Dict, Object, list, tuple)


def ways(node: Node, effort: modules.Effort) -> Iterator[tuple[str, Node]]:
    """Yield the steps that a path may take from a node.

    Keys of dicts, indexes of lists, modules in modules, attributes of other objects.
    """
    if isinstance(node, list | tuple):
        yield from ((str(index), value) for index, value in enumerate(node))
        return
    named = named_items(node)
    if named:
        yield from named
        return
    held = modules.parts(node, effort)
    if held is not None:
        yield from held.modules
        return
    pairs = modules.attributes(node)
    if pairs is not None:
        effort.pay(pairs, len(pairs))
        yield from ((key, value) for key, value in pairs if isinstance(key, str))


def is_no_state_dict(name: str) -> bool:
    """Return whether what has this name holds tensors that are no weights."""
    return _matches(name, NOT_STATE_DICTS)


def find(checkpoint: Checkpoint, at: str | None = None, option: str = "--at") -> StateDict:
    """Return the one state_dict, or the one that `at` names (dotted; `.` is the whole file).

    `option` is what chooses on the command line. Raises `AmbiguousStateDict` where there is none or
    more than one, `NoSuchKey` where `at` names nothing that holds tensors.
    """
    state = locate(checkpoint, at, option)
    refuse_part(checkpoint, state)
    return state


def locate(checkpoint: Checkpoint, at: str | None = None, option: str = "--at") -> StateDict:
    """Return the one state_dict as `find` does, that of a part of a checkpoint too."""
    with _naming(checkpoint):
        if at is not None:
            return _named(checkpoint, at, option)
        return _only(checkpoint, candidates(checkpoint.tree), option)


def part_of(checkpoint: Checkpoint, state: StateDict | None) -> parts.Part | None:
    """Return what a file is a part of, judged by its state_dict, or by all that may be one."""
    paths = [] if state else [each.at for each in candidates(checkpoint.tree)]
    states = [state] if state else [state_dict_at(checkpoint, path) for path in paths]
    said = checkpoint.path, checkpoint.tree, checkpoint.metadata
    found = (
        parts.recognise(*said, entries) for entries in [each.entries for each in states] or [{}]
    )
    return next((part for part in found if part), None)


def refuse_part(checkpoint: Checkpoint, state: StateDict | None) -> None:
    """Raise `PartialCheckpoint` for a file that is one part of several."""
    part = part_of(checkpoint, state)
    if part is not None:
        raise parts.refuse(checkpoint.path, part)


@contextmanager
def _naming(checkpoint: Checkpoint) -> Iterator[None]:
    """Name the file in what is raised about its modules."""
    try:
        yield
    except FormatError as error:
        if error.path is None:
            error.path = checkpoint.path
            error.message = f"{checkpoint.path}: {error.message}"
        raise


def _only(checkpoint: Checkpoint, found: list[Candidate], option: str) -> StateDict:
    if not found and _is_empty(checkpoint.tree):
        return state_dict_at(checkpoint, ())
    if len(found) != 1:
        raise _not_one(checkpoint, found, option)
    return state_dict_at(checkpoint, found[0].at)


def _is_empty(tree: Node) -> bool:
    return items(tree) == [] or modules.is_module(tree, modules.Effort())


def find_or_none(
    checkpoint: Checkpoint, *, several: bool = True, option: str = "--at"
) -> StateDict | None:
    """Return the one state_dict, None where there is none.

    Where there is more than one, None if `several` is allowed, else `AmbiguousStateDict`.
    """
    with _naming(checkpoint):
        found = candidates(checkpoint.tree)
        if not found or (several and len(found) > 1):
            return None
        return _only(checkpoint, found, option)


def _not_one(checkpoint: Checkpoint, found: list[Candidate], option: str) -> AmbiguousStateDict:
    if found:
        # The likely one: the largest, and of equals the last, where EMA copies and teachers stand.
        likely = max(reversed(found), key=lambda candidate: candidate.nbytes)
        return AmbiguousStateDict(
            f"{checkpoint.path} holds {len(found)} candidate state dicts",
            evidence=_table(found),
            option=f"{option} {quoted(dotted(likely.at) or '.')}",
        )
    refuse_part(checkpoint, None)
    problem = _search(checkpoint.tree).problem
    if problem is not None:
        raise problem
    count = sum(1 for _ in tensors(checkpoint.tree))
    if count:
        return AmbiguousStateDict(
            f"{checkpoint.path} holds {counted(count, 'tensor')} but no state_dict",
            hint=f"ckptool keys --all {argument(checkpoint.path)}   shows where they are; "
            f"{option} NAME chooses a dict of them",
        )
    return AmbiguousStateDict(f"{checkpoint.path} holds no tensors")


def _table(found: list[Candidate]) -> list[str]:
    rows = [
        (
            dotted(candidate.at) or ".",
            counted(candidate.count, "tensor"),
            readable(candidate.nbytes),
            f"prefix {candidate.prefix}" if candidate.prefix else "",
            f"module {candidate.module}" if candidate.module else "",
        )
        for candidate in found
    ]
    return table(rows)


def _named(checkpoint: Checkpoint, at: str, option: str) -> StateDict:
    path = () if at in ("", ".") else _resolve(checkpoint, at, option)
    state = state_dict_at(checkpoint, path)
    if not any(isinstance(value, TENSORS) for value in state.entries.values()):
        raise NoSuchKey(
            f"`{at}` in {checkpoint.path} is no dict of tensors",
            evidence=_places(checkpoint),
            hint=f"ckptool keys --all {argument(checkpoint.path)}   lists all tensors by path",
        )
    return state


def _resolve(checkpoint: Checkpoint, at: str, option: str) -> Path:
    """Split a dotted name into steps; a key may itself hold dots."""

    effort = modules.Effort()

    def steps(node: Node, rest: str) -> Path | None:
        for key, value in ways(node, effort):
            if key == rest:
                return (key,)
            if rest.startswith(key + "."):
                further = steps(value, rest[len(key) + 1 :])
                if further is not None:
                    return (key, *further)
        return None

    path = steps(checkpoint.tree, at)
    if path is None:
        from difflib import get_close_matches

        known = [dotted(found.at) for found in candidates(checkpoint.tree)]
        close = get_close_matches(at, known, n=1, cutoff=0.6)
        raise NoSuchKey(
            f"there is no `{at}` in {checkpoint.path}",
            evidence=_places(checkpoint),
            option=f"{option} {quoted(close[0])}" if close else "",
        )
    return path


def _places(checkpoint: Checkpoint) -> list[str]:
    found = candidates(checkpoint.tree)
    return [f"tensors are at {dotted(candidate.at) or '.'}" for candidate in found[:8]]


Steps = dict[int, dict[str, Node]]  # of nodes by their `id`: what is known of the ways from them


def _node_at(tree: Node, path: Path, known: Steps | None = None) -> Node:
    node = tree
    known = {} if known is None else known
    for step in path:
        if isinstance(node, list | tuple):
            node = node[int(step)]
            continue
        if id(node) not in known:
            known[id(node)] = dict(ways(node, modules.Effort()))
        node = known[id(node)][step]
    return node


def _flattened(node: Node) -> dict[str, Node]:
    """Return a dict's entries; those of a dict of dicts of tensors with their keys joined."""
    pairs = text_items(node) or []
    if any(isinstance(value, TENSORS) for _, value in pairs):
        return dict(pairs)
    flat: dict[str, Node] = {}
    for key, value in dict(pairs).items():
        inner = text_items(value) or []
        joins = any(isinstance(item, TENSORS) for _, item in inner)
        for name, item in dict(inner).items() if joins else [(None, value)]:
            joined = key if name is None else f"{key}.{name}"
            if joined in flat:
                raise KeyCollision(f"two tensors would both be {joined}, with their keys joined")
            flat[joined] = item
    return flat


def _joined_metadata(node: Node) -> Node:
    """Return the `_metadata` of a state_dict, or those of its parts under the joined paths."""
    own = attribute(node, "_metadata")
    pairs = text_items(node) or []
    if own is not None or any(isinstance(value, TENSORS) for _, value in pairs):
        return own
    joined = {
        f"{key}.{path}".rstrip("."): entry
        for key, value in pairs
        for path, entry in text_items(attribute(value, "_metadata")) or []
    }
    return make_state_dict(joined, None) if joined else None


def state_dict_at(checkpoint: Checkpoint, path: Path, known: Steps | None = None) -> StateDict:
    """Return the state_dict at a place in the tree, which must be there.

    Who asks for many passes the same `known`: the ways to them are then looked up once.
    """
    node = _node_at(checkpoint.tree, path, known)
    if isinstance(node, Object) and modules.is_module(node, modules.Effort()):
        held = modules.state_of(node)
        said = (held.notes, held.class_name, held.missing, held.classes)
        return StateDict(path, held.entries, None, *said)
    repeated = _repeated(checkpoint, text_items(node) or [])
    notes = tuple(f"the key {key} stands twice, with equal values" for key in repeated)
    return StateDict(path, _flattened(node), _joined_metadata(node), notes)


def _repeated(checkpoint: Checkpoint, pairs: list[tuple[str, Node]]) -> list[str]:
    """List keys that are there twice; torch takes the last, so that values must not differ."""
    seen: dict[str, Node] = {}
    repeated = []
    for key, value in pairs:
        if key in seen:
            if not _same(seen[key], value):
                raise Malformed(
                    f"{checkpoint.path}: the key {key} stands twice in the state_dict, "
                    "with different values",
                    path=checkpoint.path,
                )
            repeated.append(key)
        seen[key] = value
    return repeated


def repeated_keys(checkpoint: Checkpoint) -> list[str]:
    """List keys that are there twice in a dict, anywhere in the tree.

    Raises `Malformed` where there are tensors in that dict and the values differ.
    """
    repeated: dict[str, None] = {}
    seen: set[int] = set()
    stack = [checkpoint.tree]
    while stack:
        node = stack.pop()
        if isinstance(node, INNER) and id(node) not in seen:
            seen.add(id(node))
            pairs = named_items(node)
            if len({key for key, _ in pairs}) != len(pairs):
                if any(isinstance(value, TENSORS) for _, value in pairs):
                    _repeated(checkpoint, pairs)
                counts = Counter(key for key, _ in pairs)
                repeated |= dict.fromkeys(key for key, count in counts.items() if count > 1)
            stack += children(node)
    return list(repeated)


def _same(one: Node, other: Node) -> bool:
    if isinstance(one, TensorInfo) and isinstance(other, TensorInfo):
        return one.view == other.view
    plain = isinstance(one, int | float | str | bytes | None)
    return one is other or (plain and type(one) is type(other) and one == other)


def beside(tree: Node, at: Path) -> list[str]:
    """Name what is beside the state_dict, at each level around it."""
    names = []
    for depth, step in enumerate(at):
        keys = dict.fromkeys(_labels(_node_at(tree, at[:depth])))
        names += [dotted((*at[:depth], key)) for key in keys if key != step]
    return names


def _labels(node: Node) -> list[str]:
    """Name what is directly inside a node."""
    if isinstance(node, list | tuple):
        shown = [str(index) for index in range(min(len(node), MAX_LISTED))]
        more = len(node) - len(shown)
        return [*shown, *([f"{more} more items"] if more else [])]
    held = modules.parts(node, modules.Effort())
    if held is not None:
        return [name for name, _ in (*held.tensors, *held.modules)]
    return [label(key) for key, _ in items(node) or modules.attributes(node) or []]


def also_at(tree: Node, at: Path) -> list[Path]:
    """List the other places, as deep as candidates lie, where the very node at a place stands."""
    node = _node_at(tree, at)
    found: list[Path] = []
    effort = modules.Effort()
    seen: set[int] = set()
    stack: list[tuple[Path, Node]] = [((), tree)]
    while stack:
        path, here = stack.pop()
        if here is node:
            found += [path] if path != at else []
        elif id(here) not in seen and len(path) < MAX_CANDIDATE_DEPTH:
            seen.add(id(here))
            inside = ways(here, effort)
            stack += [((*path, key), value) for key, value in inside if isinstance(value, _WAYS)]
    return found


def state_dict_node(tree: Node, at: Path, known: Steps | None = None) -> Node:
    """Return the node at a place in the tree; `known` as for `state_dict_at`."""
    return _node_at(tree, at, known)
