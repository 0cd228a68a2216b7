"""Modules of two naming schemes: what is sure is right, whatever the names are."""

from __future__ import annotations

import json
import random
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import sampled
from torch import nn
from torchvision import models

import ckptool
from ckptool.containers import read
from ckptool.state import checkpoint
from ckptool.state.matching import match
from ckptool.state.matching_recipe import names
from ckptool.state.matching_rules import Plan, blocks_of, plan
from ckptool.state.renaming import Renaming

LISTS = Path(__file__).parents[1] / "recipes" / "lists.json"
Shapes = Mapping[str, tuple[int, ...]]
MODELS = (
    "resnet18 resnet50 mobilenet_v2 mobilenet_v3_small efficientnet_b0 densenet121 vgg11_bn "
    "mnasnet0_5 regnet_x_400mf convnext_tiny vit_b_16 swin_t squeezenet1_0 googlenet"
).split()


def shapes(state: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(getattr(value, "shape", value)) for key, value in state.items()}


def of_model(name: str) -> dict[str, tuple[int, ...]]:
    given = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        return shapes(getattr(models, name)(**given).state_dict())


def sure(here: Shapes, there: Shapes) -> dict[str, str]:
    """Return the keys that are sure; those that only go with their module are not judged."""
    found = match(here, there).pairs
    return {old: new for old, new in names(found).items() if new in there}


def made_by(how: Plan, keys: Iterable[str]) -> dict[str, str]:
    first, then = Renaming(how.first), Renaming(how.then)
    return {key: then(first(key)) for key in keys}


class Renamer:
    """Other words for those in keys, at random: each word another, numbers in the same order."""

    def __init__(self, seed: int, offset: int) -> None:
        self.random, self.offset = random.Random(seed), offset
        self.words: dict[str, str] = {}

    def __call__(self, key: str) -> str:
        *path, leaf = key.split(".")
        return ".".join([*(re.sub("[A-Za-z_]+|[0-9]+", self.other, part) for part in path), leaf])

    def other(self, found: re.Match[str]) -> str:
        word = found[0]
        if word.isdigit():
            return str(int(word) + self.offset)
        while word not in self.words:
            new = "".join(self.random.choices("bdfgjpwyz", k=6))
            if new not in self.words.values():
                self.words[word] = new
        return self.words[word]


@pytest.mark.product(4)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", MODELS)
def test_nothing_wrong_is_sure_under_any_names(name: str, seed: int) -> None:
    here = of_model(name)
    rename = Renamer(seed, offset=seed)
    pairs = [(rename(key), shape) for key, shape in here.items()]
    random.Random(seed).shuffle(pairs)
    there = dict(pairs)
    assert len(there) == len(here)
    found = sure(here, there)
    assert {old: rename(old) for old in found} == found
    assert len(found) > 0.3 * len(here)


@pytest.mark.parametrize("name", sampled(MODELS, 4))
def test_rules_say_what_the_pairs_say(name: str) -> None:
    """Blocks that are flattened, or cut in stages, are numbered anew, and so in the rules."""
    here = of_model(name)
    rename = Renamer(0, offset=2)
    there = {rename(key): shape for key, shape in here.items()}
    matching = match(here, there)
    wanted = names(matching.pairs)
    how = plan(list(here), wanted, blocks_of(matching.pairs))
    assert made_by(how, wanted) == wanted
    assert how.count <= len({key.rpartition(".")[0] for key in here})


def test_swapped_words_are_never_guessed() -> None:
    """Three layers that could change places, under names without a meaning."""
    here = {f"attn.{name}.weight": (8, 8) for name in ("q", "k", "v")}
    there = {f"attn.{name}.weight": (8, 8) for name in ("red", "green", "blue")}
    found = match(here, there)
    assert not found.pairs
    assert [len(each.here) for each in found.ambiguous] == [3]


@pytest.mark.parametrize(
    ("here", "there"),
    [
        ("a.cls_token", "b.mask_token"),
        ("encoder.class_embedding", "encoder.register"),
    ],
)
def test_a_lone_parameter_of_the_same_shape_is_not_sure(here: str, there: str) -> None:
    more = {"net.0.weight": (4, 3), "net.1.weight": (5, 4)}
    found = match({here: (1, 1, 8), **more}, {there: (1, 8), **more})
    assert {pair.here.path for pair in found.pairs} == {("net", "0"), ("net", "1")}
    assert len(found.ambiguous) == 1


def test_numbers_that_could_count_otherwise_are_not_in_order() -> None:
    """Two layers of two norms: which number is the layer's?"""
    here = {f"layer.{i}.norm.{j}.weight": (8,) for i in range(2) for j in range(2)}
    there = {f"kind.{j}.at.{i}.weight": (8,) for i in range(2) for j in range(2)}
    assert not match(here, there).pairs
    three = {f"kind.{j}.at.{i}.weight": (8,) for i in range(3) for j in range(2)}
    other = {f"layer.{i}.norm.{j}.weight": (8,) for i in range(3) for j in range(2)}
    assert not match(three, other).pairs


def test_a_model_that_is_twice_there_is_ambiguous() -> None:
    one = of_model("resnet18")
    both = {f"{side}.{key}": shape for side in ("left", "right") for key, shape in one.items()}
    other = {f"{side}.{key}": shape for side in ("one", "two") for key, shape in one.items()}
    found = match(both, other)
    assert not found.pairs
    assert len(found.ambiguous) == 1
    assert len(sure(both, both)) == len(both)


CASES = {
    "q k v": (["q", "k", "v"], ["query", "key", "value"], True),
    "norms": (["ln_1", "ln_2"], ["input_layernorm", "post_attention_layernorm"], True),
    "norms of Llama": (
        ["input_layernorm", "post_attention_layernorm"],
        ["attention_norm", "ffn_norm"],
        False,
    ),
    "before": (["norm1", "norm2"], ["layernorm_before", "layernorm_after"], True),
    "order": (["conv1", "conv2", "conv3"], ["layer.0", "layer.1", "layer.2"], True),
    "offset": (["conv1", "conv2"], ["conv0", "conv1"], True),
    "letters": (["f.a", "f.b"], ["conv1", "conv2"], True),
    "norms of three": (
        ["norm1", "norm2", "norm3"],
        ["self_norm", "cross_norm", "final_norm"],
        False,
    ),
    "no words": (["red", "green"], ["left", "right"], False),
}


@pytest.mark.parametrize("case", CASES)
def test_what_names_tell_apart(case: str) -> None:
    here, there, told = CASES[case]
    one, other = ({f"m.{n}.weight": (6, 6) for n in side} for side in (here, there))
    found = sure(one, dict(reversed([*other.items()])))
    assert found == (dict(zip(one, other, strict=True)) if told else {})


@pytest.mark.parametrize(
    ("one", "other", "least"),
    [
        ("timm vit", "hf vit", 0.6),
        ("timm convnext", "hf convnext", 1),
        ("hf resnet basic", "hf resnet basic", 1),
    ],
)
def test_lists_of_other_libraries(one: str, other: str, least: float) -> None:
    """Judged by recipes that were proved by the outputs of both models."""
    lists = json.loads(LISTS.read_text(encoding="utf-8"))
    here, there = (shapes(lists[name]) for name in (one, other))
    found = sure(here, there)
    assert len(found) >= least * len(here)
    words = {"timm vit": "timm-vit-to-hf", "timm convnext": "timm-convnext-to-hf"}
    if one in words:
        edit = ckptool.Recipe.load(words[one]).edit()
        key_map, _ = ckptool.edits.apply([edit], _tensors(here))
        truth = dict(key_map.pairs)
        assert {old: truth[old] for old in found} == found


def _tensors(given: Shapes) -> Mapping[str, Any]:
    """Return entries of a state_dict with shapes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "in.pth"
        torch.save({key: torch.zeros(shape) for key, shape in given.items()}, path)
        return checkpoint.find(read(path)).entries


@pytest.mark.parametrize("kind", ["deep", "wide", "one shape", "long names", "odd names"])
def test_hostile_names_are_paired_or_left_alone(kind: str) -> None:
    keys = {
        "deep": [".".join(["a"] * (i % 100)) + f".w{i}" for i in range(1000)],
        "wide": [f"m{i}x.weight" for i in range(1000)],
        "one shape": [f"{chr(97 + i % 26)}{i}.{i % 7}.b{i % 3}.weight" for i in range(1000)],
        "long names": [f"{'ab_' * 1000}{i}.weight" for i in range(300)],
        "odd names": [f"{{i}}*{i}.[re:\\{i}'\n.weight" for i in range(300)],
    }[kind]
    shape = (lambda i: (4, 4)) if kind != "wide" else (lambda i: (i % 50 + 2, 4))
    here = {key: shape(i) for i, key in enumerate(keys)}
    there = {f"x.{key}": shape(i) for i, key in enumerate(reversed(keys))}
    matching = match(here, there)
    wanted = names(matching.pairs)
    how = plan(list(here), wanted, blocks_of(matching.pairs))
    assert made_by(how, here) == {key: wanted.get(key, key) for key in here}


def test_a_module_goes_as_a_whole() -> None:
    norm = nn.BatchNorm2d(4).state_dict()
    here = shapes({f"bn.{key}": value for key, value in norm.items()})
    there = {key.replace("bn", "norm"): shape for key, shape in here.items() if "num_" not in key}
    pairs = match(here, there).pairs
    assert names(pairs) == {key: key.replace("bn", "norm") for key in here}


def _fused(sides: Sequence[Sequence[str]]) -> list[tuple[str, list[str], bool]]:
    sizes = {"qkv": 24, "in_proj": 24}
    one, other = (
        {f"b.attn.{name}.weight": (sizes.get(name, 8), 8) for name in side} for side in sides
    )
    found = match(one, other).fused
    return [(e.whole.path[-1], [part.path[-1] for part in e.parts], e.back) for e in found]


def test_fused_projections_are_proposed() -> None:
    parts = ["value", "query", "key"]
    assert _fused([["qkv", "proj"], [*parts, "out_proj"]]) == [
        ("qkv", ["query", "key", "value"], False)
    ]
    assert _fused([parts, ["qkv"]]) == [("qkv", ["query", "key", "value"], True)]
    assert _fused([["qkv", "proj"], ["one", "two", "three", "four"]]) == []
