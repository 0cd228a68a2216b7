"""`ckptool recipe`: what it lists, what it tries, what it says of what comes out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Outcome
from safetensors.torch import save_file

import ckptool

Run = Callable[..., Outcome]
SPLIT = """# Splits the head.
recipe = 1
[[step]]
rename = [['fc', 'head'], ['conv.{i}', 'body.{i}']]
[[step]]
split = {from = 'head.{p}', to = ['left.{p}', 'right.{p}']}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "split.toml"
    path.write_text(SPLIT, encoding="utf-8")
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    shapes = {"conv.0.w": (2, 3), "fc.weight": (4, 3), "fc.bias": (4,), "other": (1,)}
    entries = {key: torch.arange(2.0).new_ones(shape) for key, shape in shapes.items()}
    path = tmp_path / "in.pth"
    torch.save(entries, path)
    return path


def like(path: Path, **changed: torch.Tensor) -> Path:
    """Write what the recipe makes of the model, but for some tensors."""
    shapes = {"body.0.w": (2, 3), "left.weight": (2, 3), "right.weight": (2, 3)}
    shapes |= {"left.bias": (2,), "right.bias": (2,), "other": (1,)}
    save_file({key: torch.zeros(shape) for key, shape in shapes.items()} | changed, path)
    return path


def test_the_recipes_that_come_with_ckptool_are_listed_and_can_be_read(run: Run) -> None:
    listed = run("recipe", "--list")
    assert listed.code == 0
    names = [line.split("\t")[0] for line in listed.out.splitlines()]
    assert {"torchvision-vit-to-timm", "fuse-qkv"} <= set(names)
    for name in names:
        assert run("recipe", name).code == 0
        assert ckptool.Recipe.load(name).about


def test_a_recipe_alone_shows_its_steps(run: Run, recipe: Path) -> None:
    assert run("recipe", recipe, "-q").out.splitlines() == [
        "1\trename\tfc=head",
        "1\trename\tconv.{i}=body.{i}",
        "2\tsplit\tfrom=head.{p}  to=left.{p} right.{p}",
    ]
    assert run("recipe", recipe, "--reverse", "-q").out.splitlines() == [
        "2\tfuse\tfrom=left.{p} right.{p}  to=head.{p}",
        "1\trename\thead=fc",
        "1\trename\tbody.{i}=conv.{i}",
    ]


def test_it_says_what_each_rule_takes_and_writes_nothing(
    run: Run, recipe: Path, model: Path, tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    done = run("recipe", recipe, "--from", model)
    assert done.code == 0
    assert done.out.splitlines() == [
        "1\trename\t2\tfc=head", "1\trename\t1\tconv.{i}=body.{i}", "2\tsplit\t2\thead.{p}",
    ]  # fmt: skip
    assert done.err.splitlines() == [
        f"{model}: 4 keys in, 6 out",
        "1 key that no rule matches: other",
    ]
    assert sorted(tmp_path.iterdir()) == before


def test_it_says_what_steps_without_rules_take(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(
        "recipe = 1\n[[step]]\nadd = 'net.'\n[[step]]\ndrop = ['net.conv', '*.bias']\n"
        "[[step]]\nkeep = ['net.fc']\n[[step]]\nstrip = 'net.'\n"
    )
    done = run("recipe", tmp_path / "r.toml", "--from", model)
    assert done.out.splitlines() == [
        "1\tadd\t4\tnet.", "2\tdrop\t2\tnet.conv *.bias", "3\tkeep\t1\tnet.fc",
        "4\tstrip\t1\tnet.",
    ]  # fmt: skip


def test_what_comes_out_is_compared(run: Run, recipe: Path, model: Path, tmp_path: Path) -> None:
    same = run("recipe", recipe, "--from", model, "--like", like(tmp_path / "same.safetensors"))
    assert same.code == 0
    assert "keys, shapes and dtypes are those of" in same.err
    odd = like(
        tmp_path / "odd.safetensors",
        other=torch.zeros(1, dtype=torch.int64), **{"left.bias": torch.zeros(3)},
    )  # fmt: skip
    other = run("recipe", recipe, "--from", model, "--like", odd)
    assert other.code == 1
    assert "2 keys not as in" in other.err
    assert "    other   F32 [1] here, I64 [1] there" in other.err
    assert "    left.bias   F32 [2] here, F32 [3] there" in other.err
    document = json.loads(run("recipe", recipe, "--from", model, "--like", odd, "--json").out)
    assert document["schema"] == "recipe/1"
    assert [each["count"] for each in document["steps"]] == [2, 1, 2]
    assert {each["key"] for each in document["differing"]} == {"other", "left.bias"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "name a recipe, or use --list"),
        (("--list", "x.toml"), "name a recipe, or use --list"),
        (("--list", "--from", "a"), "has no effect"),
        (("fuse-qkv", "--like", "a"), "--like has no effect without --from"),
        (("fuse-qvk",), "did you mean `fuse-qkv`?"),
        (("./no.toml",), "cannot be read: no such file"),
        (("in.pth",), "no recipe `in.pth` comes with ckptool"),
    ],
)
def test_refusals(run: Run, arguments: tuple[str, ...], said: str) -> None:
    done = run("recipe", *arguments)
    assert (done.code, done.out) == (2, "")
    assert said in done.err


def test_the_library_takes_recipes_too(recipe: Path, model: Path, tmp_path: Path) -> None:
    out, back = tmp_path / "out.pth", tmp_path / "back.pth"
    steps = ckptool.Recipe.load(recipe)
    done = ckptool.convert(model, out, steps=[steps.edit()])
    assert (done.read, done.written) == (4, 6)
    assert [(each.number, each.count) for each in done.counts] == [(1, 2), (1, 1), (2, 2)]
    ckptool.convert(out, back, steps=[steps.edit(reverse=True)])
    assert ckptool.diff(model, back).equal
    assert ckptool.diff(model, out, recipe=str(recipe)).equal
    fitted = ckptool.transfer(model, tmp_path / "t.pth", like=out, recipe=str(recipe))
    assert fitted.fit is not None
    assert fitted.fit.filled == 1.0


def test_a_plan_shows_groups_together(run: Run, recipe: Path, model: Path) -> None:
    plan = run("convert", "--recipe", recipe, "-n", model, "out.pth").out.splitlines()
    at = plan.index("- fc.weight")
    assert plan[at : at + 3] == ["- fc.weight", "+ left.weight", "+ right.weight"]
    assert not [line for line in plan if re.search(r"^[-+~] other", line)]
