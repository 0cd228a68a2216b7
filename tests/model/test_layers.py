"""`layers`: judged by torchsummaryX's rows, torchinfo's numbers and torch's own counter."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import pytest
import resnet50_layers
from conftest import sampled

import ckptool

torch = pytest.importorskip("torch")
nn = torch.nn
Run = Callable[..., Any]

# torchinfo 1.8.0 on [1, 3, 224, 224], in eval mode: parameters, multiply-adds, layers that run.
TORCHINFO = {
    "resnet50": (25557032, 4089238376, 158),
    "vgg11": (132863336, 7616525288, 29),
    "densenet121": (7978856, 2834246312, 366),
    "mobilenet_v2": (3504872, 300809384, 141),
    "mobilenet_v3_small": (2542856, 56527424, 141),
    "efficientnet_b0": (5288548, 385867108, 223),
    "regnet_y_400mf": (4344144, 401876208, 237),
    "shufflenet_v2_x1_0": (2278604, 144925172, 151),
    "mnasnet1_0": (4383312, 314454792, 141),
    # Of these it counts a linear layer for one token, and attention not at all.
    "vit_b_16": (86567656, None, None),
    "swin_t": (28288354, None, None),
    "convnext_tiny": (28589128, None, None),
}


def test_the_rows_of_torchsummaryx() -> None:
    pytest.importorskip("torchvision")
    found = [
        (row.name, list(row.kernel or ()), list(row.output), row.parameters)
        for row in ckptool.layers("resnet50")
    ]
    assert found == [*resnet50_layers.rows()]


@pytest.mark.parametrize("name", sampled([*TORCHINFO], 3))
def test_the_numbers_of_torchinfo(name: str) -> None:
    pytest.importorskip("torchvision")
    parameters, products, count = TORCHINFO[name]
    found = ckptool.layers(name)
    assert (found.parameters, found.trainable) == (parameters, parameters)
    assert sum(row.parameters for row in found) == parameters
    assert sum(row.multiply_adds for row in found) == found.multiply_adds
    if products is not None:
        assert sum(map(as_torchinfo, found)) == products
        assert len(found) == count


def as_torchinfo(row: ckptool.Layer) -> int:
    """Count as torchinfo does: a bias is a product, and so is what normalises."""
    if "Conv" not in row.kind:
        return row.parameters
    return row.multiply_adds + (row.parameters - prod(row.weight)) * prod(row.output[2:])


def test_attention_is_counted() -> None:
    """An encoder of ViT-B/16 by hand: projections, and two products of 197 by 197 in 12 heads."""
    pytest.importorskip("torchvision")
    rows = [row for row in ckptool.layers("vit_b_16") if row.name.endswith("self_attention")]
    assert len(rows) == 12
    tokens, width = 197, 768
    assert rows[0].multiply_adds == 4 * tokens * width * width + 2 * tokens * tokens * width
    assert rows[0].parameters == 4 * width * width + 4 * width


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        self.again = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(1))
        self.unused = nn.Linear(2, 2)
        self.unused.bias.requires_grad_(False)

    def forward(self, x: Any) -> Any:
        x = self.body(x).mean((2, 3))
        return self.again(self.again(x)) * self.scale


def test_modules_that_repeat_or_never_run() -> None:
    found = ckptool.layers(Net(), input_shapes="2,3,8,8")
    shown = [(r.name, r.output, r.parameters, r.repeated, r.multiply_adds) for r in found]
    assert shown == [
        ("body.0", (2, 4, 6, 6), 112, False, 2 * 108 * 36),
        ("body.1", (2, 4, 6, 6), 0, False, 0),
        ("again", (2, 4), 20, False, 32),
        ("again", (2, 4), 0, True, 32),
        ("", (2, 4), 1, False, 0),
        ("unused", None, 6, False, 0),
    ]
    assert (found.parameters, found.trainable) == (139, 137)
    assert found.layers[0].kernel == (3, 4, 3, 3)
    assert found.layers[0].weight == (4, 3, 3, 3)
    assert found.to_dict()["layers"][0]["kernel"] == [3, 4, 3, 3]
    assert {row.dtype for row in found} == {"F32"}
    folded = ckptool.layers(Net(), input_shapes="2,3,8,8", depth=1)
    assert [row.name for row in folded] == ["body", "again", "again", "", "unused"]
    assert folded.layers[0].parameters == 112
    assert folded.layers[0].multiply_adds == 2 * 108 * 36
    whole = ckptool.layers(Net(), input_shapes="2,3,8,8", depth=0)
    assert [(row.name, row.parameters) for row in whole] == [("", 139)]


def test_a_model_that_needs_values_runs_on_the_cpu() -> None:
    class Choosing(nn.Linear):
        def forward(self, x: Any) -> Any:
            return super().forward(x if float(x.sum()) > 1e9 else x + 1)

    assert ckptool.layers(Choosing(4, 3), input_shapes="1,4").multiply_adds == 12


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torchvision")
    monkeypatch.chdir(tmp_path)
    done = run("layers", "--model", "resnet18", "--depth", "1")
    assert done.code == 0
    first = ["conv1", "Conv2d", "[3, 64, 7, 7]", "[1, 64, 112, 112]", "9408", "118013952", "F32"]
    assert done.out.splitlines()[0].split("\t") == first
    assert "11,689,512 parameters (11,689,512 trainable, 0 not)" in done.err
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(4, 3), nn.ReLU())\n"
    )
    done = run("layers", "--model", "net.py:net")
    assert done.code == 2
    assert "hint: ckptool layers --model net.py:net --input-shape 1,3,224,224" in done.err
    done = run("layers", "--model", "inception_v3", "--json").document
    assert (done["schema"], done["inputs"]) == ("layers/1", "[1, 3, 299, 299]")
    assert run("layers", "--model", "fcn_resnet50").code == 2


def test_what_a_file_fills(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential("
        "nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))\n"
    )
    state = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 5)).state_dict()
    del state["1.num_batches_tracked"]
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": {**wrapped, "module.old": torch.ones(1)}}, "best.pth.tar")
    line = ("layers", "--model", "net.py:net", "--input-shape", "2,4", "best.pth.tar")
    done = run(*line)
    assert [row.split("\t")[-1] for row in done.out.splitlines()] == ["2/2", "4/5", "0/2"]
    assert "best.pth.tar fills 1 of 3 layers that have tensors" in done.err
    assert "not filled: 1.num_batches_tracked" in done.err
    assert "of another shape: 2.weight, 2.bias" in done.err
    assert "no layer has it: old" in done.err
    found = run(*line, "--json").document
    assert (found["missing"], found["unexpected"]) == (["1.num_batches_tracked"], ["old"])
