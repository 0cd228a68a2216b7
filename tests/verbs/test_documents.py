"""The JSON of every schema, pinned: what scripts read must stay as it is, field by field.

`python tests/verbs/test_documents.py` records them anew, for a field that is added on purpose.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
GOOD, HOSTILE = HERE.parents[1] / "fixtures" / "good", HERE.parents[1] / "fixtures" / "hostile"
RECORDED = HERE / "documents"
LINES = {
    "keys": "keys model_best.pth.tar",
    "keys_all": "keys --all optimizer.pth",
    "keys_chosen": "keys dino.pth --at teacher --select *.weight --sort name",
    "keys_layouts": "keys sparse.pth",
    "keys_module": "keys whole_model.pth",
    "keys_sharded": "keys sharded_safetensors",
    "strip_prefix": "strip-prefix model_best.pth.tar out.pth",
    "strip_dry_run": "strip-prefix -n data_parallel.pth out.safetensors",
    "unwrap": "unwrap model_best.pth.tar out.pth",
    "convert": "convert --strip-prefix module --drop classifier model_best.pth.tar out.safetensors",
    "convert_tied": "convert tied.pth out.safetensors",
    "convert_module": "convert --tensors-only whole_model.pth out.pth",
    "convert_sharded": "convert --max-shard-size 300 plain.pth out",
    "transfer": "transfer model_best.pth.tar out.pth",
    "transfer_like": "transfer model_best.pth.tar out.pth --like flowers.safetensors",
    "average": "average --weights 1,0.5 model_best.pth.tar plain.pth out.pth",
    "recipe": "recipe lightning-to-plain --from plain.pth --like changed.safetensors",
    "match": "match data_parallel.pth --like flowers.safetensors",
    "many_keys": "keys tied.pth missing.pth plain.safetensors",
    "many_info": "info plain.pth png.pth",
    "many_edits": "strip-prefix data_parallel.pth plain.pth os_system.pth out/",
    "info": "info model_best.pth.tar",
    "info_several": "info dino.pth",
    "info_foreign": "info foreign.pth",
    "info_dangerous": "info --at state_dict os_system.pth",
    "info_module": "info whole_model.pth",
    "info_no_tensors": "info no_tensors.pth",
    "info_sharded": "info sharded_safetensors",
    "check": "check plain.pth model_best_legacy.pth.tar foreign.pth script.pt",
    "check_finite": "check --finite --sha256 special_values.pth",
    "check_unsafe": "check os_system.pth png.pth",
    "diff_equal": "diff data_parallel.pth plain.pth --ignore-prefix auto",
    "diff": "diff model_best.pth.tar flowers.safetensors --ignore-prefix auto",
    "diff_values": "diff plain.safetensors changed.safetensors",
    "diff_tolerance": "diff plain.safetensors changed.safetensors --atol 0.5 --rtol 0.01",
    "plot": "plot plain.pth -o plot.svg",
    "plot_values": "plot --stats plain.pth -o plot.svg",
    "plot_change": "plot plain.safetensors changed.safetensors -o plot.svg",
    "diff_structure": "diff --structure --all optimizer.pth model_best.pth.tar",
}
MODEL_LINES = {
    "layers": "layers --model net.py:Net --input-shape 2,4 c.pth",
    "verify": "verify --model net.py:Net --device cpu --input-shape 2,4 a.pth b.pth",
    "verify_partial": (
        "verify --partial --model net.py:Net --device cpu --input-shape 2,4 a.pth c.pth"
    ),
}
SUMS = {"mean", "std", "relative", "cosine"}
NET = """
from torch import nn
class Net(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 3), nn.Linear(3, 2))
"""


def line(name: str) -> list[str]:
    return (LINES | MODEL_LINES)[name].split()


def prepare(name: str, folder: Path) -> None:
    """Put the files that a line names into a folder."""
    if name in MODEL_LINES:
        prepare_models(folder)
        return
    for word in line(name):
        for fixtures in (GOOD, HOSTILE):
            if (fixtures / word).is_dir():
                shutil.copytree(fixtures / word, folder / word)
            elif (fixtures / word).is_file():
                shutil.copyfile(fixtures / word, folder / word)
    data = (GOOD / "plain.safetensors").read_bytes()
    (folder / "changed.safetensors").write_bytes(data[:-6] + b"\0\0\xc0\x7f\0\x41")


def prepare_models(folder: Path) -> None:
    """Write a model and two files of its weights that differ."""
    torch = pytest.importorskip("torch")
    (folder / "net.py").write_text(NET)
    count = torch.arange(100.0)
    sizes = {"0.weight": (3, 4), "0.bias": (3,), "1.weight": (2, 3), "1.bias": (2,)}
    state = {
        key: count[: torch.Size(size).numel()].reshape(size).clone() for key, size in sizes.items()
    }
    torch.save(state, folder / "a.pth")
    torch.save({**state, "1.bias": state["1.bias"] + 1}, folder / "b.pth")
    torch.save({**state, "1.bias": torch.zeros(5)}, folder / "c.pth")


def masked(document: dict[str, Any]) -> dict[str, Any]:
    """Take out what another machine measures or has installed."""
    for run in document.get("runs", ()):
        run["seconds_reference"] = len(run["seconds_reference"])
        run["seconds_candidate"] = len(run["seconds_candidate"])
        run["device_name"] = ""
        for numbers in (run, *run["differences"]):
            for name in numbers.keys() & {"max_abs_diff", "max_abs", "max_ulp", "ulp"}:
                numbers[name] = numbers[name] is not None and bool(numbers[name])
    return {**document, "torch": ""} if "torch" in document else document


@pytest.mark.parametrize("name", LINES | MODEL_LINES)
def test_documents_stay(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    if name.startswith("plot"):
        pytest.importorskip("matplotlib")
    prepare(name, tmp_path)
    monkeypatch.chdir(tmp_path)
    document = masked(run(*line(name), "--json").document)
    recorded = (RECORDED / f"{name}.json").read_text(encoding="utf-8")
    assert in_order(document) == recorded


def in_order(document: dict[str, Any]) -> str:
    """Write a document as it is recorded, its fields in their order.

    The last digits of sums are those of the processor and of the version of numpy.
    """

    def steady(fields: dict[str, Any]) -> dict[str, Any]:
        return {
            name: float(f"{value:.9g}") if name in SUMS and isinstance(value, float) else value
            for name, value in fields.items()
        }

    text = json.dumps(document)
    return json.dumps(json.loads(text, object_hook=steady), indent=1) + "\n"


def record() -> None:
    from ckptool.cli.main import main

    for name in LINES | MODEL_LINES:
        with tempfile.TemporaryDirectory() as folder:
            prepare(name, Path(folder))
            os.chdir(folder)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                main([*line(name), "--json"])
            document = masked(json.loads(out.getvalue()))
            (RECORDED / f"{name}.json").write_text(in_order(document), encoding="utf-8")
            os.chdir(HERE)


if __name__ == "__main__":
    sys.path.insert(0, str(HERE.parent))
    record()
