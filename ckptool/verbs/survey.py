"""What a checkpoint is, as facts: where its state_dict sits, what is beside it, what takes room.

Nothing is refused for being ambiguous: where several dicts may be the state_dict all are described.
Bytes are those of the file: a storage counts once, for the part of the tree that uses it first.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import field
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.files import budget
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.pickles.safety import Verdict
from ckptool.pickles.tree import Node
from ckptool.records import dataclass, grouped, plain
from ckptool.state import checkpoint as places, naming, walk
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.modules import Effort
from ckptool.state.parts import Part
from ckptool.state.walk import Path
from ckptool.state.wrappers import Peeling, peeling, worn
from ckptool.tensors.tensor import (
    TENSORS,
    AnyTensor,
    Packing,
    TensorInfo,
    is_contiguous,
    tensors_of,
)
from ckptool.text import counted, listed, readable, visible
from ckptool.verbs.ledger import Ledger, stored

if TYPE_CHECKING:  # `check` needs none of them
    from ckptool.documents import looking, shared
    from ckptool.verbs.frameworks import Framework


@dataclass(frozen=True, slots=True)
class Total:
    """How many tensors there are, of how many elements and bytes."""

    count: int
    elements: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Place:
    """A dict that may be the state_dict: `stored` counts the bytes of the file that only it needs.

    `peeling` is what `auto` would remove, `worn` describes all wrappers seen in its keys, `other`
    counts its entries that are no tensors, `ties` map keys to those that are the same view,
    `unfit` says which entries safetensors cannot hold and why.
    """

    at: Path
    keys: Sequence[str]
    total: Total
    stored: int
    prefix: str
    peeling: Peeling
    worn: Sequence[str]
    other: int
    ties: dict[str, str]
    unfit: dict[str, str]
    module: str = ""
    classes: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> looking.Candidate:
        """Return an entry of the `candidates` of `info/1`."""
        total: shared.Total = plain(self.total)
        return {
            "at": list(self.at),
            **total,
            "stored": self.stored,
            "prefix": self.prefix,
            "wrappers": list(self.peeling.prefixes),
            "inside": list(self.peeling.inside),
            "bookkeeping": sorted(self.peeling.bookkeeping),
            "module": self.module,
            "classes": self.classes,
        }


@dataclass(frozen=True, slots=True)
class Beside:
    """What is beside the state_dict: its name, what it is, how many tensors and bytes.

    `weights` says that it is a dict of tensors by name, as a state_dict is.
    """

    name: str
    what: str
    tensors: int
    nbytes: int
    weights: bool


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A command to paste, and what it is good for."""

    reason: str
    command: str


@dataclass(frozen=True, slots=True)
class Survey:
    """What a file is and what is in it.

    `state` is the one state_dict, None where there is none or more than one; the totals are then
    those of the whole file; `alone` says that nothing must choose it, `root` what the whole file
    is. `elsewhere` counts bytes of other tensors, `unused` those of storages that no tensor
    reaches, `rest` what is neither tensor data nor an unread record: the pickle, headers, padding.
    `part` says of what the file is one of several parts.
    """

    checkpoint: Checkpoint
    places: tuple[Place, ...]
    place: Place | None
    state: StateDict | None
    total: Total
    dtypes: dict[str, Total]
    ties: dict[str, str]
    views: tuple[str, ...]
    strided: tuple[str, ...]
    requires_grad: int
    devices: dict[str, int]
    deflated: int
    beside: tuple[Beside, ...]
    elsewhere: int
    unused: int
    rest: int
    verdict: Verdict
    framework: Framework | None
    alone: bool
    root: str
    part: Part | None = None
    suggestions: tuple[Suggestion, ...] = ()

    def __repr__(self) -> str:
        size = f"{counted(self.total.count, 'tensor')}, {readable(self.total.nbytes)}"
        path, container = self.checkpoint.path, self.checkpoint.container
        return f"<Survey of {visible(path)}: {container}, {size}>"

    @property
    def notes(self) -> list[str]:
        """List what the reader and the state_dict note."""
        framework = [self.framework.note] if self.framework and self.framework.note else []
        safe = self.verdict.level is not Level.DANGEROUS
        of_python_2 = [_LATIN_1] if safe and safety.has_old_text(self.checkpoint.tree) else []
        of_state = [*self.state.missing, *self.state.notes] if self.state else []
        return [*framework, *self.checkpoint.notes, *of_python_2, *of_state]

    def to_dict(self) -> looking.Info:
        """Return the document `info/1`."""
        checkpoint, state = self.checkpoint, self.state
        unread = checkpoint.unread
        document: looking.Info = {
            "schema": "info/1",
            "file": checkpoint.path,
            "container": checkpoint.container,
            "generation": checkpoint.generation,
            "protocol": checkpoint.protocol,
            "byteorder": checkpoint.byteorder,
            "file_nbytes": checkpoint.nbytes,
            "framework": self.framework.name if self.framework else None,
            "part": plain(self.part),
            "at": list(state.at) if state is not None else None,
            "candidates": [place.to_dict() for place in self.places],
            "count": self.total.count,
            "elements": self.total.elements,
            "nbytes": self.total.nbytes,
            "dtypes": plain(self.dtypes),
            "wrappers": list(self.place.peeling.prefixes) if self.place else [],
            "ties": self.ties,
            "views": list(self.views),
            "not_contiguous": list(self.strided),
            "requires_grad": self.requires_grad,
            "devices": self.devices,
            "module_metadata": state is not None and state.metadata is not None,
            "beside": [each.name for each in self.beside],
            "beside_values": [
                {
                    "name": each.name,
                    "what": each.what,
                    "tensors": each.tensors,
                    "nbytes": each.nbytes,
                }
                for each in self.beside
            ],
            "bytes": {
                "other": self.elsewhere,
                "unused": self.unused,
                "unread": checkpoint.unread_nbytes,
                "structure": self.rest,
            },
            "unread": list(unread),
            "metadata": checkpoint.metadata,
            "safety": self.verdict.word(checkpoint.program),
            "imports": list(self.verdict.imports),
            "versions": list(self.verdict.versions),
            "globals": [str(name) for name in checkpoint.globals],
            "foreign": [str(name) for name in self.verdict.foreign],
            "dangerous": [
                {"what": call.text, "byte": call.offset, "at": call.where}
                for call in safety.evidence(self.verdict, checkpoint.calls, checkpoint.tree)
            ],
            "notes": [
                *self.notes,
                *([f"not read: {listed(unread, len(unread))}"] if unread else []),
            ],
            "suggestions": plain(self.suggestions),
        }

        if plugin := containers.by_name(checkpoint.container).plugin:
            document["plugin"] = plugin
        return document

    @property
    def framework_prefix(self) -> str:
        """Return the prefix under which a framework keeps the weights, if the keys have it."""
        return self.framework.prefix if self.framework else ""


_LATIN_1 = "text of Python 2 in it: torch.load needs encoding='latin1'"


def survey(checkpoint: Checkpoint, at: str | None = None) -> Survey:
    """Collect the facts of a checkpoint; `at` chooses one of several state_dicts.

    Raises `NoSuchKey` for an `at` that names no dict of tensors.
    """
    from ckptool.verbs import frameworks

    tree = checkpoint.tree
    state = places.locate(checkpoint, at) if at is not None else places.find_or_none(checkpoint)
    paths = [state.at] if at is not None and state else _paths(tree)
    ledger = Ledger()
    known: places.Steps = {}
    found = tuple(_place(checkpoint, path, state, ledger, known) for path in paths)
    entries = _tensors(checkpoint, state)
    said: dict[int, tuple[str, bool]] = {}
    around = _around(tree, paths, known)
    beside = tuple(_beside(name, node, ledger, said) for name, node in around)
    before = ledger.nbytes
    ledger.take(tree)
    single = found[0] if len(found) == 1 else None
    ties = single.ties if single else _left_behind(dict(entries)).ties
    storages = ledger.storages()
    data = sum(stored(storage) for storage in storages)
    return Survey(
        checkpoint=checkpoint,
        places=found,
        place=single,
        state=state,
        total=_total(info for _, info in entries),
        dtypes=_by_dtype(entries),
        ties=ties,
        views=tuple(key for key, info in entries if _is_part(info)),
        strided=tuple(key for key, info in entries if _is_strided(info)),
        requires_grad=sum(
            isinstance(info, TensorInfo) and info.requires_grad for _, info in entries
        ),
        devices=dict(Counter(storage.location for storage in storages)),
        deflated=sum(storage.packing is Packing.DEFLATED for storage in storages),
        beside=beside,
        elsewhere=ledger.nbytes - before,
        unused=ledger.unused(),
        rest=max(0, checkpoint.nbytes - data - checkpoint.unread_nbytes),
        verdict=safety.judge_file(checkpoint),
        framework=frameworks.recognise(checkpoint, _first_keys(found)),
        alone=single is not None and (at is None or len(_paths(tree)) == 1),
        root=naming.what(tree),
        part=places.part_of(checkpoint, state),
    )


def _left_behind(entries: dict[str, Node]) -> containers.Left:
    from ckptool.containers import safetensors

    return safetensors.left_behind(entries, False)


def _first_keys(found: Sequence[Place]) -> list[str]:
    """Return the keys of the first candidate, without wrapper prefixes they all share."""
    return [place.peeling.name(key) for place in found[:1] for key in place.keys]


def _paths(tree: Node) -> list[Path]:
    return [candidate.at for candidate in places.candidates(tree)]


def _tensors(checkpoint: Checkpoint, state: StateDict | None) -> list[tuple[str, AnyTensor]]:
    """List the tensors of the state_dict by key, or those of the whole file by path."""
    if state is None:
        return list(walk.named(checkpoint.tree))
    return list(tensors_of(state.entries).items())


def _place(
    checkpoint: Checkpoint, path: Path, state: StateDict | None, ledger: Ledger, known: places.Steps
) -> Place:
    if state is None or state.at != path:
        state = places.state_dict_at(checkpoint, path, known)
    keys = list(state.entries)
    tensors = tensors_of(state.entries).values()
    left = _left_behind(state.entries)
    before = ledger.nbytes
    ledger.take(places.state_dict_node(checkpoint.tree, path, known))
    return Place(
        at=path,
        keys=keys,
        total=_total(tensors),
        stored=ledger.nbytes - before,
        prefix=places.common_prefix(keys),
        peeling=peeling(state.entries),
        worn=worn(state.entries),
        other=len(keys) - len(tensors),
        ties=left.ties,
        unfit=left.unfit,
        module=state.module,
        classes=state.classes,
    )


def _total(tensors: Iterable[AnyTensor]) -> Total:
    found = list(tensors)
    return Total(len(found), sum(i.numel for i in found), sum(i.nbytes for i in found))


def _by_dtype(entries: Sequence[tuple[str, AnyTensor]]) -> dict[str, Total]:
    """Count tensors by dtype, those of most bytes first."""
    kinds = grouped((info.dtype.label, info) for _, info in entries)
    totals = {label: _total(infos) for label, infos in kinds.items()}
    return dict(sorted(totals.items(), key=lambda item: -item[1].nbytes))


def _is_part(info: AnyTensor) -> bool:
    """Return whether a tensor is a view of a larger storage."""
    return isinstance(info, TensorInfo) and info.nbytes < info.storage.nbytes


def _is_strided(info: AnyTensor) -> bool:
    return isinstance(info, TensorInfo) and not is_contiguous(info.shape, info.stride)


# What is beside the state_dicts.


def _around(tree: Node, paths: Sequence[Path], known: places.Steps) -> Iterator[tuple[str, Node]]:
    """Yield what is beside the places given, at each level around them, by dotted name."""
    inner = {path[:depth] for path in paths for depth in range(len(path))}
    taken = inner | set(paths)
    if not paths:
        inner = {()}
    for level in sorted(inner, key=len):
        node = places.state_dict_node(tree, level, known)
        for key, value in dict(places.ways(node, Effort())).items():
            here = (*level, key)
            if here not in taken:
                yield walk.dotted(here), value


def _beside(name: str, node: Node, ledger: Ledger, said: dict[int, tuple[str, bool]]) -> Beside:
    budget.current().spend(2 * budget.NAME)
    before = ledger.nbytes
    count = ledger.take(node)
    if id(node) not in said:  # one node may be under any number of names
        named = places.text_items(node) or []
        said[id(node)] = (naming.what(node), any(isinstance(value, TENSORS) for _, value in named))
    return Beside(name, said[id(node)][0], count, ledger.nbytes - before, said[id(node)][1])
