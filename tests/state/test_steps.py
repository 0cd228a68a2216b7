"""Steps of recipes against torch: every dtype, stride and dimension, there and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file, save_file
from torch import Tensor

Run = Callable[..., Outcome]
State = dict[str, Tensor]
Make = Callable[[State], State]

DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "f64": torch.float64,
    "i64": torch.int64,
    "u8": torch.uint8,
    "bool": torch.bool,
    "c64": torch.complex64,
    "f8": torch.float8_e4m3fn,
}


def bits(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in row-major order, so that NaN is NaN."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def same(made: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, ordered: bool = True) -> None:
    assert (list(made) == list(wanted)) if ordered else (made.keys() == wanted.keys())
    for key, tensor in wanted.items():
        assert (made[key].dtype, made[key].shape) == (tensor.dtype, tensor.shape), key
        assert torch.equal(bits(made[key]), bits(tensor)), key


def filled(shape: tuple[int, ...], dtype: str) -> Tensor:
    """Return random bytes as a tensor; NaN and infinity come with them."""
    kind = DTYPES[dtype]
    size = torch.empty(0, dtype=kind).element_size()
    raw = torch.randint(0, 2 if dtype == "bool" else 256, (*shape, size), dtype=torch.uint8)
    return raw.view(kind)[..., 0]


def strided(tensor: Tensor, how: str) -> Tensor:
    """Lay the same elements out in another way."""
    if how == "transposed" and tensor.dim() > 1:
        return tensor.transpose(0, 1).contiguous().transpose(0, 1)
    if how == "sliced" and tensor.dim():
        wide = torch.cat([tensor, tensor], dim=tensor.dim() - 1)
        return wide[..., : tensor.shape[-1]]
    if how == "offset" and tensor.dim():
        return torch.cat([tensor, tensor])[tensor.shape[0] :]
    return tensor


def halves(tensor: Tensor, heads: int) -> Tensor:
    """`permute_for_rope` of transformers' convert_llama_weights_to_hf.py."""
    rows = tensor.shape[0]
    cut = tensor.reshape(heads, rows // heads // 2, 2, *tensor.shape[1:])
    return cut.transpose(1, 2).reshape(tensor.shape)


def per_head(tensor: Tensor, heads: int, parts: int) -> Tensor:
    rows = tensor.shape[0] // heads // parts
    cut = tensor.reshape(parts, heads, rows, *tensor.shape[1:])
    return cut.transpose(0, 1).reshape(tensor.shape)


def each(remake: Callable[[Tensor], Tensor]) -> Make:
    return lambda state: {key: remake(tensor) for key, tensor in state.items()}


def cut(dim: int, sizes: int | list[int]) -> Make:
    def make(state: State) -> State:
        made = {}
        for key, tensor in state.items():
            step = tensor.shape[dim] // sizes if isinstance(sizes, int) else sizes
            made |= {f"{key}.{at}": part for at, part in enumerate(tensor.split(step, dim))}
        return made

    return make


def apart(dim: int) -> Make:
    return lambda state: {
        f"{key}.{at}": part
        for key, tensor in state.items()
        for at, part in enumerate(tensor.unbind(dim))
    }


THREE = "['w.{i}.0', 'w.{i}.1', 'w.{i}.2']"
TWO = "['w.{i}.0', 'w.{i}.1']"
SPLIT = "split = {{from = 'w.{{i}}', to = {}, dim = {}{}}}"
UNSTACK = "unstack = {{from = 'w.{{i}}', to = 'w.{{i}}.{{e}}', dim = {}}}"

# name: (shape, step, what torch makes)
CASES: dict[str, tuple[tuple[int, ...], str, Make]] = {
    **{
        f"split {dim}": ((6, 12, 6), SPLIT.format(THREE, dim, ""), cut(dim, 3))
        for dim in range(-3, 3)
    },
    **{
        f"split sizes {dim}": ((6, 6), SPLIT.format(TWO, dim, ", sizes = [2, 4]"), cut(dim, [2, 4]))
        for dim in (-2, -1, 0, 1)
    },
    **{f"unstack {dim}": ((4, 3, 5), UNSTACK.format(dim), apart(dim)) for dim in range(-3, 3)},
    **{
        f"transpose {one} {other}": (
            (4, 3, 5),
            f"transpose = {{keys = 'w', dims = [{one}, {other}]}}",
            each(lambda tensor, one=one, other=other: tensor.transpose(one, other)),  # type: ignore[misc]
        )
        for one, other in [(0, 1), (0, 2), (-1, 1), (-1, -3), (1, 1)]
    },
    **{
        f"permute {dims}": (
            (4, 3, 5),
            f"permute = {{keys = 'w', dims = {dims}}}",
            each(lambda tensor, dims=dims: tensor.permute(dims)),  # type: ignore[misc]
        )
        for dims in ([0, 1, 2], [2, 0, 1], [1, -1, 0], [-3, -1, -2])
    },
    **{
        f"reshape {shape}": (
            (4, 6),
            f"reshape = {{keys = 'w', shape = {shape}, was = [4, 6]}}",
            each(lambda tensor, shape=shape: tensor.reshape(shape)),  # type: ignore[misc]
        )
        for shape in ([24], [-1, 2], [2, 2, 3, 2], [6, 4], [1, 4, 1, 6])
    },
    "reshape to a number": (
        (1, 1),
        "reshape = {keys = 'w', shape = [], was = [1, 1]}",
        each(lambda tensor: tensor.reshape([])),
    ),
    **{
        f"squeeze {dim}": (
            (1, 3, 1),
            f"squeeze = {{keys = 'w', dim = {dim}}}",
            each(lambda tensor, dim=dim: tensor.squeeze(dim)),  # type: ignore[misc]
        )
        for dim in (-3, -1, 0, 2)
    },
    **{
        f"unsqueeze {dim}": (
            (2, 3),
            f"unsqueeze = {{keys = 'w', dim = {dim}}}",
            each(lambda tensor, dim=dim: tensor.unsqueeze(dim)),  # type: ignore[misc]
        )
        for dim in range(-3, 3)
    },
    "unsqueeze a number": ((), "unsqueeze = {keys = 'w', dim = 0}", each(lambda t: t.unsqueeze(0))),
    **{
        f"slice {dim}": (
            (6, 6),
            f"slice = {{keys = 'w', dim = {dim}, rows = '4,0:2,2,2,3:'}}",
            each(lambda t, dim=dim: t.index_select(dim, torch.tensor([4, 0, 1, 2, 2, 3, 4, 5]))),  # type: ignore[misc]
        )
        for dim in (-2, -1, 0, 1)
    },
    **{
        f"rope {shape}": (
            shape,
            "rope = {keys = 'w', heads = 3, to = 'half'}",
            each(lambda tensor: halves(tensor, 3)),
        )
        for shape in ((12,), (12, 5), (6, 2))
    },
    **{
        f"interleave {shape}": (
            shape,
            "interleave = {keys = 'w', heads = 2, parts = 3}",
            each(lambda tensor: per_head(tensor, 2, 3)),
        )
        for shape in ((12,), (18, 5), (6, 2))
    },
    **{
        f"empty {step.split()[0]}": ((0, 4), step, make)
        for step, make in [
            (
                SPLIT.format(TWO, 0, ""),
                lambda s: {f"{k}.{n}": t for k, t in s.items() for n in "01"},
            ),
            (SPLIT.format(TWO, 1, ", sizes = [1, 3]"), cut(1, [1, 3])),
            ("transpose = {keys = 'w'}", each(Tensor.t)),
            (
                "reshape = {keys = 'w', shape = [2, 0, 7], was = [0, 4]}",
                each(lambda t: t.reshape(2, 0, 7)),
            ),
            ("unsqueeze = {keys = 'w', dim = 1}", each(lambda t: t.unsqueeze(1))),
            ("rope = {keys = 'w', heads = 2, to = 'half'}", each(lambda t: t)),
            ("interleave = {keys = 'w', heads = 2, parts = 3}", each(lambda t: t)),
        ]
    },
}
NO_WAY_BACK = ("slice",)


def recipe(path: Path, *steps: str) -> Path:
    path.write_text("\n".join(["recipe = 1", *(f"[[step]]\n{each}" for each in steps), ""]))
    return path


def saved(state: State, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    return path


def loaded(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return load_file(path)
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def converted(run: Run, source: Path, target: Path, *options: object) -> dict[str, Any]:
    outcome = run("convert", source, target, *options, "--no-sync", "--force")
    assert outcome.code == 0, outcome.err
    return loaded(target)


SUFFIXES = [".pth .pth", ".pth .safetensors", ".safetensors .pth"]


@pytest.mark.product(60, more=2)
@pytest.mark.parametrize("suffixes", SUFFIXES)
@pytest.mark.parametrize("how", ["plain", "transposed", "sliced", "offset"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_a_step_makes_what_torch_makes_and_back(
    run: Run, tmp_path: Path, name: str, dtype: str, how: str, suffixes: str
) -> None:
    shape, step, make = CASES[name]
    torch.manual_seed(0)
    state = {f"w.{at}": strided(filled(shape, dtype), how) for at in (0, 1)}
    first, second = suffixes.split()
    source = saved(state, tmp_path / f"in{first}")
    steps = recipe(tmp_path / "r.toml", step)
    there = tmp_path / f"out{second}"
    made = converted(run, source, there, "--recipe", steps)
    same(made, make(state), ordered=second == ".pth")
    back = ("--recipe", steps, "--reverse")
    if name.startswith(NO_WAY_BACK):
        outcome = run("convert", there, tmp_path / "back.pth", *back)
        assert outcome.code == 2
        assert "step 1 (slice) has no way back" in outcome.err
        return
    same(converted(run, there, tmp_path / "back.pth", *back), state, ordered=second == ".pth")
