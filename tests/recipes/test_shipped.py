"""Recipes of the package, where torch and torchvision are enough: names, shapes, and the way back.

Keys and shapes of timm's and transformers' models are in lists.json, which tiny.py writes.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from journeys import SHIPPED, Run, answer, close, convert, resized, same, there_and_back
from torch import nn

LISTS = json.loads((Path(__file__).parent / "lists.json").read_text(encoding="utf-8"))
NAMES = sorted(path.stem for path in SHIPPED.glob("*.toml"))
LLAMA = {
    "llama-2-7b-meta-to-hf": {"4096": tiny.DIM, "heads = 32": tiny.HEADS},
    "llama-3-8b-meta-to-hf": {
        "4096": tiny.DIM,
        "1024": tiny.DIM // tiny.HEADS * tiny.GROUPS,
        "heads = 32": tiny.HEADS,
        "heads = 8": tiny.GROUPS,
    },
}


def random(name: str) -> dict[str, torch.Tensor]:
    """Return random tensors with the keys and shapes of a model of another library."""
    torch.manual_seed(0)
    return {key: torch.randn(shape) for key, shape in LISTS[name].items()}


def listed(path: Path, name: str) -> None:
    """Check that a file has the keys and shapes of a model of another library."""
    tensors = torch.load(path, weights_only=True)
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == LISTS[name]


def test_torchvision_vit_becomes_timms_and_transformers(run: Run, tmp_path: Path) -> None:
    state = tiny.shaken(tiny.torchvision_vit()).state_dict()
    last = there_and_back(run, tmp_path, state, "torchvision-vit-to-timm", "timm-vit-to-hf")
    listed(tmp_path / "1.pth", "timm vit")
    listed(last, "hf vit")


def test_two_recipes_in_one_command(run: Run, tmp_path: Path) -> None:
    """In the order given: the way back names the last one first."""
    state = tiny.shaken(tiny.torchvision_vit()).state_dict()
    torch.save(state, tmp_path / "in.pth")
    first, second = (("--recipe", name) for name in ("torchvision-vit-to-timm", "timm-vit-to-hf"))
    out = convert(run, tmp_path / "in.pth", tmp_path / "out.safetensors", *first, *second)
    back = convert(run, out, tmp_path / "back.pth", *second, *first, "--reverse")
    same(torch.load(back, weights_only=True), state, ordered=True)


def test_older_files_of_torchvision_have_other_names(run: Run, tmp_path: Path) -> None:
    state = tiny.shaken(tiny.torchvision_vit()).state_dict()
    older = {
        key.replace("mlp.0", "mlp.linear_1").replace("mlp.3", "mlp.linear_2"): tensor
        for key, tensor in state.items()
    }
    torch.save(older, tmp_path / "old.pth")
    timm = convert(
        run, tmp_path / "old.pth", tmp_path / "timm.pth", "--recipe", "torchvision-vit-to-timm"
    )
    listed(timm, "timm vit")
    back = tmp_path / "new.pth"
    convert(run, timm, back, "--recipe", "torchvision-vit-to-timm", "--reverse")
    tiny.torchvision_vit().load_state_dict(torch.load(back, weights_only=True))


@pytest.mark.parametrize("recipe", ["torchvision-vit-to-timm", "timm-vit-to-hf"])
def test_a_backbone_has_no_head(run: Run, tmp_path: Path, recipe: str) -> None:
    of_timm = recipe.startswith("timm")
    state = random("timm vit") if of_timm else tiny.torchvision_vit().state_dict()
    plain = {key: tensor for key, tensor in state.items() if "head" not in key}
    assert len(state) == len(plain) + 2
    there_and_back(run, tmp_path, plain, recipe)


def test_timm_convnext_becomes_transformers(run: Run, tmp_path: Path) -> None:
    listed(
        there_and_back(run, tmp_path, random("timm convnext"), "timm-convnext-to-hf"), "hf convnext"
    )


@pytest.mark.parametrize("kind", ["basic", "bottleneck"])
def test_torchvision_resnet_becomes_transformers(run: Run, tmp_path: Path, kind: str) -> None:
    state = tiny.shaken(tiny.torchvision_resnet(kind)).state_dict()
    listed(there_and_back(run, tmp_path, state, "torchvision-resnet-to-hf"), f"hf resnet {kind}")


@pytest.mark.parametrize("recipe", LLAMA)
def test_llama_of_meta_becomes_transformers(run: Run, tmp_path: Path, recipe: str) -> None:
    groups = tiny.HEADS if "2-7b" in recipe else tiny.GROUPS
    state = tiny.shaken(tiny.meta_llama(groups)).state_dict()
    state["rope.freqs"] = torch.arange(4.0)
    path = there_and_back(run, tmp_path, state, resized(recipe, tmp_path, LLAMA[recipe]))
    tensors = torch.load(path, weights_only=True)
    assert torch.equal(tensors.pop("model.rotary_emb.inv_freq"), state["rope.freqs"])
    assert tensors.keys() == LISTS["hf llama"].keys()
    if groups == tiny.GROUPS:
        assert {k: list(tensor.shape) for k, tensor in tensors.items()} == LISTS["hf llama"]


def llama_shapes(layers: int, groups: int, words: int, hidden: int) -> dict[str, list[int]]:
    """Return the keys and shapes of Meta's files of 4096 columns."""
    names = {
        **{name: [4096, 4096] for name in ("attention.wq", "attention.wo")},
        **{name: [128 * groups, 4096] for name in ("attention.wk", "attention.wv")},
        **{name: [hidden, 4096] for name in ("feed_forward.w1", "feed_forward.w3")},
        "feed_forward.w2": [4096, hidden],
        **{name: [4096] for name in ("attention_norm", "ffn_norm")},
    }
    shapes = {
        f"layers.{number}.{name}.weight": shape
        for number in range(layers)
        for name, shape in names.items()
    }
    ends = {name: [words, 4096] for name in ("tok_embeddings.weight", "output.weight")}
    return {**shapes, **ends, "norm.weight": [4096]}


@pytest.mark.parametrize(
    ("recipe", "sizes"),
    [
        ("llama-2-7b-meta-to-hf", (32, 32, 32000, 11008)),
        ("llama-3-8b-meta-to-hf", (32, 8, 128256, 14336)),
    ],
)
def test_llama_of_the_real_size_is_taken(
    run: Run, tmp_path: Path, make_safetensors: Any, recipe: str, sizes: tuple[int, ...]
) -> None:
    """A sparse file of 27 or 32 GB: its header is read, and nothing else."""
    shapes = {**llama_shapes(*sizes), "rope.freqs": [64]}
    path = make_safetensors(tmp_path / "llama.safetensors", shapes)
    outcome = run("recipe", recipe, "--from", path, "--json")
    path.unlink()
    assert outcome.code == 0, outcome.err
    assert "no rule matches" not in outcome.err


@pytest.mark.parametrize("recipe", LLAMA)
def test_llama_of_another_size_has_other_heads(run: Run, tmp_path: Path, recipe: str) -> None:
    torch.save(tiny.meta_llama(tiny.HEADS).state_dict(), tmp_path / "in.pth")
    outcome = run("convert", tmp_path / "in.pth", tmp_path / "out.pth", "--recipe", recipe)
    assert outcome.code == 2
    assert "reshape" in outcome.err
    assert not (tmp_path / "out.pth").exists()


def test_gpt2_gets_linear_layers(run: Run, tmp_path: Path) -> None:
    state = random("hf gpt2")
    path = there_and_back(run, tmp_path, state, "gpt2-hf-to-linear")
    tensors = torch.load(path, weights_only=True)
    turned = {key for key in state if re.search(r"\.c_\w+\.weight$", key)}
    assert len(turned) == 4 * tiny.DEPTH
    for key, tensor in state.items():
        assert torch.equal(tensors[key], tensor.T if key in turned else tensor)
    missing, extra = tiny.linear_gpt().load_state_dict(tensors, strict=False)
    assert (missing, extra) == (["lm_head.weight"], [])


class Attention(nn.Module):
    """Self-attention with q, k and v in three tensors, or in one."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        if fused:
            self.qkv_proj = nn.Linear(tiny.DIM, 3 * tiny.DIM)
        else:
            self.q_proj, self.k_proj, self.v_proj = (
                nn.Linear(tiny.DIM, tiny.DIM) for _ in range(3)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hasattr(self, "qkv_proj"):
            q, k, v = self.qkv_proj(x).chunk(3, -1)
        else:
            q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        return nn.functional.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("layers", [1, 11])
def test_qkv_is_fused(run: Run, tmp_path: Path, layers: int) -> None:
    three, one = (
        nn.Sequential(*(Attention(fused) for _ in range(layers))) for fused in (False, True)
    )
    path = there_and_back(run, tmp_path, tiny.shaken(three).state_dict(), "fuse-qkv", ordered=False)
    one.load_state_dict(torch.load(path, weights_only=True))
    given = torch.randn(2, 4, tiny.DIM)
    close(answer(one, given), answer(three, given))


def test_an_attention_alone_is_fused(run: Run, tmp_path: Path) -> None:
    path = there_and_back(run, tmp_path, Attention(False).state_dict(), "fuse-qkv", ordered=False)
    assert set(torch.load(path, weights_only=True)) == {"qkv_proj.weight", "qkv_proj.bias"}


@pytest.mark.parametrize("name", ["model", "net"])
def test_lightning_becomes_plain(run: Run, tmp_path: Path, name: str) -> None:
    inner = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = nn.ModuleDict({name: inner}).state_dict()
    checkpoint = {"epoch": 1, "pytorch-lightning_version": "2.6.6", "state_dict": state}
    torch.save(checkpoint, tmp_path / "in.ckpt")
    out = convert(
        run, tmp_path / "in.ckpt", tmp_path / "out.ckpt", "--recipe", "lightning-to-plain"
    )
    converted = torch.load(out, weights_only=True)
    nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).load_state_dict(converted["state_dict"])
    assert converted["epoch"] == 1
    back = tmp_path / "back.ckpt"
    convert(run, out, back, "--recipe", "lightning-to-plain", "--reverse")
    keys = torch.load(back, weights_only=True)["state_dict"].keys()
    assert keys == {f"model.{key}" for key in inner.state_dict()}


def test_each_recipe_says_what_it_was_proved_with() -> None:
    assert NAMES
    for name in NAMES:
        text = (SHIPPED / f"{name}.toml").read_text(encoding="utf-8")
        assert re.match(r"# \S.*\n(# .*\n)*# Proved .*\nrecipe = 1\n", text), name
        assert len(text.partition("\n")[0]) <= 90, name


def test_the_list_has_each_recipe(run: Run) -> None:
    outcome = run("recipe", "--list")
    assert outcome.code == 0
    assert [name for name in NAMES if name not in outcome.out] == []


def test_a_recipe_is_by_its_name_not_a_file(run: Run, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fuse-qkv").write_text("recipe = 2", encoding="utf-8")
    torch.save(Attention(False).state_dict(), tmp_path / "in.pth")
    convert(run, tmp_path / "in.pth", tmp_path / "out.pth", "--recipe", "fuse-qkv")
