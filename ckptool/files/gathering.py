"""Views whose elements lie apart: read in the order of their storage, and turned in memory.

A block of a transposed tensor has a few elements of every row. Those of as many blocks as there is
room for are read at once, so that each row is read as seldom as that allows.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from contextlib import suppress
from math import prod
from typing import Any

from zlib_ng.zlib_ng import crc32

from ckptool.files import checksums
from ckptool.files.checksums import Part
from ckptool.records import NamedTuple
from ckptool.tensors import numbers
from ckptool.tensors.chunks import pieces
from ckptool.tensors.numbers import LINE, Box
from ckptool.tensors.tensor import (
    Storage,
    TensorInfo,
    coalesced,
    contiguous_stride,
    is_contiguous,
    span,
)
from ckptool.tensors.values import arguments

BAND = 32 << 20  # of what lies apart, for all threads: what is read with it is read again
AHEAD = BAND // 8  # for a thread of its own
READ = 1 << 20  # at once, to gather from
MADE = 2 * READ  # at once, of what is read from several places or computed
LEAST = READ // 8  # of what a thread does not gather alone
NEAR = 32 << 10  # reading on to what is no farther takes less time than another call
PAGE = 2 << 20  # a large one
STRIP = 512  # rows that are turned at once: so many lines are in the first cache

Fetch = Callable[[memoryview, int], object]  # fill a view from this byte of an unpacked storage


def boxes(
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
            yield from boxes(shape[1:], stride[1:], start, within, taken)
        else:
            taken = rows * row
            yield (rows, *shape[1:]), stride, start
        first, count = first + taken, count - taken


def are_turned(value: TensorInfo) -> bool:
    """Check whether the elements of a row lie apart."""
    _, stride = coalesced(value.shape, value.stride)
    return bool(stride) and stride[-1] != 1


def large_pages(nbytes: int) -> memoryview:
    """Allocate so many bytes or more; those of a large page or more in such, where there are any.

    To clear a small page, when it is first written to, takes longer than to fill it; to clear a
    large one takes longer than to allocate what is less.
    """
    if nbytes < PAGE:
        return numbers.allocated(nbytes)
    nbytes = -(-nbytes // PAGE) * PAGE
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(mmap.mmap(-1, nbytes))
    # Large pages of memory that is shared, as mmap has it, are off by default.
    memory = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


class Ahead:
    """What a thread has read of views for the blocks that it is asked for next.

    There is room for so many bytes. What was read for all threads is in the `band`; `parts` are
    those of recorded storages that were read in order.
    """

    def __init__(
        self, nbytes: int = AHEAD, parts: list[Part] | None = None, band: Band | None = None
    ) -> None:
        self.parts = [] if parts is None else parts
        self._room, self._band = nbytes, band
        self._held: dict[int, _Gathered] = {}
        self._spare: list[memoryview] = []

    def take(self, nbytes: int) -> memoryview:
        """Return memory of so many bytes or more, until it is given back."""
        memory = self._spare.pop() if self._spare else memoryview(b"")
        return memory if len(memory) >= nbytes else large_pages(nbytes)

    def give(self, memory: memoryview) -> None:
        """Take memory back."""
        self._spare.append(memory)

    def read(
        self, info: TensorInfo, first: int, target: memoryview, fetch: Fetch, among: int
    ) -> None:
        """Fill `target` with the elements from `first` on, of one view among so many."""
        size = info.dtype.itemsize
        while target:
            held = self._holding(info, first) or self._gathered(info, first, fetch, among)
            count = min(len(target) // size, held.end - first)
            for box in boxes(*held.box, first - held.first, count):
                elements = numbers.array(target, (box[0], contiguous_stride(box[0]), 0), size)
                _turn(elements, numbers.array(held.memory, box, size))
                target = target[elements.nbytes :]
            first += count
            del held

    def _holding(self, info: TensorInfo, first: int) -> _Gathered | None:
        held = self._held.get(id(info))
        if held and held.has(info, first):
            return held
        return self._band.holding(info, first) if self._band else None

    def _gathered(self, info: TensorInfo, first: int, fetch: Fetch, among: int) -> _Gathered:
        """Read what fits into the room of one among so many."""
        memory = memoryview(b"")
        while id(info) in self._held or len(self._held) >= among:
            name = id(info) if id(info) in self._held else next(iter(self._held))
            memory = self._held.pop(name).memory
        room = self._room if are_turned(info) else min(self._room, 2 * READ)
        most = max(room // among // info.dtype.itemsize, 1)
        box = next(_boxes_of(info, first, min(most, info.numel - first)))
        layout = _laid_out(box, info.dtype.itemsize)
        if layout.nbytes > len(memory):
            memory = large_pages(layout.nbytes)
        portion, held = _placed(info, first, box, layout, memory)
        portion.load(_Source(info, fetch, min(self._room // 2, READ), self.parts))
        self._held[id(info)] = held
        return held


class Band:
    """What all threads read together for a range of a storage, before they turn it together."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")
        self._held: dict[int, list[_Gathered]] = {}

    def begin(self, storage: Storage, start: int, nbytes: int) -> list[Portion]:
        """Forget what was read before; return what to read for bytes of a storage.

        Nobody may read from the band before all of that is done.
        """
        self._held.clear()
        found = list[tuple[TensorInfo, int, Box, _Layout]]()
        for info, first, count in _turned(storage, start, nbytes):
            for box in _boxes_of(info, first, count):
                found.append((info, first, box, _laid_out(box, info.dtype.itemsize)))
                first += prod(box[0])
        needed = sum(layout.nbytes for *_, layout in found)
        if needed > len(self._memory):
            # Once for nearly all: rows grow by an eighth at most, and what is unused costs nothing.
            self._memory = numbers.allocated(max(needed, BAND + BAND // 8))
        portions, memory = list[Portion](), self._memory
        for info, first, box, layout in found:
            whole, held = _placed(info, first, box, layout, memory[: layout.nbytes])
            self._held.setdefault(id(info), []).append(held)
            portions += whole.portions()
            memory = memory[layout.nbytes :]
        return portions

    def holding(self, info: TensorInfo, first: int) -> _Gathered | None:
        """Return what holds an element of a view."""
        held = self._held.get(id(info), ())
        return next((each for each in held if each.has(info, first)), None)


def _turned(storage: Storage, start: int, nbytes: int) -> Iterator[tuple[TensorInfo, int, int]]:
    """Yield what bytes of a storage need of views whose rows are gathered: elements in a row."""
    made = storage.chunked or storage.computed
    if made is None:
        return
    first, end = start // made.itemsize, -(-(start + nbytes) // made.itemsize)
    if storage.chunked:
        found = pieces(storage.chunked, first, end - first)
        needed = [(piece.chunk.source, piece.first, piece.count) for piece in found]
    else:
        needed = [(value, first, end - first) for value in arguments(storage)]
    for value, at, count in needed:
        size = value.dtype.itemsize
        if is_contiguous(value.shape, value.stride):
            yield from _turned(value.storage, value.start + at * size, count * size)
        elif are_turned(value) and count * size >= LEAST:
            yield value, at, count


def _boxes_of(info: TensorInfo, first: int, count: int) -> Iterator[Box]:
    shape, stride = coalesced(info.shape, info.stride)
    return boxes(shape, stride, info.storage_offset, first, count)


class _Gathered(NamedTuple):
    """Elements of a view, from `first` to `end`, and how they lie in memory."""

    info: TensorInfo
    first: int
    end: int
    box: Box
    memory: memoryview

    def has(self, info: TensorInfo, first: int) -> bool:
        return self.info is info and self.first <= first < self.end


class _Layout(NamedTuple):
    """How a box is laid out in memory, in the order of its storage.

    `rows` have the size of each dimension, its stride in the storage, and that in memory; each of
    them is a row of rows, or of runs.
    """

    stride: tuple[int, ...]
    rows: list[tuple[int, int, int]]
    run: int
    nbytes: int


def _laid_out(box: Box, size: int) -> _Layout:
    """Lay out a box.

    Rows that will be columns lie apart a little: those a power of two away from each other, as most
    are, have one place in the cache.
    """
    shape, stride, _ = box
    order = sorted((at for at in range(len(shape)) if stride[at]), key=lambda at: -stride[at])
    outer, run, last = [*order], 1, len(shape) - 1
    while outer and stride[outer[-1]] == run and (run == 1 or outer[-1] != last):
        run *= shape[outer.pop()]
    there, step = [0] * len(shape), 1
    for at in reversed(order):
        if outer and at == outer[-1] and run * size >= 8 * LINE:
            step += LINE // size
        there[at], step = step, step * shape[at]
    rows = [(shape[at], stride[at], there[at]) for at in outer]
    return _Layout((*there,), rows, run, -(-step * size // LINE) * LINE)


def _placed(
    info: TensorInfo, first: int, box: Box, layout: _Layout, memory: memoryview
) -> tuple[Portion, _Gathered]:
    """Return what to read for a box into memory, and what is there then."""
    shape, _, offset = box
    held = _Gathered(info, first, first + prod(shape), (shape, layout.stride, 0), memory)
    return Portion(info, memory, 0, layout.rows, layout.run, offset), held


class _Source(NamedTuple):
    """What elements are gathered from, how many bytes at once; `parts` are those read in order."""

    info: TensorInfo
    fetch: Fetch
    limit: int
    parts: list[Part]

    def read(self, view: memoryview, first: int, *, all_of: bool) -> None:
        """Fill a view from an element on; with `all_of`, what is before it is read as well."""
        start = first * self.info.dtype.itemsize
        self.fetch(view, start)
        found = checksums.part(self.info.storage, start, len(view)) if all_of else None
        if found is not None:
            self.parts.append(found.read(crc32(view)))


class Portion(NamedTuple):
    """Runs of a view's elements to read, which lie apart in a storage and in memory."""

    info: TensorInfo
    memory: memoryview
    place: int
    rows: list[tuple[int, int, int]]
    run: int
    offset: int

    def portions(self) -> Iterator[Portion]:
        """Cut it into what one thread reads at once."""
        if not self.rows:
            return iter((self,))
        return self._cut(max(READ // (self.rows[0][1] * self.info.dtype.itemsize), 1))

    def _cut(self, count: int) -> Iterator[Portion]:
        (length, stride, there), *inner = self.rows
        for at in range(0, length, count):
            few = min(count, length - at)
            rows = [(few, stride, there), *inner] if few > 1 else inner
            place, offset = self.place + at * there, self.offset + at * stride
            yield self._replace(place=place, rows=rows, offset=offset)

    def read(self, fetch: Fetch, parts: list[Part]) -> None:
        """Read it as a portion of a band."""
        self.load(_Source(self.info, fetch, READ, parts))

    def load(self, source: _Source) -> None:
        """Read it; where little of what is between first and last is wanted, each run alone."""
        size, run = self.info.dtype.itemsize, self.run
        if not self.rows:
            target = self.memory[self.place * size : (self.place + run) * size]
            source.read(target, self.offset, all_of=True)
            return
        shape, stride, there = zip(*self.rows, strict=True)
        wanted = prod(shape) * run * size
        nbytes = (span(shape, stride) + run - 1) * size
        near = nbytes <= max(4 * wanted, NEAR * prod(shape))
        if not near or nbytes > source.limit:
            for part in self._cut(max(shape[0] // 2, 1) if near else 1):
                part.load(source)
            return
        whole = self._whole_rows()
        data = numbers.allocated(whole if nbytes <= whole <= source.limit else nbytes)
        source.read(data, self.offset, all_of=len(data) == whole or nbytes == wanted)
        target = numbers.array(self.memory, ((*shape, run), (*there, 1), self.place), size)
        target[...] = numbers.array(data, ((*shape, run), (*stride, 1), 0), size)

    def _whole_rows(self) -> int:
        """Return how many bytes it is with what is between each row and the next, or 0.

        It is not 0 where rows begin here that have a recorded checksum: they are read once for all
        of it.
        """
        (count, stride, _), storage = self.rows[0], self.info.storage
        begun = (self.offset - self.info.storage_offset) % stride == 0
        if not begun or checksums.part(storage, 0, 0) is None:
            return 0
        size = self.info.dtype.itemsize
        return min(count * stride * size, storage.nbytes - self.offset * size)


def _turn(target: Any, source: Any) -> None:
    """Copy an array into another of the same shape, a strip of rows after the other."""
    if source.ndim < 2 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], STRIP):
        target[..., start : start + STRIP] = source[..., start : start + STRIP]
