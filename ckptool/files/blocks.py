"""The one way to read elements: blocks of them in row-major order, whatever lies beneath.

Contiguous little-endian elements are the bytes of their storage. Others are gathered with numpy,
their bytes swapped and torch's pending operations done on the way. Computed ones are made from a
block of each of their arguments; as kernels work element by element, any range can be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from math import prod
from operator import mul
from typing import Any, NamedTuple

from zlib_ng.zlib_ng import crc32

from ckptool.files import checksums
from ckptool.files.checksums import Part
from ckptool.files.fileio import CHUNK, Readers, unpacked
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
from ckptool.tensors.values import arguments

AHEAD = 16 << 20  # of what lies apart: what is read with it is read again for the next
READ = 1 << 20  # at once, to gather from
LONG = 64 << 10  # pieces of it, on average, are read and written each alone
NEAR = 32 << 10  # reading on to what is no farther takes less time than another call
AT_ONCE = 4 << 20  # of all tensors that elements are made of
LINE = 64  # bytes of a line of the cache
STRIP = 512  # rows that are turned at once: so many lines are in the first cache

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
    ahead = Ahead(limit)
    for start in range(0, value.nbytes, len(buffer)):
        block = buffer[: value.nbytes - start]
        read_elements(value, start // value.dtype.itemsize, block, readers, ahead)
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


def _fetch(storage: Storage, readers: Readers, ahead: Ahead) -> Fetch:
    """Return what fills a view from a byte of a storage, which is unpacked first if it must be."""
    if storage.packing is Packing.DEFLATED:
        return readers.unpacked(storage).read_into
    return lambda view, start: fill(view, storage, start, readers, ahead)


def fill(
    view: memoryview, storage: Storage, start: int, readers: Readers, ahead: Ahead | None = None
) -> list[Part]:
    """Fill `view` from `start` in a storage that is not deflated; a chunked one is assembled.

    `start` and the length are whole elements of a chunked or computed storage. Returns what was
    read of the tensors that those are made of.
    """
    ahead = ahead or Ahead(len(view))
    if storage.computed is not None:
        return _compute(view, storage.computed, start, readers, ahead)
    chunked = storage.chunked
    if chunked is None:
        readers[storage.path].read_into(view, storage.start + start)
        return []
    size, parts = chunked.itemsize, []
    first, count = start // size, len(view) // size
    for piece in pieces(chunked, first, count):
        source = piece.chunk.source
        at = _place_in_order(chunked, piece, first)
        if at is None:
            data = memoryview(bytearray(piece.count * size))
        else:
            data = view[at * size : (at + piece.count) * size]
        among = 1 if at is not None else len(chunked.chunks)
        parts += _read(source, piece.first, data, readers, ahead, among)
        _settle(source, data, big=storage.byteorder != "little")
        if at is None:
            _place(chunked, piece, data, first, view)
    return parts


def _place_in_order(chunked: Chunked, piece: Piece, first: int) -> int | None:
    """Return where the elements of a piece go that follow each other in the whole, else None."""
    steps = contiguous_stride(chunked.shape)
    if not is_contiguous(piece.chunk.source.shape, steps):
        return None
    begin: int = sum(map(mul, piece.chunk.offsets, steps))
    return begin + piece.first - first


def runs(storage: Storage, start: int, nbytes: int) -> Iterator[tuple[Storage, int, int]]:
    """Cut bytes of a storage into those of the storages that they lie in just so; one run each.

    That is only worth it where the pieces are long.
    """
    chunked = storage.chunked
    if chunked is None or nbytes < LONG * len(chunked.chunks):
        yield storage, start, nbytes
        return
    size, end = chunked.itemsize, start + nbytes
    first = start // size
    found = [*pieces(chunked, first, -(-end // size) - first)]
    places = [_place_in_order(chunked, piece, first) for piece in found]
    if None in places or not all(_is_plain(piece.chunk.source, storage) for piece in found):
        yield storage, start, nbytes
        return
    for place, piece in sorted(zip(places, found, strict=True), key=lambda each: each[0] or 0):
        source, at = piece.chunk.source, (first + (place or 0)) * size
        before, count = max(start - at, 0), min(end - at, piece.count * size)
        yield from runs(source.storage, source.start + piece.first * size + before, count - before)


def _is_plain(value: TensorInfo, whole: Storage) -> bool:
    """Return whether a piece has its elements as the whole has them."""
    swapped = value.dtype.swap > 1 and value.storage.byteorder != whole.byteorder
    in_order = is_contiguous(value.shape, value.stride) and not value.lazy and not swapped
    return in_order and value.storage.packing is not Packing.DEFLATED


class Grain(NamedTuple):
    """How many bytes are best asked for in a row, and how many at once; as whole `rows` or not."""

    in_a_row: int
    at_once: int
    rows: bool


def grain(storage: Storage) -> Grain:
    """Return in what portions a storage is best asked for.

    Where rows are columns of what is gathered, a part of a row takes as long as the whole.
    """
    args = arguments(storage)
    if all(is_contiguous(each.shape, each.stride) for each in args):
        below = [grain(each.storage) for each in args]
        return max(below, default=Grain(CHUNK, CHUNK, rows=False))
    shape, size = args[0].shape, args[0].dtype.itemsize
    if storage.chunked:
        shape = storage.chunked.shape
    turned = any(each.stride[-1] != 1 for each in args if each.shape)
    in_a_row = _rows(shape, size, AHEAD if turned else 4 * READ)
    return Grain(in_a_row, min(_rows(shape, size, READ), READ), turned)


def _rows(shape: tuple[int, ...], size: int, most: int) -> int:
    """Return as many bytes as fit into `most`, in whole rows of as many dimensions as fit."""
    for length in reversed(shape):
        if size * length > most:
            break
        size *= max(length, 1)
    return max(most // size, 1) * size


def _read(
    value: TensorInfo, first: int, block: memoryview, readers: Readers, ahead: Ahead, among: int
) -> list[Part]:
    """Read elements as they are stored; return what that was of a recorded checksum."""
    read_elements(value, first, block, readers, ahead, among)
    found = checksums.part_of(value, first, len(block) // value.dtype.itemsize)
    return [found._replace(crc32=crc32(block))] if found else []


def _compute(
    view: memoryview, computed: Computed, start: int, readers: Readers, ahead: Ahead
) -> list[Part]:
    """Fill `view` with the elements of a computed storage from the byte `start` on.

    Of many tensors, a few elements are read at once.
    """
    args, size = computed.args, computed.itemsize
    if not args:
        computed.kernel(view, start)
        return []
    import numpy as np

    first, count = start // size, len(view) // size
    found = [checksums.part_of(value, first, count) for value in args]
    read = [0] * len(args)
    most = max(AT_ONCE // sum(value.dtype.itemsize for value in args), 1)
    for at in range(0, count, most):
        few, made = min(most, count - at), []
        for number, value in enumerate(args):
            block = np.empty(few * value.dtype.itemsize, "u1").data
            read_elements(value, first + at, block, readers, ahead, len(args))
            if found[number]:
                read[number] = crc32(block, read[number])
            _settle(value, block)
            made.append(block)
        computed.kernel(view[at * size : (at + few) * size], *made)
    pairs = zip(found, read, strict=True)
    return [part._replace(crc32=checksum) for part, checksum in pairs if part]


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
    info: TensorInfo,
    first: int,
    target: memoryview,
    readers: Readers,
    ahead: Ahead,
    among: int = 1,
) -> None:
    """Fill `target` with stored elements in row-major order, from the element `first` on.

    They are one of so many that are read at the same time.
    """
    fetch = _fetch(info.storage, readers, ahead)
    if is_contiguous(info.shape, info.stride):
        fetch(target, info.start + first * info.dtype.itemsize)
    else:
        ahead.read(info, first, target, fetch, among)


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


class Ahead:
    """What was read of views whose elements lie apart, for the blocks that are asked for next.

    A block of a transposed tensor has a few elements of every row: with those of more columns,
    each row is read less often. There is room for so many bytes, of a worker of its own.
    """

    def __init__(self, nbytes: int = AHEAD) -> None:
        self.parts: list[Part] = []  # what was read in order
        self._room = nbytes
        self._held: dict[int, _Gathered] = {}

    def read(
        self, info: TensorInfo, first: int, target: memoryview, fetch: Fetch, among: int
    ) -> None:
        """Fill `target` with the elements from `first` on."""
        size = info.dtype.itemsize
        while target:
            held = self._holding(info, first) or self._gathered(info, first, fetch, among)
            count = min(len(target) // size, held.end - first)
            for box in _boxes(*held.box, first - held.first, count):
                elements = _array(target, (box[0], contiguous_stride(box[0]), 0), size)
                _turn(elements, _array(held.memory, box, size))
                target = target[elements.nbytes :]
            first += count
            del held

    def _holding(self, info: TensorInfo, first: int) -> _Gathered | None:
        held = self._held.get(id(info))
        return held if held and held.info is info and held.first <= first < held.end else None

    def _gathered(self, info: TensorInfo, first: int, fetch: Fetch, among: int) -> _Gathered:
        """Read what fits into the room of one among so many."""
        memory = memoryview(b"")
        while id(info) in self._held or len(self._held) >= among:
            name = id(info) if id(info) in self._held else next(iter(self._held))
            memory = self._held.pop(name).memory
        shape, stride = coalesced(info.shape, info.stride)
        room = self._room if stride[-1] != 1 else min(self._room, 2 * READ)
        most = max(room // among // info.dtype.itemsize, 1)
        box = next(_boxes(shape, stride, info.storage_offset, first, min(most, info.numel - first)))
        source = _Source(info.storage, fetch, min(self._room // 2, READ), self.parts)
        memory, there = _gather(box, info.dtype.itemsize, memory, source)
        held = _Gathered(info, first, first + prod(box[0]), (box[0], there, 0), memory)
        self._held[id(info)] = held
        return held


class _Gathered(NamedTuple):
    """Elements of a view, from `first` to `end`, and how they lie in memory."""

    info: TensorInfo
    first: int
    end: int
    box: Box
    memory: memoryview


class _Source(NamedTuple):
    """What elements are gathered from, how many bytes at once; `parts` are those read in order."""

    storage: Storage
    fetch: Fetch
    limit: int
    parts: list[Part]

    def read(self, view: memoryview, start: int, *, dense: bool) -> None:
        """Fill a view from a byte on; `dense` tells that all of it is wanted."""
        self.fetch(view, start)
        found = checksums.part(self.storage, start, len(view)) if dense else None
        if found is not None:
            self.parts.append(found._replace(crc32=crc32(view)))


def _gather(
    box: Box, size: int, memory: memoryview, source: _Source
) -> tuple[memoryview, tuple[int, ...]]:
    """Read a box; return its elements, and their strides there.

    They are in the order of the storage, in the memory given where it is large enough. Rows that
    will be columns lie apart a little: those a power of two away from each other, as most are, have
    one place in the cache.
    """
    import numpy as np

    shape, stride, offset = box
    order = sorted((at for at in range(len(shape)) if stride[at]), key=lambda at: -stride[at])
    outer, run = [*order], 1
    while outer and stride[outer[-1]] == run:
        run *= shape[outer.pop()]
    there, step = [0] * len(shape), 1
    for at in reversed(order):
        if outer and at == outer[-1] and run * size >= 8 * LINE:
            step += LINE // size
        there[at], step = step, step * shape[at]
    if step * size > len(memory):
        memory = np.empty(step * size, "u1").data  # in large pages
    rows = [(shape[at], stride[at], there[at]) for at in outer]
    _load(memory, 0, rows, run, offset, size, source)
    return memory, tuple(there)


def _load(
    memory: memoryview,
    place: int,
    rows: list[tuple[int, int, int]],
    run: int,
    offset: int,
    size: int,
    source: _Source,
) -> None:
    """Read runs of elements, which are apart in a storage and in memory, in rows of rows.

    Where little of what is between first and last is wanted, each run is read alone.
    """
    import numpy as np

    if not rows:
        source.read(memory[place * size : (place + run) * size], offset * size, dense=True)
        return
    shape, stride, there = zip(*rows, strict=True)
    nbytes = (span(shape, stride) + run - 1) * size
    count = prod(shape)
    near = nbytes <= max(4 * count * run * size, NEAR * count)
    if near and nbytes <= source.limit:
        data = np.empty(nbytes, "u1").data
        source.read(data, offset * size, dense=nbytes == count * run * size)
        _array(memory, ((*shape, run), (*there, 1), place), size)[...] = _array(
            data, ((*shape, run), (*stride, 1), 0), size
        )
        return
    head, *rest = rows
    half = max(head[0] // 2, 1) if near else 1
    parts = ((at, min(half, head[0] - at)) for at in range(0, head[0], half))
    for at, length in parts:
        inner = [(length, *head[1:]), *rest] if length > 1 else rest
        _load(memory, place + at * head[2], inner, run, offset + at * head[1], size, source)


def _turn(target: Any, source: Any) -> None:
    """Copy an array into another of the same shape, a strip of rows after the other."""
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]
