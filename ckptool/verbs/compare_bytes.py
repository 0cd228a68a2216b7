"""Two tensors as streams of bytes, compared a block at a time; only what differs is decoded.

Tensors that lie in the same way are read as they lie, gaps of a strided view included; where such
runs differ, or the tensors lie in different ways, their elements are gathered in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptool.errors import LimitExceeded, Unsupported
from ckptool.files.fileio import CHUNK, Readers, fill, seekable, unpacked
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import (
    Packing,
    Read,
    Storage,
    TensorInfo,
    gather,
    is_contiguous,
    needs_swap,
    settled,
    span,
)
from ckptool.verbs import compare_numpy
from ckptool.verbs.compare_values import Tolerance, Values, count_values, numbers

GATHER_BLOCK = 4 << 20
SLICE = 1024  # bytes that are decoded if they differ; whole elements of any dtype
TOGETHER = 128  # such slices at a time: as Python objects, numbers take ten times the room
NUMPY_FROM = 4 << 20  # bytes to decode that take longer without numpy than to import it

if TYPE_CHECKING:
    Block = bytes | bytearray | memoryview[int]


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive bytes of a storage."""

    storage: Storage
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Pair:
    """Two tensors of one dtype and shape, and how they are compared.

    What both repeat along a dimension stands in them once; `times` counts the repetitions. `runs`
    are the bytes that both lie in, None where they lie in different ways; `dense` tells whether
    nothing else lies there.
    """

    left: TensorInfo
    right: TensorInfo
    times: int
    runs: tuple[Run, Run] | None
    dense: bool

    @property
    def views(self) -> tuple[object, ...]:
        """Identify what is compared: pairs of equal views come to the same."""
        return (self.left.view, self.right.view, self.times)

    @property
    def nbytes(self) -> int:
        """Count the bytes of one side that are read first."""
        return self.runs[0].nbytes if self.runs else self.left.nbytes


def pair(left: TensorInfo, right: TensorInfo) -> Pair:
    """Look how two tensors of one dtype and shape lie.

    Raises `Unsupported` for elements that share bytes and lie in two ways.
    """
    repeated = [not (one or other) for one, other in zip(left.stride, right.stride, strict=True)]
    shape = tuple(
        1 if again and size else size for size, again in zip(left.shape, repeated, strict=True)
    )
    times = max(1, left.numel) // max(1, replace(left, shape=shape).numel)
    left, right = replace(left, shape=shape), replace(right, shape=shape)
    dense = all(is_contiguous(each.shape, each.stride) for each in (left, right))
    runs = _runs(left, right, dense=dense)
    if runs is None and left.dtype.bits < 8:
        raise Unsupported(f"{left.dtype.label} that lies in two ways cannot be compared")
    return Pair(left, right, times, runs, dense or left.dtype.bits < 8)


def _runs(left: TensorInfo, right: TensorInfo, *, dense: bool) -> tuple[Run, Run] | None:
    if left.lazy != right.lazy or _is_swapped(left) != _is_swapped(right):
        return None
    if not dense and left.stride != right.stride:
        return None
    count = left.numel if dense else span(left.shape, left.stride)
    if count > 2 * left.numel and left.dtype.bits >= 8:
        return None
    one, other = (Run(each.storage, each.start, each.dtype.nbytes(count)) for each in (left, right))
    return one, other


def _is_swapped(info: TensorInfo) -> bool:
    return needs_swap(info.storage, info.dtype.swap)


class Comparer:
    """Compare pairs of tensors, one after the other; a context that closes the files."""

    def __init__(self, tolerance: Tolerance, limit: int, progress: Callable[[int], None]) -> None:
        self._tolerance = tolerance
        self._limit = limit
        self._progress = progress
        self._decoded = 0
        self._readers = Readers()
        self._sides = (_Side(self._readers), _Side(self._readers))

    def __enter__(self) -> Comparer:
        return self

    def __exit__(self, *_: object) -> None:
        for side in self._sides:
            side.close()
        self._readers.close()

    def compare(self, both: Pair) -> Values:
        """Compare two tensors; raises `LimitExceeded` for what repeats itself beyond measure."""
        found = Values(both.left.numel)
        if both.left.dtype.bits < 8:
            found.of = both.nbytes
        if both.runs is not None:
            one, other = (side.run(run) for side, run in zip(self._sides, both.runs, strict=True))
            for start, a, b in self._differing(one, other):
                if not both.dense:
                    break
                blocks = settled(a, both.left), settled(b, both.right)
                self._add_values(found, both.left.dtype, start, *blocks)
            else:
                return _repeated(found, both.times)
        self._gather(both, found)
        return _repeated(found, both.times)

    def _gather(self, both: Pair, found: Values) -> None:
        if both.left.nbytes > self._limit:
            raise LimitExceeded(
                f"a tensor of {both.left.nbytes} bytes in a file that is much smaller",
                option="--structure",
                hint="compares no values",
            )
        one, other = (
            side.elements(info)
            for side, info in zip(self._sides, (both.left, both.right), strict=True)
        )
        for start, a, b in self._differing(one, other):
            self._add_values(found, both.left.dtype, start, a, b)

    def _differing(
        self, left: Iterator[Block], right: Iterator[Block]
    ) -> Iterator[tuple[int, bytes | bytearray, bytes | bytearray]]:
        """Yield the blocks that differ, and where they start."""
        start = 0
        for one, other in _aligned(left, right):
            if one != other:
                yield start, one, other
            start += len(one)
            self._progress(2 * len(one))

    def _add_values(
        self,
        found: Values,
        dtype: DType,
        start: int,
        one: bytes | bytearray,
        other: bytes | bytearray,
    ) -> None:
        """Count what differs in a block; equal slices of it are not decoded."""
        kept = [
            at for at in range(0, len(one), SLICE) if one[at : at + SLICE] != other[at : at + SLICE]
        ]
        for first in range(0, len(kept), TOGETHER):
            places = kept[first : first + TOGETHER]
            left, right = (
                b"".join(block[at : at + SLICE] for at in places) for block in (one, other)
            )
            self._decoded += len(left)
            fast = self._decoded > NUMPY_FROM and compare_numpy.available()
            count = compare_numpy.count_values if fast else count_values
            part = count(dtype, left, right, self._tolerance)
            if part.first is not None:
                kind = numbers(dtype)
                nbytes = kind.width * kind.parts
                index, rest = divmod(part.first * nbytes, SLICE)
                part.first = (start + places[index] + rest) // nbytes
            found.add(part)


def _repeated(found: Values, times: int) -> Values:
    return replace(
        found,
        of=found.of * times,
        count=found.count * times,
        within=found.within * times,
        nan_payloads=found.nan_payloads * times,
        nan_one_side=found.nan_one_side * times,
        zero_signs=found.zero_signs * times,
        infinities=found.infinities * times,
    )


class _Side:
    """The storages of one side; a deflated one stays unpacked while it is the one in use."""

    def __init__(self, readers: Readers) -> None:
        self._readers = readers
        self._in_use: Storage | None = None
        self._read: Read | None = None
        self._open = ExitStack()

    def close(self) -> None:
        self._open.close()

    def _reading(self, storage: Storage) -> Read:
        if self._read is None or self._in_use != storage:
            self._open.close()
            self._read = self._open.enter_context(seekable(storage, self._readers))
            self._in_use = storage
        return self._read

    def run(self, run: Run) -> Iterator[Block]:
        """Yield the bytes of a run; a block is good until the next is asked for."""
        storage = run.storage
        if storage.packing is not Packing.DEFLATED:
            yield from self._filled(run)
        elif run.nbytes == storage.nbytes:
            yield from _whole(unpacked(storage, self._readers[storage.path]))
        else:
            read = self._reading(storage)
            for start in range(0, run.nbytes, CHUNK):
                yield read(run.start + start, min(CHUNK, run.nbytes - start))

    def _filled(self, run: Run) -> Iterator[bytearray]:
        buffer = bytearray(min(CHUNK, run.nbytes))
        for start in range(0, run.nbytes, CHUNK):
            if run.nbytes - start < len(buffer):
                buffer = bytearray(run.nbytes - start)
            fill(memoryview(buffer), run.storage, run.start + start, self._readers)
            yield buffer

    def elements(self, info: TensorInfo) -> Iterator[Block]:
        """Yield the elements in order, little-endian, with pending operations done."""
        for block in gather(info, self._reading(info.storage), GATHER_BLOCK):
            yield settled(block, info)


def _whole(blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Cut a stream where elements end, whatever lengths it comes in."""
    rest = b""
    for data in blocks:
        block = rest + data
        cut = len(block) - len(block) % SLICE
        rest = block[cut:]
        if cut:
            yield block[:cut]
    if rest:
        yield rest


def _aligned(
    left: Iterator[Block], right: Iterator[Block]
) -> Iterator[tuple[bytes | bytearray, bytes | bytearray]]:
    """Cut two streams of the same length into blocks of the same lengths."""
    one: Block = b""
    other: Block = b""
    while (one := one or next(left, b"")) and (other := other or next(right, b"")):
        size = min(len(one), len(other))
        yield _head(one, size), _head(other, size)
        one, other = memoryview(one)[size:], memoryview(other)[size:]
    next(right, b"")  # a deflated storage has a last look at its end


def _head(block: Block, size: int) -> bytes | bytearray:
    """Give the first bytes; as `bytes` or `bytearray`, which compare faster than a view."""
    if len(block) == size and not isinstance(block, memoryview):
        return block
    return bytes(memoryview(block)[:size])
