"""What a shell offers to complete; judged by bash, and by torchvision for its names."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, environment

from ckptool.cli import completion
from ckptool.cli.main import main

GOOD = FIXTURES / "good"
HOSTILE = FIXTURES / "hostile"
Offered = Callable[[str], list[str]]


@pytest.fixture
def offered(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Offered:
    """Return what is offered for the last word of a line, with `file` for any file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(completion, "SECONDS", 10)
    for name in ("model_best.pth.tar", "dino.pth", "plain.pth", "tied.pth"):
        shutil.copy(GOOD / name, tmp_path / name)

    def offer(line: str) -> list[str]:
        words = line.split(" ")
        monkeypatch.setenv("_CKPTOOL_COMPLETE", "bash_complete")
        monkeypatch.setenv("COMP_WORDS", line)
        monkeypatch.setenv("COMP_CWORD", str(len(words) - 1))
        capsys.readouterr()
        main([])
        out, err = capsys.readouterr()
        assert err == ""
        kinds = [each.split(",", 1) for each in out.splitlines() if each]
        return [value if kind == "plain" else kind for kind, value in kinds]

    return offer


KEYS = list(torch.load(GOOD / "model_best.pth.tar", weights_only=False)["state_dict"])

LINES = [
    ("ckptool keys model_best.pth.tar --select ", KEYS),
    ("ckptool keys --select module.classifier.", []),  # of which file?
    ("ckptool diff model_best.pth.tar plain.pth --select module.c", KEYS[-2:]),
    ("ckptool convert model_best.pth.tar o.pth --drop module.cl", KEYS[-2:]),
    ("ckptool transfer model_best.pth.tar o.pth --keep cl", [key[7:] for key in KEYS[-2:]]),
    ("ckptool show model_best.pth.tar module.cl", KEYS[-2:]),
    ("ckptool keys dino.pth --at ", ["student", "teacher", "dino_loss"]),
    ("ckptool keys --at teacher dino.pth --select head.w", ["head.weight"]),
    ("ckptool diff model_best.pth.tar dino.pth --right-at t", ["teacher"]),
    ("ckptool diff dino.pth model_best.pth.tar --left-at t", ["teacher"]),
    ("ckptool transfer model_best.pth.tar o.pth --like dino.pth --like-at t", ["teacher"]),
    ("ckptool recipe timm-c", ["timm-convnext-to-hf"]),
    ("ckptool convert a.pth b.pth --recipe timm-c", ["timm-convnext-to-hf"]),
    ("ckptool recipe map", ["file"]),
    ("ckptool help sa", ["safety"]),
    ("ckptool help unw", ["unwrap"]),
    ("ckptool unw", ["unwrap"]),
    ("ckptool keys mod", ["file"]),
    ("ckptool transfer model_best.pth.tar out", ["file"]),
    ("ckptool transfer model_best.pth.tar out --like d", ["file"]),
    ("ckptool layers --model net.p", ["file"]),
]


@pytest.mark.parametrize(("line", "names"), LINES, ids=[line for line, _ in LINES])
def test_names_are_offered(offered: Offered, line: str, names: list[str]) -> None:
    assert offered(line) == names


def test_of_many_keys_modules_are_offered(offered: Offered, tmp_path: Path) -> None:
    layers = {f"model.layers.{n}.{name}": torch.ones(1) for n in range(60) for name in "abc"}
    torch.save({**layers, "model.norm": torch.ones(1)}, tmp_path / "many.pth")
    line = "ckptool keys many.pth --select "
    assert offered(line) == ["model.layers", "model.norm"]
    assert offered(f"{line}model.layers.") == [f"model.layers.{number}" for number in range(60)]
    assert offered(f"{line}model.layers.7.") == [f"model.layers.7.{name}" for name in "abc"]


def test_models_and_weights_are_those_of_torchvision(offered: Offered) -> None:
    torchvision = pytest.importorskip("torchvision")
    models = torchvision.models.list_models()
    assert offered("ckptool layers --model resnet") == sorted(
        name for name in models if name.startswith("resnet")
    )
    weights = {str(each) for name in models for each in torchvision.models.get_model_weights(name)}
    from ckptool.model import registry

    assert registry.models() == sorted(models)
    assert set(registry.weights()) == weights
    assert offered("ckptool download ResNet18_W") == ["ResNet18_Weights.IMAGENET1K_V1"]


BROKEN = "missing_data_pkl.pth html_page.pth inflate_bomb.pth billion_laughs.pth absent.pth".split()


@pytest.mark.parametrize("name", [*BROKEN, "https://example.org/model.pth", "/dev/zero", "."])
def test_a_broken_file_offers_nothing_and_says_nothing(offered: Offered, name: str) -> None:
    path = HOSTILE / name if name in BROKEN else name
    found = offered(f"ckptool keys {path} --select zz")
    assert found == []


def test_what_takes_too_long_offers_nothing(
    offered: Offered, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*_: object) -> list[str]:
        time.sleep(60)
        return ["late"]

    monkeypatch.setattr(completion, "SECONDS", 0.05)
    monkeypatch.setattr(completion, "_read", slow)
    started = time.monotonic()
    assert offered("ckptool keys plain.pth --select l") == []
    assert time.monotonic() - started < 30


LOADED = """
import os, sys
from ckptool.cli.main import main
main([])
names = {"torch", "torchvision", "numpy", "ml_dtypes", "matplotlib", "safetensors"}
sys.exit(", ".join(names & set(sys.modules)) or 0)
"""


@pytest.mark.parametrize(
    "line", ["keys model_best.pth.tar --select m", "layers --model r", "download r", "recipe t"]
)
def test_completion_imports_no_library(tmp_path: Path, line: str) -> None:
    shutil.copy(GOOD / "model_best.pth.tar", tmp_path)
    words = f"ckptool {line}"
    asked = {
        "_CKPTOOL_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        cwd=tmp_path, env=environment(asked), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("plain,")


@pytest.mark.skipif(not shutil.which("bash"), reason="asks bash")
def test_bash_completes_a_key(tmp_path: Path) -> None:
    """The script that the manual sets up, as bash calls it."""
    shutil.copy(GOOD / "model_best.pth.tar", tmp_path)
    program = tmp_path / "ckptool"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m ckptool "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    script = (
        'eval "$(_CKPTOOL_COMPLETE=bash_source ./ckptool)"; '
        "COMP_WORDS=(./ckptool show model_best.pth.tar module.classifier.b); COMP_CWORD=3; "
        '_ckptool_completion ./ckptool; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-c", script],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("module.classifier.bias\n", "")
