"""`keys --stats`, judged by torch in double precision."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, sampled

import ckptool
from ckptool.cli.report_stats import bar

Run = Callable[..., Any]
GOOD = sorted(path.name for path in (FIXTURES / "good").glob("*.pth"))
MOST = 1 << 24  # elements that torch gets a copy of; one tensor is expanded from far fewer
WORDS = ("min", "max", "mean", "std", "zeros", "nan", "inf")


def expected(tensor: torch.Tensor) -> dict[str, Any]:
    """Return what torch says of the finite elements; a complex number is two."""
    flat = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    values = flat.detach().double().flatten()
    finite = values[values.isfinite()]
    none = not len(finite)
    return {
        "min": None if none else finite.min().item(),
        "max": None if none else finite.max().item(),
        "mean": None if none else finite.mean().item(),
        "std": None if none else finite.std(correction=0).item(),
        "zeros": int((finite == 0).sum()),
        "nan": int(values.isnan().sum()),
        "inf": int(values.isinf().sum()),
    }


def assert_alike(found: dict[str, Any], tensor: torch.Tensor) -> None:
    said = {name: found[name] for name in WORDS}
    wanted = expected(tensor)
    exact = ("min", "max", "zeros", "nan", "inf")
    assert [said[name] for name in exact] == [wanted[name] for name in exact], found["key"]
    for name in ("mean", "std"):
        near = None if wanted[name] is None else pytest.approx(wanted[name], rel=1e-9, abs=1e-12)
        assert said[name] == near, found["key"]


JUDGED = (
    "F64 F32 F16 BF16 F8_E4M3 F8_E5M2 F8_E4M3FNUZ F8_E5M2FNUZ F8_E8M0 C128 C64 C32 "
    "I64 I32 I16 I8 U64 U32 U16 U8 BOOL"
).split()


@pytest.mark.parametrize("name", sorted({*sampled(GOOD, 4), "every_dtype.pth"}))
def test_every_dense_tensor_of_a_fixture(name: str) -> None:
    listing = ckptool.keys(FIXTURES / "good" / name, all=True, stats=True)
    try:
        tensors = ckptool.load_state_dict(FIXTURES / "good" / name)
        plain = {key: value for key, value in tensors.items() if isinstance(value, torch.Tensor)}
    except ckptool.CkptoolError:
        return
    for found in ckptool.keys(FIXTURES / "good" / name, stats=True).to_dict()["tensors"]:
        tensor = plain.get(found["key"])
        if tensor is None or tensor.is_quantized or tensor.layout is not torch.strided:
            continue
        if found["dtype"] in JUDGED and tensor.numel() <= MOST:
            assert_alike(found, tensor)
    assert len(listing.to_dict()["tensors"]) == len(listing)


@pytest.mark.parametrize(
    "dtype", ["float64", "float32", "float16", "bfloat16", "float8_e5m2", "int8"]
)
def test_many_blocks_and_odd_values(dtype: str, tmp_path: Path) -> None:
    values = torch.linspace(-100, 100, 300_001, dtype=torch.float64) ** 3 / 1e4 + 1000
    if dtype == "int8":
        values = values % 100
    tensor = values.to(getattr(torch, dtype))
    if tensor.is_floating_point():
        odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0]).to(tensor.dtype)
        tensor[torch.arange(5) * 70_000] = odd
    torch.save({"w": tensor, "turned": tensor[:300_000].view(600, 500).t()}, tmp_path / "w.pth")
    found = ckptool.keys(tmp_path / "w.pth", stats=True).to_dict()["tensors"]
    assert_alike(found[0], tensor)
    assert_alike(found[1], tensor[:300_000])


def test_a_mean_that_is_far_from_zero(tmp_path: Path) -> None:
    """Where the difference of two sums would be lost; and squares that no double holds."""
    generator = torch.Generator().manual_seed(0)
    near = (torch.randn(100_000, generator=generator).double() * 1e-3 + 1e6).double()
    huge = torch.tensor([1e300, -1e308], dtype=torch.float64)
    torch.save({"near": near, "huge": huge}, tmp_path / "w.pth")
    found, largest = ckptool.keys(tmp_path / "w.pth", stats=True).to_dict()["tensors"]
    assert_alike(found, near)
    assert (largest["max"], largest["std"]) == (1e300, None)


def test_sorted_by_what_is_largest(run: Run, tmp_path: Path) -> None:
    made = {
        "a": torch.tensor([1.0, -9.0]),
        "b": torch.tensor([math.nan, 2.0]),
        "c": torch.tensor([0.0, 30.0]),
    }
    torch.save(made, tmp_path / "w.pth")
    for word, order in {"absmax": "cab", "std": "cab", "nan": "bac", "file": "abc"}.items():
        said = run("keys", "--stats", "--sort", word, "--json", tmp_path / "w.pth").out
        assert "".join(each["key"] for each in json.loads(said)["tensors"]) == order
    done = run("keys", "--sort", "std", tmp_path / "w.pth")
    assert (done.code, done.out) == (2, "")
    row = run("keys", "--stats", tmp_path / "w.pth").out.splitlines()[1].split("\t")
    assert row == ["b", "F32", "[2]", "8", "2.0", "2.0", "2.0", "0.0", "0", "1", "0"]


def test_what_has_no_numbers_has_no_figures(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(0), "n": torch.tensor([math.nan])}, tmp_path / "w.pth")
    for found in ckptool.keys(tmp_path / "w.pth", stats=True).to_dict()["tensors"]:
        assert [found[name] for name in WORDS[:4]] == [None] * 4


def test_a_bar_shows_where_the_elements_are() -> None:
    from ckptool.tensors.dtype import DType
    from ckptool.tensors.statistics import statistics

    data = struct.pack("<8f", 0, 0, 0, 0, 0, 0, 0, 10)
    assert bar(statistics(data, DType.F32, cells=True)) == "|#        .|"
