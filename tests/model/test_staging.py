"""Storages brought to a device by workers: by copies that are late, and on a GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

import ckptool
from ckptool import containers
from ckptool.errors import Malformed
from ckptool.files import fileio
from ckptool.model import staging
from ckptool.model.revive import Reviver
from ckptool.state import checkpoint as places
from ckptool.tensors.tensor import TensorInfo

torch = pytest.importorskip("torch")


class Late:
    """A stream whose copies are done when somebody waits for them, and no earlier."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.done = 0


class Event:
    """What was begun on a stream before it was recorded."""

    def record(self, stream: Late) -> None:
        self.stream, self.count = stream, len(stream.waiting)

    def synchronize(self) -> None:
        for copy in self.stream.waiting[self.stream.done : self.count]:
            copy()
        self.stream.done = max(self.stream.done, self.count)


@pytest.fixture
def late() -> staging.Copies:
    return staging.Copies(
        buffer=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8),
        stream=Late,
        event=Event,
        copy=lambda stream, target, source: stream.waiting.append(lambda: target.copy_(source)),
    )


@pytest.fixture(params=[1 << 12, 1 << 16, 16 << 20])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(staging, "CHUNK", request.param)
    size: int = request.param
    return size


def staged(path: Path, copies: staging.Copies) -> dict[str, Any]:
    """Load a file through workers, to the memory of this machine."""
    checkpoint = containers.read(path)
    entries = places.find(checkpoint, None).entries
    make = Reviver(checkpoint.path)
    make.stage(entries.values(), copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of layouts that it calls unfinished
        return {key: make(value) for key, value in entries.items()}


def state() -> dict[str, Any]:
    torch.manual_seed(0)
    sizes = [(300, 400), (7,), (5000,), (1, 3), (90000,), (0, 4), ()]
    values = {f"layer.{at}": torch.randn(size) for at, size in enumerate(sizes)}
    values |= {"half": torch.randn(1001).half(), "flags": torch.arange(77).to(torch.uint8)}
    return values | {"tied": values["layer.0"], "part": values["layer.4"][100:200]}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_bytes_are_those_of_the_file(
    tmp_path: Path, suffix: str, late: staging.Copies, chunk: int
) -> None:
    path = tmp_path / f"a{suffix}"
    torch.save(state(), tmp_path / "a.pth")
    if suffix == ".safetensors":
        ckptool.convert(tmp_path / "a.pth", path)
    loaded = staged(path, late)
    meant = state()
    assert loaded.keys() >= meant.keys() - {"tied"}
    for key, value in loaded.items():
        assert value.dtype is meant[key].dtype
        assert torch.equal(value, meant[key]), key
    if suffix == ".pth":
        assert loaded["tied"].data_ptr() == loaded["layer.0"].data_ptr()
        assert loaded["part"].data_ptr() == loaded["layer.4"].data_ptr() + 400


def test_storages_are_aligned_and_of_their_own_size(tmp_path: Path, late: staging.Copies) -> None:
    torch.save(state(), tmp_path / "a.pth")
    loaded = staged(tmp_path / "a.pth", late)
    starts = {value.untyped_storage().data_ptr() for value in loaded.values() if value.numel()}
    assert len({start % staging.ALIGNMENT for start in starts}) == 1
    assert loaded["layer.1"].untyped_storage().nbytes() == 28
    loaded["layer.1"].zero_()
    assert torch.equal(loaded["layer.2"], state()["layer.2"])


@pytest.mark.parametrize(
    "name", ["sharded_safetensors", "sharded_legacy", "big_endian.pth", "sparse.pth"]
)
def test_shards_and_what_is_not_in_order(name: str, late: staging.Copies) -> None:
    loaded = staged(FIXTURES / "good" / name, late)
    meant = ckptool.load_state_dict(FIXTURES / "good" / name)
    assert loaded.keys() == meant.keys()
    for key, value in meant.items():
        assert torch.equal(value.to_dense(), loaded[key].to_dense()), key


def test_reads_are_few_and_none_is_larger_than_a_buffer(tmp_path: Path) -> None:
    torch.save({str(at): torch.randn(100) for at in range(1000)}, tmp_path / "a.pth")
    entries = places.find(containers.read(tmp_path / "a.pth"), None).entries
    storages = {each.storage: 0 for each in entries.values() if isinstance(each, TensorInfo)}
    reads = list(staging._reads(storages))
    assert len(reads) == 1
    assert len(reads[0].pieces) == 1000
    assert reads[0].stop - reads[0].start <= staging.CHUNK


def test_what_fails_in_a_worker_is_raised(
    tmp_path: Path, late: staging.Copies, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(state(), tmp_path / "a.pth")

    def short(reader: Any, view: memoryview, start: int) -> None:
        raise Malformed("became shorter", path=reader.path)

    monkeypatch.setattr(staging, "CHUNK", 1 << 12)
    monkeypatch.setattr(fileio.Reader, "read_into", short)
    with pytest.raises(Malformed, match="became shorter"):
        staging.load(
            [
                each.storage
                for each in places.find(containers.read(tmp_path / "a.pth"), None).entries.values()
            ],
            torch.device("cpu"),
            late,
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_on_a_gpu(tmp_path: Path, suffix: str, chunk: int) -> None:
    torch.save(state(), tmp_path / "a.pth")
    path = tmp_path / f"a{suffix}"
    if suffix == ".safetensors":
        ckptool.convert(tmp_path / "a.pth", path)
    loaded = ckptool.load_state_dict(path, device="cuda")
    for key, value in loaded.items():
        assert value.is_cuda
        assert torch.equal(value.cpu(), state()[key])
        assert value.untyped_storage().data_ptr() % 16 == 0
