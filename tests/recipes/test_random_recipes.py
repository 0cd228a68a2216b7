"""Recipes at random: what ckptool writes is what the same steps make in torch, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled
from journeys import Run, convert, same
from plain import Draw, Step, tied

NUMBERS = range(400)


def toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, int) else f"'{value}'"


def written(steps: list[Step], path: Path) -> Path:
    lines = [f"[[step]]\n{word} = {toml(fields)}" for word, fields in steps]
    path.write_text("\n".join(["recipe = 1", *lines, ""]), encoding="utf-8")
    return path


@pytest.mark.parametrize("number", sampled(NUMBERS, 20))
def test_a_recipe_makes_what_torch_makes(run: Run, tmp_path: Path, number: int) -> None:
    draw = Draw(number, steps=1 + number % 7, back=False)
    torch.save(draw.start, tmp_path / "in.pth")
    recipe = written(draw.recipe, tmp_path / "r.toml")
    out = convert(run, tmp_path / "in.pth", tmp_path / "out.pth", "--recipe", recipe)
    made = torch.load(out, weights_only=True)
    same(made, draw.state, ordered=False)
    assert tied(made) == tied(draw.state)


@pytest.mark.parametrize("number", sampled(NUMBERS, 20))
def test_a_recipe_and_its_way_back_change_nothing(run: Run, tmp_path: Path, number: int) -> None:
    draw = Draw(number, steps=1 + number % 7, back=True)
    torch.save(draw.start, tmp_path / "in.pth")
    recipe = written(draw.recipe, tmp_path / "r.toml")
    out = convert(run, tmp_path / "in.pth", tmp_path / "out.pth", "--recipe", recipe)
    back = convert(run, out, tmp_path / "back.pth", "--recipe", recipe, "--reverse")
    made = torch.load(back, weights_only=True)
    same(made, draw.start, ordered=False)
    assert tied(made) == tied(draw.start)
