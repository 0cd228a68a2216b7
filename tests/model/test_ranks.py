"""`convert --distributed`: many processes write one output, or all end with one error."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, environment, listing
from safetensors.torch import save_file

import ckptool
from ckptool.errors import CkptoolError
from ckptool.files import writing
from ckptool.files.copying import Copy, PlannedFile
from ckptool.files.target import Output
from ckptool.model import ranks
from ckptool.model.ranks import Launched
from ckptool.tensors.tensor import Storage

# Ranks that are threads of this process, with a store that is a dict.


@dataclass
class Store:
    """What ranks need of `torch.distributed.Store`."""

    held: dict[str, bytes] = field(default_factory=dict)
    lock: Any = field(default_factory=threading.RLock)
    gone: bool = False

    def set(self, key: str, value: str | bytes) -> None:
        assert not self.gone or self.fail()
        self.held[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self.held[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.held[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        assert not self.gone or self.fail()
        return all(key in self.held for key in keys)

    def compare_set(self, key: str, expected: str, desired: bytes) -> bytes:
        with self.lock:
            return self.held.setdefault(key, desired)

    def fail(self) -> bool:
        raise RuntimeError("Connection reset by peer")


class Threads:
    """Runs a function as so many ranks, and keeps what each returned or raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.store, self._here = Store(), threading.local()
        monkeypatch.setattr(ranks, "launched", lambda command="": self._here.place)
        monkeypatch.setattr(ranks, "_store", lambda place: self.store)

    def run(self, size: int, function: Callable[[int], Any]) -> list[Any]:
        self.store.held.clear()
        found: list[Any] = [None] * size

        def one(rank: int) -> None:
            self._here.place = Launched(rank, size, "here", 1, rank == 0)
            try:
                found[rank] = function(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


def weights() -> dict[str, torch.Tensor]:
    """Make tensors of odd sizes, so that nothing is aligned, and some that are views."""
    torch.manual_seed(0)
    shared = torch.randn(40, 50)
    return {
        "a.bytes": torch.randint(0, 255, (1237,), dtype=torch.uint8),
        "a.weight": torch.randn(301, 67),
        "a.turned": torch.randn(203, 101).t(),
        "a.half": torch.randn(77, 91).to(torch.bfloat16),
        "tied.one": shared,
        "tied.two": shared,
        "part": torch.randn(100, 100)[10:70, 3:50],
        "double": torch.randn(3001, dtype=torch.float64),
        **{f"many.{number}": torch.randn(5 + number) for number in range(60)},
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor(True),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / name for name in ("in.pth", "in.safetensors", "in_dcp")}
    torch.save({"epoch": 3, "state_dict": weights()}, found["in.pth"])
    plain = {key: value.contiguous().clone() for key, value in weights().items()}
    save_file(plain, found["in.safetensors"])
    ckptool.convert(found["in.pth"], found["in_dcp"], to="dcp")
    return found


FORMS: dict[str, dict[str, Any]] = {
    "out.pth": {},
    "out.safetensors": {},
    "cast.safetensors": {"dtype": "bf16"},
    "cast.pth": {"dtype": "f16", "overflow": "clamp"},
    "shards": {"max_shard_size": "60KB"},
    "torch_shards": {"max_shard_size": "60KB", "to": "torch"},
    "dcp": {"to": "dcp"},
    "dcp_cast": {"to": "dcp", "dtype": "bf16", "dtype_except": "a.*"},
}


def bytes_of(path: Path) -> object:
    return listing(path) if path.is_dir() else path.read_bytes()


@pytest.mark.product(5, always=3)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["in.pth", "in.safetensors", "in_dcp"])
def test_bytes_are_those_of_one_process(
    threads: Threads,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    form: str,
    size: int,
) -> None:
    """Cut anywhere, in elements too: on a file system, ranges end at 64 KiB at least."""
    monkeypatch.setattr(writing, "LEAST_CUT", 1)
    monkeypatch.setattr(writing, "PIECES", 1 << 30)
    alone, together = tmp_path / "alone" / form, tmp_path / "together" / form
    alone.parent.mkdir(), together.parent.mkdir()
    expected = ckptool.convert(inputs[source], alone, **FORMS[form])

    def convert(rank: int) -> object:
        return ckptool.convert(inputs[source], together, distributed=True, **FORMS[form])

    found = threads.run(size, convert)
    assert {type(each).__name__ for each in found} == {"Rewrite"}, found
    assert bytes_of(together) == bytes_of(alone)
    assert [path.name for path in together.parent.iterdir()] == [form]
    assert found[0].casts == expected.casts
