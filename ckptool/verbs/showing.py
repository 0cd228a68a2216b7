"""What `show` gives: the values of a tensor, or a plain value beside the state_dict."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import EditError, NoSuchKey, Unsupported
from ckptool.files import blocks
from ckptool.files.fileio import Readers
from ckptool.pickles.tree import ByteArray, Dict, LongInteger, Node, Object, OldString, Set, items
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, modules, naming, walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.selecting import close_matches
from ckptool.tensors import numbers, statistics, values
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TENSORS, AnyTensor, CompositeTensor, TensorInfo
from ckptool.text import argument, counted, length, shape, visible

if TYPE_CHECKING:
    from pathlib import Path

    from ckptool.documents import looking

AT_MOST = 1_000  # elements, or plain values, unless all are asked for
ALL = 1_000_000
EDGE = 3  # elements at both ends of a dimension that are shown of more, as torch does
_NUMBER = r"-?\d{1,18}"
_RANGE = re.compile(
    rf"(?P<start>{_NUMBER})?:(?P<stop>{_NUMBER})?(:(?P<step>\d{{1,18}})?)?", re.ASCII
)


@dataclass(frozen=True, slots=True)
class Shown:
    """Values of a tensor in row-major order, or a plain value, where `dtype` is None.

    Of a `truncated` tensor, `values` are those at the ends of each dimension, as many as
    `kept_shape` says; of a plain value, what comes first. Elements are numbers of Python, in double
    precision, complex ones too.
    """

    file: str
    key: str
    dtype: DType | None
    shape: tuple[int, ...]
    values: object
    truncated: bool
    kept_shape: tuple[int, ...] = ()

    def __repr__(self) -> str:
        kind = f"{self.dtype.label} {shape(self.shape)}" if self.dtype else "plain value"
        return f"<Shown {visible(self.key)} of {visible(self.file)}: {kind}>"

    def to_dict(self) -> looking.Show:
        """Return the document `show/1`; NaN and infinity are texts, complex numbers pairs."""
        tensor = self.dtype is not None
        return {
            "schema": "show/1",
            "file": self.file,
            "key": self.key,
            "dtype": self.dtype.label if self.dtype else None,
            "shape": list(self.shape) if tensor else None,
            "values": _in_json(self.values),
            "truncated": self.truncated,
            "kept_shape": list(self.kept_shape) if tensor and self.truncated else None,
        }


def show(
    path: str | Path, key: str, *, at: str | None = None, slice: str = "", all: bool = False
) -> Shown:
    """Show the values of a tensor, or a plain value, by its key or its path in the file.

    `slice` chooses elements as an index of torch does (`0,:5`); at most 1 000 are given, those at
    the ends of each dimension, or with `all` at most 1 000 000. Raises `NoSuchKey`.

    >>> ckptool.show("model_best.pth.tar", "module.classifier.bias", slice=":2").values
    [-1.73046875, 0.75390625]
    >>> ckptool.show("model_best.pth.tar", "epoch").values
    90
    """
    checkpoint = containers.read(path)
    node = _find(checkpoint, key, at)
    most = ALL if all else AT_MOST
    if not isinstance(node, TENSORS):
        if slice:
            raise EditError(f"`{key}` is not a tensor: --slice chooses elements of one")
        budget = [most]
        plain = _plain(node, budget)
        return Shown(checkpoint.path, key, None, (), plain, truncated=budget[0] < 0)
    value = _indexed(_dense(node, key), slice, key)
    kept = value if value.numel <= AT_MOST or all else _ends(value)
    if kept.numel > most:
        raise EditError(
            f"`{key}` has {value.numel} elements, and at most {most} are shown",
            hint="--slice '0,:5' chooses some",
        )
    return Shown(
        checkpoint.path,
        key,
        value.dtype,
        value.shape,
        elements(kept),
        truncated=kept is not value,
        kept_shape=kept.shape,
    )


def elements(value: TensorInfo) -> Sequence[object]:
    """Return the elements of a tensor in row-major order; they are in memory then."""
    if not value.numel:
        return []
    numbers.load()
    found: list[object] = []
    with closing(Readers()) as readers:
        for block in blocks.blocks(value, readers):
            found += statistics.elements(block, value.dtype)
    return found


def _find(checkpoint: Checkpoint, key: str, at: str | None) -> Node:
    """Return what a key of the state_dict names, or a path in the whole file."""
    state = places.find(checkpoint, at) if at else places.find_or_none(checkpoint)
    if state and key in state.entries:
        return state.entries[key]
    known = dict(walk.named(checkpoint.tree))
    if key in known:
        return known[key]
    found = list(_places(checkpoint.tree, key))
    if not found:
        names = [*(state.entries if state else ()), *known, *_tops(checkpoint.tree)]
        close = close_matches(key, names)
        lists = f"ckptool keys --all {argument(checkpoint.path)}   lists all tensors by path"
        raise NoSuchKey(
            f"there is no `{key}` in {checkpoint.path}",
            hint=f"did you mean {' or '.join(close)}?" if close else lists,
        )
    return found[0]


def _tops(tree: Node) -> list[str]:
    return [walk.label(key) for key, _ in items(tree) or []]


def _places(node: Node, rest: str) -> Iterator[Node]:
    """Yield what a dotted path leads to; a key may itself hold dots."""
    for name, value in _inside(node):
        if name == rest:
            yield value
        elif rest.startswith(name + "."):
            yield from _places(value, rest[len(name) + 1 :])


def _inside(node: Node) -> list[tuple[str, Node]]:
    if isinstance(node, list | tuple):
        return [(str(place), value) for place, value in enumerate(node)]
    if isinstance(node, Set):
        return _inside(node.items)
    pairs = items(node) or (modules.attributes(node) if isinstance(node, Object) else None) or []
    return walk.labelled(pairs)


# Tensors.


def _dense(tensor: AnyTensor, key: str) -> TensorInfo:
    """Return a tensor whose elements can be shown; raises `Unsupported`."""
    if isinstance(tensor, CompositeTensor):
        raise Unsupported(
            f"`{key}` is a {tensor.layout} tensor, of {counted(len(tensor.parts), 'part')}"
        )
    if not statistics.is_counted(tensor.dtype):
        raise Unsupported(f"`{key}` is {tensor.dtype.label}: several numbers share its bytes")
    return tensor


def _indexed(value: TensorInfo, index: str, key: str) -> TensorInfo:
    """Return the elements that an index of torch chooses: integers, ranges, `...`."""
    if not index:
        return value
    steps = [each.strip() for each in index.strip("[] ").split(",")]
    if "..." in steps:
        place = steps.index("...")
        whole = [":"] * (len(value.shape) - len(steps) + 1)
        steps[place : place + 1] = whole
    if len(steps) > len(value.shape):
        what = f"`{key}` has {counted(len(value.shape), 'dimension')}, and --slice {index} more"
        raise EditError(what)
    kept = []
    for dim, step in enumerate(steps):
        ranges = _ranges(step, value.shape[dim], f"`{step}` in --slice {index}")
        value = values.taken(value, dim, ranges)
        kept += [] if length(step.lstrip("-"), 10) is not None else [value.shape[dim]]
    return values.shaped(value, (*kept, *value.shape[len(steps) :]))


def _ranges(text: str, size: int, what: str) -> list[tuple[int, int]]:
    """Return the ranges that an integer or `start:stop:step` takes of a dimension."""
    if re.fullmatch(_NUMBER, text, re.ASCII):
        place = _counted(text)
        if not -size <= place < size:
            raise EditError(f"{what} is outside of a dimension of {size}")
        return [(place % size, place % size + 1)]
    match = _RANGE.fullmatch(text)
    if match is None or (match["step"] and not length(match["step"], 10)):
        raise EditError(f"{what} is neither an integer nor a range", hint="--slice '0,:5'")
    given = (_counted(match[name]) if match[name] else None for name in ("start", "stop", "step"))
    start, stop, step = slice(*given).indices(size)
    if step == 1:
        return [(start, max(start, stop))]
    chosen = range(start, stop, step)
    if len(chosen) > AT_MOST:
        raise EditError(
            f"{what} takes {len(chosen)} places one by one, and at most {AT_MOST} may be"
        )
    return [(place, place + 1) for place in chosen]


def _counted(text: str) -> int:
    """Return an integer that a pattern found."""
    found = length(text.removeprefix("-"), 10) or 0
    return -found if text.startswith("-") else found


def _ends(value: TensorInfo) -> TensorInfo:
    """Return the elements at the ends of each dimension."""
    for dim, size in enumerate(value.shape):
        if size > 2 * EDGE:
            value = values.taken(value, dim, [(0, EDGE), (size - EDGE, size)])
    return value


# Plain values.


def _plain(node: Node, left: list[int]) -> object:
    """Return a node as values of Python; what is more than there is room for is left out."""
    left[0] -= 1
    if left[0] < 0:
        return ...
    match node:
        case None | bool() | int() | float() | str():
            return node
        case bytes() | ByteArray() | OldString() | LongInteger():
            return naming.what(node)
        case TensorInfo() | CompositeTensor():
            return f"tensor {naming.what(node)}"
        case list() | tuple() | Set():
            inside = node.items if isinstance(node, Set) else node
            return [_plain(each, left) for each in inside[: max(left[0], 0) + 1]]
    pairs = _inside(node)
    if not pairs and not isinstance(node, Dict):
        return naming.what(node)
    return {name: _plain(value, left) for name, value in pairs[: max(left[0], 0) + 1]}


def _in_json(value: object) -> object:
    """Return what JSON can hold."""
    match value:
        case float() if not math.isfinite(value):
            return str(value)
        case complex():
            return [_in_json(value.real), _in_json(value.imag)]
        case list():
            return [_in_json(each) for each in value]
        case dict():
            return {name: _in_json(each) for name, each in value.items()}
        case _ if value is ...:
            return "..."
    return value
