"""`diff`: what two checkpoints have apart, in any two containers.

Keys, dtypes, shapes and bytes decide whether state_dicts are equal, and the values beside them
where both files have a place for such. Order of keys, ties, strides, requires_grad and device
tags are told and decide nothing: containers differ in what they can say of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace
from typing import TYPE_CHECKING

from ckptool.errors import EditError, Malformed, Unsupported
from ckptool.files import budget
from ckptool.files.copying import Begin, no_progress, run_jobs
from ckptool.files.jobs import Copy
from ckptool.pickles.torch_objects import attributes, quantizer
from ckptool.pickles.tree import Dict, Node
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, edits, module_metadata, replacing, selecting, walk
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.edit_options import recipe_edits
from ckptool.state.walk import Path
from ckptool.state.wrappers import peeling
from ckptool.tensors.differences import comparable
from ckptool.tensors.summaries import Values
from ckptool.tensors.tensor import AnyTensor, CompositeTensor, TensorInfo
from ckptool.text import counted, listed, shape
from ckptool.verbs.compare_sides import Asked, edited, notes, state_dicts, tolerance
from ckptool.verbs.compare_tensors import Pair, compare, pair, refuse_changed
from ckptool.verbs.compare_trees import TAKEN, Place, places_of, shown
from ckptool.verbs.difference import Change, Difference, Found, Side

if TYPE_CHECKING:
    from ckptool.model.live import CheckpointLike

# torch/_utils.py, `_rebuild_sparse_tensor`
_PARTS = {
    "sparse_coo": ("indices", "values"),
    **dict.fromkeys(("sparse_csr", "sparse_bsr"), ("crow_indices", "col_indices", "values")),
    **dict.fromkeys(("sparse_csc", "sparse_bsc"), ("ccol_indices", "row_indices", "values")),
}


@budget.run()
def diff(
    left: CheckpointLike,
    right: CheckpointLike,
    *,
    at: str | None = None,
    left_at: str | None = None,
    right_at: str | None = None,
    all: bool = False,
    structure: bool = False,
    atol: float = 0.0,
    rtol: float = 0.0,
    select: str | Sequence[str] = (),
    map: Mapping[str, str] | None = None,
    recipe: str | Sequence[str] = (),
    reverse: bool = False,
    ignore_prefix: str | Sequence[str] | None = None,
    anywhere: bool = False,
    progress: Begin = no_progress,
) -> Difference:
    """Compare two checkpoints bit for bit, or within `atol + rtol * |left|`.

    Each is a file, a state_dict or an `nn.Module`. `at` is where the state_dict sits on both
    sides, `left_at` and `right_at` on one; `all` compares all there is by path, `structure` reads
    no values; `map` has rules as of `--rename`, what the left and the right call it; `recipe`
    names recipes that make the right's tensors of the left's, backwards with `reverse`;
    `ignore_prefix` is a prefix or several, or `auto`, and `anywhere` ignores them inside keys too.
    Raises what reading raises (`FormatError`), `AmbiguousStateDict`, `NoSuchKey`, and
    `NothingMatched` for what no key has.

    >>> ckptool.diff("data_parallel.pth", "plain.pth", ignore_prefix="auto").equal
    True
    >>> [change.key for change in ckptool.diff("flowers.safetensors", "plain.pth")]
    ['classifier.bias', 'classifier.weight']
    """
    from ckptool.model import live

    steps = [edits.renames(map.items())] if map else []
    steps += recipe_edits(recipe, reverse=reverse)
    asked = Asked(
        at=at,
        left_at=left_at,
        right_at=right_at,
        every=all,
        structure=structure,
        tolerance=tolerance(atol, rtol),
        select=select,
        steps=steps,
        ignore_prefix=ignore_prefix or (),
        anywhere=anywhere,
    )
    with live.opened(left) as one, live.opened(right) as other:
        return compared(one, other, asked, progress)


def compared(left: Checkpoint, right: Checkpoint, asked: Asked, progress: Begin) -> Difference:
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
    _queue: list[tuple[Found, Change, Pair]] = field(default_factory=list)
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
        if self.asked.steps or self.asked.ignore_prefix:
            what = "--rename, --recipe and --ignore-prefix need a state_dict on both sides"
            raise EditError(what)
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
        """Compare what tensors are; queue those of one shape."""
        facts = [
            ("layout", _layout(left), _layout(right)),
            ("dtype", left.dtype.label, right.dtype.label),
            ("shape", shape(left.shape), shape(right.shape)),
        ]
        differing = [Change(key, *fact) for fact in facts if fact[1] != fact[2]]
        if [each.what for each in differing] not in ([], ["dtype"]):
            found.changed += differing
            return
        change = differing[0] if differing else Change(key, "values")
        if not differing:
            self._compare_kept(found, key, left, right)
        if isinstance(left, TensorInfo) and isinstance(right, TensorInfo):
            self._queue_values(found, change, left, right)
        elif differing:
            found.changed.append(change)
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

    def _queue_values(
        self, found: Found, change: Change, left: TensorInfo, right: TensorInfo
    ) -> None:
        """Queue two tensors whose values decide, or say how far two of different dtypes are."""
        alike = left.dtype is right.dtype
        compared = comparable(left.dtype, right.dtype) and not self.asked.structure
        if not left.numel or not (alike or compared):
            found.changed += [] if alike else [change]
            return
        try:
            self._queue.append((found, change, pair(left, right)))
        except Unsupported as error:
            error.message = f"{change.key}: {error.message}"
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
        sides = self.left, self.right
        pairs = [both for _, _, both in self._queue]
        known = compare(pairs, sides, progress, self.asked.tolerance)
        for found, change, both in self._queue:
            _judge(found, change, both, known[both.views])
        self._note_damage(
            [
                both
                for _, change, both in self._queue
                if change.what == "values" and known[both.views].count
            ]
        )
        refuse_changed(sides)

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


def _judge(found: Found, change: Change, both: Pair, values: Values) -> None:
    if change.what == "dtype" or values.count or values.within:
        bits = min(8, both.left.dtype.bits)  # below a byte, bytes were counted
        first = None if values.first is None else _index(values.first * 8 // bits, both.left.shape)
        decides = change.what == "dtype" or values.count
        where = found.changed if decides else found.within
        where.append(replace(change, values=values, first=first))


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
