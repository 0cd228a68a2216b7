"""Shapes, strides, dtypes and the gathering of strided views, against torch and numpy."""

from __future__ import annotations

import gc
import tracemalloc
from itertools import product
from math import prod
from typing import Any

import pytest

from ckptool.tensors import tensor as module
from ckptool.tensors.dtype import BY_SAFETENSORS_NAME, BY_STORAGE_CLASS, BY_TORCH_NAME, DType
from ckptool.tensors.tensor import (
    Storage,
    TensorInfo,
    contiguous_stride,
    gather,
    is_contiguous,
    needs_swap,
    problem,
    span,
    swapped,
)

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
judge = pytest.importorskip("judge")

SHAPES = [(), (0,), (1,), (5,), (2, 3), (0, 3), (4, 0, 2), (1, 1), (3, 1, 2), (2, 2, 2, 2)]


def info_of(view: Any, **more: Any) -> TensorInfo:
    """Describe a torch tensor as a file would."""
    dtype = BY_TORCH_NAME[str(view.dtype).removeprefix("torch.")]
    storage = Storage("", "0", 0, view.untyped_storage().nbytes(), dtype)
    return TensorInfo(
        dtype, tuple(view.shape), tuple(view.stride()), storage, view.storage_offset(), **more
    )


def gathered(view: Any, limit: int) -> tuple[bytes, int, int]:
    """Gather a view; give the bytes, the largest read and the largest block."""
    raw = judge.storage_bytes(view.untyped_storage())
    reads = [0]

    def read(start: int, nbytes: int) -> bytes:
        assert 0 <= start <= start + nbytes <= len(raw)
        reads.append(nbytes)
        return raw[start : start + nbytes]

    blocks = list(gather(info_of(view), read, limit))
    return b"".join(blocks), max(reads), max(map(len, blocks), default=0)


def contiguous_bytes(view: Any) -> bytes:
    return bytes(judge.storage_bytes(view.contiguous().clone().untyped_storage()))


# Strides.


@pytest.mark.parametrize("shape", SHAPES)
def test_contiguous_stride_is_torchs(shape: tuple[int, ...]) -> None:
    assert contiguous_stride(shape) == torch.empty(shape).stride()


@pytest.mark.parametrize("shape", SHAPES)
def test_is_contiguous_is_torchs(shape: tuple[int, ...]) -> None:
    for stride in product((0, 1, 2, 3, 6), repeat=len(shape)):
        view = torch.zeros(100).as_strided(shape, stride)
        assert is_contiguous(shape, stride) == view.is_contiguous(), stride


def test_span_counts_from_first_to_last() -> None:
    for shape in SHAPES:
        for stride in product((0, 1, 4), repeat=len(shape)):
            places = [
                sum(i * s for i, s in zip(index, stride, strict=True))
                for index in product(*map(range, shape))
            ]
            assert span(shape, stride) == (max(places) + 1 if places else 0)


# What is impossible.


def made(
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    nbytes: int = 16,
    dtype: DType = DType.F32,
) -> TensorInfo:
    return TensorInfo(dtype, shape, stride, Storage("", "0", 0, nbytes, dtype), offset)


SOUND = [
    made((4,), (1,)),
    made((2, 2), (2, 1)),
    made((1000, 1000), (0, 0), 3),
    made((0,), (1,), 4),
    made((0,), (1,), 400),
    made((2**61, 0), (1, 1)),
    made((1,), (2**62,), 3),
    made((), (), 3),
    made((), (), 0, 4),
    made((64,), (1,), 0, 64, DType.U8),
    made((7,), (1,), 0, 4, DType.QU4X2),
    made((3,), (1,), 1, 1, DType.QU2X4),
    made((1,) * 64, (1,) * 64),
]
IMPOSSIBLE = [
    (made((5,), (1,)), "needs 20 bytes"),
    (made((4,), (1,), 1), "needs 20 bytes"),
    (made((2, 2), (3, 1)), "needs 20 bytes"),
    (made((1,), (1,), 4), "needs 20 bytes"),
    (made((), (), 0, 3), "needs 4 bytes"),
    (made((2,), ()), "2 sizes|1 sizes but 0 strides"),
    (made((-1,), (1,)), "negative"),
    (made((1,), (-1,)), "negative"),
    (made((1,), (1,), -1), "negative"),
    (made((2**32, 2**32), (0, 0)), "beyond"),
    (made((2**63, 0), (1, 1)), "beyond"),
    (made((1,), (2**62 + 1,)), "beyond"),
    (made((1,), (1,), 2**63), "beyond"),
    (made((1,) * 65, (1,) * 65), "65 dimensions"),
    (made((9,), (1,), 0, 4, DType.QU4X2), "needs 5 bytes"),
]


@pytest.mark.parametrize("info", SOUND)
def test_sound_view(info: TensorInfo) -> None:
    assert problem(info) == ""


@pytest.mark.parametrize(("info", "words"), IMPOSSIBLE)
def test_impossible_view(info: TensorInfo, words: str) -> None:
    assert any(word in problem(info) for word in words.split("|")), problem(info)


# Gathering.


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
def test_gather_gives_what_contiguous_gives(view: Any, limit: int) -> None:
    data, read, block = gathered(view, limit)
    assert data == contiguous_bytes(view)
    assert max(read, block) <= limit


def test_gather_reads_little_of_what_lies_far_apart() -> None:
    view = base((1 << 20,), torch.uint8)[:: 1 << 18]
    raw = judge.storage_bytes(view.untyped_storage())
    total = 0

    def read(start: int, nbytes: int) -> bytes:
        nonlocal total
        total += nbytes
        return raw[start : start + nbytes]

    assert b"".join(gather(info_of(view), read, 1 << 22)) == contiguous_bytes(view)
    assert total < 1 << 16


def test_gather_leaves_no_block_to_the_garbage() -> None:
    """A block that only a cycle keeps stays until garbage is looked for, which may be late."""
    view = torch.zeros(1 << 10, 1 << 10).T
    data = contiguous_bytes(view.T)
    gc.collect()
    gc.disable()
    tracemalloc.start()
    try:
        for _ in gather(info_of(view), lambda start, size: data[start : start + size], 1 << 18):
            pass
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.enable()
    assert kept < 1 << 20


def test_joined_dimensions() -> None:
    joined = module._coalesced
    assert joined((2, 3, 4), (12, 4, 1)) == ((24,), (1,))
    assert joined((2, 3, 4), (12, 4, 2)) == ((6, 4), (4, 2))
    assert joined((2, 3, 4), (30, 5, 1)) == ((2, 3, 4), (30, 5, 1))
    assert joined((2, 3, 4), (24, 8, 2)) == ((24,), (2,))
    assert joined((1, 5, 1), (99, 1, 7)) == ((5,), (1,))
    assert joined((4, 7), (1, 0)) == ((4, 7), (1, 0))
    assert joined((4, 7), (0, 0)) == ((28,), (0,))
    assert joined((), ()) == ((), ())


# Bytes.


@pytest.mark.parametrize("width", [1, 2, 4, 8])
def test_swapped_reverses_every_number(width: int) -> None:
    data = bytes(range(48))
    numbers = np.frombuffer(data, f"u{width}").byteswap().tobytes()
    assert bytes(swapped(data, width)) == numbers
    assert bytes(swapped(bytearray(numbers), width)) == data


def test_only_wide_numbers_of_big_endian_files_are_swapped() -> None:
    big, little = (Storage("", "0", 0, 8, byteorder=order) for order in ("big", "little"))
    assert [needs_swap(big, width) for width in (1, 2, 8)] == [False, True, True]
    assert not any(needs_swap(little, width) for width in (1, 2, 8))


def test_equal_views_are_ties() -> None:
    flat = base((12,))
    one = info_of(flat.view(3, 4))
    assert one.view == info_of(flat.view(3, 4)).view
    for other in (flat, flat.view(4, 3), flat.view(3, 4).t(), flat[1:], flat.view(torch.float32)):
        assert one.view != info_of(other).view
    assert one.view != info_of(flat.view(3, 4), lazy=frozenset(["neg"])).view


# The table of dtypes.


TORCH_DTYPES = {
    name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
# Shells: names without an element that could be saved.
SHELLS = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}


def test_every_dtype_of_torch_is_in_the_table() -> None:
    names = {str(dtype).removeprefix("torch.") for dtype in TORCH_DTYPES.values()}
    assert names - BY_TORCH_NAME.keys() == SHELLS & names
    assert BY_TORCH_NAME.keys() - names <= {"bcomplex32", "float4_e2m1fn_x2"}  # newer torches'


@pytest.mark.parametrize("dtype", [d for d in DType if d.torch_name], ids=lambda d: d.name)
def test_size_of_a_dtype_is_torchs(dtype: DType) -> None:
    theirs = getattr(torch, dtype.torch_name, None)
    if theirs is None:
        pytest.skip(f"this torch has no {dtype.torch_name}")
    assert dtype.itemsize == theirs.itemsize


def test_storage_classes_are_torchs() -> None:
    theirs = {
        kind: str(dtype).removeprefix("torch.")
        for dtype, kind in torch.storage._dtype_to_storage_type_map().items()
    }
    assert {kind: dtype.torch_name for kind, dtype in BY_STORAGE_CLASS.items()} == theirs


def test_names_are_unique() -> None:
    for table, column in (
        (BY_SAFETENSORS_NAME, "safetensors_name"),
        (BY_TORCH_NAME, "torch_name"),
        (BY_STORAGE_CLASS, "storage_class"),
    ):
        assert len(table) == sum(bool(getattr(dtype, column)) for dtype in DType)


def test_safetensors_names_are_the_librarys() -> None:
    from safetensors.torch import _TYPES

    ours = {dtype.safetensors_name: dtype.torch_name for dtype in DType if dtype.safetensors_name}
    for name, theirs in _TYPES.items():
        assert ours[name] == str(theirs).removeprefix("torch."), name
    assert ours.keys() - _TYPES.keys() <= {"F6_E2M3", "F6_E3M2", "F4", "F8_E8M0"}


def test_bits_are_counted_up_to_whole_bytes() -> None:
    assert DType.F6_E3M2.nbytes(4) == 3
    assert [DType.QU4X2.nbytes(count) for count in (0, 1, 2, 3)] == [0, 1, 1, 2]
    assert [DType.QU2X4.nbytes(count) for count in (1, 4, 5)] == [1, 1, 2]
    assert DType.F4.nbytes(3) == 3  # torch counts pairs
