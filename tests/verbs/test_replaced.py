"""A file that is replaced by a rename while it is read is read to its end as it was.

The rename comes at each call of `os.open` in turn, before it and after it. A file that is written
to meanwhile is said to have changed, whatever it looks like then.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome
from safetensors.torch import load_file, save_file

from ckptool import containers
from ckptool.cli import main as cli
from ckptool.files import publish
from ckptool.model import loading
from ckptool.verbs import check_folders

Run = Callable[..., Outcome]

PLACES = ["in.pth", "in.safetensors", "in_legacy.pth", "in.tar.gz", "set", "dcp", "unpacked"]
COMMANDS = [
    "check --finite {s}", "keys {s}", "info {s}", "diff {s} {same}", "convert {s} out.pth",
    "strip-prefix --prefix a. {s} out.safetensors",
]  # fmt: skip


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {f"a.{name}": torch.full((40, 50), value) for name in "bcd"}


def save(folder: Path, value: float) -> None:
    """Write one model in every kind of file and folder."""
    import torch.distributed.checkpoint as dcp

    state = tensors(value)
    folder.mkdir()
    torch.save(state, folder / "in.pth")
    torch.save(state, folder / "in_legacy.pth", _use_new_zipfile_serialization=False)
    save_file(state, folder / "in.safetensors")
    shutil.make_archive(str(folder / "in"), "gztar", folder, "in.pth")
    shutil.unpack_archive(folder / "in.pth", folder / "zip", "zip")
    shutil.move(folder / "zip/in", folder / "unpacked")
    assert cli.main(["convert", "-q", str(folder / "in.pth"), str(folder / "set/"),
                     "--max-shard-size", "9KB"]) == 0  # fmt: skip
    dcp.save(state, checkpoint_id=folder / "dcp", no_dist=True)


@pytest.fixture(scope="module", name="models")
def models_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save(folder / "old", 1.0)
    save(folder / "new", 2.0)
    return folder


def exchange(here: Path, models: Path, place: str) -> None:
    """Put the new file, or the new files one after the other, the index last, where the old are."""
    new = models / "new" / place
    if new.is_file():
        shutil.copy(new, here / "temporary")
        os.replace(here / "temporary", here / place)
        return
    files = [path for path in new.rglob("*") if path.is_file()]
    index = (".json", ".metadata", "data.pkl")
    for path in sorted(files, key=lambda path: path.name.endswith(index)):
        shutil.copy(path, here / "temporary")
        os.replace(here / "temporary", here / place / path.relative_to(new))


def value_of(here: Path) -> float | None:
    """Return the one value that all tensors of the output have; None where there is none."""
    if (here / "out.pth").exists():
        state = torch.load(here / "out.pth", weights_only=True)
    elif (here / "out.safetensors").exists():
        state = load_file(here / "out.safetensors")
    else:
        return None
    values = {float(value) for tensor in state.values() for value in tensor.flatten()}
    assert len(values) == 1, values
    return values.pop()


def replacing(place: str, turn: int, after: bool, exchange: Callable[[], None]) -> Any:
    """Return an `os.open` that calls `exchange` at its n-th call for a place, and its counter."""
    real, calls = os.open, []

    def counting(path: Any, *more: Any, **named: Any) -> int:
        if place not in str(path):
            return real(path, *more, **named)
        calls.append(path)
        due = len(calls) == turn
        if due and not after:
            exchange()
        fd = real(path, *more, **named)
        if due and after:
            exchange()
        return fd

    return counting, calls


@pytest.mark.parametrize("command", COMMANDS, ids=[line.split()[0] for line in COMMANDS])
@pytest.mark.parametrize("place", PLACES)
def test_what_is_replaced_is_read_as_it_was(
    run: Run,
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    command: str,
) -> None:
    words = command.format(
        s="in.tar.gz::in.pth" if place == "in.tar.gz" else place, same=models / "old/in.pth"
    ).split()
    for turn in range(2, 40):
        here, old = tmp_path / str(turn), models / "old" / place
        here.mkdir()
        shutil.copytree(old, here / place) if old.is_dir() else shutil.copy(old, here)
        monkeypatch.chdir(here)
        change = partial(exchange, here, models, place)
        with monkeypatch.context() as patch:
            opened, calls = replacing(place, turn // 2, turn % 2 == 1, change)
            patch.setattr(os, "open", opened)
            done = run(*words)
        assert done.code in ((0, 1) if "diff" in words else (0,)), (turn, done)
        assert "damaged" not in done.out + done.err
        assert value_of(here) in ((1.0, 2.0) if "out" in command else (None,))
        if "diff" in words and done.code == 1:
            assert done.out.count("values") >= 3, done  # all of the new one
        if len(calls) < turn // 2:
            return
    raise AssertionError(f"{len(calls)} files were opened")


@pytest.mark.parametrize("command", COMMANDS, ids=[line.split()[0] for line in COMMANDS])
@pytest.mark.parametrize("place", ["in.pth", "in.safetensors", "set/model-00001-of-00003"])
def test_what_is_written_to_is_said_to_have_changed(
    run: Run,
    tmp_path: Path,
    models: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    command: str,
) -> None:
    source = place.partition("/")[0]
    named = "set/model.safetensors.index.json" if source == "set" else source
    words = command.format(s=named, same=models / "old/in.pth").split()
    place += ".safetensors" if "/" in place else ""
    real = os.preadv
    for turn in range(1, 60):
        here, old = tmp_path / str(turn), models / "old" / source
        here.mkdir()
        shutil.copytree(old, here / source) if old.is_dir() else shutil.copy(old, here)
        monkeypatch.chdir(here)
        node, left = os.stat(place).st_ino, turn

        def reading(fd: int, *more: Any, here: Path = here, node: int = node) -> int:
            nonlocal left
            left -= os.fstat(fd).st_ino == node
            if not left:
                content = (here / place).read_bytes()
                (here / place).write_bytes(content[:100] + bytes(400) + content[500:])
                os.utime(here / place, (0, 0))
            return real(fd, *more)

        with monkeypatch.context() as patch:
            patch.setattr(os, "preadv", reading)
            done = run(*words)
        if left > 0:
            assert turn > 1
            return
        assert "was changed while it was read" in done.out + done.err, (turn, done)
        assert done.code == (1 if "check" in words else 3)
        assert not list(here.glob("out*"))


def test_in_place_leaves_alone_what_someone_else_has_put_there(
    run: Run, tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(models / "old/in.pth", "in.pth")
    real = publish.publish

    def late(*arguments: Any) -> Any:
        exchange(tmp_path, models, "in.pth")
        return real(*arguments)

    monkeypatch.setattr(publish, "publish", late)
    done = run("strip-prefix", "--prefix", "a.", "--in-place", "in.pth")
    assert (done.code, done.err.partition(":")[0]) == (5, "error[output-exists]")
    assert "was replaced by another process meanwhile" in done.err
    assert Path("in.pth").read_bytes() == (models / "new/in.pth").read_bytes()
    assert os.listdir(".") == ["in.pth"]


@pytest.mark.parametrize("name", ["in.pth", "in.safetensors", "in_legacy.pth"])
def test_what_is_loaded_is_what_was_read(
    tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """By the reader of ckptool and by the libraries, which open files by their paths."""
    from ckptool.model import native

    monkeypatch.chdir(tmp_path)
    shutil.copy(models / "old" / name, name)
    with native.opened(name) as source:
        exchange(tmp_path, models, name)
        by_library = native.load(source)
    assert by_library.loader == ("safetensors" if "safe" in name else "torch.load")
    checkpoint = containers.read(name)
    shutil.copy(models / "old" / name, "temporary")
    os.replace("temporary", name)
    loaded = loading.load(checkpoint)
    for state, value in ((by_library.state_dict, 1.0), (loaded.state_dict, 2.0)):
        assert {float(each) for tensor in state.values() for each in tensor.unique()} == {value}


def test_a_folder_that_is_exchanged_while_it_is_listed_is_listed_anew(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a set of more shards, so that all names but that of the index are others."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("set", 3), ("new", 4)):
        torch.save({f"a.{n}": torch.ones(40, 50) for n in range(count)}, "in.pth")
        assert run("convert", "-q", "in.pth", f"{name}/", "--max-shard-size", "9KB").code == 0
    real, calls = check_folders._files_of, list[str]()

    def exchanging(index: str) -> list[str]:
        calls.append(index)
        if len(calls) == 1:
            os.rename("set", "old")
            os.rename("new", "set")
        return real(index)

    monkeypatch.setattr(check_folders, "_files_of", exchanging)
    done = run("check", "set")
    assert (done.code, len(calls)) == (0, 2), done
    assert "4 tensors" in done.out
    assert done.out.count("\n") == 1
