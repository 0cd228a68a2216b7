"""Tensors as records: where the bytes lie and how they are strided; never the values.

Strides and offsets are counted in elements, as torch counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import field, replace
from enum import Enum
from math import prod
from typing import Any

from ckptool.records import dataclass
from ckptool.tensors.dtype import DType

MAX_DIMENSIONS = 64  # c10/core/SymInt's containers hold more; no tensor of torch has more
MAX_COUNT = 1 << 62


class Packing(Enum):
    """How the bytes of a storage are in its file."""

    PLAIN = "plain"
    DEFLATED = "deflated"
    CHUNKED = "chunked"
    COMPUTED = "computed"


# Values, though not frozen: for each field of a frozen one, making it calls a function, and there
# are two of these classes for each tensor of a file.
@dataclass(slots=True)
class Storage:
    """A run of bytes in a file; equal storages are shared storages.

    `dtype` is that of torch's typed storage, None for an untyped one. `crc32` is what the file
    recorded for the unpacked bytes, None where it recorded nothing. A chunked storage is in
    pieces, `chunked` says where; `path` and `key` then name the whole. A computed storage is in no
    file: `computed` says what its elements are made of. Both are the identity of such a storage.
    `whole` is the recorded storage that this one is a byte range of.
    """

    path: str
    key: str
    start: int
    nbytes: int
    dtype: DType | None = field(default=None, compare=False)  # bytes may be under two
    location: str = "cpu"
    byteorder: str = "little"
    crc32: int | None = None
    packing: Packing = Packing.PLAIN
    packed_nbytes: int = 0
    chunked: Chunked | None = field(default=None, repr=False)
    computed: Computed | None = field(default=None, repr=False)
    whole: Storage | None = field(default=None, compare=False, repr=False)

    def __hash__(self) -> int:
        return hash((self.path, self.key, self.start))


@dataclass(frozen=True, slots=True, eq=False)
class Chunked:
    """The pieces of a contiguous tensor of this shape; they cover it exactly."""

    shape: tuple[int, ...]
    itemsize: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Computed:
    """Elements made one by one from those of other tensors, all of one shape.

    `kernel` fills a view with their bytes in the new dtype, from a block of as many elements of
    each; of none, with what it holds from a byte on.
    """

    kernel: Callable[..., None]
    args: tuple[TensorInfo, ...]
    itemsize: int


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A box of a tensor: where it begins in each dimension, and the tensor that fills it."""

    offsets: tuple[int, ...]
    source: TensorInfo


@dataclass(slots=True, eq=False)
class TensorInfo:
    """A strided view of a storage.

    `origin` is the node that rebuilds the tensor where that says more than these fields do (a
    Parameter, a quantizer, attributes); it is carried, and its storage and offset come from here.
    `lazy` holds torch's pending operations, `conj` and `neg`: the bytes are those before them.
    """

    dtype: DType
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    storage: Storage
    storage_offset: int = 0
    requires_grad: bool = False
    lazy: frozenset[str] = frozenset()
    origin: Any = None

    @property
    def numel(self) -> int:
        """Count the elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes of the elements, as a contiguous copy would take."""
        return self.dtype.nbytes(self.numel)

    @property
    def start(self) -> int:
        """Return the byte in the storage where the first element lies."""
        return self.storage_offset * self.dtype.itemsize

    @property
    def view(self) -> tuple[object, ...]:
        """Identify the exact view: two tensors with equal views are tied."""
        return (self.storage, self.storage_offset, self.shape, self.stride, self.dtype, self.lazy)


@dataclass(frozen=True, slots=True, eq=False)
class CompositeTensor:
    """A tensor made of others (sparse, nested) or of none (meta); carried whole."""

    layout: str
    dtype: DType
    shape: tuple[int, ...]
    parts: tuple[TensorInfo, ...]
    origin: Any

    @property
    def numel(self) -> int:
        """Count the elements of the dense tensor it stands for."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Count the bytes of its parts."""
        return sum(part.nbytes for part in self.parts)


AnyTensor = TensorInfo | CompositeTensor
TENSORS = (TensorInfo, CompositeTensor)


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of a contiguous tensor, as torch does (zero sizes count as one)."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Return whether the elements are in order without gaps; sizes of one do not count."""
    if 0 in shape:
        return True
    step = 1
    for size, here in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if here != step:
                return False
            step *= size
    return True


def span(shape: Sequence[int], stride: Sequence[int]) -> int:
    """Count the elements from the first to the last that a view touches, gaps included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def without_repeats(
    info: TensorInfo, repeated: Sequence[bool] | None = None
) -> tuple[TensorInfo, int]:
    """Return a view without the dimensions that repeat its elements, and how often they do.

    `repeated` tells which dimensions those are; by default, all with a stride of 0.
    """
    again = [step == 0 for step in info.stride] if repeated is None else repeated
    sizes = list(zip(info.shape, again, strict=True))
    shape = tuple(min(size, 1) if drop else size for size, drop in sizes)
    return replace(info, shape=shape), prod(size for size, drop in sizes if drop)


def problem(info: TensorInfo) -> str:
    """Return why a view is impossible, an empty string for a sound one."""
    shape, stride = info.shape, info.stride
    if len(shape) != len(stride):
        return f"has {len(shape)} sizes but {len(stride)} strides"
    if len(shape) > MAX_DIMENSIONS:
        return f"has {len(shape)} dimensions"
    start = info.storage_offset
    count, needed, lowest, widest = 1, 1, start, start
    for size, step in zip(shape, stride, strict=True):
        count *= size or 1
        needed += (size - 1) * step
        lowest, widest = min(lowest, size, step), max(widest, step)
    if lowest < 0:
        return "has a negative size, stride or offset"
    if max(count, widest) > MAX_COUNT:
        return "has a size, stride or offset beyond 2^62"
    end = 0 if 0 in shape else info.dtype.nbytes(start + needed)
    if end > info.storage.nbytes:
        return f"needs {end} bytes of a storage of {info.storage.nbytes}"
    return ""


def coalesced(
    shape: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Drop dimensions of one and join those that follow each other without a gap."""
    joined: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * step:
            joined[-1] = (joined[-1][0] * size, step)
        else:
            joined.append((size, step))
    return tuple(size for size, _ in joined), tuple(step for _, step in joined)


def view_stride(
    shape: Sequence[int], stride: Sequence[int], wanted: Sequence[int]
) -> tuple[int, ...] | None:
    """Return the strides of a view of the same elements in another shape, None where none is.

    As torch's `Tensor.view` (aten/src/ATen/TensorUtils.cpp, `computeStride_impl`).
    """
    if 0 in shape:
        return contiguous_stride(wanted)
    runs = list(zip(*coalesced(shape, stride), strict=True))
    found, left, step = [], 1, 1
    for size in reversed(wanted):
        if left == 1 and size > 1:
            left, step = runs.pop()
        if left % size:
            return None
        found.append(step)
        left, step = left // size, step * size
    return tuple(reversed(found))


def needs_swap(storage: Storage, width: int) -> bool:
    """Return whether numbers of `width` bytes in this storage are not little-endian."""
    return width > 1 and storage.byteorder != "little"


def tensors_of(entries: Mapping[str, object]) -> dict[str, AnyTensor]:
    """Return the entries that are tensors."""
    return {key: value for key, value in entries.items() if isinstance(value, TENSORS)}


def shapes_of(entries: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the entries that are tensors."""
    return {key: value.shape for key, value in tensors_of(entries).items()}


def ties(entries: Mapping[str, object]) -> dict[str, str]:
    """Return which keys are exactly the tensor of a key before them."""
    firsts: dict[tuple[object, ...], str] = {}
    found = {
        key: firsts.setdefault(value.view, key)
        for key, value in entries.items()
        if isinstance(value, TensorInfo) and value.numel
    }
    return {key: first for key, first in found.items() if key != first}
