"""Transfers: what fits a target is kept, what does not is named, and the hints work when pasted."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, listing

from ckptool.containers import read
from ckptool.errors import PoorFit
from ckptool.state.layouts import Layout
from ckptool.verbs import fitting
from ckptool.verbs.fitting import Mismatch, Reference, fit, reference, reference_of

Run = Callable[..., Outcome]
Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def make(here: Path, make_safetensors: Callable[..., Path]) -> Callable[[str, Shapes], str]:
    """Write a checkpoint with the shapes given, under a name, in the current folder."""

    def write(name: str, shapes: Shapes) -> str:
        make_safetensors(here / name, shapes, b"0123456789")
        return name

    return write


BODY: Shapes = {"conv.weight": (4, 3), "conv.bias": (4,), "norm.weight": (4,)}
HEAD: Shapes = {"fc.weight": (10, 4), "fc.bias": (10,)}
SMALL_HEAD: Shapes = {"fc.weight": (2, 4), "fc.bias": (2,)}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + key: shape for key, shape in shapes.items()}


# The comparison.


def test_fit_sorts_keys() -> None:
    target = Reference("target", {"a": (2, 3), "b": (4,), "c": (1,), "d": ()})
    found = fit({"x": (9,), "b": (5,), "a": (2, 3), "d": ()}, target)
    assert found.matched == ("a", "d")
    assert found.mismatched == (Mismatch("b", (5,), (4,)),)
    assert found.missing == ("c",)
    assert found.absent == ("x",)
    assert found.filled == (6 + 1) / (6 + 4 + 1 + 1)


def test_fit_with_an_empty_target_is_full() -> None:
    assert fit({"a": (1,)}, Reference("target", {})).filled == 1.0
    assert fit({}, Reference("target", {"a": (1,)})).filled == 0.0


def test_fit_counts_elements_not_tensors() -> None:
    target = Reference("target", {"big": (99,), "small": (1,)})
    assert fit({"big": (99,)}, target).filled == 0.99
    assert fit({"small": (1,)}, target).filled == 0.01


def test_a_permuted_shape_is_a_mismatch() -> None:
    found = fit({"a": (2, 3)}, Reference("target", {"a": (3, 2)}))
    assert found.mismatched == (Mismatch("a", (2, 3), (3, 2)),)


def test_a_reference_is_peeled() -> None:
    layout = Layout({"_orig_mod.module.a": (1,), "_orig_mod.module.b": (2,)}, {}, {})
    made = reference("target", layout)
    assert made == Reference("target", {"a": (1,), "b": (2,)})


def test_a_reference_of_a_training_checkpoint(good: Path) -> None:
    made = reference_of(read(good / "model_best.pth.tar"))
    assert made.shapes["classifier.weight"] == (10, 4)
    assert len(made.shapes) == 8
    assert reference_of(read(good / "dino.pth"), "teacher").shapes.keys() >= {"head.bias"}


# Files.


def test_what_does_not_fit_is_dropped_and_named(
    run: Run, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {**BODY, **HEAD, "extra.weight": (1,)})
    like = make("like.safetensors", {**BODY, **SMALL_HEAD, "pool.weight": (1,)})
    done = run("transfer", source, "out.safetensors", "--like", like)
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines() == [
        "dropped 1 (not in like.safetensors): extra.weight [1]",
        "dropped, shape differs:",
        "    fc.weight  [10, 4]  here, [2, 4] in like.safetensors",
        "    fc.bias    [10]     here, [2] in like.safetensors",
        "fills 3 of 6 tensors, 64.5 % of the parameters; "
        "not filled: fc.weight, fc.bias, pool.weight",
        "out.safetensors: 3 tensors, 80 B",
        "read 6, renamed 0, dropped 3, written 3",
    ]
    assert run("keys", "--names", "out.safetensors").out.split() == list(BODY)


def test_the_document_of_a_partial_fit(run: Run, make: Callable[[str, Shapes], str]) -> None:
    source = make("in.safetensors", {**BODY, **HEAD})
    like = make("like.safetensors", {**BODY, **SMALL_HEAD, "pool.weight": (1,)})
    document = run("transfer", "--json", source, "out.pth", "--like", like).document
    assert document["matched"] == 3
    assert document["mismatched"] == [
        {"key": "fc.weight", "here": [10, 4], "there": [2, 4]},
        {"key": "fc.bias", "here": [10], "there": [2]},
    ]
    assert document["missing"] == ["pool.weight"]
    assert document["filled"] == 20 / 31
    assert document["dropped"] == [
        {"key": "fc.weight", "reason": "shape differs"},
        {"key": "fc.bias", "reason": "shape differs"},
    ]


@pytest.mark.parametrize("there", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("inside", ["", "module.", "module._orig_mod."])
def test_both_sides_are_peeled(
    run: Run, make: Callable[[str, Shapes], str], inside: str, there: str
) -> None:
    source = make("in.safetensors", prefixed(inside, BODY))
    like = make("like.safetensors", prefixed(there, BODY))
    done = run("transfer", "--json", source, "out.safetensors", "--like", like)
    assert done.code == 0
    assert (done.document["filled"], done.document["written"]) == (1.0, 3)
    assert run("keys", "--names", "out.safetensors").out.split() == list(BODY)


def test_without_a_target_it_unwraps_and_peels(run: Run, good: Path, here: Path) -> None:
    done = run("transfer", "--json", good / "model_best.pth.tar", "out.pth")
    assert (done.document["renamed"], done.document["dropped"]) == (8, [])
    keys = run("keys", "--json", "out.pth").document
    assert keys["at"] == keys["beside"] == []
    assert keys["tensors"][0]["key"] == "features.0.weight"
    assert run("transfer", good / "plain.pth", "bare.pth").code == 0


def test_edits_are_applied_after_peeling_in_the_order_given(
    run: Run, make: Callable[[str, Shapes], str], here: Path
) -> None:
    source = make("in.safetensors", prefixed("module.backbone.", {**BODY, **HEAD}))
    (here / "strip.toml").write_text("recipe = 1\n[[step]]\nstrip = 'backbone.'\n")
    for options, keys in (
        (["--drop", "backbone.fc"], list(prefixed("backbone.", BODY))),
        (["--drop", "backbone.fc", "--rename", "backbone="], list(BODY)),
        (["--rename", "backbone=", "--drop", "fc"], list(BODY)),
        (["--keep", "backbone.fc", "--recipe", "strip.toml"], list(HEAD)),
        (["--recipe", "strip.toml", "--keep", "fc"], list(HEAD)),
        (["--rename", "backbone=", "--keep", "fc", "--drop", "*.bias"], ["fc.weight"]),
    ):
        done = run("transfer", "--force", source, "out.safetensors", *options)
        assert done.code == 0, done.err
        names = run("keys", "--names", "out.safetensors").out.split()
        assert sorted(names) == sorted(keys)
    for options in (["--drop", "fc"], ["--rename", "backbone=", "--drop", "backbone.fc"]):
        assert run("transfer", "--force", source, "out.safetensors", *options).code == 2


MATCHES = [
    (0.5, 20, True),
    (0.5, 19, False),
    (0.9, 36, True),
    (0.9, 35, False),
    (0.0, 0, True),
    (1.0, 40, True),
    (1.0, 39, False),
]


@pytest.mark.parametrize(("least", "common", "written"), MATCHES)
def test_min_match_is_a_share_of_elements(
    run: Run,
    here: Path,
    make: Callable[[str, Shapes], str],
    least: float,
    common: int,
    written: bool,
) -> None:
    source = make("in.safetensors", {"a": (common,), "other": (1000,)})
    like = make("like.safetensors", {"a": (common,), "b": (40 - common,)})
    done = run("transfer", source, "out.pth", "--like", like, "--min-match", least)
    assert done.code == (0 if written else 1), done.err
    assert (here / "out.pth").exists() is written
    assert done.out == ""
    if not written:
        assert done.err.startswith("error[poor-fit]: ")


def test_a_poor_fit_says_how_poor_and_what_would_accept_it(
    run: Run, here: Path, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {"a": (3,), "x.y": (1,)})
    like = make("like.safetensors", {"a": (3,), "b": (7,), "c.d": (2, 2)})
    before = listing(here)
    done = run("transfer", source, "out.pth", "--like", like)
    assert done.code == 1
    first, *evidence, hint = done.err.splitlines()
    assert "only 21.4 % of the parameters of like.safetensors would be filled" in first
    assert "nothing was written" in first
    assert evidence == [
        "    1 of 3 tensors match, 0 differ in shape, 2 missing",
        "    keys only here look like x.y",
        "    keys only there look like b",
    ]
    assert listing(here) == before
    assert "--min-match 0.21" in hint
    assert paste(run, hint).code == 0


def paste(run: Run, hint: str) -> Outcome:
    """Run the command in a hint."""
    text = hint.removeprefix("hint: ").split("   ")[0]
    return run(*shlex.split(text)[1:])


PREFIXES = [
    ("backbone.", "", "backbone"),
    ("encoder.model.", "", "encoder.model"),
    ("module.backbone.", "", "backbone"),
    ("", "backbone.", "=backbone"),
    ("", "module.net.body.", "=net.body"),
]


@pytest.mark.parametrize(("inside", "there", "named"), PREFIXES)
def test_the_hint_names_the_prefix_and_works_when_pasted(
    run: Run, here: Path, make: Callable[[str, Shapes], str], inside: str, there: str, named: str
) -> None:
    source = make("in.safetensors", prefixed(inside, {**BODY, **HEAD}))
    like = make("like.safetensors", prefixed(there, {**BODY, **HEAD}))
    done = run("transfer", source, "out.pth", "--like", like)
    assert done.code == 1
    hint = done.err.splitlines()[-1]
    assert named in hint
    assert "would fill 100.0 %" in hint
    pasted = paste(run, hint)
    assert pasted.code == 0, pasted.err
    assert "fills 5 of 5 tensors, 100.0 % of the parameters" in pasted.err


def test_the_hint_is_right_where_only_the_body_fits(
    run: Run, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {**prefixed("student.", BODY), "projection.weight": (9, 9)})
    like = make("like.safetensors", {**BODY, **SMALL_HEAD})
    done = run("transfer", source, "out.pth", "--like", like)
    hint = done.err.splitlines()[-1]
    assert "--rename student=" in hint
    assert "would fill 66.7 %" in hint
    assert paste(run, hint).code == 0


def test_a_poor_fit_shows_both_shapes_and_the_move_that_fills_most(
    run: Run, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {**prefixed("model.encoder.", BODY), "head.weight": (9, 9)})
    like = make("like.safetensors", {**prefixed("net.trunk.", BODY), "head.weight": (5, 9)})
    done = run("transfer", source, "out.pth", "--like", like)
    assert "    head.weight: [9, 9] here, [5, 9] in like.safetensors" in done.err.splitlines()
    hint = done.err.splitlines()[-1]
    assert " --rename model.encoder=net.trunk --min-match 0." in hint  # not half of it, even so
    assert paste(run, hint).code == 0


def test_a_hint_to_rename_works_behind_a_rename(
    run: Run, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {**prefixed("student.", BODY), "projection.weight": (9, 9)})
    like = make("like.safetensors", {**prefixed("net.", BODY), **SMALL_HEAD})
    options = ("--rename", "projection=head", "--drop", "*.bias")
    for given in (options[:2], options):  # in the same step, and in the next
        hint = run("transfer", source, "out.pth", "--like", like, *given).err.splitlines()[-1]
        assert " --rename student=net" in hint
        assert paste(run, f"{hint.split('   ')[0]} --force").code == 0
    source = make("in.safetensors", {**prefixed("student.", BODY), "patch": (1, 3, 2, 2)})
    like = make("like.safetensors", {**prefixed("net.", BODY), "patch": (1, 1, 2, 2)})
    for more in ((), ("--adapt", "patch=in-chans", "--min-match", "0.9")):
        options = ("--like", like, "--rename", "student=teacher", *more)
        again = run("transfer", source, "out.pth", *options)
        assert "error[poor-fit]" in again.err
        assert "--rename teacher" not in again.err  # no step renames a key twice


@pytest.mark.parametrize("which", ["file", "model"])
def test_a_tied_tensor_counts_once_in_the_share(run: Run, here: Path, which: str) -> None:
    torch = pytest.importorskip("torch")
    (here / "tied.py").write_text(
        "from torch import nn\n"
        "def net(rows=32):\n"
        "    model = nn.Module()\n"
        "    model.emb, model.body = nn.Embedding(rows, 10), nn.Linear(10, 40)\n"
        "    model.lm_head = nn.Linear(10, rows, bias=False)\n"
        "    model.lm_head.weight = model.emb.weight\n"
        "    return model\n"
    )
    namespace: dict[str, Any] = {}
    exec((here / "tied.py").read_text(), namespace)
    torch.save(namespace["net"](31).state_dict(), "in.pth")
    torch.save(namespace["net"]().state_dict(), "like.pth")
    target = ["--like", "like.pth"] if which == "file" else ["--model", "tied.py:net"]
    done = run("transfer", "in.pth", "out.pth", *target)
    assert done.code == 0, done.err
    assert "57.9 % of the parameters" in done.err  # 440 of 440 + 320


def test_no_hint_where_nothing_helps(run: Run, make: Callable[[str, Shapes], str]) -> None:
    source = make("in.safetensors", {"x.y": (3,)})
    like = make("like.safetensors", {"a.b": (5,)})
    done = run("transfer", source, "out.pth", "--like", like)
    assert done.code == 1
    assert "would fill" not in done.err
    assert "hint" not in done.err


def test_a_torch_target_for_a_safetensors_source_and_back(run: Run, good: Path, here: Path) -> None:
    for source, like, out in (
        ("plain.safetensors", "model_best.pth.tar", "a.pth"),
        ("model_best.pth.tar", "plain.safetensors", "b.safetensors"),
        ("model_best_legacy.pth.tar", "plain_legacy.pth", "c.pth"),
    ):
        done = run("transfer", good / source, out, "--like", good / like)
        assert done.code == 0, done.err
        assert "fills 8 of 8 tensors, 100.0 % of the parameters" in done.err


def test_the_state_dict_of_the_target_can_be_chosen(run: Run, good: Path, here: Path) -> None:
    like = good / "dino.pth"
    done = run("transfer", like, "out.pth", "--at", "student", "--like", like)
    assert done.code == 2
    done = run(
        "transfer", like, "out.pth", "--at", "student", "--like", like, "--like-at", "teacher"
    )
    assert done.code == 0, done.err
    assert "fills 8 of 8 tensors" in done.err


def test_hostile_names_in_targets_are_shown_harmless(
    run: Run, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {"a": (3,), "x\x1b[31m": (1,)})
    like = make("like\x1b[31m.safetensors", {"a": (3,), "y\u202e": (1,)})
    done = run("transfer", source, "out.pth", "--like", like)
    assert done.code == 0
    assert "\x1b" not in done.err
    assert "\u202e" not in done.err
    done = run("transfer", source, "out2.pth", "--like", like, "--min-match", "1")
    assert done.code == 1
    assert "\x1b" not in done.err


def test_the_library_raises_what_the_command_says(
    here: Path, make: Callable[[str, Shapes], str]
) -> None:
    source = make("in.safetensors", {"a": (3,)})
    with pytest.raises(PoorFit):
        fitting.transfer(source, "out.pth", like=Reference("target", {"b": (1,)}))
    done = fitting.transfer(source, "out.pth", like=Reference("target", {"a": (3,)}))
    assert done.fit is not None
    assert done.fit.filled == 1.0
    assert done.rewrite.written == 1
