"""Programs of torch.export: their weights are read as data, judged by `torch.export.load`."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
Run = Callable[..., Any]
pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9), reason="another layout before"
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.ReLU())
    program = torch.export.export(model.eval(), (torch.zeros(2, 3),))
    torch.export.save(program, tmp_path / "model.pt2")
    return tmp_path / "model.pt2"


def test_the_weights_are_those_of_the_program(run: Run, path: Path, tmp_path: Path) -> None:
    assert run("convert", path, tmp_path / "out.pth").code == 0
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    wanted = torch.export.load(path).state_dict
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[key], wanted[key]) for key in wanted)
    document = run("info", path, "--json").document
    assert (document["container"], document["count"]) == ("torch-export", len(wanted))
    assert "graph" in run("info", path).out


def test_a_record_that_is_missing_or_short(run: Run, path: Path, tmp_path: Path) -> None:
    for change in (lambda data: None, lambda data: data[:-1], lambda data: data[:-4]):
        changed = tmp_path / "changed.pt2"
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(changed, "w") as new:
            for name in old.namelist():
                data = old.read(name)
                data = change(data) if name.endswith("weight_0") else data
                if data is not None:
                    new.writestr(name, data)
        assert run("keys", changed).code == 3
