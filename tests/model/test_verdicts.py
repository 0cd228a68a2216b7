"""What a proof must not claim: outputs that say nothing, two models, one file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ckptool

torch = pytest.importorskip("torch")
nn = torch.nn
Run = Callable[..., Any]
CPU: dict[str, Any] = {"devices": "cpu", "input_shapes": "2,4"}


class Net(nn.Sequential):
    def __init__(self, eps: float = 1e-5, activation: type[Any] = nn.ReLU) -> None:
        torch.manual_seed(8)
        super().__init__(nn.Linear(4, 6), nn.LayerNorm(6, eps=eps), activation(), nn.Linear(6, 3))


class Renamed(nn.Module):
    """The same network under other names, with a layer that does nothing and a function."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Identity(), nn.Linear(4, 6), nn.LayerNorm(6, eps=eps))
        self.head = nn.ModuleDict({"out": nn.Linear(6, 3)})

    def forward(self, x: Any) -> Any:
        return self.head["out"](self.stem(x).relu())


NAMES = {"0": "stem.1", "1": "stem.2", "3": "head.out"}


def renamed(state: dict[str, Any]) -> dict[str, Any]:
    return {f"{NAMES[key[0]]}{key[1:]}": value.clone() for key, value in state.items()}


def flipped(state: dict[str, Any], key: str) -> dict[str, Any]:
    changed = {name: value.clone() for name, value in state.items()}
    changed[key].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 24)
    return changed


@pytest.fixture
def zero_head() -> dict[str, Any]:
    state = Net().state_dict()
    return {**state, "3.weight": torch.zeros(3, 6), "3.bias": torch.zeros(3)}


def test_a_head_of_zeros_is_inconclusive(zero_head: dict[str, Any]) -> None:
    found = ckptool.verify(zero_head, zero_head, Net(), **CPU)
    assert (found.verdict, found.identical, found.same_digests) == ("inconclusive", False, True)
    assert found.runs[0].why == "constant"
    found = ckptool.verify(zero_head, flipped(zero_head, "0.weight"), Net(), **CPU)
    assert (found.verdict, found.same_digests) == ("inconclusive", False)
    assert found.runs[0].differing[:2] == ("0", "1")
    assert found.runs[0].parameters == ("0.weight",)
    independent = {**zero_head, "3.bias": torch.arange(3.0)}
    assert ckptool.verify(independent, independent, Net(), **CPU).runs[0].why == "independent"
    nan = {**zero_head, "3.bias": torch.full((3,), float("nan"))}
    assert ckptool.verify(nan, nan, Net(), **CPU).runs[0].why == "nan"


def test_what_hides_on_the_way_is_inconclusive() -> None:
    """A ReLU that lets nothing through: outputs depend on the input by another way."""

    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.hidden = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x: Any) -> Any:
            return self.seen(x) + self.hidden(x).clamp(max=-1e9).clamp(min=0)

    state = Hiding().state_dict()
    found = ckptool.verify(state, flipped(state, "hidden.weight"), Hiding(), **CPU)
    assert (found.verdict, found.runs[0].why) == ("inconclusive", "inside")
    assert found.runs[0].differing == ("hidden",)


def test_exit_codes_and_first_lines(
    run: Run, tmp_path: Path, zero_head: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential("
        "nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 3))\n"
    )
    torch.save(zero_head, "zeros.pth")
    torch.save(flipped(zero_head, "0.weight"), "flipped.pth")
    line = ("verify", "--model", "net.py:net", "--device", "cpu", "--input-shape", "2,4")
    done = run(*line, "zeros.pth", "zeros.pth")
    assert (done.code, done.out) == (1, "inconclusive\tcpu\t0\t0\t\n")
    assert done.err.startswith("inconclusive: cpu (")
    assert "all 5 modules are the same" in done.err.splitlines()[0]
    assert run(*line, "zeros.pth", "zeros.pth", "--allow-inconclusive").code == 0
    done = run(*line, "zeros.pth", "flipped.pth", "--allow-inconclusive")
    assert done.code == 1
    first = done.err.splitlines()[0]
    assert "modules differ: 0, 1" in first
    assert "1 tensor differs: 0.weight" in first
    done = run(*line, "zeros.pth", "flipped.pth", "--json")
    assert json.loads(done.out)["verdict"] == "inconclusive"
    assert run(*line, "zeros.pth").code == 2
    assert run(*line, "zeros.pth", "--allow-inconclusive").code == 2


# Two models.


def test_another_implementation_gives_the_same() -> None:
    state = Net().state_dict()
    found = ckptool.verify(state, renamed(state), Net(), candidate_model=Renamed(), **CPU)
    assert (found.verdict, found.candidate_model) == ("identical", "Renamed")
    assert found.runs[0].settings == ()


def test_settings_come_before_weights() -> None:
    state = Net().state_dict()
    other = Renamed(eps=1e-3)
    (run,) = ckptool.verify(state, renamed(state), Net(), candidate_model=other, **CPU)
    assert (run.verdict, run.first_difference) == ("different", "1")
    assert run.candidate_difference == "stem.2"
    (setting,) = run.settings
    assert (setting.name, setting.reference, setting.candidate) == ("eps", 1e-5, 1e-3)
    assert setting.modules == (("1", "stem.2"),)
    near = ckptool.verify(
        state, renamed(state), Net(), candidate_model=other, atol=0.1, rtol=0.1, **CPU
    )
    assert near.verdict == "identical"


def test_the_first_pair_that_parts_where_weights_differ() -> None:
    state = Net().state_dict()
    changed = renamed(flipped(state, "1.weight"))
    (run,) = ckptool.verify(state, changed, Net(), candidate_model=Renamed(), **CPU)
    assert (run.first_difference, run.candidate_difference) == ("1", "stem.2")
    assert run.settings == ()


def test_another_activation() -> None:
    state = Net().state_dict()
    (run,) = ckptool.verify(state, state, Net(), candidate_model=Net(activation=nn.GELU), **CPU)
    (setting,) = run.settings
    assert (setting.name, setting.reference, setting.candidate) == ("activation", "ReLU", "GELU")
    assert run.first_difference == "2"
    with pytest.raises(ckptool.BadInput, match="--partial"):
        ckptool.verify(state, state, Net(), candidate_model=Net(), partial=True, **CPU)


def test_other_arguments_of_the_same_model(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net(eps=1e-5, width=6):\n    return nn.Sequential("
        "nn.Linear(4, width), nn.LayerNorm(width, eps=eps), nn.Linear(width, 3))\n"
    )
    torch.save(
        nn.Sequential(nn.Linear(4, 7), nn.LayerNorm(7), nn.Linear(7, 3)).state_dict(), "a.pth"
    )
    line = ("verify", "--model", "net.py:net", "--device", "cpu", "--input-shape", "2,4")
    more = ("--model-arg", "width=7", "--candidate-arg", "eps=0.01")
    done = run(*line, *more, "a.pth", "a.pth")
    assert done.code == 1
    assert "eps is 1e-05 against 0.01 in 1" in done.err
    assert "no tensor that both files have differs" in done.err


# One file.


def test_one_file_is_enough_to_look(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    models = pytest.importorskip("torchvision").models
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(2)
    model = models.squeezenet1_1().eval()
    wrapped = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": wrapped}, "model_best.pth.tar")
    noise = np.random.default_rng(1).integers(0, 255, (300, 300, 3), np.uint8)
    image.fromarray(noise).save("dog.png")
    line = ("verify", "model_best.pth.tar", "--model", "squeezenet1_1", "--device", "cpu")
    done = run(*line, "--input", "dog.png")
    assert done.code == 0
    rows = [row.split("\t") for row in done.out.splitlines()]
    transforms = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    with torch.inference_mode():
        scores = model(transforms(image.open("dog.png").convert("RGB"))[None])[0]
    assert [int(row[1]) for row in rows] == scores.topk(5).indices.tolist()
    assert "a forward pass took " in done.err
    found = run(*line, "--input", "dog.png", "--json").document
    assert (found["candidate"], found["verdict"], found["identical"]) == (None, None, None)
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        image.fromarray(noise).save(tmp_path / "data" / name / "1.png")
    done = run(*line, "--data", "data")
    assert (done.code, done.out) == (0, "cpu\t2\t0.0 %\n")
    assert "0.0 % of 2 pictures are right" in done.err
