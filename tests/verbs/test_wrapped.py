"""What wrappers, copies, lists and odd keys make of a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import ckptool
from ckptool.errors import NoSuchKey, NothingMatched, UnsafePickle

torch = pytest.importorskip("torch")
nn = torch.nn
Run = Callable[..., Any]


def net() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def prefixed(prefix: str, state: dict[str, Any]) -> dict[str, Any]:
    return {prefix + key: value for key, value in state.items()}


@pytest.fixture
def averaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A training checkpoint as torchvision's references write it, the working directory."""
    monkeypatch.chdir(tmp_path)
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(model, use_buffers=True)
    for parameter in ema.parameters():
        parameter.data.mul_(2)
    torch.save({"model": model.state_dict(), "model_ema": ema.state_dict(), "epoch": 1}, "ema.pth")
    torch.save(ema.module.state_dict(), "want.pth")
    return tmp_path


@pytest.mark.parametrize(
    "line",
    [
        "strip-prefix --at model_ema ema.pth out.pth",
        "strip-prefix --prefix module --every --at model_ema ema.pth out.pth",
        "strip-prefix --prefix auto --at model_ema ema.pth out.pth",
        "transfer --at model_ema ema.pth out.pth",
        "transfer --at model_ema ema.pth out.pth --like want.pth",
        "transfer --at model_ema ema.pth out.pth --drop n_averaged",
        "convert --at model_ema --strip-prefix auto ema.pth out.safetensors",
        "convert --at model_ema --strip-prefix module ema.pth out.pth",
    ],
)
def test_an_averaged_model_becomes_the_model(averaged: Path, run: Run, line: str) -> None:
    done = run(*line.split(), "--json")
    assert done.code == 0, done.err
    reasons = {each["key"]: each["reason"] for each in done.document["dropped"]}
    assert reasons["n_averaged"] == "bookkeeping"
    nested = done.document["target"].endswith(".pth") and not line.startswith("transfer")
    at = "model_ema" if nested else None
    state = ckptool.load_state_dict(done.document["target"], at=at)
    model = net()
    model.load_state_dict(state)
    for key, value in torch.load("want.pth").items():
        assert torch.equal(state[key], value)


def test_the_library_takes_an_averaged_model(averaged: Path) -> None:
    model = net()
    found = ckptool.load_matching(model, "ema.pth", at="model_ema")
    assert (found.missing, found.unexpected, found.filled) == ((), (), 1.0)
    assert found.dropped == ("n_averaged",)
    kept = ckptool.load_matching(net(), "ema.pth", at="model_ema", keep_bookkeeping=True)
    assert kept.unexpected == ("n_averaged",)
    into = torch.optim.swa_utils.AveragedModel(net())
    assert ckptool.load_matching(into, "want.pth").matched == tuple(torch.load("want.pth"))
    same = ckptool.diff("want.pth", "ema.pth", right_at="model_ema", ignore_prefix="auto")
    assert same.equal
    assert "not compared (bookkeeping): n_averaged" in same.notes
    done = ckptool.strip_prefix("ema.pth", "k.pth", at="model_ema", keep_bookkeeping=True)
    assert done.dropped == ()


def test_a_model_with_wrapped_parts_still_takes_its_own_file(tmp_path: Path) -> None:
    model = net()
    model[0] = nn.Sequential()
    model[0]._orig_mod = nn.Conv2d(3, 4, 1)
    torch.save(model.state_dict(), tmp_path / "own.pth")
    found = ckptool.load_matching(model, tmp_path / "own.pth")
    assert (found.missing, found.unexpected, found.filled) == ((), (), 1.0)
    assert ckptool.load_matching(net(), tmp_path / "own.pth").filled == 1.0


def test_prefixes_repeat_and_what_is_left_is_said(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    torch.save(prefixed("net.module.", net().state_dict()), source)
    done = run("strip-prefix", "--prefix", "net", source, out)
    left = "in the output, every key starts with `module.` (DataParallel)"
    assert f"{left}; `ckptool transfer` removes it" in done.err.splitlines()
    done = run("strip-prefix", "--prefix", "net", "--prefix", "module", source, out, "--force")
    assert "in the output" not in done.err
    assert list(torch.load(out)) == list(net().state_dict())
    ckptool.strip_prefix(source, out, prefix=["net", "auto"], force=True)
    assert list(torch.load(out)) == list(net().state_dict())


def test_anywhere_is_for_convert_transfer_and_diff(tmp_path: Path, run: Run) -> None:
    source, out, plain = (tmp_path / name for name in ("in.pth", "out.pth", "plain.pth"))
    state = {"a.w": torch.ones(2), "b.w": torch.zeros(3)}
    torch.save(state, plain)
    torch.save({"a.module.w": torch.ones(2), "module.b.module.w": torch.zeros(3)}, source)
    for line in ("convert --strip-prefix module", "convert --strip-prefix auto", "transfer"):
        assert run(*line.split(), "--anywhere", source, out, "--force").code == 0
        assert list(torch.load(out)) == ["a.w", "b.w"]
    assert run("diff", source, plain, "--ignore-prefix", "auto").code == 1
    assert run("diff", source, plain, "--ignore-prefix", "auto", "--anywhere").code == 0


@pytest.mark.parametrize("name", ["net_ema", "swa", "best", "discriminator", "shadow"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_copy_of_any_name_makes_it_ambiguous(
    tmp_path: Path, run: Run, name: str, prefix: str
) -> None:
    copy = {key: value + 1 for key, value in net().state_dict().items() if "running" not in key}
    source = tmp_path / "in.pth"
    torch.save({"model": net().state_dict(), name: prefixed(prefix, copy)}, source)
    done = run("unwrap", "-q", source, tmp_path / "out.pth")
    assert done.code == 2
    assert "error[ambiguous-state-dict]" in done.err
    assert name in done.err


def test_one_dict_under_two_names_is_one(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "in.pth"
    state = net().state_dict()
    torch.save({"best": state, "state_dict": state}, source)
    done = run("unwrap", source, tmp_path / "out.pth")
    assert done.code == 0
    assert "took the state_dict at `state_dict`" in done.err
    assert "the same state_dict is also at `best`" in done.err


def test_edits_at_the_top_keep_the_nesting(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    model = nn.DataParallel(net())
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    whole = {"epoch": 1, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict(),
             "heads": {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(3)}}}  # fmt: skip
    torch.save(whole, source)
    assert run("convert", "--at", ".", "--drop", "optimizer", source, out).code == 0
    found = torch.load(out)
    assert list(found) == ["epoch", "state_dict", "heads"]
    assert list(found["state_dict"]) == list(whole["state_dict"])
    assert found["state_dict"]._metadata == whole["state_dict"]._metadata
    assert list(found["heads"]) == ["a", "b"]
    line = ("convert", "--at", ".", "--rename", "heads.a=heads.b.x", "--drop", "state_dict")
    assert run(*line, source, out, "--force").code == 0
    assert {name: list(each) for name, each in torch.load(out)["heads"].items()} == {
        "b": ["x.w", "w"]
    }
    assert run("convert", "--at", "heads", "--rename", "b.w=a", source, out, "--force").code == 2


def test_lists_and_odd_keys_hide_nothing(tmp_path: Path, run: Run) -> None:
    source, out = tmp_path / "in.pth", tmp_path / "out.pth"
    state = {"module.w": torch.ones(2), 7: torch.ones(3), ("x", 1): "odd"}
    torch.save(({"lr": 0.1}, state), source)
    done = run("strip-prefix", "--prefix", "module", source, out)
    assert done.code == 0
    assert list(torch.load(out)[1]) == ["w", 7, ("x", 1)]
    torch.save({0: torch.ones(2), 1: torch.ones(3)}, source)
    done = run("convert", source, tmp_path / "o.safetensors")
    assert done.code == 2
    assert "error[no-state-dict]" in done.err
    command = done.err.rpartition("hint: ckptool ")[2].split()
    assert run(*command).code == 0
    assert list(ckptool.keys(tmp_path / "o.safetensors")) == ["0", "1"]
    torch.save([torch.ones(1), {"mean": torch.ones(2)}], source)  # no part for the whole
    assert run("unwrap", source, out, "--force").code == 2


def test_nested_dicts_are_one_state_dict(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "in.pth"
    deep = {"embedding": {"word": {"table": {"rows": {"weight": torch.ones(2)}}}},
            "encoder": {"layers.0.weight": torch.ones(3)}}  # fmt: skip
    torch.save({"args": 1, "model": {"language_model": deep}}, source)
    assert list(ckptool.keys(source)) == [
        "language_model.embedding.word.table.rows.weight",
        "language_model.encoder.layers.0.weight",
    ]
    torch.save({"model": {"a": {"w": torch.ones(2)}, "b": {"w": torch.ones(2) * 2}}}, source)
    assert run("keys", source).code == 2


def test_at_says_what_is_there(tmp_path: Path, run: Run) -> None:
    bare, one = tmp_path / "bare.pth", tmp_path / "one.pth"
    torch.save(net().state_dict(), bare)
    torch.save(torch.ones(2, 3), one)
    with pytest.raises(NoSuchKey) as caught:
        ckptool.keys(bare, at="state_dict")
    assert caught.value.hint == f"{bare} is a bare state_dict: leave out --at"
    assert "not a dict of tensors: F32 [2, 3]" in run("keys", one, "--at", ".").err
    torch.save(
        {"student": net().state_dict(), "teacher": prefixed("x.", {"w": torch.ones(1)})}, one
    )
    done = run("transfer", bare, tmp_path / "o.pth", "--like", one, "--like-at", "techer")
    assert "--like-at teacher" in done.err


class Evil:
    def __reduce__(self) -> Any:
        import os

        return (os.system, ("true",))


def test_unsafe_comes_before_nothing_matched(tmp_path: Path) -> None:
    source = tmp_path / "in.pth"
    torch.save({"state_dict": net().state_dict(), "hook": Evil()}, source)
    with pytest.raises(UnsafePickle):
        ckptool.strip_prefix(source, tmp_path / "out.pth")
    with pytest.raises(NothingMatched):  # the output would not carry it
        ckptool.strip_prefix(source, tmp_path / "out.safetensors")


def test_a_submodule_called_module_is_left_alone(tmp_path: Path, run: Run) -> None:
    source = tmp_path / "in.pth"
    part = nn.Linear(3, 2)
    model = nn.Module()
    model.module, model.gradient, model.scaler = part, nn.Module(), nn.Linear(1, 1)
    model.gradient.module = part
    torch.save(model.state_dict(), source)
    facts = json.loads(run("info", source, "--json").out)
    assert "DataParallel" not in run("info", source).out
    assert facts["suggestions"] == []


def test_a_dict_inside_itself_is_joined_once(run: Callable[..., Any], tmp_path: Path) -> None:
    tree: dict[str, Any] = {"part": {"weight": torch.ones(2)}, "epoch": 1}
    tree["again"] = {"whole": tree}
    torch.save(tree, tmp_path / "in.pth")
    done = run("keys", "--at", ".", "--json", tmp_path / "in.pth")
    assert done.code == 0
    assert [each["key"] for each in done.document["tensors"]] == ["part.weight"]


LIKE_THE_MODEL: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "other prefix": lambda state: prefixed("net.", state),
    "counters of its own": lambda state: {
        **state, "decay": torch.tensor(0.9), "num_updates": torch.tensor([3])
    },
    "no dots, as LitEma": lambda state: {
        **{key.replace(".", ""): value for key, value in state.items()},
        "decay": torch.tensor(0.9),
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", LIKE_THE_MODEL)
@pytest.mark.parametrize("prefix", ["", "model.", "module.model."])
def test_a_copy_under_other_keys_is_a_copy(
    kind: str, prefix: str, tmp_path: Path, run: Run
) -> None:
    if prefix and kind.startswith("no dots"):
        prefix = "module."
    copy = LIKE_THE_MODEL[kind]({key: value + 1 for key, value in net().state_dict().items()})
    source = str(tmp_path / "in.pth")
    torch.save({"model": prefixed(prefix, net().state_dict()), "smoothed": copy}, source)
    done = run("unwrap", source, str(tmp_path / "out.pth"))
    assert (done.code, "smoothed" in done.err) == (2, True)
    assert run("unwrap", source, str(tmp_path / "out.pth"), "--at", "smoothed").code == 0


def test_other_shapes_under_the_same_keys_are_no_copy(tmp_path: Path, run: Run) -> None:
    source = str(tmp_path / "in.pth")
    losses = {"loss": torch.tensor(1.0), "best": torch.tensor(2.0)}
    head = nn.Linear(4, 3).state_dict()
    torch.save({"model": net().state_dict(), "head": head, "losses": losses}, source)
    assert run("unwrap", source, str(tmp_path / "out.pth")).code == 0


def test_extra_state_that_is_a_dict_is_an_entry(tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    state = {**net().state_dict(), "0._extra_state": {"scale": torch.ones(2)}}
    torch.save(prefixed("module.", state), source)
    assert run("strip-prefix", source, out).code == 0
    assert list(torch.load(out, weights_only=True)) == list(state)


def test_what_is_inside_is_counted_after_what_all_share(tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    torch.save(prefixed("module._orig_mod.", net().state_dict()), source)
    done = run("transfer", source, out)
    assert "stripped `module._orig_mod.` from 9 of 9 keys" in done.err
    assert "` inside " not in done.err
    assert "`_orig_mod.`," not in run("info", source).out


def test_an_average_and_its_model_in_one_dict_are_seen(tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    state, counters = net().state_dict(), {"initted": torch.tensor(True), "step": torch.tensor(0)}
    both = {**counters, **prefixed("online_model.", state), **prefixed("ema_model.", state)}
    torch.save({"ema": both}, source)
    wanted = f"{len(state)} of {len(both)} keys start with `ema_model.` (EMA)"
    assert wanted in run("info", source).out
    assert wanted in run("unwrap", source, out).err


def test_what_no_state_dict_is_proposed_for_works(tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    torch.save([torch.ones(2), torch.zeros(3)], source)
    for verb in ("unwrap", "transfer"):
        refused = run(verb, source, out, "--force")
        assert refused.err.splitlines()[-1] == f"hint: ckptool {verb} {source} {out} --force --at ."
        assert run(verb, source, out, "--at", ".", "--force").code == 0
    run("unwrap", source, out, "--at", ".", "--force")
    assert list(torch.load(out, weights_only=True)) == ["0", "1"]


@pytest.mark.parametrize(
    "line",
    ["convert --anywhere IN OUT", "convert --keep-bookkeeping IN OUT", "diff --anywhere IN IN"],
)
def test_an_option_of_prefixes_needs_a_prefix(line: str, tmp_path: Path, run: Run) -> None:
    source = str(tmp_path / "in.pth")
    torch.save(net().state_dict(), source)
    words = line.replace("IN", source).replace("OUT", str(tmp_path / "out.pth")).split()
    done = run(*words)
    assert (done.code, "has no effect without" in done.err) == (2, True)


def test_like_at_needs_like(tmp_path: Path) -> None:
    source = str(tmp_path / "in.pth")
    torch.save(net().state_dict(), source)
    with pytest.raises(ckptool.CkptoolError, match="--like"):
        ckptool.transfer(source, str(tmp_path / "out.pth"), like_at="model")


@pytest.mark.parametrize("start", ["module.module.", "layer._orig_mod.module."])
def test_what_a_proposal_removes_is_gone_after_it(start: str, tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    bare = prefixed("module." if start.startswith("module") else "", {"a": torch.ones(1)})
    torch.save({**bare, **prefixed(start, net().state_dict())}, source)
    before = run("keys", source).err
    said, _, rest = before.partition(": ckptool strip-prefix ")
    proposed = [line.split("\t") for line in run("info", source).out.splitlines()]
    reasons = [line[1] for line in proposed if "strip-prefix" in line[-1]]
    assert len(reasons) == 1
    assert reasons[0] in said
    assert ".module.`" not in reasons[0]
    assert ".module.`" in rest
    auto = ("--prefix", "auto") if "--prefix auto" in rest else ()
    assert run("strip-prefix", *auto, source, out).code == 0
    assert "_orig_mod" not in run("keys", out).out


def test_all_prefixes_that_would_fill_as_much_are_named(tmp_path: Path, run: Run) -> None:
    source, like, out = (str(tmp_path / name) for name in ("in.pth", "like.pth", "out.pth"))
    state = net().state_dict()
    both = {**prefixed("module.encoder_q.", state), **prefixed("module.encoder_k.", state)}
    torch.save({"state_dict": both}, source)
    torch.save(state, like)
    hint = run("transfer", source, out, "--like", like).err.splitlines()[-1]
    assert "--rename encoder_q=   would fill 100.0 %, as would --rename encoder_k=" in hint
    torch.save({"state_dict": prefixed("module.encoder_q.", state)}, source)
    assert "as would" not in run("transfer", source, out, "--like", like).err


def test_parts_of_other_names_are_no_copies_of_each_other(tmp_path: Path, run: Run) -> None:
    source, out = str(tmp_path / "in.pth"), str(tmp_path / "out.pth")
    parts = {
        name: prefixed(f"{name}.", nn.Linear(3, 3).state_dict()) for name in ("first", "second")
    }
    torch.save({"model": parts}, source)
    assert run("unwrap", source, out).code == 0
    assert len(torch.load(out, weights_only=True)) == 4


def test_copies_of_single_numbers_are_copies(tmp_path: Path, run: Run) -> None:
    source = str(tmp_path / "in.pth")
    torch.save({"model": {"w": torch.ones(1)}, "mean": {"w": torch.zeros(1)}}, source)
    assert run("unwrap", source, str(tmp_path / "out.pth")).code == 2


def test_the_last_lines_say_where_the_state_dict_is(run: Run, good: Path, tmp_path: Path) -> None:
    """What `load_state_dict` takes is inside the output, or the output itself."""
    wrapped, bare = tmp_path / "wrapped.pth", tmp_path / "bare.pth"
    done = run("strip-prefix", good / "model_best.pth.tar", wrapped)
    assert done.err.splitlines()[-2] == f"{wrapped}: 8 tensors, 704 B at `state_dict`"
    done = run("transfer", good / "model_best.pth.tar", bare)
    assert done.err.splitlines()[-2] == f"{bare}: 8 tensors, 704 B"
