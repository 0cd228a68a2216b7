"""What `keys` lists: the tensors of the state_dict, or of the whole file, chosen and sorted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field, replace
from functools import partial
from typing import TYPE_CHECKING

from ckptool.pickles.subclasses import NDARRAY, class_of
from ckptool.records import dataclass, plain
from ckptool.state import checkpoint as places, selecting, walk
from ckptool.state.candidates import Candidate
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.parts import Part
from ckptool.tensors.tensor import AnyTensor, CompositeTensor, TensorInfo, tensors_of
from ckptool.text import counted, html_table, readable, shape, visible

if TYPE_CHECKING:  # the copy engine takes long to load
    from ckptool.documents import looking
    from ckptool.files.copying import Begin
    from ckptool.tensors.summaries import Statistics

Entry = tuple[str, AnyTensor]


@dataclass(frozen=True, slots=True)
class Listing:
    """Tensors by key, or by path where `state` is None; `beside` names what is around them.

    `part` says of what the file is one of several parts, `at` is the place that was asked for;
    `arrays` are those of numpy in it that are not in the state_dict (random states); `statistics`
    are those of the elements, by key, where they were asked for.

    It reads like a dict: `len`, iteration over the keys, `key in listing`, `listing[key]`.
    """

    checkpoint: Checkpoint
    state: StateDict | None
    entries: list[Entry]
    beside: list[str]
    part: Part | None = None
    at: str | None = None
    arrays: Sequence[Entry] = ()
    statistics: Mapping[str, Statistics] | None = None
    _by_key: dict[str, AnyTensor] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_key", dict(self.entries))

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return (key for key, _ in self.entries)

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> AnyTensor:
        return self._by_key[key]

    def __repr__(self) -> str:
        size = f"{counted(len(self), 'tensor')}, {readable(self.nbytes)}"
        return f"<Listing of {visible(self.checkpoint.path)}: {size}>"

    def _repr_html_(self) -> str:
        return html_table(rows(self.entries), repr(self)[1:-1])

    @property
    def nbytes(self) -> int:
        """Sum the bytes of the tensors listed."""
        return sum(info.nbytes for _, info in self.entries)

    def to_dict(self) -> looking.Keys:
        """Return the document `keys/1`."""
        return {
            "schema": "keys/1",
            "file": self.checkpoint.path,
            "container": self.checkpoint.container,
            "at": list(self.state.at) if self.state else [],
            "module": self.state.module if self.state else "",
            "count": len(self),
            "nbytes": self.nbytes,
            "tensors": [self._tensor(key, info) for key, info in self.entries],
            "beside": self.beside,
            "part": plain(self.part),
            "arrays": [_fields(key, info) for key, info in self.arrays],
        }

    def _tensor(self, key: str, info: AnyTensor) -> looking.Tensor:
        """Describe a tensor, with its statistics where they were asked for."""
        fields = _fields(key, info)
        if self.statistics is not None:
            from ckptool.tensors.summaries import Statistics

            found = self.statistics.get(key, Statistics())
            numbers = found.numbers
            fields["min"], fields["max"] = numbers["min"], numbers["max"]
            fields["mean"], fields["std"] = numbers["mean"], numbers["std"]
            fields["zeros"], fields["nan"], fields["inf"] = found.zeros, found.nan, found.inf
        return fields


def _fields(key: str, info: AnyTensor) -> looking.Tensor:
    fields: looking.Tensor = {
        "key": key,
        "dtype": info.dtype.label,
        "shape": list(info.shape),
        "nbytes": info.nbytes,
    }
    if isinstance(info, CompositeTensor):
        fields["layout"] = info.layout
    if kind := class_of(info):
        fields["class"] = kind
    return fields


def rows(entries: Sequence[Entry]) -> list[tuple[str, str, str, str]]:
    """Describe tensors for people, below a head."""
    return [
        ("KEY", "DTYPE", "SHAPE", "SIZE"),
        *(
            (visible(key), _dtype(info), shape(info.shape), readable(info.nbytes))
            for key, info in entries
        ),
    ]


def _dtype(info: AnyTensor) -> str:
    kind = info.layout if isinstance(info, CompositeTensor) else class_of(info).rpartition(".")[2]
    return f"{info.dtype.label} {kind}".rstrip()


def listing(checkpoint: Checkpoint, at: str | None = None, *, every: bool = False) -> Listing:
    """Choose what to list: the state_dict, or every tensor where that is asked or all there is.

    Raises `AmbiguousStateDict` where there are several candidates, `NoSuchKey` for a wrong `at`.
    """
    state = None
    if at is not None:
        state = places.find(checkpoint, at)
    elif not every:
        state = places.find_or_none(checkpoint, several=False)
        places.refuse_part(checkpoint, state)
    if state is None:
        inside, arrays = _arrays(checkpoint, places.candidates(checkpoint.tree))
        return Listing(
            checkpoint,
            state=None,
            entries=[*walk.named(checkpoint.tree), *inside],
            beside=[],
            arrays=arrays,
            part=places.part_of(checkpoint, None) if every else None,
        )
    tensors = list(tensors_of(state.entries).items())
    beside = places.beside(checkpoint.tree, state.at)
    _, arrays = _arrays(checkpoint, [state])
    return Listing(checkpoint, state=state, entries=tensors, beside=beside, at=at, arrays=arrays)


def _arrays(
    checkpoint: Checkpoint, states: Sequence[StateDict | Candidate]
) -> tuple[list[Entry], list[Entry]]:
    """List the arrays of numpy by path: those in state_dicts, and the others."""
    if NDARRAY not in checkpoint.globals:
        return [], []
    found = walk.arrays(checkpoint.tree)
    held: list[Entry] = [(walk.dotted(path), info) for path, info in found]
    tops = [each.at for each in states]
    known: places.Steps = {}
    pairs = ((at, places.state_dict_at(checkpoint, at, known).entries) for at in tops if held)
    keys = {walk.dotted((*at, key)) for at, entries in pairs for key in entries}
    inside = [each for each in held if each[0] in keys]
    return inside, [each for each in held if each[0] not in keys]


def chosen(
    listed: Listing,
    patterns: str | Sequence[str],
    sort: str,
    statistics: Begin | None = None,
    *,
    cells: bool = False,
) -> Listing:
    """Keep what the patterns select, sorted by `size`, by `name`, or as in the `file`.

    With `statistics`, which begins a progress bar, all elements are read; with `cells`, for
    histograms too. They are sorted by `absmax`, `nan` and `std`: the largest comes first.
    """
    entries = listed.entries
    if patterns:
        keys = selecting.select(patterns, [key for key, _ in entries])
        entries = [(key, info) for key, info in entries if key in keys]
    if statistics is not None:
        listed = _with_statistics(replace(listed, entries=entries), statistics, cells)
    if sort == "size":
        entries = sorted(entries, key=lambda entry: -entry[1].nbytes)
    elif sort == "name":
        entries = sorted(entries, key=lambda entry: entry[0])
    elif sort != "file":
        figures = listed.statistics or {}
        entries = sorted(entries, key=lambda entry: -_figure(figures.get(entry[0]), sort))
    return replace(listed, entries=entries)


def _with_statistics(listed: Listing, progress: Begin, cells: bool) -> Listing:
    """Add the statistics of all elements; those of `cells` too, which histograms are made of.

    Views that overlap so often that to read them would take for ever have none.
    """
    from ckptool.tensors.statistics import is_counted, statistics
    from ckptool.tensors.summaries import Statistics
    from ckptool.verbs.finite import count_in

    tensors = [
        (key, info)
        for key, info in listed.entries
        if isinstance(info, TensorInfo) and is_counted(info.dtype)
    ]
    step = progress(sum(info.nbytes for _, info in tensors))
    found, _ = count_in(tensors, partial(statistics, cells=cells), Statistics(), step)
    return replace(listed, statistics=found)


def _figure(found: Statistics | None, sort: str) -> float:
    if found is None or (sort != "nan" and not found.count):
        return -1.0
    if sort == "nan":
        return found.nan + found.inf
    return found.absmax if sort == "absmax" else found.std
