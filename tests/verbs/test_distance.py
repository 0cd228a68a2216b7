"""How far `diff` says that tensors are: relative norm and cosine, judged by torch in float64."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, sampled

import ckptool
from ckptool.cli.report_diff import differences
from ckptool.verbs.difference import Change

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")

Run = Callable[..., Any]
GOOD = sorted(path.name for path in (FIXTURES / "good").glob("*.pth"))
FLOATS = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu complex64 complex128"
).split()
FLOATS = [name for name in FLOATS if hasattr(torch, name)]  # torch 2.6 lacks the last float8
INTEGERS = "int64 int32 int16 int8 uint8 uint16 uint32 bool".split()
CASTS = "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2".split()


def saved(path: Path, content: Any) -> Path:
    torch.save(content, path)
    return path


def doubles(tensor: Any) -> Any:
    dense = tensor.detach().resolve_conj().resolve_neg()
    return (torch.view_as_real(dense) if dense.is_complex() else dense).double().flatten()


def expected(left: Any, right: Any) -> tuple[float | None, float | None]:
    """Return relative norm and cosine of what is finite on both sides."""
    one, other = doubles(left), doubles(right)
    finite = one.isfinite() & other.isfinite()
    one, other = one[finite], other[finite]
    if not len(one):
        return None, None
    norm, apart = one.norm().item(), (one - other).norm().item()
    relative = apart / norm if norm else (math.inf if apart else 0.0)
    if not norm or not other.norm():
        return relative, None
    return relative, (one.dot(other) / one.norm() / other.norm()).item()


def assert_far(change: Change, left: Any, right: Any) -> None:
    wanted = expected(left, right)
    for said, meant in zip((change.relative, change.cosine), wanted, strict=True):
        assert said == (None if meant is None else pytest.approx(meant, rel=1e-9, abs=1e-12))


def random(dtype: str, count: int, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, dtype)
    if kind.is_complex:
        return torch.view_as_complex(torch.randn(count, 2, generator=generator).double()).to(kind)
    values = torch.randn(count, generator=generator).double() * 20
    if dtype == "bool":
        return values > 0
    return (values.abs() if dtype in ("float8_e8m0fnu", *INTEGERS) else values).to(kind)


def only(found: ckptool.Difference) -> Change:
    (change,) = found.state.changed
    return change


@pytest.mark.parametrize("share", [1e-4, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS])
def test_distance_of_one_dtype(tmp_path: Path, dtype: str, share: float) -> None:
    """Of several blocks, the first of which may be equal."""
    count = 300_001
    left, other = random(dtype, count), random(dtype, count, 1)
    mask = torch.rand(count, generator=torch.Generator().manual_seed(2)) < share
    mask[: 0 if share == 1 else 150_000] = False
    width = left.element_size()
    right = left.clone()
    bytes_of = [each.view(torch.uint8).view(count, width) for each in (right, other)]
    bytes_of[0][mask] = bytes_of[1][mask]
    one, two = saved(tmp_path / "1.pth", {"w": left}), saved(tmp_path / "2.pth", {"w": right})
    assert_far(only(ckptool.diff(one, two)), left, right)


@pytest.mark.parametrize("name", sampled(GOOD, 4))
def test_every_fixture_against_what_it_is_scaled_to(tmp_path: Path, name: str) -> None:
    try:
        tensors = ckptool.load_state_dict(FIXTURES / "good" / name)
    except ckptool.CkptoolError:
        return
    dense = {
        key: value
        for key, value in tensors.items()
        if key
        and isinstance(value, torch.Tensor)
        and value.layout is torch.strided
        and 0 < value.numel() <= 1 << 24  # one is expanded from far fewer
        and str(value.dtype).removeprefix("torch.") in (*FLOATS, *INTEGERS)
    }
    left = {key: value.detach().clone() for key, value in dense.items()}
    right = {key: changed(value) for key, value in left.items()}
    found = ckptool.diff(saved(tmp_path / "1.pth", left), saved(tmp_path / "2.pth", right))
    assert {change.key for change in found} == set(dense)
    for change in found:
        assert_far(change, left[change.key], right[change.key])


def changed(tensor: Any) -> Any:
    """Give a tensor with another last element, whatever the dtype."""
    other = tensor.resolve_conj().resolve_neg().contiguous().clone()
    other.view(-1)[-1:].view(torch.uint8)[-1] ^= 1
    return other


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    left = torch.tensor([math.nan, 1.0, math.inf, 3.0, 4.0])
    right = torch.tensor([1.0, 2.0, math.inf, math.nan, 5.0])
    change = only(ckptool.diff({"w": left}, {"w": right}))
    assert change.relative == pytest.approx(math.sqrt(2) / math.sqrt(17))
    nothing = only(ckptool.diff({"w": left[:1]}, {"w": right[:1]}))
    assert (nothing.relative, nothing.cosine) == (None, None)


def test_zeros_and_huge_numbers(tmp_path: Path, run: Run) -> None:
    zero, one = torch.zeros(3), torch.ones(3)
    grown = only(ckptool.diff({"w": zero}, {"w": one}))
    assert (grown.relative, grown.cosine) == (math.inf, None)
    assert grown.to_dict()["relative"] is None
    gone = only(ckptool.diff({"w": one}, {"w": zero}))
    assert (gone.relative, gone.cosine) == (1.0, None)
    signs = only(ckptool.diff({"w": zero}, {"w": -zero}))
    assert (signs.relative, signs.cosine) == (0.0, None)
    huge = only(ckptool.diff({"w": one.double() * 1e300}, {"w": one.double() * 2e300}))
    assert (huge.relative, huge.cosine) == (None, None)


def test_layouts_and_repetitions(tmp_path: Path) -> None:
    base = torch.randn(60, 50, generator=torch.Generator().manual_seed(0))
    tensors = {"turned": base.t(), "again": base[:1].expand(7, 50), "rows": base[::3]}
    others = {key: value.clone() * 1.5 for key, value in tensors.items()}
    one, two = saved(tmp_path / "1.pth", tensors), saved(tmp_path / "2.pth", others)
    found = ckptool.diff(one, two)
    assert len(list(found)) == 3
    for change in found:
        assert_far(change, tensors[change.key], others[change.key])


def test_a_deflated_file_whose_end_differs(tmp_path: Path) -> None:
    left = torch.randn(1_000_000, generator=torch.Generator().manual_seed(0))
    right = left.clone()
    right[-1] += 1
    one, two = saved(tmp_path / "1.pth", {"w": left}), saved(tmp_path / "2.pth", {"w": right})
    packed = tmp_path / "packed.pth"
    with zipfile.ZipFile(one) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    assert_far(only(ckptool.diff(packed, two)), left, right)


def test_what_has_no_numbers_has_no_distance(tmp_path: Path) -> None:
    pairs = torch.arange(6, dtype=torch.uint8)
    if not hasattr(torch, "float4_e2m1fn_x2"):
        pytest.skip("this torch has no dtype of two floats in a byte")
    packed = [
        saved(tmp_path / f"{at}.pth", {"w": (pairs + at).view(torch.float4_e2m1fn_x2)})
        for at in (0, 1)
    ]
    change = only(ckptool.diff(*packed))
    assert (change.relative, change.cosine, change.values.count) == (None, None, 6)


# Across dtypes.


@pytest.mark.parametrize("narrow", CASTS)
@pytest.mark.parametrize("wide", ["float64", "float32", "float16", "bfloat16"])
def test_what_torch_rounded_is_equal_after_rounding(tmp_path: Path, wide: str, narrow: str) -> None:
    if wide == narrow:
        return
    left = random(wide, 200_003)
    left[:3] = torch.tensor([math.nan, 0.0, -0.0])
    right = (
        left.to(torch.float32).to(getattr(torch, narrow))
        if wide != "float64"
        else left.to(getattr(torch, narrow))
    )
    if wide == "float64" and narrow not in ("float32", "float16"):
        left = left.float().double()  # torch rounds a double twice
        right = left.float().to(getattr(torch, narrow))
    if narrow == "float16":
        left = left.float().to(getattr(torch, wide))
        right = left.float().half()
    for one, other in ((left, right), (right, left)):
        change = only(ckptool.diff({"w": one}, {"w": other}))
        assert (change.what, change.equal_after_rounding) == ("dtype", True)
        assert change.values is not None
        assert change.values.count == 0
        assert_far(change, one, other)
    moved = right.clone()
    moved.view(torch.uint8)[-1] ^= 1
    change = only(ckptool.diff({"w": left}, {"w": moved}))
    assert change.equal_after_rounding is False
    assert (change.values.count, change.first) == (1, (200_002,))


@pytest.mark.parametrize(
    ("one", "other", "equal"),
    [
        (torch.tensor([1, 2, 3]), torch.tensor([1, 2, 3], dtype=torch.int32), True),
        (torch.tensor([1, 2, 3]), torch.tensor([1.0, 2.0, 3.5]), False),
        (torch.tensor([1, 0]), torch.tensor([True, False]), True),
        (torch.tensor(1 << 40), torch.tensor(float(1 << 40)), True),
        (torch.tensor([1 + 1j]), torch.tensor([1 + 1j], dtype=torch.complex128), True),
        (torch.tensor([1 + 1j]), torch.tensor([1.0]), None),
        (torch.zeros(0), torch.zeros(0).half(), None),
        (torch.quantize_per_tensor(torch.ones(2), 0.5, 0, torch.qint8), torch.ones(2), None),
    ],
)
def test_kinds_of_dtypes(one: Any, other: Any, equal: bool | None) -> None:
    change = only(ckptool.diff({"w": one}, {"w": other}))
    assert (change.what, change.equal_after_rounding) == ("dtype", equal)
    assert (change.relative is None) is (equal is None)


def test_a_model_in_half_precision(run: Run, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    wide = {f"layers.{at}.weight": torch.randn(8, 8, generator=generator) for at in range(3)}
    half = {key: value.half() for key, value in wide.items()}
    half["layers.2.weight"][1, 2] += 1
    one, other = saved(tmp_path / "fp32.pth", wide), saved(tmp_path / "fp16.pth", half)
    done = run("diff", one, other)
    assert done.code == 1
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert [row[0] for row in rows] == ["dtype"] * 3
    assert [row[-1] for row in rows] == ["equal-after-rounding"] * 2 + ["differs-after-rounding"]
    assert "3 of 3 tensors differ in dtype, 2 of them equal after rounding" in done.err
    _, *table = differences(ckptool.diff(one, other), 200)
    assert [line.split("  ")[-1] for line in table] == [
        "F32 -> F16, equal rounded",
        "F32 -> F16, equal rounded",
        "F32 -> F16, 1 differ",
    ]
    document = run("diff", "--json", one, other).document["changed"][2]
    assert document["equal_after_rounding"] is False
    assert (document["left"], document["count"], document["first"]) == ("F32", 1, [1, 2])
    unread = run("diff", "--json", "--structure", one, other).document["changed"]
    assert [each["equal_after_rounding"] for each in unread] == [None] * 3


def test_sorted_by_how_far(run: Run, tmp_path: Path) -> None:
    left = {key: torch.ones(4) for key in "abcd"}
    right = {"a": left["a"] + 1, "b": left["b"].half(), "c": left["c"] * 9, "e": left["d"]}
    one, other = saved(tmp_path / "1.pth", left), saved(tmp_path / "2.pth", right)
    rows = run("diff", "--sort", "far", one, other).out.splitlines()
    assert [row.split("\t")[1] for row in rows] == ["d", "e", "c", "a", "b"]
    refused = run("diff", "--structure", "--sort", "far", one, other)
    assert refused.code == 2
