"""Count NaN and infinity in the raw bytes of floats, without numpy and at the speed of C.

A float is not finite where all bits of its exponent are set (IEEE 754, and bfloat16). Each byte of
the elements is taken as a strided slice, mapped to 1 where its share of the exponent is full, and
the slices are combined as large integers, whose set bits are counted. As hardly any weight is
beyond 2^127, the byte with the sign nearly always ends the search. The eight-bit floats are those
of torch/headeronly/util (Float8_e4m3fn.h ...): most have a NaN or two and no infinity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace

from ckptool.files.fileio import Reader, Readers, seekable, unpacked
from ckptool.pickles.tree import Node
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.walk import Path
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import (
    CompositeTensor,
    Packing,
    Read,
    Storage,
    TensorInfo,
    gather,
    is_contiguous,
)

BLOCK = 1 << 19
MAX_REPEATS = 4  # times the bytes of the storages, that overlapping views may add up to
SMALL = 1 << 20

# width in bytes, bits of the exponent, bits of the mantissa; of complex numbers, of each part
_IEEE = {
    DType.F64: (8, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
    DType.C128: (8, 0x7FF0_0000_0000_0000, 0x000F_FFFF_FFFF_FFFF),
    DType.F32: (4, 0x7F80_0000, 0x007F_FFFF),
    DType.C64: (4, 0x7F80_0000, 0x007F_FFFF),
    DType.BF16: (2, 0x7F80, 0x007F),
    DType.BC32: (2, 0x7F80, 0x007F),
    DType.F16: (2, 0x7C00, 0x03FF),
    DType.C32: (2, 0x7C00, 0x03FF),
    DType.F8_E5M2: (1, 0x7C, 0x03),
}
_NANS = {
    DType.F8_E4M3: b"\x7f\xff",
    DType.F8_E4M3FNUZ: b"\x80",
    DType.F8_E5M2FNUZ: b"\x80",
    DType.F8_E8M0: b"\xff",
}
DTYPES = frozenset([*_IEEE, *_NANS])  # those that can hold NaN or infinity


@dataclass(frozen=True, slots=True)
class Tally:
    """How many numbers are NaN, and how many are infinite; a complex number is two."""

    nan: int = 0
    inf: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.nan + other.nan, self.inf + other.inf)

    def times(self, count: int) -> Tally:
        """Give what so many repetitions hold."""
        return Tally(self.nan * count, self.inf * count)


def tally(data: bytes | bytearray, dtype: DType, byteorder: str = "little") -> Tally:
    """Count in whole elements of one of `DTYPES`."""
    if dtype in _NANS:
        return Tally(sum(data.count(value) for value in _NANS[dtype]))
    width, exponent, mantissa = _IEEE[dtype]
    places = range(width) if byteorder == "little" else range(width - 1, -1, -1)

    def slices(mask: int, full: bool) -> Iterable[int]:
        # From the byte with the sign down: it decides nearly always.
        for index in range(width - 1, -1, -1):
            share = mask >> 8 * index & 0xFF
            if share:
                table = _table(share, share if full else 0)
                yield int.from_bytes(data[places[index] :: width].translate(table), "little")

    found = _common(slices(exponent, True))
    infinite = _common(slices(mantissa, False), found)
    return Tally((found ^ infinite).bit_count(), infinite.bit_count())


def _common(numbers: Iterable[int], found: int | None = None) -> int:
    """Combine until nothing is left."""
    if found == 0:
        return 0
    for number in numbers:
        found = number if found is None else found & number
        if not found:
            break
    return found or 0


def _table(mask: int, wanted: int) -> bytes:
    """Map the bytes that hold `wanted` under a mask to 1, all others to 0."""
    return bytes(byte & mask == wanted for byte in range(256))


@dataclass(frozen=True, slots=True)
class Floats:
    """What the floats of a checkpoint hold: tensors, by path, with NaN or infinity.

    `skipped` are views that overlap so often that to count in them would take for ever.
    """

    found: tuple[tuple[str, Tally], ...]
    skipped: tuple[str, ...]


def floating(tree: Node) -> Iterator[tuple[Path, TensorInfo]]:
    """Yield the tensors of a tree that can hold NaN or infinity, with their paths."""
    for path, info in walk.tensors(tree):
        parts = info.parts if isinstance(info, CompositeTensor) else (info,)
        for part in parts:
            if part.dtype in DTYPES:
                yield path, part


def not_finite(checkpoint: Checkpoint, progress: Callable[[int], None]) -> Floats:
    """Count NaN and infinity in every tensor, those of one storage together; ties once."""
    by_storage: dict[Storage, list[tuple[Path, TensorInfo]]] = {}
    for path, info in floating(checkpoint.tree):
        by_storage.setdefault(info.storage, []).append((path, info))
    left = MAX_REPEATS * max(SMALL, sum(storage.nbytes for storage in by_storage))
    tallies: dict[Path, Tally] = {}
    skipped: list[Path] = []
    with closing(Readers()) as readers:
        for storage, tensors in by_storage.items():
            known: dict[tuple[object, ...], Tally] = {}
            views = [(path, *_once(info)) for path, info in tensors]
            with _blocks_of(storage, [once for _, once, _ in views], readers) as blocks:
                for path, once, repeats in views:
                    if once.view not in known:
                        cost = max(once.nbytes, storage.packed_nbytes and storage.nbytes)
                        if cost > left:
                            skipped.append(path)
                            continue
                        left -= cost
                        known[once.view] = _tally_of(once, blocks)
                        progress(once.nbytes)
                    here = known[once.view].times(repeats)
                    tallies[path] = tallies.get(path, Tally()) + here
    found = [(_name(path), here) for path, here in tallies.items() if here != Tally()]
    return Floats(tuple(found), tuple(map(_name, skipped)))


def _name(path: Path) -> str:
    return walk.dotted(path) or "."


def _once(info: TensorInfo) -> tuple[TensorInfo, int]:
    """Give a view without the dimensions that repeat its elements, and how often they do."""
    repeats = 1
    shape = []
    for size, step in zip(info.shape, info.stride, strict=True):
        repeats *= size if step == 0 else 1
        shape.append(min(size, 1) if step == 0 else size)
    if info.dtype is not DType.C128:
        return replace(info, shape=tuple(shape)), repeats
    # As its parts: there are no elements of sixteen bytes to gather.
    stride = tuple(2 * step for step in info.stride)
    start = 2 * info.storage_offset
    parts = replace(info, dtype=DType.F64, shape=(*shape, 2), stride=(*stride, 1))
    return replace(parts, storage_offset=start), repeats


Blocks = Callable[[TensorInfo], Iterator[bytes | bytearray]]  # whole elements of a view


def _tally_of(info: TensorInfo, blocks: Blocks) -> Tally:
    total = Tally()
    for data in blocks(info):
        total += tally(data, info.dtype, info.storage.byteorder)
    return total


@contextmanager
def _blocks_of(storage: Storage, views: list[TensorInfo], readers: Readers) -> Iterator[Blocks]:
    """Give what reads the elements of views of one storage; it is spooled only where it must be."""
    contiguous = all(is_contiguous(info.shape, info.stride) for info in views)
    if storage.packing is Packing.DEFLATED and contiguous:
        yield lambda info: _streamed(info, readers[storage.path])
        return
    with seekable(storage, readers) as read:
        yield lambda info: _read_in_order(info, read)


def _read_in_order(info: TensorInfo, read: Read) -> Iterator[bytes | bytearray]:
    if not is_contiguous(info.shape, info.stride):
        yield from gather(info, read, BLOCK)
        return
    for start in range(0, info.nbytes, BLOCK):
        yield read(info.start + start, min(BLOCK, info.nbytes - start))


def _streamed(info: TensorInfo, reader: Reader) -> Iterator[bytes]:
    position, stop, rest = 0, info.start + info.nbytes, b""
    for data in unpacked(info.storage, reader):
        part = rest + data[max(0, info.start - position) : max(0, stop - position)]
        position += len(data)
        cut = len(part) - len(part) % info.dtype.itemsize
        rest = part[cut:]
        yield part[:cut]
