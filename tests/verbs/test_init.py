"""`transfer --init`: judged by `torch.nn.init` under the seed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

import ckptool
from ckptool.errors import EditError, MissingExtra, NothingMatched

torch = pytest.importorskip("torch")
init = torch.nn.init

Run = Callable[..., Outcome]
BODY = {"conv.weight": (4, 3, 3, 3), "conv.bias": (4,)}
NEW = {"head.0.weight": (5, 4), "head.0.bias": (5,), "head.1.weight": (2, 5), "scale": (3,)}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({key: torch.ones(shape) for key, shape in BODY.items()}, "body.pth")
    torch.save({key: torch.zeros(shape) for key, shape in (NEW | BODY).items()}, "whole.pth")


def filled(*rules: str, **given: Any) -> dict[str, Any]:
    given = {"like": "whole.pth", "min_match": 0, "force": True, **given}
    done = ckptool.transfer("body.pth", "out.pth", init=rules, **given)
    out: dict[str, Any] = torch.load("out.pth", weights_only=True)
    assert {*done.initialised} == out.keys() - BODY.keys()
    assert all(torch.equal(out[key], torch.ones(shape)) for key, shape in BODY.items())
    return out


RULES: list[tuple[str, Callable[[Any], Any]]] = [
    ("xavier_uniform", init.xavier_uniform_),
    ("xavier_normal:gain=2", lambda tensor: init.xavier_normal_(tensor, gain=2)),
    ("kaiming_normal", init.kaiming_normal_),
    (
        "kaiming_uniform:mode=fan_out,nonlinearity=relu",
        lambda tensor: init.kaiming_uniform_(tensor, mode="fan_out", nonlinearity="relu"),
    ),
    ("normal:std=0.01", lambda tensor: init.normal_(tensor, std=0.01)),
    ("normal:mean=1,std=2e-3", lambda tensor: init.normal_(tensor, 1, 2e-3)),
    ("trunc_normal:std=0.02", lambda tensor: init.trunc_normal_(tensor, std=0.02)),
    ("uniform:a=-1,b=1", lambda tensor: init.uniform_(tensor, -1, 1)),
    ("orthogonal", init.orthogonal_),
    ("zeros", init.zeros_),
    ("ones", init.ones_),
    ("constant:0.5", lambda tensor: init.constant_(tensor, 0.5)),
]


@pytest.mark.parametrize(("how", "oracle"), RULES)
def test_values_are_those_of_torch_under_the_seed(how: str, oracle: Callable[[Any], Any]) -> None:
    before = torch.random.get_rng_state()
    out = filled(f"*.weight={how}", "*.bias=zeros", "scale=normal", seed=7)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(7)  # in the order of the target
    assert torch.equal(out["head.0.weight"], oracle(torch.empty(5, 4)))
    assert torch.equal(out["head.0.bias"], torch.zeros(5))
    assert torch.equal(out["head.1.weight"], oracle(torch.empty(2, 5)))
    assert torch.equal(out["scale"], init.normal_(torch.empty(3)))
    assert list(out) == [*NEW, *BODY]


def test_the_first_rule_that_selects_a_key_has_it() -> None:
    out = filled("head.0=ones", "head=zeros", "scale=constant:2")
    assert out["head.0.weight"].eq(1).all()
    assert out["head.1.weight"].eq(0).all()
    assert out["scale"].eq(2).all()


def test_what_differs_in_shape_is_new_and_has_the_dtype_of_the_target() -> None:
    torch.save({"fc.weight": torch.ones(3, 2), "a": torch.ones(4)}, "a.pth")
    torch.save({"fc.weight": torch.ones(5, 2).half(), "a": torch.ones(4)}, "b.pth")
    done = ckptool.transfer("a.pth", "out.pth", like="b.pth", init="fc=xavier_uniform", min_match=0)
    out = torch.load("out.pth")
    torch.manual_seed(0)
    assert torch.equal(out["fc.weight"], init.xavier_uniform_(torch.empty(5, 2).half()))
    assert done.initialised == ("fc.weight",)


def test_a_model_fills_what_no_rule_takes() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    torch.save({"0.weight": torch.ones(4, 3, 3, 3)}, "a.pth")
    given = {"model": model, "init": ["0.bias=constant:3"], "init_missing": True}
    done = ckptool.transfer("a.pth", "out.pth", min_match=0, **given)
    model.load_state_dict(torch.load("out.pth"))
    assert model[0].bias.eq(3).all()
    assert model[1].num_batches_tracked.dtype is torch.int64
    assert len(done.initialised) == 6


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("head", "does not end in =HOW"),
        ("head=xavier", "does not end in =HOW"),
        ("head=normal:sd=3", "normal takes mean, std"),
        ("head=zeros:1", "zeros takes nothing"),
        ("head=normal:std=x", "`x` is not a number"),
        ("head=constant", "which constant is not said"),
        ("head.0.bias=xavier_uniform", "fewer than 2 dimensions"),
        ("head.1=kaiming_normal:mode=fan", "fan"),
    ],
)
def test_rules_that_are_not(rule: str, message: str, run: Run) -> None:
    with pytest.raises(EditError, match=message):
        filled(rule)
    assert run("transfer", "body.pth", "out.pth", "--like", "whole.pth", "--init", rule).code == 2
    assert not Path("out.pth").exists()


def test_a_rule_of_a_key_that_the_file_fills_takes_nothing() -> None:
    with pytest.raises(NothingMatched) as caught:
        filled("conv=zeros")
    assert "--init conv=zeros, of 4 keys to fill" in caught.value.message
    with pytest.raises(EditError, match="need --like or --model"):
        ckptool.transfer("body.pth", "out.pth", init="conv=zeros")


def test_what_was_initialised_is_named(run: Run) -> None:
    line = ["transfer", "body.pth", "out.pth", "--like", "whole.pth", "--init", "head=ones"]
    outcome = run(*line, "--min-match", "0")
    assert outcome.code == 0
    said = "initialised: head.0.weight, head.0.bias, head.1.weight; not filled: scale"
    assert said in outcome.err
    document = run(*line, "--min-match", "0", "--json", "--force").document
    assert document["initialised"] == ["head.0.weight", "head.0.bias", "head.1.weight"]


def test_only_initial_values_need_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    ckptool.transfer("body.pth", "out.pth", like="whole.pth", min_match=0)
    with pytest.raises(MissingExtra) as caught:
        ckptool.transfer("body.pth", "o.pth", like="whole.pth", init="head=zeros", min_match=0)
    assert caught.value.exit_code == 7
    assert "pip install torch" in caught.value.hint
