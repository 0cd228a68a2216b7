"""What a file may make reading cost: 64 bytes of memory for each of its metadata, or a refusal."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import costly
import pytest
import torch
from conftest import FIXTURES, environment, sampled
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import ckptool
from ckptool.containers import _dcp_metadata
from ckptool.files import budget
from ckptool.pickles import pickle_reader

Run = Callable[..., Any]
linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")


def measured(*line: str | Path) -> dict[str, Any]:
    """Run a command line in a process of its own."""
    done = subprocess.run(
        [sys.executable, costly.__file__, *map(str, line)],
        env=environment(), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@linux
@pytest.mark.product(12)
@pytest.mark.parametrize("command", ["check", "info"])
@pytest.mark.parametrize("name", sampled([*costly.INPUTS], 8))
def test_memory_is_bounded_by_the_metadata_as_stored(
    tmp_path: Path, name: str, command: str
) -> None:
    path = costly.write(name, tmp_path)
    found = measured(command, path)
    assert found["peak"] <= costly.bound(path), (found, path.stat().st_size)
    assert found["code"] in (0, 1, 3, 4)


@linux
@pytest.mark.parametrize(
    "name",
    sampled(["dicts, deflated", "keys", "an index of absent shards", "entries of safetensors"], 4),
)
def test_what_is_refused_takes_no_more(tmp_path: Path, name: str) -> None:
    path = costly.write(name, tmp_path, 16)
    found = measured("check", path)
    assert found["peak"] <= costly.bound(path)
    assert "--max-memory" in str(found["said"])


def test_an_index_of_many_chunks_is_small(tmp_path: Path) -> None:
    """Of 64 000, as 1000 tensors on 64 ranks have, it is read by default."""
    ranks, tensors = 64, 50
    names = [f"optimizer.state.model.layers.{i}.weight.exp_avg" for i in range(tensors)]
    chunks = [
        ChunkStorageMetadata(torch.Size([rank, 0]), torch.Size([1, 2])) for rank in range(ranks)
    ]
    described = {
        name: TensorStorageMetadata(TensorProperties(), torch.Size([ranks, 2]), copy.copy(chunks))
        for name in names
    }
    stored = {
        MetadataIndex(name, torch.Size([rank, 0]), rank): _StorageInfo(f"__{rank}_0.distcp", i, 1)
        for i, name in enumerate(names)
        for rank in range(ranks)
    }
    index = pickle.dumps(Metadata(described, storage_data=stored))
    with budget.run(budget.UNBOUNDED):
        spending = budget.current()
        tracemalloc.start()
        parsed = pickle_reader.load(index, 0, _dcp_metadata.IndexVocabulary())
        taken = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        counted = spending.spent - budget.PROCESS
    assert len(_dcp_metadata.parse(parsed.tree).entries) == tensors
    assert taken <= counted < 20 * len(index)
    assert counted * 64_000 / (ranks * tensors) < budget.MOST - 2 * budget.PROCESS


def deflated(path: Path, n: int = 150_000) -> Path:
    costly.pickled("dicts", zipfile.ZIP_DEFLATED)(path, n)
    return path


def test_a_refusal_says_what_lifts_it(run: Run, tmp_path: Path) -> None:
    path = deflated(tmp_path / "packed.pth")
    done = run("keys", "--all", path)
    assert (done.code, done.out) == (3, "")
    first, hint = done.err.splitlines()
    assert first.startswith(f"error[too-costly]: {path} (torch zip")
    assert "as stored) takes more than 64.0 MiB of memory" in first
    assert hint.startswith("hint: ckptool keys --all ")
    assert "--max-memory 256MiB" in hint
    assert run(*hint.split()[2:]).code == 0


@pytest.mark.thorough
def test_check_says_unsupported(run: Run, tmp_path: Path) -> None:
    path = deflated(tmp_path / "packed.pth")
    done = run("check", path)
    assert done.code == 3
    assert done.out.startswith(f"{path}\tunsupported\ttorch zip")
    assert f"hint: ckptool check --max-memory 256MiB {path}" in done.err
    assert run("check", "--max-memory", "256MiB", path).code == 0


def test_what_was_read_before_is_judged(run: Run, tmp_path: Path) -> None:
    costly.archive(
        path := tmp_path / "evil.pth",
        {
            "data.pkl": b"\x80\x02](cposix\nsystem\nU\x01x\x85R" + b"}" * 200_000 + b"e.",
            "version": b"3\n",
        },
        zipfile.ZIP_DEFLATED,
    )
    done = run("check", path)
    assert done.code == 4
    assert "posix.system" in done.out
    assert "unsupported" in done.out


@pytest.mark.thorough
def test_every_file_of_a_check_has_a_budget_of_its_own(run: Run, tmp_path: Path) -> None:
    paths = [deflated(tmp_path / f"{index}.pth", 70_000) for index in range(4)]
    assert run("check", *paths).code == 0
    assert run("diff", paths[0], paths[1]).code == 3  # both are open together


def test_a_plain_pickle_that_costs_too_much_is_not_passed_over(run: Run, tmp_path: Path) -> None:
    costly.plain(path := tmp_path / "plain.pkl", 1_000_000)
    done = run("check", path)
    assert (done.code, "unsupported" in done.out) == (3, True)


@pytest.mark.thorough
@pytest.mark.parametrize("size", ["2GiB", "2147483648", 2 << 30])
def test_the_library_has_it_too(tmp_path: Path, size: int | str) -> None:
    path = deflated(tmp_path / "packed.pth")
    with pytest.raises(ckptool.TooCostly):
        ckptool.read(path)
    with ckptool.max_memory(size):
        assert ckptool.read(path).container == "torch-zip"
    assert ckptool.check(path).status is ckptool.Status.UNSUPPORTED


@pytest.mark.parametrize("size", ["", "much", "0", "-1"])
def test_a_size_is_a_size(run: Run, good: Path, size: str) -> None:
    done = run("keys", f"--max-memory={size}", good / "plain.pth")
    assert (done.code, "is not a size" in done.err) == (2, True)


def test_every_command_takes_it(run: Run) -> None:
    from ckptool.cli import main

    reading = {name for names in main.GROUPS.values() for name in names} - {"help"}
    for name in reading:
        assert "--max-memory SIZE" in run(name, "--help").out


@pytest.mark.thorough
@pytest.mark.product(2)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_hundred_thousand_tensors_are_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"many{suffix}"
    if suffix == ".pth":
        weight = torch.zeros(1)
        torch.save({f"model.layers.{n}.mlp.weight": weight.clone() for n in range(100_000)}, path)
    else:
        costly.entries(path, 100_000)
    assert len(ckptool.keys(path)) == 100_000


def test_a_set_is_read_under_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spent = []
    before = budget.Budget.spend

    def counting(self: budget.Budget, nbytes: int, **more: float) -> None:
        before(self, nbytes, **more)  # type: ignore[arg-type]
        spent.append(self)

    monkeypatch.setattr(budget.Budget, "spend", counting)
    ckptool.read(FIXTURES / "good" / "sharded_safetensors")
    assert len(set(map(id, spent))) == 1
