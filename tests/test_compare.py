"""What `diff` says of values, judged by torch and numpy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import ckptool
from ckptool import compare_numpy
from ckptool.compare import Change, Difference
from ckptool.compare_values import Tolerance, count_values, decoded, numbers
from ckptool.dtype import BY_TORCH_NAME, DType

hypothesis = pytest.importorskip("hypothesis")
torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
safetensors_torch = pytest.importorskip("safetensors.torch")

from hypothesis import given, settings, strategies as st  # noqa: E402

FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
    torch.float8_e8m0fnu,
]
INTEGERS = [
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
]
OTHERS = [torch.bool, torch.complex64, torch.complex128]
DTYPES = [*FLOATS, *INTEGERS, *OTHERS]


def save(path: Path, **entries: Any) -> Path:
    torch.save(entries, path)
    return path


def compare(folder: Path, left: Any, right: Any, **how: Any) -> Difference:
    """Compare two tensors, each in a file of its own."""
    one = save(folder / "left.pth", w=left)
    other = save(folder / "right.pth", w=right)
    return ckptool.diff(one, other, **how)


def only_change(found: Difference) -> Change:
    assert not found.equal
    (change,) = found.state.changed
    return change


def raw(tensor: Any) -> Any:
    """Give the bytes of each element, in a last axis."""
    flat = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return flat.reshape(tensor.numel(), -1)


def as_double(tensor: Any) -> Any:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.double().reshape(-1).numpy()


def random_tensor(dtype: Any, seed: int, shape: tuple[int, ...]) -> Any:
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape) * dtype.itemsize
    data = torch.randint(0, 256, (count,), generator=generator).to(torch.uint8)
    return (data % 2 if dtype == torch.bool else data).view(dtype).reshape(shape)


def changed_copy(tensor: Any, seed: int, share: float) -> Any:
    """Give a tensor with other bytes in about this share of its elements."""
    generator = torch.Generator().manual_seed(seed + 1)
    other = random_tensor(tensor.dtype, seed + 2, tuple(tensor.shape))
    mask = torch.rand(tensor.numel(), generator=generator) < share
    data, new = tensor.clone().reshape(-1), other.reshape(-1)
    size = tensor.element_size()
    data.view(torch.uint8).reshape(-1, size)[mask] = new.view(torch.uint8).reshape(-1, size)[mask]
    return data.reshape(tensor.shape)


# The numbers, against numpy's.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share", [0.002, 0.3, 1.0])
def test_numbers_of_random_changes(tmp_path: Path, dtype: Any, share: float) -> None:
    left = random_tensor(dtype, 7, (11, 5, 31))
    right = changed_copy(left, 7, share)
    differs = (raw(left) != raw(right)).any(axis=1)
    change = only_change(compare(tmp_path, left, right))
    assert change.what == "values"
    values = change.values
    assert values is not None
    assert (values.count, values.of) == (int(differs.sum()), left.numel())
    first = np.unravel_index(int(np.flatnonzero(differs)[0]), left.shape)
    assert change.first == tuple(int(index) for index in first)
    if dtype == torch.bool:
        assert values.max_abs is None
    elif dtype in INTEGERS:
        exact = [int(number) for number in left.reshape(-1).tolist()]
        others = [int(number) for number in right.reshape(-1).tolist()]
        assert values.max_abs == max(abs(a - b) for a, b in zip(exact, others, strict=True))
        assert values.max_ulp is None
    else:
        judge_floats(values, left, right)


def judge_floats(values: Any, left: Any, right: Any) -> None:
    one, other = as_double(left), as_double(right)
    parts = 2 if left.is_complex() else 1
    bits = [raw(each).reshape(left.numel() * parts, -1) for each in (left, right)]
    differs = (bits[0] != bits[1]).any(axis=1)
    finite = np.isfinite(one) & np.isfinite(other) & differs
    nans = np.isnan(one).astype(int) + np.isnan(other).astype(int)
    assert values.nan_payloads == int((differs & (nans == 2)).sum())
    assert values.nan_one_side == int((differs & (nans == 1)).sum())
    infinite = (np.isinf(one) | np.isinf(other)) & (nans == 0) & differs
    assert values.infinities == int(infinite.sum())
    with np.errstate(all="ignore"):
        gaps = np.abs(one - other)
    assert values.zero_signs == int((finite & (gaps == 0)).sum())
    measured = finite & (gaps != 0)
    if not measured.any():
        assert (values.max_abs, values.max_ulp) == (None, None)
        return
    assert values.max_abs == float(gaps[measured].max())
    width = bits[0].shape[1]
    steps = [ordered(each[measured], width, left.dtype) for each in bits]
    assert values.max_ulp == max(abs(a - b) for a, b in zip(*steps, strict=True))


def ordered(rows: Any, width: int, dtype: Any) -> list[int]:
    """Count from zero how many floats of this width lie below each, by sign and magnitude."""
    numbers = [int.from_bytes(bytes(row), "little") for row in rows]
    if dtype == torch.float8_e8m0fnu:
        return numbers
    sign = 1 << (8 * width - 1)
    return [-(number - sign) if number & sign else number for number in numbers]


@pytest.mark.parametrize("dtype", [each for each in FLOATS if each.itemsize <= 2], ids=str)
def test_every_pattern_of_a_small_float_is_decoded_as_torch_does(dtype: Any) -> None:
    count = 256**dtype.itemsize
    patterns = torch.arange(count, dtype=torch.int32)
    data = patterns.to(torch.uint16 if dtype.itemsize == 2 else torch.uint8)
    kind = numbers(BY_TORCH_NAME[str(dtype).removeprefix("torch.")])
    ours = np.array(list(decoded(kind, data.numpy().tobytes())))
    np.testing.assert_array_equal(ours, data.view(dtype).double().numpy())


def test_special_values_are_named(tmp_path: Path) -> None:
    nan, inf = math.nan, math.inf
    left = torch.tensor([nan, 1.0, 0.0, inf, inf, 1.0, nan, 5.0])
    right = torch.tensor([nan, nan, -0.0, -inf, 1.0, 1.0, 2.0, 5.0])
    right.view(torch.int32)[0] ^= 1  # another NaN
    values = only_change(compare(tmp_path, left, right)).values
    assert values is not None
    assert (values.count, values.of, values.first) == (6, 8, 0)
    counts = (values.nan_payloads, values.nan_one_side, values.zero_signs, values.infinities)
    assert counts == (1, 2, 1, 2)
    assert (values.max_abs, values.max_ulp) == (None, None)


def test_neighbours_are_one_ulp_apart(tmp_path: Path) -> None:
    left = torch.tensor([1.0, -1.0, 0.0, 1e-45])
    right = torch.nextafter(left, torch.tensor(math.inf))
    values = only_change(compare(tmp_path, left, right)).values
    assert values is not None
    assert (values.count, values.max_ulp) == (4, 1)
    across = compare(tmp_path, torch.tensor([1e-45]), torch.tensor([-1e-45]))
    found = only_change(across).values
    assert found is not None
    assert found.max_ulp == 2


def test_the_widest_integers_are_measured_exactly(tmp_path: Path) -> None:
    left = torch.tensor([-(2**63), 5, 2**63 - 1])
    right = torch.tensor([2**63 - 1, 5, 2**63 - 2])
    values = only_change(compare(tmp_path, left, right)).values
    assert values is not None
    assert values.max_abs == 2**64 - 1


# numpy gives what is counted without it.

KINDS = [each for each in DType if each.bits >= 8]


@settings(max_examples=200)
@given(
    st.sampled_from(KINDS),
    st.binary(max_size=200),
    st.binary(max_size=200),
    st.sampled_from([0.0, 1e-3, 0.5, 1e30, math.inf]),
    st.sampled_from([0.0, 1e-6, 0.25]),
)
def test_numpy_counts_the_same(
    dtype: DType, left: bytes, right: bytes, atol: float, rtol: float
) -> None:
    size = min(len(left), len(right)) // dtype.itemsize * dtype.itemsize
    one, other = left[:size], right[:size]
    for pair in ((one, other), (one, one), (one + bytes(size), other + bytes(size))):
        tolerance = Tolerance(atol, rtol)
        assert compare_numpy.count_values(dtype, *pair, tolerance) == count_values(
            dtype, *pair, tolerance
        )
