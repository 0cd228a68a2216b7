"""Kernels of casts: judged by torch where it rounds once, by numpy and by fractions elsewhere."""

from __future__ import annotations

from bisect import bisect_left
from fractions import Fraction
from random import Random

import ml_dtypes
import numpy as np
import pytest
import torch
from conftest import step

from ckptool.tensors import numbers
from ckptool.tensors.counts import Losses
from ckptool.tensors.dtype import BY_TORCH_NAME, DType

KINDS = {
    DType.BF16: ml_dtypes.bfloat16,
    DType.F16: np.float16,
    DType.F32: np.float32,
    DType.F64: np.float64,
    DType.F8_E4M3: ml_dtypes.float8_e4m3fn,
    DType.F8_E5M2: ml_dtypes.float8_e5m2,
    DType.F8_E4M3FNUZ: ml_dtypes.float8_e4m3fnuz,
    DType.F8_E5M2FNUZ: ml_dtypes.float8_e5m2fnuz,
}
# numpy warns of what a test is made to do.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
NARROW = [DType.BF16, DType.F16, DType.F8_E4M3, DType.F8_E5M2]


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def cast(values: np.ndarray, target: DType, *, clamp: bool = False) -> tuple[np.ndarray, Losses]:
    """Cast with the kernel, from the dtype of an array."""
    source = next(dtype for dtype, kind in KINDS.items() if values.dtype == kind)
    made = np.empty(values.size, KINDS[target])
    losses = numbers.cast(made.view("u1").data, values.tobytes(), source, target, clamp=clamp)
    return made, losses


def same(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Check for the same bits, but for those of a NaN."""
    nan = np.isnan(wanted.astype("f8"))
    return bool(((bits(got) == bits(wanted)) | nan).all() and np.isnan(got.astype("f8"))[nan].all())


def every(dtype: DType) -> np.ndarray:
    """Return all numbers of a dtype of one or two bytes."""
    size = dtype.itemsize
    return np.arange(1 << 8 * size, dtype=f"u{size}").view(KINDS[dtype])


def of_torch(values: np.ndarray, target: DType) -> np.ndarray:
    """Cast with torch."""
    source = next(dtype for dtype, kind in KINDS.items() if values.dtype == kind)
    tensor = torch.frombuffer(bytearray(values.tobytes()), dtype=getattr(torch, source.torch_name))
    made = tensor.to(getattr(torch, target.torch_name))
    return made.view(torch.uint8).numpy().view(KINDS[target])


SMALL = [dtype for dtype in KINDS if dtype.itemsize <= 2]


@pytest.mark.parametrize("source", SMALL)
@pytest.mark.parametrize("target", [DType.F32, DType.F64])
def test_all_patterns_widen_as_in_torch(source: DType, target: DType) -> None:
    got, losses = cast(every(source), target)
    assert same(got, of_torch(every(source), target))
    assert losses == Losses()


def neighbours(target: DType, kind: str) -> np.ndarray:
    """Return what is around every number of a dtype, and around every middle of two, of both signs.

    A middle and its neighbours in the wider dtype decide how it is rounded.
    """
    numbers_ = np.unique(np.abs(every(target).astype("f8")))
    numbers_ = numbers_[np.isfinite(numbers_)]
    step = numbers_[-1] - numbers_[-2]
    numbers_ = np.append(numbers_, [numbers_[-1] + step, numbers_[-1] + 2 * step])
    middles = (numbers_[1:] + numbers_[:-1]) / 2
    exact = np.concatenate([numbers_, middles]).astype(kind)
    up = np.nextafter(exact, np.array(np.inf, kind))
    down = np.nextafter(exact, np.array(-np.inf, kind))
    odd = [0.0, np.inf, np.nan, np.finfo(kind).max, np.finfo(kind).smallest_subnormal]
    found = np.concatenate([exact, up, down, np.array(odd, kind)])
    return np.concatenate([found, -found])


def rounded(values: np.ndarray, target: DType) -> np.ndarray:
    """Round to nearest even by exact arithmetic; what is beyond the largest is infinite, or NaN."""
    numbers_ = every(target)[: 1 << 8 * target.itemsize - 1]
    finite = [Fraction(float(each)) for each in numbers_ if np.isfinite(each)]
    limit = finite[-1] + (finite[-1] - finite[-2])  # the next, if there were one
    sign = 1 << 8 * target.itemsize - 1
    made = []
    for value in values.astype("f8"):
        if np.isnan(value) or np.isinf(value):
            pattern = len(finite) if np.isinf(value) else sign - 1
        else:
            exact = abs(Fraction(float(value)))
            at = bisect_left(finite, exact)
            low = finite[at - 1] if at else finite[0]
            high = finite[at] if at < len(finite) else limit
            middle = (low + high) / 2
            pattern = at if exact > middle or (exact == middle and at % 2 == 0) else max(at - 1, 0)
            pattern = at if exact == high else min(pattern, len(finite))
        made.append(pattern | (sign if np.signbit(value) else 0))
    return np.array(made, f"u{target.itemsize}").view(KINDS[target])


@pytest.mark.parametrize("kind", ["f4", "f8"])
@pytest.mark.parametrize("target", NARROW)
def test_all_numbers_and_ties_round_to_even_by_exact_arithmetic(target: DType, kind: str) -> None:
    values = neighbours(target, kind)
    if target.itemsize == 2:
        values = values[Random(f"{target}{kind}").randrange(7) :: 7 * step(2)]
    got, _ = cast(values, target)
    assert same(got, rounded(values, target))


@pytest.mark.parametrize("target", NARROW)
def test_all_numbers_and_ties_round_as_in_torch(target: DType) -> None:
    values = neighbours(target, "f4")
    if target is DType.F8_E4M3:  # beyond, torch 2.6 makes NaN and newer ones the largest
        values = values[~(np.abs(values) > 464)]
    assert same(cast(values, target)[0], of_torch(values, target))


def test_doubles_round_to_half_as_in_numpy_and_to_single_as_in_torch() -> None:
    values = neighbours(DType.F16, "f8")
    with np.errstate(all="ignore"):
        assert same(cast(values, DType.F16)[0], values.astype("f2"))
    exponents = np.arange(1 << 12, dtype="u8") << 52
    patterns = np.random.default_rng(0).integers(0, 1 << 52, 1 << 12, "u8")
    ties = (patterns >> np.uint64(29) << np.uint64(29)) | np.uint64(1 << 28)
    wide = np.concatenate([(exponents | each) for each in (patterns, ties, ties + 1)]).view("f8")
    assert same(cast(wide, DType.F32)[0], of_torch(wide, DType.F32))


def test_a_double_is_rounded_once() -> None:
    """Just above a tie of bf16, a double is the tie itself in single precision."""
    above = np.array([1 + 2**-8 + 2**-40, 2.0**-133 * (0.5 + 2**-30), 448 + 16 + 2**-20])
    assert cast(above, DType.BF16)[0].astype("f8")[0] == 1 + 2**-7
    assert cast(above, DType.BF16)[0].astype("f8")[1] == 2.0**-133
    assert cast(above, DType.F8_E4M3)[1].overflow == 1


SOURCES = [*SMALL, DType.F32, DType.F64]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("target", numbers.CASTS)
def test_losses_are_what_became_another_kind_of_number(source: DType, target: DType) -> None:
    values = (
        every(source) if source.itemsize <= 2 else neighbours(DType.BF16, KINDS[source]().dtype)
    )
    if source.itemsize > 2:
        more = [neighbours(each, values.dtype) for each in NARROW if each is not DType.BF16]
        values = np.concatenate([values, *more])
    got, losses = cast(values, target)
    one, other = values.astype("f8"), got.astype("f8")
    infinite = ~np.isnan(one) if target is DType.F8_E4M3 else np.isfinite(one)
    low = {d: float(ml_dtypes.finfo(KINDS[d]).smallest_normal) for d in (source, target)}
    small = (other != 0) & (np.abs(other) < low[target]) & (np.abs(one) >= low[source])
    assert losses == Losses(
        int((infinite & ~np.isfinite(other)).sum()),
        int(((one != 0) & (other == 0)).sum()),
        int(small.sum()),
    )
    assert (np.signbit(other) == np.signbit(one))[one == 0].all()


@pytest.mark.parametrize("target", NARROW)
def test_clamp_makes_what_is_too_large_the_largest(target: DType) -> None:
    values = neighbours(target, "f8")
    (plain, lost), (got, same_lost) = cast(values, target), cast(values, target, clamp=True)
    largest = float(ml_dtypes.finfo(KINDS[target]).max)
    assert numbers.largest(target) == largest
    assert lost == same_lost
    infinite = np.isinf(values) if target is not DType.F8_E4M3 else np.zeros(len(values), bool)
    beyond = ~np.isfinite(plain.astype("f8")) & ~np.isnan(values) & ~infinite
    assert beyond.sum() == lost.overflow > 0
    assert (got.astype("f8")[beyond] == np.copysign(largest, values[beyond])).all()
    assert same(got[~beyond], plain[~beyond])


def test_nan_infinity_and_minus_zero_stay() -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0], "f4")
    for target in numbers.CASTS:
        nan, high, low, zero = cast(values, target)[0].astype("f8")
        assert np.isnan(nan)
        assert zero == 0
        assert np.signbit(zero)
        if target is not DType.F8_E4M3:
            assert (high, low) == (np.inf, -np.inf)
    clamped = cast(values, DType.F8_E4M3, clamp=True)[0].astype("f8")
    assert clamped[1:3].tolist() == [448, -448]


def test_signalling_nans_stay_nan() -> None:
    single = np.array([0x7F80_0001, 0xFF80_0001, 0x7FFF_FFFF], "u4").view("f4")
    double = np.array([0x7FF0_0000_0000_0001, 0xFFF0_0000_0000_0001, 2**63 - 1], "u8").view("f8")
    for values in (single, double):
        for target in numbers.CASTS:
            assert np.isnan(cast(values, target)[0].astype("f8")).all()


@pytest.mark.parametrize(
    ("word", "dtype"),
    [
        *((word, DType.BF16) for word in ("bf16", "bfloat16", "BF16", "torch.bfloat16")),
        *((word, DType.F16) for word in ("f16", "fp16", "float16", "half", "FP16")),
        *((word, DType.F32) for word in ("f32", "fp32", "float32", "float", "F32")),
        *((word, DType.F64) for word in ("f64", "double", "Float64")),
        *((word, DType.F8_E4M3) for word in ("f8_e4m3", "float8_e4m3fn", "fp8_e4m3", "F8_E4M3")),
        *((word, DType.F8_E5M2) for word in ("f8_e5m2", "float8_e5m2")),
        *((word, DType.I64) for word in ("i64", "int64", "long")),
        *((word, None) for word in ("", "b16", "e4m3", "float8", "16")),
    ],
)
def test_words_for_dtypes(word: str, dtype: DType | None) -> None:
    from ckptool.tensors.dtype import named

    assert named(word) is dtype


def test_every_name_of_torch_and_safetensors_is_a_word() -> None:
    from ckptool.tensors.dtype import named

    for dtype in DType:
        for name in filter(None, (dtype.safetensors_name, dtype.torch_name)):
            assert named(name) is dtype
    assert all(named(name) is dtype for name, dtype in BY_TORCH_NAME.items())
