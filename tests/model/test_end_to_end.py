"""The whole way on the CPU: download, train, strip, convert, transfer, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from downloads import no_proxy_fixture, server_fixture  # noqa: F401  (fixtures)
from server import Reply, Server

torch = pytest.importorskip("torch")
models = pytest.importorskip("torchvision.models")

Run = Callable[..., Any]
GHOST_NET = Path(__file__).parent / "ghost_net.py"
SMALL = ("--input-shape", "1,3,64,64", "--device", "cpu")


@pytest.fixture
def registered(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Serve weights of resnet18 under a name that holds their hash, as torchvision's registry."""
    torch.manual_seed(1)
    made = tmp_path / "made.pth"
    torch.save(models.resnet18().state_dict(), made)
    body = made.read_bytes()
    made.unlink()
    name = f"resnet18-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server.replies[f"/{name}"] = [Reply(body)]
    weights = models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setattr(weights.value, "url", f"{server.root}/{name}")
    return name


def wrapped_training(weights: Path, target: Path) -> None:
    """Write what a run on several GPUs would have saved with these weights."""
    model = models.resnet18()
    model.load_state_dict(torch.load(weights, weights_only=True))
    parallel = torch.nn.DataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
    content = {
        "epoch": 90,
        "arch": "resnet18",
        "state_dict": parallel.state_dict(),
        "best_acc1": torch.tensor(71.2),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(content, target)


def flip_a_bit(source: Path, target: Path, key: str) -> None:
    """Copy weights with the highest bit of one fraction turned over."""
    weights = torch.load(source, weights_only=True)
    weights[key].view(torch.int32).view(-1)[7] ^= 1 << 22
    torch.save(weights, target)


def test_from_download_to_proof(registered: str, tmp_path: Path, run: Run) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    assert run("download", "resnet18", "-o", folder).code == 0
    downloaded = folder / registered
    assert [path.name for path in folder.iterdir()] == [registered]

    best = tmp_path / "model_best.pth.tar"
    wrapped_training(downloaded, best)
    clean, bare, converted, head, wrong = (
        tmp_path / name
        for name in ("clean.pth", "bare.pth", "clean.safetensors", "head.pth", "wrong.pth")
    )
    assert run("strip-prefix", best, clean).code == 0
    assert run("unwrap", clean, bare).code == 0
    assert run("convert", bare, converted).code == 0

    for candidate in (clean, bare, converted):
        done = run("verify", best, candidate, "--model", "resnet18", *SMALL, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert found["schema"] == "verify/1"
        assert found["identical"] is True
        assert [each["device"] for each in found["runs"]] == ["cpu"]
        assert found["runs"][0]["max_abs_diff"] == 0

    ten = ("--model", "resnet18", "--model-arg", "num_classes=10")
    done = run("transfer", best, head, *ten, "--init-missing")
    assert done.code == 0, done.err
    model = models.resnet18(num_classes=10)
    model.load_state_dict(torch.load(head, weights_only=True), strict=True)
    assert torch.equal(model.conv1.weight, torch.load(bare, weights_only=True)["conv1.weight"])
    done = run("verify", best, head, *ten, *SMALL, "--partial", "--json")
    assert json.loads(done.out)["identical"] is True

    weights = torch.load(bare, weights_only=True)
    weights["bn1.num_batches_tracked"] += 1  # which no output depends on
    torch.save(weights, wrong)
    done = run("verify", best, wrong, "--model", "resnet18", *SMALL)
    assert done.code == 0
    assert "1 tensor differs: bn1.num_batches_tracked" in done.err.splitlines()[0]

    flip_a_bit(bare, wrong, "layer3.1.conv2.weight")
    done = run("verify", best, wrong, "--model", "resnet18", *SMALL, "--json")
    assert done.code == 1
    found = json.loads(done.out)
    assert found["identical"] is False
    assert found["runs"][0]["first_difference"] == "layer3.1.conv2"
    assert found["runs"][0]["max_abs_diff"] > 0


def test_a_model_of_ones_own_gets_another_head(tmp_path: Path, run: Run) -> None:
    """A GhostNet-like model, trained on 1000 classes under DataParallel, goes on to ten."""
    import ghost_net

    torch.manual_seed(2)
    trained = tmp_path / "ghost.pth.tar"
    state = torch.nn.DataParallel(ghost_net.ghost_net(num_classes=1000)).state_dict()
    torch.save({"state_dict": state, "epoch": 3}, trained)

    spec = ("--model", f"{GHOST_NET}:ghost_net", "--model-arg", "num_classes=10")
    target = tmp_path / "init.pth"
    done = run("transfer", trained, target, *spec)
    assert done.code == 0, done.err
    assert "classifier.weight" in done.err

    model = ghost_net.ghost_net(num_classes=10)
    found = model.load_state_dict(torch.load(target, weights_only=True), strict=False)
    assert sorted(found.missing_keys) == ["classifier.bias", "classifier.weight"]
    assert found.unexpected_keys == []

    done = run("verify", trained, target, *spec, *SMALL, "--partial", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["identical"] is True

    named = tmp_path / "named.pth"
    assert run("transfer", trained, named, "--drop", "classifier").code == 0
    dropped = torch.load(named, weights_only=True)
    assert not [key for key in dropped if key.startswith("classifier")]
    kept = torch.load(target, weights_only=True)
    assert dropped.keys() == kept.keys()
    assert all(torch.equal(dropped[key], kept[key]) for key in kept)


def test_a_url_goes_straight_into_transfer(
    server: Server, tmp_path: Path, run: Run, good: Path
) -> None:
    server.replies["/model_best.pth.tar"] = [Reply((good / "model_best.pth.tar").read_bytes())]
    url = f"{server.root}/model_best.pth.tar"
    done = run("keys", "--names", url)
    assert done.code == 0, done.err
    assert done.out.splitlines()[0] == "module.features.0.weight"
    assert "neither ETag nor Last-Modified" in done.err  # it is read where it is
    found = json.loads(run("info", "--json", url).out)
    assert (found["file"], found["count"]) == (url, 8)
    assert [each["command"] for each in found["suggestions"]] == [
        f"ckptool strip-prefix {url} model_best.stripped.pth",
        f"ckptool transfer {url} model_best.clean.pth",
    ]
    target = tmp_path / "pretrain.pth"
    done = run("transfer", url, target, "--drop", "classifier", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["source"] == url
    assert next(iter(torch.load(target, weights_only=True))) == "features.0.weight"
