"""A torch zip that was unpacked: read as data from its folder, judged by torch on the zip."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from ckptool.verbs import checking
from ckptool.verbs.checked import Status

torch = pytest.importorskip("torch")
Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": {"a": torch.arange(6.0), "b": torch.ones(2)}}, "x.pth")
    with zipfile.ZipFile("x.pth") as archive:
        archive.extractall(tmp_path / "out")
    Path("x.pth").unlink()
    return tmp_path / "out" / "x"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_it_is_read_by_the_name_of_the_folder(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("unwrap", folder, tmp_path / "out.pth").code == 0
    loaded = torch.load(tmp_path / "out.pth", weights_only=True)
    assert loaded["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert loaded["b"].tolist() == [1, 1]
    assert checking.check(folder).status is Status.OK
    assert run("keys", folder / "data.pkl").code == 0
    assert [row.split("\t")[1] for row in run("check", folder).out.splitlines()] == ["ok"]


def test_a_storage_that_is_missing_short_or_elsewhere(run: Run, folder: Path) -> None:
    data = folder / "data" / "0"
    whole, pickled = data.read_bytes(), (folder / "data.pkl").read_bytes()
    data.write_bytes(whole[:-1])
    assert "should have 24 bytes and has 23" in run("keys", folder).err
    data.unlink()
    assert run("keys", folder).code == 3
    (folder / "secret").write_bytes(whole)
    (folder / "data.pkl").write_bytes(
        pickled.replace(b"X\x01\0\0\x000", b"X\x09\0\0\0../secret", 1)
    )
    assert "a storage named" in run("keys", folder).err


def test_a_program_or_another_pickle_is_not_taken_for_it(run: Run, folder: Path) -> None:
    shutil.copy(folder / "version", folder / "constants.pkl")
    assert run("keys", folder).code == 3
    (folder / "constants.pkl").unlink()
    (folder / "version").unlink()
    assert run("keys", folder).code == 3


def test_a_folder_of_folders_names_those_that_are_checkpoints(run: Run, tmp_path: Path) -> None:
    """As the Trainer writes with FSDP: weights, optimizer and other states in one folder."""
    with zipfile.ZipFile(FIXTURES / "good" / "plain.pth") as archive:
        archive.extractall(tmp_path / "run")
    shutil.copytree(tmp_path / "run" / "plain", tmp_path / "run" / "optimizer_0")
    shutil.copy(FIXTURES / "good" / "plain.pth", tmp_path / "run" / "rng_state.pth")
    done = run("keys", tmp_path / "run")
    assert f"hint: ckptool info {tmp_path / 'run' / 'plain'}\n" in done.err
    assert "    optimizer_0/ " in done.err
