"""Object stores: what fsspec reads and writes, as a whole or not at all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome

import ckptool
from ckptool.errors import (
    Malformed,
    MissingExtra,
    NoSuchFile,
    OutputExists,
    SameFile,
    WriteError,
)

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good" / "plain.pth"


@pytest.fixture(name="memory")
def memory_fixture() -> Iterator[Any]:
    """Empty fsspec's memory file system."""
    fsspec = pytest.importorskip("fsspec")
    system = fsspec.filesystem("memory")
    system.store.clear()
    system.pseudo_dirs[:] = [""]
    yield system
    system.store.clear()


@pytest.fixture(name="bucket")
def bucket_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run moto's S3 on this machine, for s3fs."""
    server = pytest.importorskip("moto.server")
    pytest.importorskip("s3fs")
    import boto3

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    moto = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    _, port = moto.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "s3://bucket"
    moto.stop()


@pytest.fixture(name="root", params=["memory", "s3"])
def root_fixture(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        request.getfixturevalue("memory")
        return "memory://bucket"
    root: str = request.getfixturevalue("bucket")
    return root


def test_what_is_written_is_read_back(root: str) -> None:
    ckptool.convert(GOOD, f"{root}/a/plain.safetensors", sync=False)
    assert ckptool.diff(GOOD, f"{root}/a/plain.safetensors").equal
    ckptool.convert(f"{root}/a/plain.safetensors", f"{root}/a/again.pth")
    assert ckptool.diff(f"{root}/a/again.pth", GOOD).equal
    assert ckptool.check(f"{root}/a/again.pth").status.value == "ok"


def test_sets_and_folders(root: str) -> None:
    done = ckptool.convert(GOOD, f"{root}/set", max_shard_size=400)
    assert len(done.shards) > 1
    ckptool.convert(f"{root}/set", f"{root}/dcp", to="dcp")
    assert ckptool.diff(f"{root}/set/model.safetensors.index.json", f"{root}/dcp").equal
    for target, how in ((f"{root}/set", {"max_shard_size": 400}), (f"{root}/dcp", {"to": "dcp"})):
        with pytest.raises(OutputExists, match="a store replaces no set at once"):
            ckptool.convert(GOOD, target, force=True, **how)


def test_what_is_there_is_replaced_only_by_force(root: str) -> None:
    target = f"{root}/x.pth"
    ckptool.convert(GOOD, target)
    with pytest.raises(OutputExists):
        ckptool.unwrap(FIXTURES / "good" / "model_best.pth.tar", target)
    ckptool.unwrap(FIXTURES / "good" / "model_best.pth.tar", target, force=True)
    assert len([*ckptool.keys(target)]) == 8
    with pytest.raises(SameFile):
        ckptool.convert(target, target, force=True)
    with pytest.raises(NoSuchFile):
        ckptool.keys(f"{root}/y.pth")


def test_a_plan_writes_nothing(memory: Any) -> None:
    ckptool.convert(GOOD, "memory://bucket/x.pth", dry_run=True)
    assert not memory.store


@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_set_that_fails_leaves_nothing(
    memory: Any, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    real, names = type(memory).put_file, []

    def put(self: Any, file: str, path: str, **how: Any) -> None:
        names.append(path.rpartition("/")[2])
        if len(names) == failing:
            raise OSError("the network is gone")
        real(self, file, path, **how)

    monkeypatch.setattr(type(memory), "put_file", put)
    with pytest.raises(WriteError, match="the network is gone"):
        ckptool.convert(GOOD, "memory://bucket/set", max_shard_size=400)
    assert not memory.store
    assert all(name.endswith(".safetensors") for name in names[:2])
    assert names[2:] in ([], ["model.safetensors.index.json"])


def test_an_object_that_changes_is_refused(memory: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ckptool.convert(GOOD, "memory://bucket/x.pth")
    real = type(memory).cat_file

    def cat(self: Any, path: str, **how: Any) -> Any:
        data = real(self, path, **how)
        with self.open(path, "wb") as file:
            file.write(GOOD.read_bytes()[::-1])
        return data

    monkeypatch.setattr(type(memory), "cat_file", cat)
    with pytest.raises(Malformed, match="was changed while it was read"):
        ckptool.keys("memory://bucket/x.pth")


def test_without_the_extra(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "fsspec", None)
    for command in (["keys", "s3://bucket/x.pth"], ["convert", GOOD, "gs://bucket/x.pth"]):
        done = run(*command)
        assert done.code == MissingExtra.exit_code == 7
        assert "pip install 'ckptool[remote]'" in done.err


@pytest.mark.parametrize("target", ["https://a.example/x.pth", "hf://org/model/x.pth"])
def test_what_takes_no_output(target: str) -> None:
    with pytest.raises(WriteError) as caught:
        ckptool.convert(GOOD, target)
    assert caught.value.hint == "outputs go to files, and to s3://, gs:// and az://"
