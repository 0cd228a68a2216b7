"""Tensors as records: where the bytes lie and how they are strided; never the values.

Strides and offsets are counted in elements, as torch counts them.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import product
from math import prod
from typing import Any, Literal

from ckptool.tensors.dtype import DType

MAX_DIMENSIONS = 64  # c10/core/SymInt's containers hold more; no tensor of torch has more
MAX_COUNT = 1 << 62


class Packing(Enum):
    """How the bytes of a storage lie in its file."""

    PLAIN = "plain"
    DEFLATED = "deflated"
    CHUNKED = "chunked"


@dataclass(frozen=True, slots=True)
class Storage:
    """A run of bytes in a file; equal storages are shared storages.

    `dtype` is that of torch's typed storage, None for an untyped one. `crc32` is what the file
    recorded for the unpacked bytes, None where it recorded nothing. A chunked storage lies in
    pieces, `chunked` says where; `path` and `key` then name the whole.
    """

    path: str
    key: str
    start: int
    nbytes: int
    dtype: DType | None = field(default=None, compare=False)  # bytes may stand under two
    location: str = "cpu"
    byteorder: str = "little"
    crc32: int | None = None
    packing: Packing = Packing.PLAIN
    packed_nbytes: int = 0
    chunked: Chunked | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True, eq=False)
class Chunked:
    """The pieces of a contiguous tensor of this shape; they cover it exactly."""

    shape: tuple[int, ...]
    itemsize: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """A box of a tensor: where it begins in each dimension, and the tensor that fills it."""

    offsets: tuple[int, ...]
    source: TensorInfo


@dataclass(frozen=True, slots=True, eq=False)
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
        """Give the byte in the storage where the first element lies."""
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
    """Give the strides of a contiguous tensor, as torch computes them (zero sizes count as one)."""
    stride = []
    step = 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def is_contiguous(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Tell whether the elements lie in order without gaps; dimensions of size one do not count."""
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


def problem(info: TensorInfo) -> str:
    """Say in words why a view is impossible; an empty string for a sound one."""
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


Read = Callable[[int, int], bytes]  # (start, nbytes) in the unpacked storage -> those bytes

# Typecodes of memoryview.cast and array for whole numbers of so many bytes.
_UNSIGNED: dict[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}
_PAGE = 4096


def gather(info: TensorInfo, read: Read, limit: int) -> Iterator[bytearray]:
    """Yield the elements in contiguous order, in blocks of at most `limit` bytes.

    What is read at once stays below `limit` too, whatever the strides.
    """
    if 0 in info.shape:
        return
    shape, stride = _coalesced(info.shape, info.stride)
    offset, itemsize = info.storage_offset, info.dtype.itemsize
    if itemsize > 8:  # complex128 is two floats, and no number for `memoryview`
        shape, stride = (*shape, 2), (*(2 * step for step in stride), 1)
        offset, itemsize = 2 * offset, 8
    yield from _blocks(shape, stride, offset, itemsize, read, limit)


def swapped(data: bytes | bytearray, width: int) -> bytes | bytearray:
    """Reverse the bytes of every `width`-byte number."""
    if width == 1:
        return data
    numbers = array(_UNSIGNED[width], bytes(data))
    numbers.byteswap()
    return numbers.tobytes()


def _coalesced(
    shape: Sequence[int], stride: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Drop dimensions of one and join those that lie behind each other."""
    joined: list[tuple[int, int]] = []
    for size, step in zip(shape, stride, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * step:
            joined[-1] = (joined[-1][0] * size, step)
        else:
            joined.append((size, step))
    return tuple(size for size, _ in joined), tuple(step for _, step in joined)


def _blocks(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    itemsize: int,
    read: Read,
    limit: int,
) -> Iterator[bytearray]:
    row = prod(shape[1:]) * itemsize
    if not shape or shape[0] * row <= limit:
        yield _block(shape, stride, offset, itemsize, read, limit)
    elif row > limit:
        for index in range(shape[0]):
            start = offset + index * stride[0]
            yield from _blocks(shape[1:], stride[1:], start, itemsize, read, limit)
    else:
        rows = limit // row
        for first in range(0, shape[0], rows):
            part = (min(rows, shape[0] - first), *shape[1:])
            yield _block(part, stride, offset + first * stride[0], itemsize, read, limit)


def _block(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int,
    itemsize: int,
    read: Read,
    limit: int,
) -> bytearray:
    block = bytearray(prod(shape) * itemsize)
    target = memoryview(block).cast(_UNSIGNED[itemsize])
    strides = (stride, contiguous_stride(shape))
    _fill(target, shape, strides, (offset, 0), itemsize, read, limit)
    return block


# No closure of `_block`: one that calls itself would keep each block until garbage is looked for.
def _fill(
    target: memoryview[int],
    shape: tuple[int, ...],
    strides: tuple[tuple[int, ...], tuple[int, ...]],
    starts: tuple[int, int],
    itemsize: int,
    read: Read,
    limit: int,
) -> None:
    """Copy elements to where they belong; strides and starts are the storage's and the block's."""
    (stride, target_stride), (source_start, target_start) = strides, starts
    nbytes = span(shape, stride) * itemsize
    sparse = nbytes > max(_PAGE, 4 * prod(shape) * itemsize)
    if nbytes <= limit and not sparse:
        data = read(source_start * itemsize, nbytes)
        source = memoryview(data).cast(_UNSIGNED[itemsize])
        _copy(source, target[target_start:], shape, stride, target_stride)
        return
    axis = max(range(len(shape)), key=lambda d: (shape[d] - 1) * stride[d])
    half = shape[axis] // 2
    for first, size in ((0, half), (half, shape[axis] - half)):
        part = (*shape[:axis], size, *shape[axis + 1 :])
        moved = (
            source_start + first * stride[axis],
            target_start + first * target_stride[axis],
        )
        _fill(target, part, strides, moved, itemsize, read, limit)


def _copy(
    source: memoryview[int],
    target: memoryview[int],
    shape: tuple[int, ...],
    source_stride: tuple[int, ...],
    target_stride: tuple[int, ...],
) -> None:
    """Copy element by element, one slice assignment for each run along the longest axis."""
    if not shape:
        target[0] = source[0]
        return
    axis = max(range(len(shape)), key=lambda d: shape[d])
    others = [d for d in range(len(shape)) if d != axis]
    count, source_step, target_step = shape[axis], source_stride[axis], target_stride[axis]
    target_end = (count - 1) * target_step + 1
    for index in product(*(range(shape[d]) for d in others)):
        here = sum(i * source_stride[d] for i, d in zip(index, others, strict=True))
        there = sum(i * target_stride[d] for i, d in zip(index, others, strict=True))
        slot = slice(there, there + target_end, target_step)
        if source_step:
            end = here + (count - 1) * source_step + 1
            target[slot] = source[here:end:source_step]
        else:
            repeated = memoryview(array(source.format, [source[here]]) * count)
            target[slot] = repeated


def needs_swap(storage: Storage, width: int) -> bool:
    """Tell whether numbers of `width` bytes in this storage are not little-endian."""
    return width > 1 and storage.byteorder != "little"


_FLIP_SIGN = bytes(byte ^ 0x80 for byte in range(256))
# What torch conjugates and negates (aten/src/ATen/native/cpu/UnaryOpsKernel.cpp, `neg_kernel`).
_COMPLEX = {DType.C128, DType.C64, DType.C32}
_NEGATED_BY_SIGN = {DType.F64, DType.F32, DType.BF16, DType.F16} | _COMPLEX
_NEGATED_BY_COMPLEMENT = {DType.I64, DType.I32, DType.I16, DType.I8, DType.U8}


def is_resolvable(info: TensorInfo) -> bool:
    """Tell whether torch could do the pending operations of a tensor."""
    negated = info.dtype in _NEGATED_BY_SIGN | _NEGATED_BY_COMPLEMENT or "neg" not in info.lazy
    return negated and (info.dtype in _COMPLEX or "conj" not in info.lazy)


def settled(block: bytes | bytearray, info: TensorInfo) -> bytes | bytearray:
    """Give elements as they lie in a storage in little-endian order, pending operations done."""
    width = info.dtype.swap
    if needs_swap(info.storage, width):
        block = swapped(block, width)
    return _resolved(bytearray(block), info) if info.lazy else block


def _resolved(block: bytearray, info: TensorInfo) -> bytearray:
    """Do torch's pending conjugation and negation."""
    width = info.dtype.swap
    if "neg" in info.lazy and info.dtype in _NEGATED_BY_COMPLEMENT:
        for at in range(0, len(block), width):
            value = -int.from_bytes(block[at : at + width], "little") % (1 << 8 * width)
            block[at : at + width] = value.to_bytes(width, "little")
    elif "neg" in info.lazy:
        block[width - 1 :: width] = block[width - 1 :: width].translate(_FLIP_SIGN)
    if "conj" in info.lazy:
        step = 2 * width
        block[step - 1 :: step] = block[step - 1 :: step].translate(_FLIP_SIGN)
    return block
