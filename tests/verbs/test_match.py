"""`match` as its users meet it: a recipe that runs as it is, choices to uncomment, exit codes."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ckptool

Run = Callable[..., Any]


class Ours(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1 = nn.Sequential(*(_block() for _ in range(2)))
        self.layer2 = nn.Sequential(_block())
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))


class Theirs(nn.Module):
    """The same network as others would write it, with a 1x1 convolution for its head."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Conv2d(4, 2, 1)
        stem = nn.ModuleDict(
            {"norm": nn.BatchNorm2d(4), "convolution": nn.Conv2d(3, 4, 3, padding=1)}
        )
        stages = nn.ModuleList(nn.ModuleList(_block() for _ in range(n)) for n in (2, 1))
        self.backbone = nn.ModuleDict({"stem": stem, "stages": stages})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        stem: Any = self.backbone["stem"]
        stages: Any = self.backbone["stages"]
        x = stem["norm"](stem["convolution"](x))
        for block in (block for stage in stages for block in stage):
            x = block(x)
        return self.classifier(x.mean((2, 3), keepdim=True)).flatten(1)


def shaken(model: nn.Module, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape) + name.endswith("var"))
    return model.eval()


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Return files of two models, and no other difference than their names."""
    paths = tmp_path / "ours.pth", tmp_path / "theirs.pth"
    torch.save(shaken(Ours(), 0).state_dict(), paths[0])
    torch.save(shaken(Theirs(), 1).state_dict(), paths[1])
    return paths


def test_what_it_writes_makes_the_other_model(
    run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    recipe, out = tmp_path / "map.toml", tmp_path / "out.pth"
    done = run("match", pair[0], "--like", pair[1], "-o", recipe)
    assert (done.code, done.out) == (0, "")
    assert "30 of 30 keys paired with 30 of 30" in done.err
    assert run("convert", "--recipe", recipe, pair[0], out).code == 0
    there = Theirs()
    there.load_state_dict(torch.load(out, weights_only=True))
    given = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(there.eval()(given), shaken(Ours(), 0)(given))
    back = tmp_path / "back.pth"
    assert run("convert", "--recipe", recipe, "--reverse", out, back).code == 0
    first, last = (torch.load(path, weights_only=True) for path in (pair[0], back))
    assert list(first) == list(last)
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_few_rules_each_with_its_reason(run: Run, pair: tuple[Path, Path]) -> None:
    done = run("match", pair[0], "--like", pair[1])
    rules = [line for line in done.out.splitlines() if line.startswith("    [")]
    assert len(rules) < 8
    assert all(re.search(r"# \d+ keys?(; sure: .*)?$", line) for line in rules)
    assert "reshape" in tomllib.loads(done.out)["step"][-1]


def test_keys_as_json_and_a_model_are_enough(
    run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    texts = [run("match", pair[0], "--like", pair[1]).out.splitlines()[3:]]
    lists = [path.with_suffix(".json") for path in pair]
    for path, listed in zip(pair, lists, strict=True):
        listed.write_text(run("keys", "--json", path).out, encoding="utf-8")
    texts.append(run("match", lists[0], "--like", lists[1]).out.splitlines()[3:])
    net = tmp_path / "net.py"
    net.write_text(
        f"import sys\nsys.path.append({str(Path(__file__).parent)!r})\n"
        "from test_match import Theirs\n",
        encoding="utf-8",
    )
    texts.append(run("match", pair[0], "--model", f"{net}:Theirs").out.splitlines()[3:])
    texts.append(ckptool.match(Ours(), like=Theirs()).text.splitlines()[3:])
    assert texts[0] == texts[1] == texts[2] == texts[3]


def tensors(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    torch.manual_seed(0)
    torch.save({key: torch.randn(shape) for key, shape in shapes.items()}, path)
    return path


def test_what_is_ambiguous_is_a_comment_until_it_is_chosen(run: Run, tmp_path: Path) -> None:
    one = {f"h.{i}.{n}.weight": (4, 4) for i in range(3) for n in ("red", "blue")}
    other = {f"h.{i}.{n}.weight": (4, 4) for i in range(3) for n in ("left", "right")}
    source, like = (tensors(tmp_path / n, s) for n, s in (("a.pth", one), ("b.pth", other)))
    recipe, out = tmp_path / "map.toml", tmp_path / "out.safetensors"
    done = run("match", source, "--like", like, "-o", recipe)
    assert done.code == 1
    assert "ambiguous, 6 keys" in done.err
    text = recipe.read_text(encoding="utf-8")
    assert run("convert", "--recipe", recipe, source, out).code == 0
    assert load_file(out).keys() == one.keys()  # nothing was guessed
    chosen = "    # ['h.{i}.red', 'h.{i}.right'],", "    # ['h.{i}.blue', 'h.{i}.left'],"
    for line in chosen:
        assert text.count(line) == 1
        text = text.replace(line, line.replace("# ", ""))
    recipe.write_text(text, encoding="utf-8")
    assert run("convert", "--recipe", recipe, source, out, "--force").code == 0
    made, given = load_file(out), torch.load(source, weights_only=True)
    for i in range(3):
        assert torch.equal(made[f"h.{i}.right.weight"], given[f"h.{i}.red.weight"])


@pytest.mark.parametrize("back", [False, True])
def test_a_fused_projection_is_a_step_to_uncomment(run: Run, tmp_path: Path, back: bool) -> None:
    leaves = {"weight": (12, 4), "bias": (12,)}
    whole = {f"h.{i}.attn.qkv.{k}": s for i in range(3) for k, s in leaves.items()}
    parts = {
        f"block.{i}.self.{n}.{k}": (4, *s[1:])
        for i in range(3)
        for n in ("query", "key", "value")
        for k, s in leaves.items()
    }
    files = [tensors(tmp_path / n, s) for n, s in (("w.pth", whole), ("p.pth", parts))]
    source, like = reversed(files) if back else files
    recipe, out = tmp_path / "map.toml", tmp_path / "out.pth"
    assert run("match", source, "--like", like, "-o", recipe).code == 1
    text = recipe.read_text(encoding="utf-8")
    text = re.sub(r"^# (\[\[step\]\]|split|fuse)", r"\1", text, flags=re.MULTILINE)
    recipe.write_text(text, encoding="utf-8")
    assert run("convert", "--recipe", recipe, source, out).code == 0
    made, given = (torch.load(path, weights_only=True) for path in (out, source))
    fused, cut = (made, given) if back else (given, made)
    for key, tensor in fused.items():
        _, i, _, _, leaf = key.split(".")
        names = [f"block.{i}.self.{name}.{leaf}" for name in ("query", "key", "value")]
        assert torch.equal(torch.cat([cut[name] for name in names]), tensor)


def test_nothing_alike(run: Run, tmp_path: Path) -> None:
    source = tensors(tmp_path / "a.pth", {"a.weight": (2, 3)})
    like = tensors(tmp_path / "b.pth", {"a.weight": (5, 7)})
    done = run("match", source, "--like", like, "-o", tmp_path / "map.toml")
    assert (done.code, done.out) == (2, "")
    assert "nothing in" in done.err
    assert not (tmp_path / "map.toml").exists()


def test_a_recipe_is_not_overwritten(run: Run, pair: tuple[Path, Path], tmp_path: Path) -> None:
    recipe = tmp_path / "map.toml"
    recipe.write_text("mine", encoding="utf-8")
    line = "match", pair[0], "--like", pair[1], "-o"
    assert run(*line, recipe).code == 5
    assert recipe.read_text(encoding="utf-8") == "mine"
    assert run(*line, pair[0], "--force").code == 5
    assert run(*line, recipe, "--force").code == 0
    assert tomllib.loads(recipe.read_text(encoding="utf-8"))["recipe"] == 1


def test_hostile_names_stay_in_their_place(run: Run, tmp_path: Path) -> None:
    """Names that end a comment or a text of TOML, fields, patterns: each is one key."""
    odd = [
        "a\n[[step]]\ndrop = 'x'.weight", "b'c.weight", 'd"e.weight', "f{i}.weight", "g*.weight",
        "re:h.weight", "@i.weight", "j\\.weight", "\u202ek.weight", "l..weight", "m\x00.weight",
    ]  # fmt: skip
    one = {key: (at + 2, 3) for at, key in enumerate(odd)}
    source = tensors(tmp_path / "a.pth", one)
    like = tensors(tmp_path / "b.pth", {f"net.{key}": shape for key, shape in one.items()})
    recipe, out = tmp_path / "map.toml", tmp_path / "out.pth"
    assert run("match", source, "--like", like, "-o", recipe).code == 0
    assert run("convert", "--recipe", recipe, source, out).code == 0
    assert torch.load(out, weights_only=True).keys() == {f"net.{key}" for key in odd}


def test_transfer_that_fits_badly_proposes_it(
    run: Run, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    done = run("transfer", pair[0], tmp_path / "out.pth", "--like", pair[1])
    assert done.code == 1
    hint = done.err.splitlines()[-1]
    assert hint.endswith("-o map.toml   all 30 shapes pair up under other names")
    assert f"ckptool match {pair[0]} --like {pair[1]}" in hint
    assert "--min-match" not in done.err


def test_the_document_names_pairs_and_what_is_left(run: Run, pair: tuple[Path, Path]) -> None:
    document = json.loads(run("match", pair[0], "--like", pair[1], "--json").out)
    assert document["schema"] == "match/1"
    assert document["pairs"][0] == {
        "here": "conv1.weight",
        "there": "backbone.stem.convolution.weight",
        "confidence": "sure",
        "why": "names",
    }
    assert tomllib.loads(document["recipe"])
    assert (document["left"], document["missing"], document["ambiguous"]) == ([], [], [])
