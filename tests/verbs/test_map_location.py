"""`--map-location`: what was saved on a GPU loads without it, judged by torch.load."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome

import ckptool
from ckptool.errors import EditError

torch = pytest.importorskip("torch")

Run = Callable[..., Outcome]


@pytest.fixture(autouse=True)
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Write a training checkpoint whose storages are tagged as on a GPU."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    whole = {
        "epoch": 3,
        "state_dict": model.state_dict() | {"tied": model.weight.detach()},
        "optimizer": optimizer.state_dict(),
        "ema": torch.nn.Parameter(torch.ones(2)),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        "device": "cuda:1",
    }
    with monkeypatch.context() as tagged:
        tagged.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
        torch.save(whole, "gpu.pth")
    return whole


def tags(path: str) -> set[str]:
    """Return the device tags of the storages of a torch zip."""
    with zipfile.ZipFile(path) as archive:
        name = next(each for each in archive.namelist() if each.endswith("data.pkl"))
        texts = [arg for _, arg, _ in pickletools.genops(archive.read(name))]
    return {text for text in texts if text == "cpu" or str(text).startswith("cuda")} - {None}


def test_a_file_of_a_gpu_loads_without_one(gpu: dict[str, Any], run: Run) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load("gpu.pth", weights_only=True)
    outcome = run("convert", "gpu.pth", "cpu.pth", "--map-location", "cpu")
    assert outcome.code == 0
    assert "storages of cuda:1" in outcome.err
    loaded = torch.load("cpu.pth", weights_only=True)
    for mine, theirs in (
        (loaded["state_dict"], gpu["state_dict"]),
        (loaded["optimizer"]["state"][0], gpu["optimizer"]["state"][0]),
    ):
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())
    assert loaded["state_dict"]["tied"].data_ptr() == loaded["state_dict"]["weight"].data_ptr()
    assert torch.equal(loaded["sparse"].to_dense(), torch.eye(3))
    assert torch.equal(loaded["quantized"].dequantize(), gpu["quantized"].dequantize())
    assert loaded["device"] == "cuda:1"  # a text that is no tag
    assert tags("cpu.pth") == {"cpu", "cuda:1"}


LINES = [
    "convert gpu.pth OUT --add-prefix a",
    "convert gpu.pth OUT --dtype bf16",
    "unwrap gpu.pth OUT",
    "transfer gpu.pth OUT",
    "transfer gpu.pth OUT --drop tied",
    "strip-prefix prefixed.pth OUT",
    "add-prefix gpu.pth OUT",
    "average gpu.pth gpu.pth OUT",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize(
    ("device", "tag"), [("cpu", "cpu"), ("cuda:0", "cuda:0"), ("cuda", "cuda:0")]
)
def test_every_command_that_writes_tags(line: str, device: str, tag: str, run: Run) -> None:
    given = [{"OUT": "out.pth"}.get(word, word) for word in line.split()]
    ckptool.add_prefix("gpu.pth", "prefixed.pth")
    outcome = run(*given, "--map-location", device, "--drop-beside", "device")
    assert outcome.code == 0, outcome.err
    assert tags("out.pth") == {tag}


def test_shards_are_tagged() -> None:
    ckptool.convert("gpu.pth", "set", to="torch", max_shard_size=30, map_location="cpu")
    files = sorted(Path("set").glob("*.bin"))
    assert len(files) > 1
    for file in files:
        assert tags(str(file)) == {"cpu"}
        torch.load(file, weights_only=True)


def test_without_it_tags_stay() -> None:
    ckptool.convert("gpu.pth", "same.pth")
    assert tags("same.pth") == {"cuda:1"}


@pytest.mark.parametrize("more", [["out.safetensors"], ["out", "--to", "dcp"]])
def test_what_has_no_tags_is_refused(more: list[str], run: Run) -> None:
    outcome = run("convert", "gpu.pth", *more, "--map-location", "cpu")
    assert outcome.code == 2
    assert "no device tags" in outcome.err
    assert not Path(more[0]).exists()


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:", "cuda:x", "cpu:0", ""])
def test_what_is_not_a_device(device: str) -> None:
    with pytest.raises(EditError, match="is not a device"):
        ckptool.convert("gpu.pth", "out.pth", map_location=device)


def test_a_tensor_of_a_device_without_storages() -> None:
    value = torch.ones(3)

    class Device:
        def __reduce__(self) -> tuple[Any, ...]:
            args = (value, torch.float32, "xla:0", False)
            return torch._utils._rebuild_device_tensor_from_cpu_tensor, args

    if not hasattr(torch._utils, "_rebuild_device_tensor_from_cpu_tensor"):
        pytest.skip("torch has no such call")
    torch.save({"a": Device()}, "xla.pth")
    ckptool.convert("xla.pth", "out.pth", map_location="cpu")
    assert torch.equal(torch.load("out.pth", weights_only=True)["a"], value)


def test_info_says_how(run: Run) -> None:
    found = [each["command"] for each in run("info", "gpu.pth", "--json").document["suggestions"]]
    assert any("--map-location cpu" in command for command in found)
