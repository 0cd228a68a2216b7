"""The way of a model through recipes and back, and what must be the same at its end."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import ckptool

SHIPPED = Path(ckptool.__file__).parent / "state" / "recipes"
Run = Callable[..., Any]


def convert(run: Run, source: Path, target: Path, *options: object) -> Path:
    outcome = run("convert", source, target, *options)
    assert outcome.code == 0, outcome.err
    return target


def there_and_back(
    run: Run, folder: Path, tensors: Mapping[str, Any], *recipes: object, ordered: bool = True
) -> Path:
    """Convert by recipes one after the other and back; return the file between, all compared."""
    paths = [folder / f"{number}.pth" for number in range(len(recipes) + 1)]
    torch.save(tensors, paths[0])
    for source, target, recipe in zip(paths, paths[1:], recipes, strict=False):
        convert(run, source, target, "--recipe", recipe)
    back = paths[-1]
    for recipe in reversed(recipes):
        back = convert(run, back, back.with_suffix(".back.pth"), "--recipe", recipe, "--reverse")
    same(torch.load(back, weights_only=True), torch.load(paths[0], weights_only=True), ordered)
    return paths[-1]


def same(
    got: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], ordered: bool
) -> None:
    """Check keys in order, dtypes, shapes, bytes, and `_metadata` of modules with tensors."""
    assert list(got) == list(wanted) if ordered else got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert (got[key].dtype, got[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(got[key]) == bits(tensor), key
    modules = {key.rpartition(".")[0] for key in wanted}
    versions, other = (getattr(each, "_metadata", {}) for each in (wanted, got))
    for module in modules & versions.keys():
        assert other.get(module) == versions[module], module


def bits(tensor: torch.Tensor) -> bytes:
    return (
        tensor.flatten()
        .clone(memory_format=torch.contiguous_format)
        .view(torch.uint8)
        .numpy()
        .tobytes()
    )


def resized(name: str, folder: Path, sizes: Mapping[str, int]) -> Path:
    """Copy a shipped recipe and change numbers in its steps, as its comment says."""
    text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
    comment, _, steps = text.partition("[[step]]")
    for old, new in sizes.items():
        steps = re.sub(rf"\b{re.escape(old)}\b", old[: -len(old.split()[-1])] + str(new), steps)
    copy = folder / f"{name}.toml"
    copy.write_text(f"{comment}[[step]]{steps}", encoding="utf-8")
    return copy


def answer(model: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """Return the output of a model, the logits of those that say more."""
    with torch.no_grad():
        out = model.eval()(given)
    return getattr(out, "logits", out)


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    assert one.std() > 0.01  # an output that depends on its weights
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
