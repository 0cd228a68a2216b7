"""What `diff` says of values, judged by torch and numpy."""

from __future__ import annotations

import math
import struct
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import ckptool
from ckptool.tensors import numbers
from ckptool.tensors.differences import differences
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.summaries import Tolerance, Values
from ckptool.verbs.difference import Change, Difference

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
OTHERS = [torch.bool, torch.complex64]
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


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex128], ids=str)
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
    kind = BY_TORCH_NAME[str(dtype).removeprefix("torch.")]
    with np.errstate(invalid="ignore"):  # signalling NaNs
        ours = numbers.floats_of(numbers.bits_of(data.numpy().tobytes(), kind), kind)
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


# Any dtype and any elements, against arithmetic in Python, number by number.

KINDS = [each for each in DType if each.bits >= 8]
# Zeros, ones, infinities, NaNs and their neighbours in one dtype or another, from the top byte.
TOPS = (b"\x00", b"\x80", b"\x7f\x80", b"\xff\x80", b"\x7f\xf0", b"\x7c", b"\xfc", b"\x7f", b"\xff")
PARTS = {
    DType.C128: torch.float64,
    DType.C64: torch.float32,
    DType.C32: torch.float16,
    DType.BC32: torch.bfloat16,
    DType.QI8: torch.int8,
    DType.QU8: torch.uint8,
    DType.QI32: torch.int32,
}


def part_of(dtype: DType) -> Any:
    """Return torch's dtype of the numbers in an element; None where there are none in it."""
    kind = PARTS.get(dtype) or getattr(torch, dtype.torch_name, None)
    return kind if kind in FLOATS or kind in INTEGERS else None


def width_of(dtype: DType) -> int:
    return dtype.itemsize // (2 if dtype in numbers.COMPLEX else 1)


@st.composite
def elements(draw: Any, dtype: DType) -> bytes:
    """Draw a few elements, mostly special ones."""
    width = width_of(dtype)
    special = st.sampled_from([(top + bytes(7))[:width][::-1] for top in TOPS])
    part = st.one_of(special, st.binary(min_size=width, max_size=width))
    return b"".join(draw(st.lists(part, min_size=8, max_size=8)))


def counted(dtype: DType, left: bytes, right: bytes, tolerance: Tolerance) -> Values:
    """Give the counts alone: how far both are is judged in test_distance.py."""
    return replace(differences(dtype, left, right, tolerance), distance=Values(0).distance)


def expected(dtype: DType, left: bytes, right: bytes, tolerance: Tolerance) -> Values:
    """Count what `differences` counts, one number after the other."""
    kind, width = part_of(dtype), width_of(dtype)
    found = Values(len(left) // dtype.itemsize)
    differing, far, gaps, steps = {}, {}, [], []
    for at in range(0, len(left), width):
        pair = [data[at : at + width] for data in (left, right)]
        if pair[0] == pair[1]:
            continue
        differing[at // dtype.itemsize] = None
        beyond = True
        if kind is not None:
            one, other = (torch.frombuffer(bytearray(each), dtype=kind) for each in pair)
            if kind in INTEGERS:
                one, other = one.item(), other.item()
            else:
                one, other = one.double().item(), other.double().item()
            if math.isfinite(one) and math.isfinite(other):
                gap = abs(one - other)
                if gap or kind in INTEGERS:
                    gaps.append(gap)
                    rows = [np.frombuffer(each, "u1")[None] for each in pair]
                    one_step, other_step = (ordered(row, width, kind)[0] for row in rows)
                    steps.append(abs(one_step - other_step))
                found.zero_signs += not gap
                if tolerance.given:
                    beyond = float(gap) > tolerance.atol + tolerance.rtol * abs(float(one))
            elif math.isnan(one) and math.isnan(other):
                found.nan_payloads += 1
                beyond = not tolerance.given
            elif math.isnan(one) or math.isnan(other):
                found.nan_one_side += 1
            else:
                found.infinities += 1
        if beyond:
            far[at // dtype.itemsize] = None
    found.count, found.within = len(far), len(differing) - len(far)
    found.first = min(far, default=None)
    found.max_abs = max(gaps, default=None)
    found.max_ulp = max(steps, default=None) if kind in FLOATS else None
    return found


@settings(max_examples=400, deadline=None)
@given(st.data(), st.sampled_from([0.0, 1e-3, 1e30, math.inf]), st.sampled_from([0.0, 0.25]))
def test_any_elements_are_counted_as_one_by_one(data: Any, atol: float, rtol: float) -> None:
    dtype = data.draw(st.sampled_from(KINDS))
    pair = (data.draw(elements(dtype)), data.draw(elements(dtype)))
    tolerance = Tolerance(atol, rtol)
    assert counted(dtype, *pair, tolerance) == expected(dtype, *pair, tolerance)


@pytest.mark.filterwarnings("error")
def test_numpy_has_nothing_to_say_of_odd_numbers() -> None:
    """A signalling NaN, cast to double precision, and an infinite tolerance of zero."""
    signalling, one = struct.pack("<I", 0x7F800001), struct.pack("<f", 1)
    for dtype in (DType.F32, DType.I32):
        for tolerance in (Tolerance(), Tolerance(0, math.inf)):
            arguments = (dtype, signalling + bytes(4), one * 2, tolerance)
            assert counted(*arguments) == expected(*arguments)


# Layouts: what lies in another way is the same tensor.


def write_deflated(source: Path, target: Path) -> Path:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    return target


BASE = torch.arange(2 * 3 * 4 * 5, dtype=torch.float32).reshape(2, 3, 4, 5)
LAYOUTS = {
    "contiguous": BASE.clone(),
    "channels_last": BASE.clone().to(memory_format=torch.channels_last),
    "slice": torch.cat([torch.full((1, 3, 4, 5), 7.0), BASE.clone()])[1:],
    "columns": torch.stack([BASE, BASE + 1], dim=-1)[..., 0],
    "transposed": BASE.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),
}


@pytest.mark.parametrize("one", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_layouts_do_not_matter(tmp_path: Path, one: str, other: str) -> None:
    left, right = LAYOUTS[one], LAYOUTS[other].detach().clone(memory_format=torch.preserve_format)
    assert compare(tmp_path, left, LAYOUTS[other]).equal
    right[1, 2, 3, 1] += 0.5
    change = only_change(compare(tmp_path, left, right))
    assert change.first == (1, 2, 3, 1)
    assert change.values is not None
    assert (change.values.count, change.values.max_abs) == (1, 0.5)


def test_what_lies_between_the_elements_does_not_matter(tmp_path: Path) -> None:
    left, right = torch.zeros(6, 2), torch.zeros(6, 2)
    right[:, 1] = 5
    assert compare(tmp_path, left[:, 0], right[:, 0]).equal


def test_a_repeated_tensor_is_read_once_and_counted_in_full(tmp_path: Path) -> None:
    one, other = torch.zeros(3, 1, 2), torch.zeros(3, 1, 2)
    other[1, 0, 1] = 4
    change = only_change(compare(tmp_path, one.expand(3, 1 << 40, 2), other.expand(3, 1 << 40, 2)))
    assert change.first == (1, 0, 1)
    assert change.values is not None
    assert (change.values.count, change.values.of) == (1 << 40, 6 << 40)


def test_a_view_that_overlaps_beyond_measure_is_refused(tmp_path: Path) -> None:
    one, other = torch.zeros(1 << 16), torch.zeros(1 << 16)
    views = [each.as_strided((1 << 15, 1 << 15), (1, 1)) for each in (one, other)]
    assert compare(tmp_path, *views).equal  # as they lie
    other[9] = 1
    with pytest.raises(ckptool.CkptoolError, match="much smaller") as caught:
        compare(tmp_path, *views)
    assert caught.value.option == "--structure"
    assert compare(tmp_path, *views, structure=True).equal


def test_byte_orders_do_not_matter(good: Path, tmp_path: Path) -> None:
    native = tmp_path / "native.pth"
    torch.save(torch.load(good / "big_endian.pth", weights_only=True), native)
    assert ckptool.diff(good / "big_endian.pth", native).equal
    entries = torch.load(native, weights_only=True)
    key = next(key for key, value in entries.items() if value.dtype == torch.float32)
    entries[key].view(-1)[0] += 1
    changed = ckptool.diff(good / "big_endian.pth", save(tmp_path / "changed.pth", **entries))
    again = ckptool.diff(good / "big_endian.pth", good / "big_endian.pth")
    assert again.equal
    change = only_change(changed)
    assert (change.key, change.values and change.values.max_abs) == (key, 1.0)


def test_the_same_bytes_in_two_byte_orders_differ(good: Path, tmp_path: Path) -> None:
    target = tmp_path / "little.pth"
    with zipfile.ZipFile(good / "big_endian.pth") as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, b"little" if name.endswith("/byteorder") else data)
    found = ckptool.diff(good / "big_endian.pth", target)
    assert {change.what for change in found.state.changed} == {"values"}


def test_pending_conjugation_and_negation_are_done_first(tmp_path: Path) -> None:
    base = torch.randn(5, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    assert base.conj().is_conj()
    assert compare(tmp_path, base.conj(), base.conj().resolve_conj()).equal
    assert compare(tmp_path, base.conj().imag, base.conj().imag.resolve_neg()).equal
    assert not compare(tmp_path, base.conj(), base).equal


def test_deflated_storages_are_unpacked(tmp_path: Path) -> None:
    big = random_tensor(torch.float32, 5, (700, 300))
    entries = {"a": big, "b": big[100:200], "c": big.T}
    plain = save(tmp_path / "plain.pth", **entries)
    packed = write_deflated(plain, tmp_path / "packed.pth")
    assert ckptool.diff(plain, packed).equal
    assert ckptool.diff(packed, packed).equal
    big[150, 7] = 12345
    found = ckptool.diff(packed, save(tmp_path / "changed.pth", **entries))
    assert {change.key: change.first for change in found.state.changed} == {
        "a": (150, 7),
        "b": (50, 7),
        "c": (7, 150),
    }


def test_elements_are_whole_where_a_deflated_storage_ends_a_block(tmp_path: Path) -> None:
    """zlib gives back what fits, in the middle of an element as well."""
    left = random_tensor(torch.float64, 5, (400_003,))
    left[:100_000] = 0
    right = left.clone()
    right.view(torch.int64)[::100] ^= 1 << 40
    plain = compare(tmp_path, left, right)
    for side in ("left", "right"):
        write_deflated(tmp_path / f"{side}.pth", tmp_path / f"{side}-packed.pth")
    pairs = [("left-packed", "right"), ("left", "right-packed"), ("left-packed", "right-packed")]
    for pair in pairs:
        one, other = (tmp_path / f"{name}.pth" for name in pair)
        assert ckptool.diff(one, other).state.changed == plain.state.changed


def test_a_deflated_file_cannot_be_unpacked_for_ever(tmp_path: Path) -> None:
    zeros = torch.zeros(1 << 22)
    entries = {f"k{at}": zeros[at:] for at in range(32)}
    entries |= {f"l{at}": torch.zeros(1 << 20) for at in range(2)}
    packed = write_deflated(save(tmp_path / "plain.pth", **entries), tmp_path / "packed.pth")
    with pytest.raises(ckptool.CkptoolError, match="would be compared"):
        ckptool.diff(packed, packed)


def test_large_tensors_are_compared_block_by_block(tmp_path: Path) -> None:
    left = random_tensor(torch.bfloat16, 11, (3, 1 << 19))
    right = left.clone()
    right.view(torch.int16)[2, (1 << 19) - 1] ^= 1
    right.view(torch.int16)[1, 5] ^= 1
    change = only_change(compare(tmp_path, left, right))
    assert change.first == (1, 5)
    assert change.values is not None
    assert (change.values.count, change.values.max_ulp) == (2, 1)


# Dtypes that are more than numbers, and tensors of tensors.


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, of what it will do without
def test_quantizers_count(tmp_path: Path) -> None:
    made = [
        torch.quantize_per_tensor(torch.ones(4), scale, 0, torch.qint8) for scale in (0.5, 0.25)
    ]
    found = compare(tmp_path, *made)
    whats = [change.what for change in found.state.changed]
    assert whats == ["quantizer", "values"]
    assert (found.state.changed[0].left, found.state.changed[0].right) == ("0.5", "0.25")
    scales = [torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.25])]
    zeros = torch.zeros(2, dtype=torch.int64)
    per_channel = [
        torch.quantize_per_channel(torch.zeros(2, 2), scale.double(), zeros, 0, torch.qint8)
        for scale in scales
    ]
    change = only_change(compare(tmp_path, *per_channel))
    assert change.key.startswith("w.(quantizer)")
    assert compare(tmp_path, per_channel[0], per_channel[0].clone()).equal


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparse_tensors_are_compared_by_their_parts(tmp_path: Path) -> None:
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    other = dense.clone()
    other[1, 0] = 4
    change = only_change(compare(tmp_path, dense.to_sparse(), other.to_sparse()))
    assert (change.key, change.first) == ("w.(values)", (1,))
    assert compare(tmp_path, dense.to_sparse(), dense.to_sparse()).equal
    assert only_change(compare(tmp_path, dense.to_sparse(), dense)).what == "layout"
    assert not compare(tmp_path, dense.to_sparse(), dense.to_sparse_csr()).equal


def test_elements_below_a_byte_are_counted_in_bytes(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F6_E3M2","shape":[2,4],"data_offsets":[0,6]}}'
    paths = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    for path, data in zip(paths, (bytes(6), bytes(4) + b"\1\0"), strict=True):
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    change = only_change(ckptool.diff(*paths))
    assert change.values is not None
    assert (change.values.count, change.values.of, change.values.max_abs) == (1, 6, None)
    assert change.first == (1, 1)  # bits 32 to 39 are of the elements 5 and 6


def test_dtypes_and_shapes_are_told_and_not_decoded(tmp_path: Path) -> None:
    change = only_change(compare(tmp_path, torch.ones(3), torch.ones(3, dtype=torch.float16)))
    assert (change.what, change.left, change.right) == ("dtype", "F32", "F16")
    change = only_change(compare(tmp_path, torch.ones(3), torch.ones(1, 3)))
    assert (change.what, change.left, change.right) == ("shape", "[3]", "[1, 3]")
    assert compare(tmp_path, torch.ones(0, 3), torch.ones(0, 3)).equal


# Tolerance: judged by torch.isclose.


@pytest.mark.parametrize("dtype", [*FLOATS[:4], torch.int64, torch.int16, torch.complex64], ids=str)
def test_a_tolerance_forgives_what_isclose_does(tmp_path: Path, dtype: Any) -> None:
    left = random_tensor(dtype, 3, (4000,))
    fractions = dtype.is_floating_point or dtype.is_complex
    left = left if fractions else left % 10_000
    right = left.clone()
    if fractions:
        right += torch.randn(4000, generator=torch.Generator().manual_seed(1)).to(dtype) * 0.01
    else:
        right += random_tensor(torch.uint8, 4, (4000,)).to(dtype) % 4
    atol, rtol = (0.01, 1e-3) if fractions else (1, 1e-4)
    found = compare(tmp_path, left, right, atol=atol, rtol=rtol)
    values = only_change(found).values
    assert values is not None
    one, other = (
        torch.view_as_real(each) if dtype.is_complex else each.reshape(-1, 1)
        for each in (left, right)
    )
    close = torch.isclose(other.double(), one.double(), atol=atol, rtol=rtol, equal_nan=True).all(
        dim=1
    )
    differs = torch.from_numpy((raw(left) != raw(right)).any(axis=1))
    assert values.count == int((~close).sum())
    assert values.within == int((close & differs).sum())


def test_what_is_within_the_tolerance_is_equal(tmp_path: Path) -> None:
    left = torch.tensor([1.0, math.nan, 0.0])
    right = torch.tensor([1.0 + 1e-6, math.nan, -0.0])
    right.view(torch.int32)[1] ^= 1
    found = compare(tmp_path, left, right, atol=1e-5)
    assert found.equal
    (change,) = found.state.within
    assert change.values is not None
    assert (change.values.count, change.values.within) == (0, 3)
    assert not compare(tmp_path, left, right, atol=1e-8).equal
    assert not compare(tmp_path, torch.tensor([True]), torch.tensor([False]), atol=5).equal
    infinite = torch.tensor([math.inf])
    assert not compare(tmp_path, infinite, -infinite, rtol=math.inf).equal


# Any two tensors, any change.


@settings(max_examples=60)
@given(
    st.sampled_from(DTYPES),
    st.integers(0, 2**16),
    st.lists(st.integers(1, 4), max_size=3),
    st.sampled_from([0.0, 0.1, 1.0]),
)
def test_any_change_is_found(dtype: Any, seed: int, shape: list[int], share: float) -> None:
    left = random_tensor(dtype, seed, tuple(shape))
    right = changed_copy(left, seed, share)
    differs = (raw(left) != raw(right)).any(axis=1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        safetensors_torch.save_file({"w": right}, folder / "right.safetensors")
        found = ckptool.diff(save(folder / "left.pth", w=left), folder / "right.safetensors")
    assert found.equal == (not differs.any())
    if not found.equal:
        values = only_change(found).values
        assert values is not None
        assert values.count == int(differs.sum())
