"""Recipes at random: what ckptool writes is what the same steps make in torch, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled
from journeys import Run, convert, same
from plain import Draw, State, Step, tied
from safetensors.torch import load_file, save_file

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


def saved(state: State, path: Path, container: str) -> Path:
    """Write a state_dict as its users do; safetensors takes neither ties nor strides."""
    if container == "safetensors" and not tied(state):
        path = path.with_suffix(".safetensors")
        save_file({key: tensor.clone().contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def loaded(path: Path) -> State:
    if path.suffix == ".safetensors":
        return load_file(path)
    return torch.load(path, weights_only=True)


def judged(path: Path, wanted: State) -> None:
    made = loaded(path)
    same(made, wanted, ordered=False)
    assert tied(made) == tied(wanted)


@pytest.mark.parametrize("number", sampled(NUMBERS, 20))
def test_a_recipe_makes_what_torch_makes(run: Run, tmp_path: Path, number: int) -> None:
    draw = Draw(number, steps=1 + number % 7, back=False)
    source = saved(draw.start, tmp_path / "in.pth", ("torch", "safetensors")[number // 2 % 2])
    recipe = written(draw.recipe, tmp_path / "r.toml")
    suffix = ".safetensors" if number % 3 == 0 and not tied(draw.state) else ".pth"
    judged(convert(run, source, tmp_path / f"out{suffix}", "--recipe", recipe), draw.state)


@pytest.mark.parametrize("number", sampled(NUMBERS, 20))
def test_a_recipe_and_its_way_back_change_nothing(run: Run, tmp_path: Path, number: int) -> None:
    draw = Draw(number, steps=1 + number % 7, back=True)
    source = saved(draw.start, tmp_path / "in.pth", ("torch", "safetensors")[number // 2 % 2])
    recipe = written(draw.recipe, tmp_path / "r.toml")
    suffix = ".safetensors" if number % 3 == 0 and not tied(draw.state) else ".pth"
    out = convert(run, source, tmp_path / f"out{suffix}", "--recipe", recipe)
    judged(convert(run, out, tmp_path / "back.pth", "--recipe", recipe, "--reverse"), draw.start)
