"""Elements of any view, dtype, byte order and packing, in blocks: what torch's contiguous gives."""

from __future__ import annotations

import errno
import gc
import mmap
import tracemalloc
import zlib
from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest

from ckptool.errors import Malformed
from ckptool.files.blocks import blocks, equal, grain, runs
from ckptool.files.fileio import Reader, Readers
from ckptool.files.gathering import BAND, Band, large_pages
from ckptool.tensors import numbers, values
from ckptool.tensors.casting import Rounding
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import Packing, Storage, TensorInfo
from ckptool.tensors.values import joined, literal

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
judge = pytest.importorskip("judge")


class Memory(dict):
    """Readers of files that are bytes in memory; `reads` are the sizes that were asked for."""

    def __init__(self, **files: bytes) -> None:
        super().__init__(dict.fromkeys(files, self))
        self.data = next(iter(files.values()))
        self.reads: list[int] = [0]

    def read_into(self, view: memoryview, start: int) -> None:
        assert 0 <= start <= start + len(view) <= len(self.data)
        self.reads.append(len(view))
        view[:] = self.data[start : start + len(view)]


def info_of(view: Any, **more: Any) -> TensorInfo:
    """Describe a torch tensor as a file would."""
    dtype = BY_TORCH_NAME[str(view.dtype).removeprefix("torch.")]
    storage = Storage("file", "0", 0, view.untyped_storage().nbytes(), dtype)
    return TensorInfo(
        dtype, tuple(view.shape), tuple(view.stride()), storage, view.storage_offset(), **more
    )


def memory_of(view: Any) -> Memory:
    return Memory(file=judge.storage_bytes(view.untyped_storage()))


def contiguous_bytes(view: Any) -> bytes:
    view = view.resolve_conj().resolve_neg()
    return bytes(judge.storage_bytes(view.contiguous().clone().untyped_storage()))


def base(shape: tuple[int, ...], dtype: Any = torch.int32) -> Any:
    return torch.arange(prod(shape), dtype=torch.int64).to(dtype).view(shape)


VIEWS = {
    "contiguous": base((3, 4, 5)),
    "transposed": base((3, 4)).t(),
    "permuted": base((3, 4, 5)).permute(2, 0, 1),
    "reversed axes": base((2, 3, 4, 5)).permute(3, 2, 1, 0),
    "channels last": base((2, 3, 4, 4)).to(memory_format=torch.channels_last),
    "rows skipped": base((6, 5))[1::2],
    "columns skipped": base((4, 6))[:, 1::2],
    "diagonal": torch.diagonal(base((4, 4))),
    "windows": base((20,)).unfold(0, 5, 2),
    "expanded": base((4, 1)).expand(4, 7),
    "expanded first": base((1, 4)).expand(7, 4),
    "expanded scalar": torch.tensor(7).expand(3, 2),
    "scalar": torch.tensor(7),
    "scalar inside": base((8,))[5],
    "empty": torch.empty(0),
    "empty rows": torch.empty(0, 3),
    "empty inside": base((6, 5))[3:3],
    "one by one": base((1, 1)),
    "odd stride of one": base((3,)).as_strided((1, 3), (7, 1)),
    "a column": base((50, 40))[:, 3],
    "far apart": base((9000,))[::4000],
    "bytes": base((5, 7), torch.uint8).t(),
    "shorts": base((5, 7), torch.int16).t(),
    "longs": base((5, 7), torch.int64).t(),
    "booleans": (base((5, 7)) % 2).bool().t(),
    "complex": torch.complex(base((3, 4)).float(), base((3, 4)).float()).t(),
    "halves": base((5, 7), torch.bfloat16).t(),
    "float8": base((5, 7), torch.float8_e4m3fn).t(),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("limit", [16, 64, 100, 1000, 1 << 20])
def test_blocks_hold_what_contiguous_holds(view: Any, limit: int) -> None:
    readers = memory_of(view)
    parts = [bytes(block) for block in blocks(info_of(view), readers, limit)]
    whole = contiguous_bytes(view) if view.numel() else b""
    assert b"".join(parts) == whole
    assert max([*readers.reads, *map(len, parts)]) <= limit
    size = limit // view.itemsize * view.itemsize
    assert [len(part) for part in parts[:-1]] == [size] * (
        len(parts) - 1
    )  # so that two can be zipped


def test_an_element_larger_than_the_limit_is_a_block() -> None:
    view = torch.arange(6).to(torch.complex128).view(2, 3).t()
    parts = [bytes(block) for block in blocks(info_of(view), memory_of(view), 3)]
    assert (b"".join(parts), len(parts)) == (contiguous_bytes(view), 6)


@pytest.mark.parametrize("dtype", [d for d in DType if d.bits >= 8 and d.torch_name], ids=str)
def test_every_dtype_in_either_byte_order(dtype: DType) -> None:
    raw = np.random.default_rng(3).integers(0, 256, 35 * dtype.itemsize, "u1")
    wanted = raw.reshape(5, 7, dtype.itemsize).transpose(1, 0, 2).tobytes()
    for order in ("little", "big"):
        data = raw.reshape(-1, dtype.swap)[:, :: -1 if order == "big" else 1].tobytes()
        storage = Storage("file", "0", 0, len(data), dtype, byteorder=order)
        for info, expected in (
            (TensorInfo(dtype, (7, 5), (1, 7), storage), wanted),
            (TensorInfo(dtype, (5, 7), (7, 1), storage), raw.tobytes()),
        ):
            for limit in (32, 1 << 20):
                got = b"".join(map(bytes, blocks(info, Memory(file=data), limit)))
                assert got == expected


NUMBERS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]
NUMBERS += [torch.int16, torch.int8, torch.uint8]


@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_pending_negation_is_torchs(dtype: Any) -> None:
    raw = torch.from_numpy(np.random.default_rng(5).integers(0, 256, 24 * dtype.itemsize, "u1"))
    view = torch._neg_view(raw.view(dtype).view(4, 6)).t()
    info = info_of(view, lazy=frozenset(["neg"]))
    assert b"".join(map(bytes, blocks(info, memory_of(view), 16))) == contiguous_bytes(view)


@pytest.mark.parametrize("dtype", [torch.complex128, torch.complex64], ids=str)
@pytest.mark.parametrize("pending", [("conj",), ("neg",), ("conj", "neg")], ids=str)
def test_pending_conjugation_is_torchs(dtype: Any, pending: tuple[str, ...]) -> None:
    view = torch.randn(4, 6, dtype=dtype, generator=torch.Generator().manual_seed(1))
    for name in pending:
        view = view.conj() if name == "conj" else torch._neg_view(view)
    info = info_of(view, lazy=frozenset(pending))
    assert b"".join(map(bytes, blocks(info, memory_of(view), 64))) == contiguous_bytes(view)


def test_elements_below_a_byte_are_bytes() -> None:
    storage = Storage("file", "0", 2, 4)
    info = TensorInfo(DType.F6_E3M2, (4,), (1,), storage, 1)
    assert b"".join(map(bytes, blocks(info, Memory(file=b"0123456789"), 2))) == b"345"


def test_gathering_reads_little_of_what_lies_far_apart() -> None:
    view = base((1 << 20,), torch.uint8)[:: 1 << 18]
    readers = memory_of(view)
    got = b"".join(map(bytes, blocks(info_of(view), readers, 1 << 22)))
    assert got == contiguous_bytes(view)
    assert sum(readers.reads) < 1 << 16


def test_no_block_is_left_to_the_garbage() -> None:
    """A block that only a cycle keeps stays until garbage is looked for, which may be late."""
    view = torch.zeros(1 << 10, 1 << 10).T
    readers = memory_of(view)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in blocks(info_of(view), readers, 1 << 18):
            pass
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 1 << 20
    assert most < 4 << 18


def test_what_repeats_itself_for_ever_takes_no_memory() -> None:
    """Two terabytes over four bytes: the first block comes at once, and is a block."""
    info = info_of(torch.tensor([7]).expand(1 << 20, 1 << 18))
    tracemalloc.start()
    try:
        first = next(blocks(info, memory_of(torch.tensor([7])), 1 << 16))
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert bytes(first) == (7).to_bytes(8, "little") * (1 << 13)
    assert most < 1 << 18


# Deflated storages.


@pytest.fixture
def readers() -> Iterator[Readers]:
    readers = Readers()
    yield readers
    readers.close()


def deflated(path: Path, data: bytes) -> Storage:
    squeezed = zlib.compressobj(wbits=-15)
    packed = squeezed.compress(data) + squeezed.flush()
    path.write_bytes(b"before" + packed)
    return Storage(
        str(path), "0", 6, len(data), packing=Packing.DEFLATED, packed_nbytes=len(packed)
    )


@pytest.mark.parametrize("limit", [1000, 1 << 16, 1 << 22])
def test_deflated_views(tmp_path: Path, readers: Readers, limit: int) -> None:
    flat = torch.randn(300_000, generator=torch.Generator().manual_seed(2))
    storage = deflated(tmp_path / "packed", flat.numpy().tobytes())
    before = sorted(tmp_path.iterdir())
    for view in (flat, flat[10:-7], flat.view(600, 500).t(), flat[::3]):
        info = replace(info_of(view), storage=storage)
        assert b"".join(map(bytes, blocks(info, readers, limit))) == contiguous_bytes(view)
    assert sorted(tmp_path.iterdir()) == before


def test_a_deflated_storage_is_unpacked_once_for_all_its_views(
    tmp_path: Path, readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = torch.arange(1 << 16)
    storage = deflated(tmp_path / "packed", flat.numpy().tobytes())
    packed = 0
    before = Reader.read

    def counting(self: Reader, start: int, nbytes: int) -> bytes:
        nonlocal packed
        packed += nbytes
        return before(self, start, nbytes)

    monkeypatch.setattr(Reader, "read", counting)
    for start in range(100):
        info = replace(info_of(flat[start : start + 1000]), storage=storage)
        assert sum(map(len, blocks(info, readers))) == 8000
    assert packed == storage.packed_nbytes


def test_a_deflated_storage_longer_than_declared_is_refused(
    tmp_path: Path, readers: Readers
) -> None:
    storage = replace(deflated(tmp_path / "packed", bytes(4000)), nbytes=3996)
    info = TensorInfo(DType.F32, (999,), (1,), storage)
    with pytest.raises(Malformed, match="longer than declared"):
        list(blocks(info, readers))


# Comparing.


def test_blocks_are_compared_whole() -> None:
    """The last block of three is shorter than the buffer that it shares with those before."""
    view = base((25,), torch.uint8)
    for at in (None, *range(25)):
        other = view.clone()
        if at is not None:
            other[at] ^= 128
        pairs = zip(
            *(blocks(info_of(each), memory_of(each), 10) for each in (view, other)), strict=True
        )
        assert [equal(*pair) for pair in pairs] == [at is None or at // 10 != n for n in range(3)]


# Byte order.


@pytest.mark.parametrize("width", [2, 4, 8])
def test_swap_reverses_every_number(width: int) -> None:
    data = bytearray(range(48))
    turned = np.frombuffer(data, f"u{width}").byteswap().tobytes()
    numbers.swap(data, width)
    assert data == turned
    numbers.swap(memoryview(data), width)
    assert data == bytearray(range(48))


def test_runs_of_any_bytes_of_what_is_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several ranks, one may write the first byte of an element and another the rest."""
    monkeypatch.setattr("ckptool.files.blocks.LONG", 1)
    data = bytes(range(96))
    parts = [
        literal(data[:32], DType.F32, (2, 4), "a"),
        literal(data[32:48], DType.F32, (1, 4), "b"),
        literal(data[48:], DType.F32, (3, 4), "c"),
    ]
    storage = joined(parts, 0).storage
    for start in range(96):
        for end in range(start + 3, 97):
            found = [*runs(storage, start, end - start)]
            assert storage not in [each for each, _, _ in found]
            read = [(each.computed.kernel, bytearray(nbytes), at) for each, at, nbytes in found]
            for kernel, out, at in read:
                kernel(out, at)
            assert b"".join(out for _, out, _ in read) == data[start:end]


def test_what_is_turned_below_a_cast_keeps_to_the_room_of_a_band() -> None:
    """A byte of the output may be made of eight that are read ahead."""
    wide = TensorInfo(DType.F64, (8192, 4096), (1, 8192), Storage("a", "0", 0, 1 << 28, DType.F64))
    cast = values.computed(Rounding(DType.F64, DType.F8_E4M3), [wide], DType.F8_E4M3)
    small = Storage("b", "0", 0, 4096 * 640, DType.F8_E4M3)
    turned = TensorInfo(DType.F8_E4M3, (640, 4096), (1, 640), small)
    storage = values.joined([cast, turned], 0).storage
    nbytes = min(grain(storage).in_a_row, storage.nbytes)
    tracemalloc.start()
    portions = Band().begin(storage, 0, nbytes)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert portions
    assert BAND // 2 < peak <= BAND // 8 * 9 + (1 << 20)


@pytest.mark.parametrize("how", ["large", "unknown", "refused"])
def test_memory_is_had_where_a_system_has_no_large_pages(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    asked = list[int]()

    class Mapped(mmap.mmap):
        def madvise(self, advice: int, *_: int) -> None:
            asked.append(advice)
            if how == "refused":
                raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(mmap, "mmap", Mapped)
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 14, raising=False)
    if how == "unknown":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    memory = large_pages(3 << 20)
    memory[-1] = 7
    assert len(memory) == 4 << 20
    assert bytes(memory[:2]) == bytes(2)
    assert len(asked) == (0 if how == "unknown" else 1)
    monkeypatch.setattr(mmap, "mmap", None)
    assert len(large_pages(100)) == 100  # as of a small tensor, of which a file has thousands
