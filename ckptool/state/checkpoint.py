"""A checkpoint: the whole inert tree of a file, and where in it the state_dict sits.

Nothing is guessed: with one candidate it is used, with several the caller must name one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import field, replace
from itertools import islice

from ckptool.errors import (
    AmbiguousStateDict,
    EditError,
    FormatError,
    Malformed,
    NoStateDict,
    NoSuchKey,
)
from ckptool.pickles.tree import (
    Global,
    Node,
    Object,
    attribute as attribute,
    children,
    items as items,
    named_items as named_items,
    text_items as text_items,
)
from ckptool.records import dataclass
from ckptool.state import modules, naming, parts
from ckptool.state.candidates import (
    MAX_LISTED,
    Candidate,
    Joined,
    candidates as candidates,
    common_prefix as common_prefix,
    is_no_state_dict as is_no_state_dict,
    members,
    search,
    ways as ways,
    whole_models as whole_models,
    with_arrays,
)
from ckptool.state.replacing import make_state_dict
from ckptool.state.walk import INNER, Path, dotted, labelled, tensors
from ckptool.tensors.tensor import TENSORS, Storage, TensorInfo
from ckptool.text import argument, at_most, counted, listed, quoted, readable, table, visible

MAX_PLACES = 12  # named in an error


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
    for the user; `location` is the device that an output tags its storages with, empty for their
    own; `held` lives as long as the bytes may be read (what an archive was unpacked to).
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
    location: str = ""
    held: tuple[object, ...] = field(default=(), compare=False)

    def __repr__(self) -> str:
        return f"<Checkpoint {visible(self.path)}: {self.container}, {readable(self.nbytes)}>"


@dataclass(frozen=True, slots=True)
class StateDict:
    """The state_dict of a checkpoint: where it sits, its entries in order, its `_metadata`.

    `module` names the class where a whole module sits there, `classes` counts the modules in it by
    theirs; `missing` says which of its entries could not be told without its code. `also` are the
    other places of the same tensors under the same keys, `inner` the dicts that its keys were
    joined of, by what begins these.
    """

    at: Path
    entries: dict[str, Node]
    metadata: Node = None
    notes: tuple[str, ...] = ()
    module: str = ""
    missing: tuple[str, ...] = ()
    classes: dict[str, int] = field(default_factory=dict)
    also: tuple[Path, ...] = ()
    inner: dict[str, Node] = field(default_factory=dict, compare=False, repr=False)

    def __repr__(self) -> str:
        entries = "entry" if len(self.entries) == 1 else "entries"
        return f"<StateDict at `{visible(dotted(self.at)) or '.'}`: {len(self.entries)} {entries}>"


def find(checkpoint: Checkpoint, at: str | None = None, option: str = "--at") -> StateDict:
    """Return the one state_dict, or the one that `at` names (dotted; `.` is the whole file).

    `option` is what chooses on the command line. Raises `AmbiguousStateDict` where there is more
    than one, `NoStateDict` where there is none, `NoSuchKey` where `at` names nothing that holds
    tensors.
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
    known: Steps = {}
    paths = [] if state else [each.at for each in candidates(checkpoint.tree)]
    states = [state] if state else [state_dict_at(checkpoint, path, known) for path in paths]
    entries = (each.entries for each in states)
    return parts.recognise(checkpoint.path, checkpoint.tree, checkpoint.metadata, entries)


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
    state, also = state_dict_at(checkpoint, found[0].at), found[0].also
    if not also:
        return state
    said = f"the same state_dict is also at {listed(f'`{dotted(path)}`' for path in also)}"
    return replace(state, also=also, notes=(*state.notes, said))


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


def _not_one(checkpoint: Checkpoint, found: list[Candidate], option: str) -> EditError:
    if found:
        # The likely one: the largest, and of equals the last, where EMA copies and teachers are.
        likely = max(reversed(found), key=lambda candidate: candidate.nbytes)
        return AmbiguousStateDict(
            f"{checkpoint.path} holds {len(found)} candidate state dicts",
            evidence=_table(found),
            option=f"{option} {quoted(dotted(likely.at) or '.')}",
        )
    refuse_part(checkpoint, None)
    problem = search(checkpoint.tree).problem
    if problem is not None:
        raise problem
    count = sum(1 for _ in tensors(checkpoint.tree))
    if not count:
        return NoStateDict(f"{checkpoint.path} holds no tensors")
    found_at = _parents(checkpoint.tree)
    chosen = f"{option} {quoted(found_at[0])}" if len(found_at) == 1 else ""
    where = _where(checkpoint) + (f"; {option} NAME chooses one" if found_at else "")
    return NoStateDict(
        f"{checkpoint.path} holds {counted(count, 'tensor')} but no state_dict",
        evidence=_at_places(found_at),
        option=chosen,
        hint="" if chosen else where,
    )


def _where(checkpoint: Checkpoint) -> str:
    return f"ckptool keys --all {argument(checkpoint.path)}   lists all tensors by path"


def _parents(tree: Node) -> list[str]:
    """List what holds tensors itself, where `--at` finds it."""
    parents = dict.fromkeys(path[:-1] for path, _ in islice(tensors(tree), MAX_LISTED) if path)
    return [dotted(path) or "." for path in parents if _has_tensors(tree, path)]


def _has_tensors(tree: Node, path: Path) -> bool:
    try:
        return any(isinstance(value, TENSORS) for _, value in members(_node_at(tree, path)))
    except (KeyError, IndexError, ValueError):  # inside an object, where no name leads
        return False


def _table(found: list[Candidate]) -> list[str]:
    rows = [
        (
            dotted(candidate.at) or ".",
            counted(candidate.count, "tensor"),
            readable(candidate.nbytes),
            f"prefix {candidate.prefix}" if candidate.prefix else "",
            f"module {candidate.module}" if candidate.module else "",
        )
        for candidate in found[:MAX_PLACES]
    ]
    more = len(found) - MAX_PLACES
    return [*table(rows), *([f"{more} more"] if more > 0 else [])]


def _named(checkpoint: Checkpoint, at: str, option: str) -> StateDict:
    path = () if at in ("", ".") else _resolve(checkpoint, at, option)
    state = state_dict_at(checkpoint, path)
    if not any(isinstance(value, TENSORS) for value in state.entries.values()):
        what = naming.what(_node_at(checkpoint.tree, path))
        raise NoSuchKey(
            f"`{at}` in {checkpoint.path} is not a dict of tensors: {what}",
            evidence=_places(checkpoint),
            hint=_where(checkpoint),
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
        bare = f"{checkpoint.path} is already a bare state_dict: leave out {option}"
        hint = bare if known == [""] else ""
        raise NoSuchKey(
            f"there is no `{at}` in {checkpoint.path}",
            evidence=_places(checkpoint),
            option=f"{option} {quoted(close[0])}" if close and known != [""] else "",
            hint=hint,
        )
    return path


def _places(checkpoint: Checkpoint) -> list[str]:
    found = [dotted(candidate.at) or "." for candidate in candidates(checkpoint.tree)]
    return _at_places(found or _parents(checkpoint.tree))


def _at_places(places: Sequence[str]) -> list[str]:
    return at_most([f"tensors are at {place}" for place in places], MAX_PLACES, " places")


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


def _joined_metadata(node: Node, inner: Mapping[str, Node]) -> Node:
    """Return the `_metadata` of a state_dict, or those of its parts under the joined paths."""
    own = attribute(node, "_metadata")
    if own is not None:
        return own
    joined = {
        f"{name}.{path}".rstrip("."): entry
        for name, part in inner.items()
        for path, entry in text_items(attribute(part, "_metadata")) or []
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
    repeated = _repeated(checkpoint, members(node))
    notes = tuple(f"the key {key} appears twice, with equal values" for key in repeated)
    joined = Joined(node)
    metadata = _joined_metadata(node, joined.inner)
    entries = with_arrays(joined.entries)
    return StateDict(path, entries, metadata, notes, inner=joined.inner)


def _repeated(checkpoint: Checkpoint, pairs: list[tuple[str, Node]]) -> list[str]:
    """List keys that are there twice; torch takes the last, so that values must not differ."""
    if len({key for key, _ in pairs}) == len(pairs):
        return []
    seen: dict[str, Node] = {}
    repeated = []
    for key, value in pairs:
        if key in seen:
            if not _same(seen[key], value):
                raise Malformed(
                    f"{checkpoint.path}: the key {key} appears twice in the state_dict, "
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
        if id(node) not in seen:
            seen.add(id(node))
            pairs = named_items(node)
            if len({key for key, _ in pairs}) != len(pairs):
                if any(isinstance(value, TENSORS) for _, value in pairs):
                    _repeated(checkpoint, pairs)
                counts = Counter(key for key, _ in pairs)
                repeated |= dict.fromkeys(key for key, count in counts.items() if count > 1)
            stack += (each for each in children(node) if isinstance(each, INNER))
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
    return [name for name, _ in labelled(items(node) or modules.attributes(node) or [])]


def state_dict_node(tree: Node, at: Path, known: Steps | None = None) -> Node:
    """Return the node at a place in the tree; `known` as for `state_dict_at`."""
    return _node_at(tree, at, known)
