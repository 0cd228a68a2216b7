"""What `plot` draws of one or two checkpoints, by layer: sizes, values, how far each moved.

A layer is a module with tensors of its own, or one of those that are cut to a depth; a tensor at
the top is a layer itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite
from typing import TYPE_CHECKING

from ckptool.errors import NothingMatched
from ckptool.files.copying import Begin
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, selecting
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.differences import comparable
from ckptool.tensors.numbers import FLOATS
from ckptool.tensors.statistics import quantiles
from ckptool.tensors.summaries import NOWHERE, Distance, Statistics
from ckptool.tensors.tensor import AnyTensor, TensorInfo
from ckptool.text import argument, counted
from ckptool.verbs import compare_sides
from ckptool.verbs.compare_sides import Asked
from ckptool.verbs.compare_tensors import compare, pair, refuse_changed
from ckptool.verbs.listing import Entry, Listing

if TYPE_CHECKING:
    from ckptool.documents import looking

Path = tuple[str, ...]
SHARES = (0.01, 0.25, 0.5, 0.75, 0.99)  # of the elements that are below a quantile


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer: its path, and the names of its tensors in it.

    `values` are those of its largest tensor of floats, or of all that were selected, with its
    quantiles at `SHARES`; `odd` counts NaN and infinity in all of them. `moved` says how far its
    floats are from those of another checkpoint.
    """

    path: Path
    tensors: tuple[str, ...]
    parameters: int
    nbytes: int
    values: Statistics | None = None
    quantiles: tuple[float, ...] = ()
    odd: int = 0
    moved: Distance | None = None

    @property
    def name(self) -> str:
        """Return its path, dotted."""
        return ".".join(self.path)

    def to_dict(self) -> looking.PlotLayer:
        """Return an entry of the `layers` of `plot/1`."""
        fields: looking.PlotLayer = {
            "module": self.name,
            "tensors": list(self.tensors),
            "parameters": self.parameters,
            "nbytes": self.nbytes,
        }
        if found := self.values:
            numbers = found.numbers
            fields["min"], fields["max"] = numbers["min"], numbers["max"]
            fields["mean"], fields["std"] = numbers["mean"], numbers["std"]
            fields["not_finite"] = self.odd
            fields["quantiles"] = dict(zip(map(str, SHARES), self.quantiles, strict=False))
        if self.moved:
            relative = self.moved.relative
            fields["relative"] = relative if relative is None or isfinite(relative) else None
            fields["cosine"] = self.moved.cosine
        return fields


@dataclass(frozen=True, slots=True)
class Plot:
    """Layers in the order of the file; `kind` is `sizes`, `values` or `change`.

    `parameters` and `nbytes` are of all tensors. `notes` say what is not in it.
    """

    kind: str
    file: str
    other: str | None
    layers: tuple[Layer, ...]
    tensors: int
    parameters: int
    nbytes: int
    notes: tuple[str, ...] = ()

    def to_dict(self) -> looking.Plot:
        """Return the document `plot/1`."""
        return {
            "schema": "plot/1",
            "kind": self.kind,
            "file": self.file,
            "other": self.other,
            "tensors": self.tensors,
            "parameters": self.parameters,
            "nbytes": self.nbytes,
            "layers": [layer.to_dict() for layer in self.layers],
            "notes": list(self.notes),
        }


def of_one(found: Listing, depth: int | None, *, stats: bool, every: bool) -> Plot:
    """Return how large layers are, or with `stats` how their values are distributed.

    `found` has statistics with cells then. Of each layer the values are those of its largest tensor
    of floats, with `every` of each tensor by itself.
    """
    if not stats:
        groups = _by_layer(found.entries, depth)
        return _plot("sizes", found, None, [_layer(*each) for each in groups.items()])
    floats = [entry for entry in found.entries if _is_float(entry[1])]
    groups = _by_layer(floats, depth)
    if every:
        groups = {tuple(key.split(".")): [(key, info)] for key, info in floats}
    left = len(found.entries) - len(floats)
    notes = [f"not in it: {counted(left, 'tensor')} without floats"] if left else []
    layers = [_spread(found, *each) for each in groups.items()]
    return _plot("values", found, None, layers, notes)


def _spread(found: Listing, path: Path, entries: Sequence[Entry]) -> Layer:
    """Describe the largest tensor of each module in a layer, all of them together."""
    known = found.statistics or {}
    modules = _by_layer(entries, None).values()
    largest = [max(each, key=lambda entry: entry[1].numel)[0] for each in modules]
    whole = sum((known.get(key, Statistics()) for key in largest), Statistics())
    odd = sum(known[key].nan + known[key].inf for key, _ in entries if key in known)
    layer = _layer(path, entries)
    return replace(layer, values=whole, quantiles=quantiles(whole, SHARES), odd=odd)


def change(
    left: Checkpoint,
    right: Checkpoint,
    *,
    at: str | None,
    select: str | Sequence[str],
    depth: int | None,
    progress: Begin,
) -> Plot:
    """Return how far the floats of each layer are from those of another checkpoint.

    Wrapper prefixes do not count. Raises what finding state_dicts raises, and `NothingMatched`
    where no tensor of one is in the other.
    """
    asked = Asked(ignore_prefix="auto")
    one, other = compare_sides.edited(asked, places.find(left, at), places.find(right, at))
    keys = [*one.entries]
    chosen = selecting.select(select, keys) if select else {*keys}
    entries = [
        (key, info) for key, info in one.entries.items() if key in chosen and _is_float(info)
    ]
    pairs = {
        key: pair(info, twin)
        for key, info in entries
        if isinstance(twin := other.entries.get(key), TensorInfo) and _alike(info, twin)
    }
    if not pairs:
        raise NothingMatched(
            f"no tensor of floats has its key and shape in {left.path} and {right.path}",
            hint=f"ckptool diff --structure {argument(left.path)} {argument(right.path)}",
        )
    found = compare([*pairs.values()], (left, right), progress)
    refuse_changed((left, right))
    moved = {key: found[each.views].distance for key, each in pairs.items()}
    layers = [
        replace(_layer(path, inside), moved=sum((moved[key] for key, _ in inside), NOWHERE))
        for path, inside in _by_layer([e for e in entries if e[0] in pairs], depth).items()
    ]
    rest = len(chosen) - len(pairs)
    notes = [f"not in it: {rest} without floats of one shape in both files"] if rest else []
    return _plot("change", Listing(left, one, entries, []), right.path, layers, notes)


def _alike(left: AnyTensor, right: TensorInfo) -> bool:
    alike = left.shape == right.shape and 0 not in left.shape
    return alike and comparable(left.dtype, right.dtype)


def _is_float(info: object) -> bool:
    return isinstance(info, TensorInfo) and info.dtype in FLOATS


def _plot(
    kind: str, found: Listing, other: str | None, layers: Sequence[Layer], notes: Sequence[str] = ()
) -> Plot:
    if not layers:
        raise NothingMatched(f"{found.checkpoint.path} has no tensors to draw")
    return Plot(
        kind=kind,
        file=found.checkpoint.path,
        other=other,
        layers=tuple(layers),
        tensors=len(found.entries),
        parameters=sum(info.numel for _, info in found.entries),
        nbytes=found.nbytes,
        notes=tuple(notes),
    )


def path_of(key: str, depth: int | None) -> Path:
    """Return the layer that a tensor is of."""
    *modules, tail = key.split(".")
    return tuple(modules[:depth]) or (tail,)


def _by_layer(entries: Iterable[Entry], depth: int | None) -> dict[Path, list[Entry]]:
    """Group tensors by layer, in the order of the file.

    What is in a module follows each other, and numbers count up: a file may have 10 before 2.
    """
    layers: dict[Path, list[Entry]] = {}
    ranks: dict[tuple[Path, str], int] = {}  # of a name in a module; all numbers have one
    for key, info in entries:
        path = path_of(key, depth)
        layers.setdefault(path, []).append((key, info))
        for at, name in enumerate(path):
            ranks.setdefault((path[:at], "" if _is_number(name) else name), len(ranks))

    def order(path: Path) -> list[tuple[int, int]]:
        return [
            (ranks[path[:at], ""], int(name)) if _is_number(name) else (ranks[path[:at], name], 0)
            for at, name in enumerate(path)
        ]

    return {path: layers[path] for path in sorted(layers, key=order)}


def _is_number(name: str) -> bool:
    return name.isdecimal() and name.isascii() and len(name) < 10


def _layer(path: Path, entries: Sequence[Entry]) -> Layer:
    start = len(".".join(path)) + 1
    return Layer(
        path=path,
        tensors=tuple(key[start:] or key for key, _ in entries),
        parameters=sum(info.numel for _, info in entries),
        nbytes=sum(info.nbytes for _, info in entries),
    )
