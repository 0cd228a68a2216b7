"""The one way to read elements: blocks of them in row-major order, whatever lies beneath.

Contiguous little-endian elements are the bytes of their storage. Others are gathered with numpy,
their bytes swapped and torch's pending operations done on the way. Computed ones are made from a
block of each of their arguments; as kernels work element by element, any range can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from math import prod
from operator import mul
from typing import Any

from zlib_ng.zlib_ng import crc32

from ckptool.files.fileio import Readers, unpacked
from ckptool.tensors import numbers
from ckptool.tensors.chunks import Piece, pieces
from ckptool.tensors.tensor import (
    Chunked,
    Computed,
    Packing,
    Storage,
    TensorInfo,
    coalesced,
    contiguous_stride,
    is_contiguous,
    needs_swap,
    span,
)

PAGE = 4096

Bytes = memoryview  # of bytes, in row-major order of elements
Fetch = Callable[[memoryview, int], object]  # fill a view from this byte of an unpacked storage
Box = tuple[tuple[int, ...], tuple[int, ...], int]  # shape, stride, offset; in elements


def blocks(value: TensorInfo, readers: Readers, limit: int = 1 << 20) -> Iterator[memoryview]:
    """Iterate over the elements in row-major order, little-endian, pending operations done.

    Each block but the last has as many whole elements as fit into `limit` bytes, one at least; it
    is valid until the next is asked for. What is read to gather one is no larger.
    """
    if not value.nbytes:
        return
    itemsize = value.dtype.itemsize
    size = max(limit // itemsize, 1) * itemsize
    buffer = memoryview(bytearray(min(size, value.nbytes)))
    for block in _stored(value, readers, buffer, size):
        _settle(value, block)
        yield block


def _settle(value: TensorInfo, block: memoryview, *, big: bool = False) -> None:
    """Do what is pending on stored elements, and make them little-endian, or `big`."""
    swapped = needs_swap(value.storage, value.dtype.swap)
    if value.lazy:
        if swapped:
            numbers.swap(block, value.dtype.swap)
        numbers.resolve(block, value.dtype, value.lazy)
        swapped = False
    if swapped != (big and value.dtype.swap > 1):
        numbers.swap(block, value.dtype.swap)


def equal(one: memoryview, other: memoryview) -> bool:
    """Check whether two blocks of one length, as `blocks` yields them, hold the same bytes.

    `==` of two views unpacks every byte; what a bytearray starts with is compared as memory.
    """
    buffer = one.obj  # the block is at its start
    return isinstance(buffer, bytearray) and buffer.startswith(other)


def _stored(
    value: TensorInfo, readers: Readers, buffer: memoryview, limit: int
) -> Iterator[memoryview]:
    """Fill `buffer` with one block of elements after the other, as they are stored."""
    storage = value.storage
    whole = is_contiguous(value.shape, value.stride) and value.nbytes == storage.nbytes
    if whole and storage.packing is Packing.DEFLATED:
        yield from _regrouped(unpacked(storage, readers[storage.path]), buffer)
        return
    fetch = _fetch(storage, readers)
    for start in range(0, value.nbytes, len(buffer)):
        block = buffer[: value.nbytes - start]
        read_elements(value, start // value.dtype.itemsize, block, fetch, limit)
        yield block


def _regrouped(parts: Iterable[bytes], buffer: memoryview) -> Iterator[memoryview]:
    """Cut a stream of bytes into blocks of the size of `buffer`."""
    used = 0
    for part in parts:
        rest = memoryview(part)
        while rest:
            count = min(len(rest), len(buffer) - used)
            buffer[used : used + count] = rest[:count]
            rest, used = rest[count:], used + count
            if used == len(buffer):
                yield buffer
                used = 0
    if used:
        yield buffer[:used]


def _fetch(storage: Storage, readers: Readers) -> Fetch:
    """Return what fills a view from a byte of a storage, which is unpacked first if it must be."""
    if storage.packing is Packing.DEFLATED:
        return readers.unpacked(storage).read_into
    return partial(_fill, storage, readers)


def _fill(storage: Storage, readers: Readers, view: memoryview, start: int) -> None:
    fill(view, storage, start, readers)


Part = tuple[int, int, int, int]  # of a chunk: its index, the first byte, how many, their CRC-32


def fill(view: memoryview, storage: Storage, start: int, readers: Readers) -> list[Part]:
    """Fill `view` from `start` in a storage that is not deflated; a chunked one is assembled.

    `start` and the length are whole elements of a chunked or computed storage. Returns the parts
    of the chunks that were read, whose checksums together are those of the chunks.
    """
    if storage.computed is not None:
        _compute(view, storage.computed, start, readers)
        return []
    chunked = storage.chunked
    if chunked is None:
        readers[storage.path].read_into(view, storage.start + start)
        return []
    first, count = start // chunked.itemsize, len(view) // chunked.itemsize
    parts = []
    for piece in pieces(chunked, first, count):
        source = piece.chunk.source
        data = memoryview(bytearray(piece.count * chunked.itemsize))
        read_elements(source, piece.first, data, _fetch(source.storage, readers))
        begin = (source.storage_offset + piece.first) * chunked.itemsize
        parts.append((piece.index, begin, len(data), crc32(data)))
        _settle(source, data, big=storage.byteorder != "little")
        _place(chunked, piece, data, first, view)
    return parts


def _compute(view: memoryview, computed: Computed, start: int, readers: Readers) -> None:
    """Fill `view` with the elements of a computed storage from the byte `start` on."""
    first, count = start // computed.itemsize, len(view) // computed.itemsize
    args = []
    for value in computed.args:
        block = memoryview(bytearray(count * value.dtype.itemsize))
        read_elements(value, first, block, _fetch(value.storage, readers))
        _settle(value, block)
        args.append(block)
    view[:] = computed.kernel(*args or (start, start + len(view)))


def _place(
    chunked: Chunked, piece: Piece, data: memoryview, first: int, target: memoryview
) -> None:
    """Put the elements of a piece where they belong in the whole; `target` begins at `first`."""
    size = chunked.itemsize
    steps = contiguous_stride(chunked.shape)
    start = sum(map(mul, piece.chunk.offsets, steps)) - first
    shape, stride = coalesced(piece.chunk.source.shape, steps)
    for box in _boxes(shape, stride, start, piece.first, piece.count):
        count = prod(box[0])
        if is_contiguous(*box[:2]):
            target[box[2] * size : (box[2] + count) * size] = data[: count * size]
        else:
            source = _array(data, (box[0], contiguous_stride(box[0]), 0), size)
            _array(target, box, size)[...] = source
        data = data[count * size :]


def read_elements(
    info: TensorInfo, first: int, target: memoryview, fetch: Fetch, limit: int = 1 << 20
) -> None:
    """Fill `target` with stored elements in row-major order, from the element `first` on."""
    size = info.dtype.itemsize
    if is_contiguous(info.shape, info.stride):
        fetch(target, info.start + first * size)
        return
    shape, stride = coalesced(info.shape, info.stride)
    for box in _boxes(shape, stride, info.storage_offset, first, len(target) // size):
        elements = _array(target, (box[0], contiguous_stride(box[0]), 0), size)
        _gather(elements, box[1], box[2], fetch, limit)
        target = target[elements.nbytes :]


def _array(memory: memoryview | bytearray, box: Box, itemsize: int) -> Any:
    """Return the elements of a box in memory as an array of any dtype of that size."""
    import numpy as np

    dtype = np.dtype(f"u{itemsize}" if itemsize <= 8 else f"c{itemsize}")
    shape, stride, offset = box
    steps = [step * itemsize for step in stride]
    return np.ndarray(shape, dtype, memory, offset * itemsize, steps)


def _boxes(
    shape: tuple[int, ...], stride: tuple[int, ...], offset: int, first: int, count: int
) -> Iterator[Box]:
    """Cut a range of elements into whole rows and the parts of rows around them."""
    if not shape:
        yield shape, stride, offset
        return
    row = prod(shape[1:])
    while count:
        index, within = divmod(first, row)
        start = offset + index * stride[0]
        rows = count // row
        if within or not rows:
            taken = min(row - within, count)
            yield from _boxes(shape[1:], stride[1:], start, within, taken)
        else:
            taken = rows * row
            yield (rows, *shape[1:]), stride, start
        first, count = first + taken, count - taken


def _gather(target: Any, stride: tuple[int, ...], offset: int, fetch: Fetch, limit: int) -> None:
    """Fill an array with elements that lie `stride` apart, reading no more than `limit` at once.

    Where little of what is between first and last is wanted, each half is read for itself.
    """
    shape, itemsize = target.shape, target.itemsize
    nbytes = span(shape, stride) * itemsize
    if nbytes <= limit and nbytes <= max(PAGE, 4 * target.nbytes):
        data = bytearray(nbytes)
        fetch(memoryview(data), offset * itemsize)
        target[...] = _array(data, (shape, stride, 0), itemsize)
        return
    axis = max(range(len(shape)), key=lambda at: (shape[at] - 1) * stride[at])
    half = shape[axis] // 2
    every = (slice(None),) * axis
    _gather(target[*every, :half], stride, offset, fetch, limit)
    _gather(target[*every, half:], stride, offset + half * stride[axis], fetch, limit)
