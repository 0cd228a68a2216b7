"""Shapes, strides and dtypes, against torch."""

from __future__ import annotations

from itertools import product
from math import prod
from typing import Any

import pytest

from ckptool.tensors.dtype import BY_SAFETENSORS_NAME, BY_STORAGE_CLASS, BY_TORCH_NAME, DType
from ckptool.tensors.tensor import (
    Storage,
    TensorInfo,
    coalesced,
    contiguous_stride,
    is_contiguous,
    needs_swap,
    problem,
    span,
)

torch = pytest.importorskip("torch")

SHAPES = [(), (0,), (1,), (5,), (2, 3), (0, 3), (4, 0, 2), (1, 1), (3, 1, 2), (2, 2, 2, 2)]


def info_of(view: Any, **more: Any) -> TensorInfo:
    """Describe a torch tensor as a file would."""
    dtype = BY_TORCH_NAME[str(view.dtype).removeprefix("torch.")]
    storage = Storage("", "0", 0, view.untyped_storage().nbytes(), dtype)
    return TensorInfo(
        dtype, tuple(view.shape), tuple(view.stride()), storage, view.storage_offset(), **more
    )


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


# Views.


def base(shape: tuple[int, ...], dtype: Any = torch.int32) -> Any:
    return torch.arange(prod(shape), dtype=torch.int64).to(dtype).view(shape)


def test_joined_dimensions() -> None:
    joined = coalesced
    assert joined((2, 3, 4), (12, 4, 1)) == ((24,), (1,))
    assert joined((2, 3, 4), (12, 4, 2)) == ((6, 4), (4, 2))
    assert joined((2, 3, 4), (30, 5, 1)) == ((2, 3, 4), (30, 5, 1))
    assert joined((2, 3, 4), (24, 8, 2)) == ((24,), (2,))
    assert joined((1, 5, 1), (99, 1, 7)) == ((5,), (1,))
    assert joined((4, 7), (1, 0)) == ((4, 7), (1, 0))
    assert joined((4, 7), (0, 0)) == ((28,), (0,))
    assert joined((), ()) == ((), ())


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
