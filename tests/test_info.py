"""`ckptool info`: what it says is what torch sees, and every command that it suggests works."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
GOOD = sorted(path for path in (FIXTURES / "good").iterdir() if path.is_file())
HOSTILE = sorted((FIXTURES / "hostile").iterdir())


def by_name(path: Path) -> str:
    return path.name


def copied(path: Path, folder: Path) -> Path:
    return Path(shutil.copy(path, folder / path.name))


def pasted(run: Run, command: str, monkeypatch: pytest.MonkeyPatch, folder: Path) -> Outcome:
    """Run a suggested command as a shell would, in the folder of its file."""
    words = shlex.split(command)
    assert words[0] == "ckptool"
    monkeypatch.chdir(folder)
    return run(*words[1:])


# What it says.


def as_torch_sees(path: Path) -> dict[str, Any]:
    """Load a file with torch, or with safetensors."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    whole: dict[str, Any] = judge.load(path)
    return whole


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("plain.pth", ()),
        ("plain_legacy.pth", ()),
        ("model_best.pth.tar", ("state_dict",)),
        ("half.pth", ()),
        ("every_dtype.pth", ()),
        ("every_dtype.safetensors", ()),
        ("big_endian.pth", ()),
        ("strided.pth", ()),
        ("parameters.pth", ()),
        ("tied.pth", ()),
        ("nested.pth", ("model", "state_dict")),
        ("rezipped.pth", ()),
    ],
)
def test_counts_are_those_of_torch(run: Run, good: Path, name: str, at: tuple[str, ...]) -> None:
    found = run("info", "--json", good / name).document
    state = as_torch_sees(good / name)
    for step in found["at"]:
        state = state[step]
    assert tuple(found["at"]) == at
    tensors = [value for value in state.values() if torch.is_tensor(value)]
    assert found["count"] == len(tensors)
    assert found["elements"] == sum(tensor.numel() for tensor in tensors)
    assert found["nbytes"] == sum(t.numel() * t.element_size() for t in tensors)
    sizes: Counter[str] = Counter()
    for tensor in tensors:
        sizes[str(tensor.dtype)] += tensor.numel() * tensor.element_size()
    assert sorted(sizes.values()) == sorted(each["nbytes"] for each in found["dtypes"].values())
    assert found["requires_grad"] == sum(tensor.requires_grad for tensor in tensors)
    assert len(found["not_contiguous"]) == sum(not tensor.is_contiguous() for tensor in tensors)


def test_the_document_has_the_fields_of_the_contract(run: Run, good: Path) -> None:
    path = good / "model_best.pth.tar"
    found = run("info", "--json", path).document
    assert found["schema"] == "info/1"
    assert found["file"] == str(path)
    assert found["container"] == "torch-zip"
    assert found["at"] == ["state_dict"]
    assert (found["count"], found["nbytes"]) == (8, 704)
    assert found["beside"] == ["epoch", "arch", "best_acc1", "optimizer"]
    assert found["safety"] == "plain"
    assert "torch._utils._rebuild_tensor_v2" in found["globals"]
    assert found["suggestions"][0]["command"].startswith("ckptool strip-prefix")


@pytest.mark.parametrize("path", GOOD, ids=by_name)
def test_parts_add_up_to_the_file(run: Run, path: Path) -> None:
    done = run("info", "--json", path)
    if done.code == 3:
        return
    found = done.document
    stored = sum(each["stored"] for each in found["candidates"])
    beside = sum(each["nbytes"] for each in found["beside_values"])
    known = stored + beside + sum(found["bytes"][key] for key in ("unread", "structure", "other"))
    assert known == path.stat().st_size


# What it suggests.


# The structure is sound, and what is wrong with the bytes only reading them shows.
BAD_BYTES = """
    crc_mismatch.pth inflate_lies.pth inflate_short.pth inflate_garbage.pth local_extra_shifts.pth
""".split()


@pytest.mark.parametrize("path", [*GOOD, *HOSTILE], ids=by_name)
def test_every_suggestion_works_when_pasted(
    run: Run, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    done = run("info", "--json", path.name)
    assert done.code in (0, 3), done.err
    if done.code == 3:
        assert done.out == ""
        return
    for each in done.document["suggestions"]:
        outcome = pasted(run, each["command"], monkeypatch, tmp_path)
        if path.name in BAD_BYTES and outcome.code == 3:
            continue  # the bytes are damaged, which only reading them shows
        assert outcome.code == 0, f"{each['command']}\n{outcome.err}"
    assert not (tmp_path / "ckptool-was-executed").exists()
