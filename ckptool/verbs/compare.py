"""`diff`: what two checkpoints have apart, in any two containers.

Keys, dtypes, shapes and bytes decide whether state_dicts are equal, and the values beside them
where both files have a place for such. Order of keys, ties, strides, requires_grad and device
tags are told and decide nothing: containers differ in what they can say of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import field
from typing import TYPE_CHECKING

from ckptool.errors import EditError, LimitExceeded, Malformed, Unsupported
from ckptool.files import fileio
from ckptool.files.copying import Begin, Copy, run_jobs
from ckptool.files.fileio import Readers
from ckptool.pickles.torch_objects import attributes, quantizer
from ckptool.pickles.tree import Dict, Node
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, module_metadata, replacing, selecting, walk
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.walk import Path
from ckptool.state.wrappers import peeling
from ckptool.tensors.counts import Values
from ckptool.tensors.tensor import AnyTensor, CompositeTensor, Packing, TensorInfo
from ckptool.text import counted, listed, readable, shape, visible
from ckptool.verbs.compare_sides import Asked, edited, notes, state_dicts
from ckptool.verbs.compare_tensors import Pair, compare, pair
from ckptool.verbs.compare_trees import TAKEN, Place, places_of, shown

if TYPE_CHECKING:
    from ckptool.documents import looking

MAX_EXPANSION = 64  # bytes to compare for each byte of the files: views may repeat themselves
SMALL = 64 << 20  # below this, they may


# torch/_utils.py, `_rebuild_sparse_tensor`
_PARTS = {
    "sparse_coo": ("indices", "values"),
    **dict.fromkeys(("sparse_csr", "sparse_bsr"), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys(("sparse_csc", "sparse_bsc"), ("ccol_indices", "row_indices", "values")),
}


@dataclass(frozen=True, slots=True)
class Change:
    """What differs under a key that both sides have.

    `what` is `dtype`, `shape`, `layout`, `quantizer`, `attributes` (what Python keeps on a tensor),
    `value` (of what is no tensor) or `values`; `left` and `right` say it in text, `values` in
    numbers; `first` is the index of the first element that differs.
    """

    key: str
    what: str
    left: str = ""
    right: str = ""
    values: Values | None = None
    first: tuple[int, ...] | None = None

    def to_dict(self) -> looking.Change:
        """Return an entry of the `changed` of `diff/1`."""
        values = self.values
        if values is None:
            return {"key": self.key, "what": self.what, "left": self.left, "right": self.right}
        most = values.max_abs
        return {
            "key": self.key,
            "what": self.what,
            "count": values.count,
            "of": values.of,
            "within": values.within,
            "first": None if self.first is None else list(self.first),
            "max_abs": most if most is not None and math.isfinite(most) else None,
            "max_ulp": values.max_ulp,
            "nan_payloads": values.nan_payloads,
            "nan_one_side": values.nan_one_side,
            "zero_signs": values.zero_signs,
            "infinities": values.infinities,
        }


@dataclass(slots=True)
class Found:
    """What differs in a part of two checkpoints; `within` differs and is within the tolerance.

    `only_left` and `only_right` say of each key in a few words what it is.
    """

    only_left: dict[str, str] = field(default_factory=dict)
    only_right: dict[str, str] = field(default_factory=dict)
    changed: list[Change] = field(default_factory=list)
    within: list[Change] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """Return whether all is equal."""
        return not (self.only_left or self.only_right or self.changed)

    def to_dict(self) -> looking.Found:
        """Return the fields of `diff/1` for this part."""
        return {
            "only_left": list(self.only_left),
            "only_right": list(self.only_right),
            "changed": [change.to_dict() for change in self.changed],
            "within_tolerance": [change.to_dict() for change in self.within],
        }


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two files; `at` is None where its tensors were compared by their paths."""

    path: str
    container: str
    at: Path | None

    def to_dict(self) -> looking.DiffSide:
        """Return the fields of `diff/1` for this file."""
        at = None if self.at is None else list(self.at)
        return {"file": self.path, "container": self.container, "at": at}


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ: in the state_dict, and in what is beside it.

    `tensors` of `nbytes` in all were compared. Iterates over what changed under a key of both.
    """

    left: Side
    right: Side
    asked: Asked
    state: Found
    beside: Found
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Change]:
        return iter((*self.state.changed, *self.beside.changed))

    @property
    def equal(self) -> bool:
        """Return whether nothing differs that decides."""
        return self.state.nothing and self.beside.nothing

    @property
    def whole(self) -> bool:
        """Return whether all tensors were compared, by their path."""
        return self.left.at is None

    def __repr__(self) -> str:
        word = "equal" if self.equal else "different"
        sides = f"{visible(self.left.path)}, {visible(self.right.path)}"
        return f"<Difference of {sides}: {word}, {counted(self.tensors, 'tensor')} compared>"

    def to_dict(self) -> looking.Diff:
        """Return the document `diff/1`."""
        return {
            "schema": "diff/1",
            "equal": self.equal,
            "left": self.left.to_dict(),
            "right": self.right.to_dict(),
            **self.state.to_dict(),
            "beside": self.beside.to_dict(),
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "structure": self.asked.structure,
            "atol": self.asked.tolerance.atol,
            "rtol": self.asked.tolerance.rtol,
            "notes": list(self.notes),
        }


def diff(left: Checkpoint, right: Checkpoint, asked: Asked, progress: Begin) -> Difference:
    """Compare two checkpoints.

    Raises `AmbiguousStateDict` where one of several must be chosen, `NothingMatched` for patterns
    and prefixes that no key has, `LimitExceeded` for views that repeat themselves beyond measure.
    """
    work = _Work(left, right, asked)
    one, other = state_dicts(left, right, asked)
    if one is None or other is None:
        work.compare_trees()
    else:
        work.compare_states(one, other)
    if not asked.structure:
        work.compare_values(progress)
    sides = [
        Side(checkpoint.path, checkpoint.container, state.at if state else None)
        for checkpoint, state in ((left, one), (right, other))
    ]
    return Difference(
        left=sides[0],
        right=sides[1],
        asked=asked,
        state=work.state,
        beside=work.beside,
        tensors=work.tensors,
        nbytes=work.nbytes,
        notes=tuple(work.notes),
    )


@dataclass(slots=True)
class _Work:
    """A comparison on its way: what was found, and the tensors whose values are yet to be read."""

    left: Checkpoint
    right: Checkpoint
    asked: Asked
    state: Found = field(default_factory=Found)
    beside: Found = field(default_factory=Found)
    notes: list[str] = field(default_factory=list)
    tensors: int = 0
    nbytes: int = 0
    _queue: list[tuple[Found, str, Pair]] = field(default_factory=list)
    _paired: set[tuple[int, int]] = field(default_factory=set)

    def compare_states(self, left: StateDict, right: StateDict) -> None:
        """Compare two state_dicts, and what is beside them unless a part was chosen."""
        one, other = edited(self.asked, left, right)
        self.notes += [*one.notes[len(left.notes) :], *other.notes[len(right.notes) :]]
        keys = list(dict.fromkeys([*one.entries, *other.entries]))
        if self.asked.select:
            selected = selecting.select(self.asked.select, keys)
            keys = [key for key in keys if key in selected]
        both = [key for key in keys if key in one.entries and key in other.entries]
        for alone, mine, theirs in (
            (self.state.only_left, one.entries, other.entries),
            (self.state.only_right, other.entries, one.entries),
        ):
            alone |= {key: shown(mine[key]) for key in keys if key not in theirs}
        for key in both:
            for place in places_of(one.entries[key], other.entries[key], (key,)):
                self._take(self.state, place)
        self._note_prefixes(one.entries, other.entries)
        self.notes += notes(self.left, self.right, one, other, both)
        if not self.asked.select:
            self._compare_metadata(one, other)
            self._compare_texts(left.at, right.at)
            self._compare_beside(left.at, right.at)

    def compare_trees(self) -> None:
        """Compare all there is, tensors by their paths."""
        if self.asked.rename or self.asked.ignore_prefix:
            raise EditError("--rename and --ignore-prefix need a state_dict on both sides")
        found = list(places_of(self.left.tree, self.right.tree))
        selected = None
        if self.asked.select:
            keys = [key for place in found for key in _tensors_at(place)]
            selected = selecting.select(self.asked.select, list(dict.fromkeys(keys)))
        for place in found:
            paths = _tensors_at(place)
            if selected is not None:
                paths = {path: what for path, what in paths.items() if path in selected}
            if place.what == "tensors" and paths:
                self._take(self.state, place)
            elif paths:
                where = self.state.only_left if place.what == "only-left" else self.state.only_right
                where |= paths
            elif selected is None:
                self._take(self.beside, place)

    def _compare_metadata(self, left: StateDict, right: StateDict) -> None:
        one, other = (module_metadata.cleaned(state.metadata) for state in (left, right))
        if one is None and other is None:
            return
        alone = Found()
        for place in places_of(one, other, ("_metadata",)) if one and other else ():
            self._take(self.beside if place.what == "value" else alone, place)
        if self.state.only_left or self.state.only_right:
            return  # and modules with them
        for path, lacks, names in (
            (self.left.path, other is None, alone.only_left),
            (self.right.path, one is None, alone.only_right),
        ):
            if lacks or names:
                modules = [name.removeprefix("_metadata.") or "the root" for name in names]
                of = f" of {listed(modules, 3)}" if modules else ""
                self.notes.append(f"only {path} has `_metadata`{of} (module versions)")

    def _compare_texts(self, left_at: Path, right_at: Path) -> None:
        """Compare what safetensors files say in `__metadata__`, where both sides have it."""
        sides = ((self.left, left_at), (self.right, right_at))
        one, other = (
            module_metadata.own_texts(places.state_dict_node(each.tree, at)) for each, at in sides
        )
        if one and other:
            left, right = (Dict(list(texts.items())) for texts in (one, other))
            for place in places_of(left, right, ("__metadata__",)):
                self._take(self.beside, place)
        elif one or other:
            path = (self.left if one else self.right).path
            self.notes.append(f"only {path} has `__metadata__`: {listed(one or other, 4)}")

    def _compare_beside(self, left_at: Path, right_at: Path) -> None:
        if self.asked.chosen:
            return
        sides = ((self.left, left_at), (self.right, right_at))
        if not left_at or not right_at:  # a bare state_dict, with no place for anything beside it
            for checkpoint, at in sides:
                names = places.beside(checkpoint.tree, at)
                if names:
                    self.notes.append(
                        f"outside the state_dict, only {checkpoint.path} has {listed(names)}"
                    )
            return
        one, other = (replacing.replaced(checkpoint.tree, at, TAKEN) for checkpoint, at in sides)
        for place in places_of(one, other):
            self._take(self.beside, place)

    def _take(self, found: Found, place: Place) -> None:
        """Note what differs at a place, or queue its tensors."""
        path = walk.dotted(place.path) or "."
        match place.what:
            case "only-left":
                found.only_left[path] = shown(place.left)
            case "only-right":
                found.only_right[path] = shown(place.right)
            case "value":
                found.changed.append(Change(path, "value", shown(place.left), shown(place.right)))
            case _:
                self.tensors += 1
                self.nbytes += place.left.nbytes
                self._compare_tensors(found, path, place.left, place.right)

    def _compare_tensors(self, found: Found, key: str, left: AnyTensor, right: AnyTensor) -> None:
        """Compare what tensors are; queue those of one dtype and shape."""
        facts = [
            ("layout", _layout(left), _layout(right)),
            ("dtype", left.dtype.label, right.dtype.label),
            ("shape", shape(left.shape), shape(right.shape)),
        ]
        differing = [Change(key, *fact) for fact in facts if fact[1] != fact[2]]
        found.changed += differing
        if differing:
            return
        self._compare_kept(found, key, left, right)
        if isinstance(left, TensorInfo) and isinstance(right, TensorInfo):
            self._queue_values(found, key, left, right)
        elif isinstance(left, CompositeTensor) and isinstance(right, CompositeTensor):
            names = _PARTS.get(left.layout, ())
            for index, (one, other) in enumerate(zip(left.parts, right.parts, strict=True)):
                name = names[index] if len(names) == len(left.parts) else index
                self._compare_tensors(found, f"{key}.({name})", one, other)

    def _compare_kept(self, found: Found, key: str, left: AnyTensor, right: AnyTensor) -> None:
        """Compare what is kept with two tensors, once for each pair: it may hold tensors too."""
        if (id(left), id(right)) in self._paired:
            return
        self._paired.add((id(left), id(right)))
        if isinstance(left, TensorInfo) and isinstance(right, TensorInfo):
            self._compare_nodes(found, (key, "quantizer"), quantizer(left), quantizer(right))
        one, other = attributes(left), attributes(right)
        if one is not None and other is not None:  # what one has alone is told
            self._compare_nodes(found, (key, "attributes"), one, other)

    def _compare_nodes(self, found: Found, at: tuple[str, str], left: Node, right: Node) -> None:
        key, what = at
        for place in places_of(left, right, (key, f"({what})")):
            if place.what == "tensors":
                self._compare_tensors(found, walk.dotted(place.path), place.left, place.right)
            else:
                one = "(none)" if place.what == "only-right" else shown(place.left)
                other = "(none)" if place.what == "only-left" else shown(place.right)
                found.changed.append(Change(key, what, one, other))

    def _queue_values(self, found: Found, key: str, left: TensorInfo, right: TensorInfo) -> None:
        if left.numel:
            try:
                self._queue.append((found, key, pair(left, right)))
            except Unsupported as error:
                error.message = f"{key}: {error.message}"
                raise

    def _note_prefixes(self, left: Mapping[str, Node], right: Mapping[str, Node]) -> None:
        """Note where keys would pair but for wrapper prefixes."""
        if not self.state.only_left or not self.state.only_right:
            return
        one, other = peeling(left), peeling(right)
        pairs = set(filter(None, map(one, left))) & set(filter(None, map(other, right)))
        if pairs - (left.keys() & right.keys()):
            side, found = (self.left, one) if one else (self.right, other)
            what = f"starts with `{found.prefix}`" if found.prefix else "or some hold a wrapper"
            self.notes.append(f"every key of {side.path} {what}; --ignore-prefix auto ignores it")

    # Values.

    def compare_values(self, progress: Begin) -> None:
        """Read and compare the tensors that are queued, each pair of views once."""
        distinct = {both.views: both for _, _, both in self._queue}
        limit = max(MAX_EXPANSION * (self.left.nbytes + self.right.nbytes), SMALL)
        total = sum(both.nbytes for both in distinct.values())
        work = total + _inflated(list(distinct.values()))
        if work > limit:
            raise LimitExceeded(
                f"{readable(work)} would be compared of files of {readable(self.left.nbytes)} "
                f"and {readable(self.right.nbytes)}",
                option="--structure",
                hint="compares no values, --select some",
            )
        known: dict[tuple[object, ...], Values] = {}
        step = progress(2 * total)
        with closing(Readers()) as readers:
            for found, key, both in self._queue:
                if both.views not in known:
                    known[both.views] = compare(both, readers, self.asked.tolerance, limit, step)
                _judge(found, key, both, known[both.views])
        self._note_damage([both for *_, both in self._queue if known[both.views].count])
        for path, _ in (*self.left.files, *self.right.files):
            fileio.refuse_changed(path)

    def _note_damage(self, differing: list[Pair]) -> None:
        """Note where bytes differ because a file is damaged: they do not match its checksum."""
        storages = dict.fromkeys(
            info.storage for both in differing for info in (both.left, both.right)
        )
        jobs: list[Copy] = [
            Copy(each, None) for each in storages if each.crc32 is not None or each.chunked
        ]
        try:
            run_jobs(jobs, None, lambda nbytes: None)
        except Malformed as error:
            self.notes.append(f"{error.message}; ckptool check says more")


def _inflated(pairs: Sequence[Pair]) -> int:
    """Count what deflated storages come to, each as often as it is taken up."""
    nbytes = 0
    for storages in (
        [both.left.storage for both in pairs],
        [both.right.storage for both in pairs],
    ):
        for before, storage in zip([None, *storages], storages, strict=False):
            if storage.packing is Packing.DEFLATED and storage != before:
                nbytes += storage.nbytes
    return nbytes


def _judge(found: Found, key: str, both: Pair, values: Values) -> None:
    if values.count or values.within:
        bits = min(8, both.left.dtype.bits)  # below a byte, bytes were counted
        first = None if values.first is None else _index(values.first * 8 // bits, both.left.shape)
        change = Change(key, "values", values=values, first=first)
        (found.changed if values.count else found.within).append(change)


def _index(flat: int, sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the index in each dimension of an element counted in contiguous order."""
    index = []
    for size in reversed(sizes):
        flat, here = divmod(flat, size)
        index.append(here)
    return tuple(reversed(index))


def _tensors_at(place: Place) -> dict[str, str]:
    """List the tensors at a place that one side has alone, or that both have, by path."""
    if place.what == "value":
        return {}
    node = place.right if place.what == "only-right" else place.left
    return {
        ".".join([*place.path, *([] if name == "." else [name])]) or ".": shown(tensor)
        for name, tensor in walk.named(node)
    }


def _layout(tensor: AnyTensor) -> str:
    if isinstance(tensor, TensorInfo):
        return "strided"
    return f"{tensor.layout} of {counted(len(tensor.parts), 'part')}"
