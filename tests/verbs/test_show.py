"""`show`: values judged by torch, which prints them; plain values by pickle."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, step

import ckptool
from ckptool.cli.report_show import value_lines
from ckptool.verbs.showing import show

Run = Callable[..., Any]
DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.uint16, torch.uint32, torch.uint64, torch.complex64, torch.complex128),
]
SHAPES = [
    (),
    (0,),
    (0, 3),
    (1,),
    (7,),
    (40,),
    (3, 4),
    (2, 3, 5),
    (1001,),
    (30, 50),
    (8, 7, 40),
    (600, 2),
]


def tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return numbers of several magnitudes, with NaN and infinity now and then."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    values *= 10.0 ** (seed % 7 - 2)
    if seed % 3 == 1:
        values = values.round()
    if not (dtype.is_floating_point or dtype.is_complex):
        values = values.abs() if "u" in str(dtype) else values
        return (values > 0.5) if dtype is torch.bool else values.clamp(-100, 100).long().to(dtype)
    if seed % 5 == 4 and values.numel() > 2:
        values.view(-1)[:2] = torch.tensor([math.nan, -math.inf])
    if dtype.is_complex:
        return torch.complex(values, values.flip(0) if shape else values).to(dtype)
    return values.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_are_printed_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    made = {
        f"{'x'.join(map(str, shape))}.{seed}": tensor(dtype, shape, seed)
        for shape in SHAPES
        for seed in range(0, 15, step(6))
    }
    torch.save(made, tmp_path / "made.pth")
    for key, value in made.items():
        try:
            expected = str(value)
        except (RuntimeError, NotImplementedError):  # of a dtype that this torch cannot print
            continue
        assert "\n".join(value_lines(show(tmp_path / "made.pth", key))) == expected, key


@pytest.mark.parametrize(
    "index", ["0", "-1", "1:3", ":, 2", "..., 0", "::2, 1:", "0, 1, 2", "5:2", "-2:"]
)
def test_a_slice_is_that_of_torch(index: str, tmp_path: Path) -> None:
    value = torch.arange(60.0).view(4, 5, 3)
    torch.save({"w": value}, tmp_path / "w.pth")
    chosen = eval(f"value[{index}]", {"value": value})
    shown = ckptool.show(tmp_path / "w.pth", "w", slice=index)
    assert (shown.shape, shown.values) == (tuple(chosen.shape), chosen.flatten().tolist())


def test_every_tensor_of_a_fixture_is_shown(good: Path) -> None:
    for name in ("model_best.pth.tar", "strided.pth", "tied.pth", "legacy.pth"):
        if not (good / name).is_file():
            continue
        loaded = torch.load(good / name, weights_only=True)
        entries = loaded.get("state_dict", loaded)
        for key, value in entries.items():
            shown = show(good / name, key)
            assert "\n".join(value_lines(shown)) == str(value), (name, key)


def test_plain_values_are_data(run: Run, good: Path) -> None:
    assert run("show", good / "model_best.pth.tar", "epoch").out == "90\n"
    assert run("show", good / "model_best.pth.tar", "arch").out == "resnet18\n"
    done = run("show", "--json", good / "model_best.pth.tar", "optimizer.param_groups.0.lr")
    assert json.loads(done.out)["values"] == 0.5
    done = run("show", good / "model_best.pth.tar", "epohc")
    assert (done.code, done.out) == (2, "")
    assert "did you mean epoch?" in done.err
    done = run("show", good / "model_best.pth.tar", "features.0.weigh")
    hint = next(line for line in done.err.splitlines() if "did you mean" in line)
    close = hint.partition("did you mean ")[2].rstrip("?").split(" or ")
    assert "module.features.0.weight" in close
    assert len({*close}) == len(close)
    done = run("show", good / "model_best.pth.tar", "nothing.like.it")
    command = f"ckptool keys --all {good / 'model_best.pth.tar'}   lists all tensors by path"
    assert (done.code, f"hint: {command}\n" in done.err) == (2, True)


def test_nothing_is_executed(run: Run) -> None:
    done = run("show", FIXTURES / "hostile" / "eval_in_namespace.pth", "hook")
    assert done.code == 0
    assert not (FIXTURES / "hostile" / "ckptool-was-executed").exists()


def test_the_document_is_json_whatever_the_values(run: Run, tmp_path: Path) -> None:
    torch.save(
        {"w": torch.tensor([math.nan, math.inf, 1.0]), "c": torch.tensor([1 + 2j])},
        tmp_path / "w.pth",
    )

    def strict(text: str) -> Any:
        return json.loads(text, parse_constant=lambda name: pytest.fail(name))

    assert strict(run("show", "--json", tmp_path / "w.pth", "w").out) == {
        "schema": "show/1",
        "file": str(tmp_path / "w.pth"),
        "key": "w",
        "dtype": "F32",
        "shape": [3],
        "values": ["nan", "inf", 1.0],
        "truncated": False,
        "kept_shape": None,
    }
    assert strict(run("show", "--json", tmp_path / "w.pth", "c").out)["values"] == [[1.0, 2.0]]


def test_more_than_a_thousand_are_asked_for(run: Run, tmp_path: Path) -> None:
    value = torch.arange(2000)
    torch.save({"w": value}, tmp_path / "w.pth")
    said = json.loads(run("show", "--json", tmp_path / "w.pth", "w").out)
    assert (said["values"], said["truncated"]) == ([0, 1, 2, 1997, 1998, 1999], True)
    said = json.loads(run("show", "--all", "--json", tmp_path / "w.pth", "w").out)
    assert (said["values"], said["truncated"]) == (value.tolist(), False)
