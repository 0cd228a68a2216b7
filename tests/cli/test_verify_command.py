"""`ckptool verify` as a script sees it."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ghost_net import ghost_net

from ckptool import load_matching
from ckptool.cli.talk import Progress

torch = pytest.importorskip("torch")
GHOST = f"{Path(__file__).parents[1] / 'model/ghost_net.py'}:ghost_net"
Run = Callable[..., Any]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A training checkpoint, its clean weights, and weights with one flipped bit."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(6)
    state = ghost_net(10, 8).state_dict()
    wrapped = {f"module.{key}": value for key, value in state.items()}
    torch.save({"state_dict": wrapped, "epoch": 3}, "trained.pth")
    torch.save(state, "clean.pth")
    changed = {key: value.clone() for key, value in state.items()}
    changed["features.1.primary.0.weight"].view(-1)[:1].view(torch.int32).bitwise_xor_(1 << 22)
    torch.save(changed, "flipped.pth")
    return dict(state)


@pytest.fixture
def verify(run: Run, files: dict[str, Any]) -> Run:
    def verify_here(reference: str, candidate: str, *more: object, model: str = GHOST) -> Any:
        own = ("--model-arg", "num_classes=10", "--model-arg", "width=8") if model == GHOST else ()
        size = () if {"--input", "--data", "--input-shape"} & set(more) else ("1,3,32,32",)
        shape = ("--input-shape", *size) if size else ()
        where = () if "--device" in more else ("--device", "cpu")
        return run("verify", reference, candidate, "--model", model, *own, *where, *shape, *more)

    return verify_here


def test_identical(verify: Run) -> None:
    done = verify("trained.pth", "clean.pth")
    assert (done.code, done.out) == (0, "identical\tcpu\t0\t0\t\n")
    assert "the outputs are the same, bit for bit" in done.err
    assert f"torch {torch.__version__}" in done.err
    assert verify("trained.pth", "clean.pth", "-q").err == ""


def test_different(verify: Run) -> None:
    done = verify("trained.pth", "flipped.pth")
    assert done.code == 1
    result, device, gap, ulp, module = done.out.rstrip("\n").split("\t")
    assert (device, result, module) == ("cpu", "different", "features.1.primary.0")
    assert done.err.startswith("different: cpu (")
    assert float(gap) > 0
    assert int(ulp) > 0
    assert "1 tensor differs: features.1.primary.0.weight" in done.err


def test_the_document(verify: Run) -> None:
    done = verify("trained.pth", "clean.pth", "--json")
    found = done.document
    assert done.code == 0
    assert found["schema"] == "verify/1"
    assert found["identical"] is True
    assert (found["reference"], found["candidate"]) == ("trained.pth", "clean.pth")
    (one,) = found["runs"]
    wanted = {
        "device": "cpu",
        "identical": True,
        "deterministic": True,
        "max_abs_diff": 0.0,
        "first_difference": None,
    }
    assert wanted.items() <= one.items()
    found = verify("trained.pth", "flipped.pth", "--json").document
    assert found["identical"] is False
    assert found["runs"][0]["first_difference"] == "features.1.primary.0"
    assert found["runs"][0]["parameters"] == ["features.1.primary.0.weight"]


def test_the_document_has_no_number_that_json_has_not(verify: Run, files: dict[str, Any]) -> None:
    files["classifier.bias"] = torch.full((10,), math.inf)
    torch.save(files, "infinite.pth")
    done = verify("clean.pth", "infinite.pth", "--json")
    json.loads(done.out, parse_constant=lambda name: pytest.fail(name))
    assert done.document["runs"][0]["max_abs_diff"] is None


def test_within_a_tolerance(verify: Run) -> None:
    done = verify("trained.pth", "flipped.pth", "--atol", "100")
    assert done.code == 0
    assert done.out.startswith("identical\tcpu\t")
    assert "within the tolerance: at most" in done.err


def test_what_differs_from_itself(verify: Run, tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "import torch\n"
        "class Net(torch.nn.Linear):\n"
        "    def __init__(self):\n        super().__init__(4, 4)\n"
        "    def forward(self, x):\n"
        "        return super().forward(torch.nn.functional.dropout(x, 0.5))\n"
    )
    torch.save(torch.nn.Linear(4, 4).state_dict(), "linear.pth")
    more = ("--input-shape", "1,4")
    done = verify("linear.pth", "linear.pth", *more, model="net.py:Net")
    assert (done.code, done.out) == (1, "inconclusive\tcpu\t\t\t\n")
    assert "nothing can be concluded" in done.err
    found = verify("linear.pth", "linear.pth", *more, "--json", model="net.py:Net").document
    assert (found["identical"], found["runs"][0]["identical"]) == (False, None)
    assert found["runs"][0]["deterministic"] is False


def test_partial(verify: Run, files: dict[str, Any]) -> None:
    bare = {key: value for key, value in files.items() if not key.startswith("classifier")}
    torch.save(bare, "bare.pth")
    done = verify("trained.pth", "bare.pth")
    assert (done.code, done.out) == (1, "")
    assert "error[does-not-load]" in done.err
    assert "missing: classifier.weight" in done.err
    assert "--init-missing" in done.err
    done = verify("trained.pth", "bare.pth", "--partial")
    assert (done.code, done.out) == (0, "identical\tcpu\t0\t0\t\n")
    assert "classifier: not in both files; set to the same values on both sides" in done.err
    found = verify("trained.pth", "bare.pth", "--partial", "--json").document
    assert found["left_out"] == ["classifier"]


def test_the_command_that_mends_mends(verify: Run, run: Run) -> None:
    done = verify("trained.pth", "trained.pth")
    assert done.code == 1
    hint = done.err.rpartition("hint: ")[2].strip()
    assert hint == "ckptool strip-prefix trained.pth OUT"
    words = hint.replace("OUT", "mended.pth").split()[1:]
    assert run(*words).code == 0
    assert verify("trained.pth", "mended.pth").code == 0


def test_another_head_is_mended_by_transfer(verify: Run, run: Run, files: dict[str, Any]) -> None:
    files["classifier.weight"], files["classifier.bias"] = torch.ones(4, 8), torch.ones(4)
    torch.save(files, "four.pth")
    done = verify("trained.pth", "four.pth")
    assert done.code == 1
    hint = done.err.rpartition("hint: ")[2].partition("   ")[0]
    assert run(*hint.replace("OUT", "mended.pth").split()[1:]).code == 0
    assert verify("trained.pth", "mended.pth").out.startswith("different\tcpu")  # a head anew
    assert verify("trained.pth", "four.pth", "--partial").code == 0


def test_a_thousand_classes_become_ten(verify: Run, run: Run) -> None:
    """What a user does: train in DataParallel, take the weights to another task, load, compare."""
    trained = torch.nn.DataParallel(ghost_net(1000, 8))
    torch.save({"state_dict": trained.state_dict(), "arch": "ghost_net"}, "imagenet.pth.tar")
    own = ("--model", GHOST, "--model-arg", "num_classes=10", "--model-arg", "width=8")
    assert run("transfer", "imagenet.pth.tar", "init.pth", *own, "--init-missing").code == 0
    model = ghost_net(10, 8)
    model.load_state_dict(torch.load("init.pth"), strict=True)
    assert load_matching(ghost_net(10, 8), "init.pth").filled == 1.0
    done = verify("imagenet.pth.tar", "init.pth", "--partial")
    assert (done.code, done.out) == (0, "identical\tcpu\t0\t0\t\n")
    assert "classifier: not in both files; set to the same values on both sides" in done.err


@pytest.mark.parametrize(
    ("arguments", "code", "slug"),
    [
        (["--device", "tpu"], 2, "bad-input"),
        (["--input-shape", "1,4,32,32"], 2, "bad-input"),
        (["--input-shape", "1,3,32,32", "--input", "dog.jpg"], 2, "bad-input"),
        (["--input", "dog.jpg"], 2, "bad-input"),
        (["--data", "."], 2, "bad-input"),
        (["--dtype", "int8"], 2, "bad-input"),
        (["--model-arg", "depth"], 2, "bad-input"),
        (["--model-arg", "depth=3"], 2, "bad-input"),
        (["--at", "nowhere"], 2, "no-such-key"),
        (["--batch-size", "0"], 2, "usage"),
    ],
)
def test_refusals(verify: Run, arguments: list[str], code: int, slug: str) -> None:
    done = verify("trained.pth", "clean.pth", *arguments)
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith(f"error[{slug}]: ")
    assert "Traceback" not in done.err


def test_other_refusals(verify: Run, run: Run) -> None:
    assert run("verify", "trained.pth", "clean.pth").code == 2
    assert verify("missing.pth", "clean.pth").code == 3
    done = verify("trained.pth", "clean.pth", model="resnet81")
    assert done.code == 2
    assert "error[no-such-model]" in done.err
    assert "did you mean resnet" in done.err


def test_a_device_that_is_not_here(verify: Run) -> None:
    if torch.cuda.is_available():
        pytest.skip("CUDA is here")
    done = verify("trained.pth", "clean.pth", "--device", "cuda")
    assert (done.code, done.out) == (7, "")
    assert "error[no-device]: there is no device `cuda` here" in done.err


def test_out_of_memory(verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(torch.nn.Conv2d, "forward", full)
    done = verify("trained.pth", "clean.pth")
    assert (done.code, done.out) == (7, "")
    assert "error[out-of-memory]" in done.err
    assert "--batch-size" in done.err


def test_no_torch(verify: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = verify("trained.pth", "clean.pth")
    assert done.code == 7
    assert "pip install torch torchvision safetensors numpy" in done.err


def test_a_reference_that_torch_refuses(verify: Run, files: dict[str, Any]) -> None:
    more = {"args": argparse.Namespace(), "best": np.float64(1.0)}
    torch.save({"state_dict": files, **more}, "foreign.pth")
    done = verify("foreign.pth", "clean.pth")
    assert done.code == 0
    assert "foreign.pth was loaded by ckptool's own reader" in done.err


def test_names_from_a_file_are_escaped(verify: Run, files: dict[str, Any]) -> None:
    files["evil\x1b[31m"] = torch.ones(1)
    torch.save(files, "evil.pth")
    done = verify("trained.pth", "evil.pth")
    assert "unexpected: evil\\x1b[31m" in done.err


@pytest.fixture
def picture(files: dict[str, Any]) -> str:
    image = pytest.importorskip("PIL.Image")
    image.fromarray(np.zeros((40, 50, 3), np.uint8)).save("dog.png")
    return "dog.png"


def test_a_picture(verify: Run, picture: str) -> None:
    done = verify("trained.pth", "clean.pth", "--input", picture)
    assert done.code == 0
    assert "likeliest classes: " in done.err
    assert "a forward pass took " in done.err
    found = verify("trained.pth", "clean.pth", "--input", picture, "--json").document
    assert len(found["runs"][0]["top_reference"]) == 5


def test_a_folder(verify: Run, picture: str, tmp_path: Path) -> None:
    for name in ("ant", "bee"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "1.png").write_bytes(Path(picture).read_bytes())
    done = verify("trained.pth", "clean.pth", "--data", "data", "--batch-size", "1")
    assert done.code == 0
    assert " of 2 pictures are right" in done.err


def test_progress_is_whole_lines_off_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 0.5, 5.0, 11.0, 12.0, 22.0])
    monkeypatch.setattr("ckptool.cli.talk.time.monotonic", lambda: next(clock))
    with Progress("", quiet=False, unit="batch") as progress:
        for done in range(1, 6):
            progress.reached(done, 8, "a.pth")
    assert capsys.readouterr().err == "a.pth: batch 3 of 8\na.pth: batch 5 of 8\n"


def test_help_loads_no_torch(spawn: Run) -> None:
    program = (
        "import sys, ckptool.cli.main as c; c.main(['verify', '--help']);"
        " sys.exit(9 if 'torch' in sys.modules else 0)"
    )
    assert spawn(program=("-c", program)).code == 0


@pytest.mark.parametrize("name", ["resnet18", "RESNET18"])
def test_a_model_of_torchvision(verify: Run, name: str) -> None:
    models = pytest.importorskip("torchvision").models
    torch.save(models.resnet18().state_dict(), "resnet18.pth")
    assert verify("resnet18.pth", "resnet18.pth", model=name).code == 0
