"""The one way to read elements: blocks of them in row-major order, whatever lies beneath.

Contiguous little-endian elements are the bytes of their storage. Others are gathered with numpy,
their bytes swapped and torch's pending operations done on the way. Computed ones are made from a
block of each of their arguments; as kernels work element by element, any range can be.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod
from operator import mul

from zlib_ng.zlib_ng import crc32

from ckptool.files import checksums
from ckptool.files.checksums import Part
from ckptool.files.fileio import Readers, unpacked
from ckptool.files.gathering import (
    BAND,
    MADE,
    READ,
    Ahead,
    Fetch,
    Portion,
    are_turned,
    boxes,
)
from ckptool.records import NamedTuple
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
)
from ckptool.tensors.values import arguments

LONG = 64 << 10  # pieces of it, on average, are read and written each alone
AT_ONCE = 4 << 20  # of all tensors that elements are made of

Bytes = memoryview  # of bytes, in row-major order of elements


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


def read_portion(portion: Portion, readers: Readers, ahead: Ahead) -> None:
    """Read a portion of what all threads gather together."""
    portion.read(_fetch(portion.info.storage, readers, ahead), ahead.parts)


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


def grain(storage: Storage, room: int = BAND) -> Grain:
    """Return in what portions a storage is best asked for, with room for what is gathered.

    Where rows are columns of what is gathered, a part of a row takes as long as the whole.
    """
    made, args = storage.chunked or storage.computed, arguments(storage)
    if made is None or not args:
        return Grain(MADE, MADE, rows=False)
    size = made.itemsize
    room //= len(args) if storage.computed else 1
    if all(is_contiguous(each.shape, each.stride) for each in args):
        below = [(grain(each.storage, room), each.dtype.itemsize) for each in args]
        rows = [
            Grain(many // before * size, min(few // before * size, MADE), rows)
            for (many, few, rows), before in below
            if rows
        ]
        return min(rows) if rows else max(each for each, _ in below)
    shape = storage.chunked.shape if storage.chunked else args[0].shape
    turned = any(map(are_turned, args))
    widest = max(max(each.dtype.itemsize, _turned_width(each)) for each in args)
    most = (room if turned else 4 * READ) // widest
    few = MADE if turned else READ
    return Grain(_rows(shape, most) * size, min(_rows(shape, few // size) * size, few), turned)


def _turned_width(value: TensorInfo) -> int:
    """Count the bytes that are read ahead of what is turned, for an element made of it."""
    if not is_contiguous(value.shape, value.stride):
        return value.dtype.itemsize if are_turned(value) else 0
    below = [_turned_width(each) for each in arguments(value.storage)]
    return sum(below) if value.storage.computed else max(below, default=0)


def _rows(shape: tuple[int, ...], most: int) -> int:
    """Return as many elements, up to so many, as are whole rows of all dimensions that fit."""
    row = 1
    for length in reversed(shape):
        if row * length > most:
            break
        row *= max(length, 1)
    return max(most // row, 1) * row


def _read(
    value: TensorInfo, first: int, block: memoryview, readers: Readers, ahead: Ahead, among: int
) -> list[Part]:
    """Read elements as they are stored; return what that was of a recorded checksum."""
    read_elements(value, first, block, readers, ahead, among)
    found = checksums.part_of(value, first, len(block) // value.dtype.itemsize)
    return [found.read(crc32(block))] if found else []


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
    first, count = start // size, len(view) // size
    found = [checksums.part_of(value, first, count) for value in args]
    read = [0] * len(args)
    most = min(max(AT_ONCE // sum(value.dtype.itemsize for value in args), 1), count)
    rooms = [ahead.take(most * value.dtype.itemsize) for value in args]
    for at in range(0, count, most):
        few, made = min(most, count - at), []
        for number, value in enumerate(args):
            block = rooms[number][: few * value.dtype.itemsize]
            read_elements(value, first + at, block, readers, ahead, len(args))
            if found[number]:
                read[number] = crc32(block, read[number])
            _settle(value, block)
            made.append(block)
        computed.kernel(view[at * size : (at + few) * size], *made)
    for room in rooms:
        ahead.give(room)
    pairs = zip(found, read, strict=True)
    return [part.read(checksum) for part, checksum in pairs if part]


def _place(
    chunked: Chunked, piece: Piece, data: memoryview, first: int, target: memoryview
) -> None:
    """Put the elements of a piece where they belong in the whole; `target` begins at `first`."""
    size = chunked.itemsize
    steps = contiguous_stride(chunked.shape)
    start = sum(map(mul, piece.chunk.offsets, steps)) - first
    shape, stride = coalesced(piece.chunk.source.shape, steps)
    for box in boxes(shape, stride, start, piece.first, piece.count):
        count = prod(box[0])
        if is_contiguous(*box[:2]):
            target[box[2] * size : (box[2] + count) * size] = data[: count * size]
        else:
            source = numbers.array(data, (box[0], contiguous_stride(box[0]), 0), size)
            numbers.array(target, box, size)[...] = source
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
