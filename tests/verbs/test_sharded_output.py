"""Sets of shards as huggingface_hub writes and loads them; a folder is published as a whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, environment, listing, write_anew
from hypothesis import given, settings, strategies as st
from test_cli import SLOW
from test_output import Fault
from test_preservation import header_of
from test_sharded import LOOSELY, model

from ckptool import containers
from ckptool.containers import sharding
from ckptool.errors import CkptoolError, EditError
from ckptool.files import moves, publish
from ckptool.text import parse_size

torch = pytest.importorskip("torch")
hub = pytest.importorskip("huggingface_hub")
safetensors_torch = pytest.importorskip("safetensors.torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with an input, `in.pth`, as the current one."""
    monkeypatch.chdir(tmp_path)
    torch.save(model(), "in.pth")
    return tmp_path


def theirs(folder: Path, size: int, *, safe: bool = True) -> Path:
    folder.mkdir()
    hub.save_torch_state_dict(model(), folder, max_shard_size=size, safe_serialization=safe)
    return folder


# As huggingface_hub does it.


@pytest.mark.parametrize("size", [1, 70, 170, 200, 1000])
def test_safetensors_shards_are_those_of_huggingface_hub(run: Run, here: Path, size: int) -> None:
    expected = theirs(here / "theirs", size)
    assert run("convert", "--max-shard-size", size, "in.pth", "ours").code == 0
    assert listing(here / "ours").keys() == listing(expected).keys()
    for path in expected.glob("*.safetensors"):
        (header, data), (other, same) = header_of(path), header_of(here / "ours" / path.name)
        header.pop("__metadata__"), other.pop("__metadata__")
        assert (list(header.items()), data) == (list(other.items()), same)
        tensors = safetensors_torch.load_file(path)
        alone = safetensors_torch.save(tensors, {"format": "pt"})
        assert alone.endswith(data)
    if (expected / INDEX).exists():
        assert (here / "ours" / INDEX).read_bytes() == (expected / INDEX).read_bytes()


@pytest.mark.parametrize("size", [70, 170, 1000])
def test_torch_shards_are_those_of_huggingface_hub(run: Run, here: Path, size: int) -> None:
    expected = theirs(here / "theirs", size, safe=False)
    done = run("convert", "--max-shard-size", size, "--to", "torch", "in.pth", "ours")
    assert done.code == 0
    assert listing(here / "ours").keys() == listing(expected).keys()
    for path in expected.glob("*.bin"):
        assert judge.same(judge.load(path), judge.load(here / "ours" / path.name), **LOOSELY) == []
    index = "pytorch_model.bin.index.json"
    if (expected / index).exists():
        assert (here / "ours" / index).read_bytes() == (expected / index).read_bytes()


@pytest.mark.parametrize("to", ["safetensors", "torch"])
def test_huggingface_hub_loads_them(run: Run, here: Path, good: Path, to: str) -> None:
    sys.path.insert(0, str(good.parent))
    from parts import Net, net

    torch.save(net().state_dict(), "net.pth")
    assert run("convert", "--max-shard-size", "300", "--to", to, "net.pth", "out").code == 0
    loaded = Net()
    hub.load_torch_model(loaded, "out", strict=True, safe=to == "safetensors")
    assert judge.same(dict(net().state_dict()), dict(loaded.state_dict()), **LOOSELY) == []


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    ties=st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=3),
    limit=st.integers(1, 80),
)
def test_the_partition_is_that_of_huggingface_hub(
    tmp_path_factory: pytest.TempPathFactory,
    sizes: list[int],
    ties: list[tuple[int, int]],
    limit: int,
) -> None:
    state = {f"k{number}": torch.zeros(size) for number, size in enumerate(sizes)}
    for alias, kept in ties:
        if kept < len(sizes):
            state[f"alias{alias}"] = state[f"k{kept}"]
    expected = hub.split_torch_state_dict_into_shards(state, max_shard_size=limit)
    path = tmp_path_factory.mktemp("split") / "in.pth"
    torch.save(state, path)
    entries = dict(containers.read(path).tree.pairs)
    found = sharding.split(entries, limit, storages=True)
    assert found.total_nbytes == expected.metadata["total_size"]
    names = sharding.Names("model", ".safetensors").shards(len(found.shards))
    assert {name: set(keys) for name, keys in zip(names, found.shards, strict=True)} == {
        name: set(keys) for name, keys in expected.filename_to_tensors.items()
    }


# The way back.


@pytest.mark.parametrize("to", ["safetensors", "torch"])
@pytest.mark.parametrize("name", ["tied.pth", "plain.pth", "slices.pth", "every_dtype.safetensors"])
def test_nothing_is_lost_on_the_way_back(
    run: Run, here: Path, good: Path, name: str, to: str
) -> None:
    judge.skip_unread(name)
    how = ("convert", "--tensors-only", "--allow-expand")
    assert run(*how, "--to", "torch", good / name, "direct.pth").code == 0
    assert run(*how, "--max-shard-size", 40, "--to", to, good / name, "set").code == 0
    assert run("convert", "set", "back.pth").code == 0
    wanted, found = judge.load("direct.pth"), judge.load("back.pth")
    assert list(wanted) == list(found)
    loosely = {} if to == "torch" else LOOSELY | {"sharing": name == "tied.pth", "identity": False}
    loosely |= {"stride": to == "torch", "containers": False, "storage": False}
    assert judge.same(wanted, found, **loosely) == []


def test_ties_far_apart_keep_the_order_of_the_keys(run: Run, here: Path) -> None:
    """The tied key is drawn into the first shard; the index remembers where it stood."""
    weight = torch.arange(6.0)
    state = {"a": weight, "b": torch.ones(6), "c": torch.zeros(6), "a2": weight, "z": torch.ones(2)}
    torch.save(state, "tied.pth")
    for to in ("safetensors", "torch"):
        assert run("convert", "--max-shard-size", 30, "--to", to, "tied.pth", to).code == 0
        index = json.loads(next(Path(to).glob("*.json")).read_text())
        assert ("ckptool" in index["metadata"]) == (
            to == "safetensors"
        )  # where the index cannot name it
        assert run("convert", to, f"{to}.pth").code == 0
        loaded = judge.load(f"{to}.pth")
        assert list(loaded) == list(state)
        assert loaded["a"].data_ptr() == loaded["a2"].data_ptr()


def test_edits_come_first_and_what_is_beside_is_named(run: Run, here: Path, good: Path) -> None:
    done = run(
        "convert", "--max-shard-size", 300, "--json", "--strip-prefix", "module",
        "--drop", "classifier", good / "model_best.pth.tar", "out",
    )  # fmt: skip
    assert done.code == 0
    document = done.document
    assert (document["schema"], document["written"]) == ("rewrite/1", 6)
    assert document["not_carried"][:2] == ["epoch", "arch"]
    assert [each["file"] for each in document["shards"]] == sorted(
        path.name for path in Path("out").glob("*.safetensors")
    )
    assert sum(each["count"] for each in document["shards"]) == 6
    sizes = [each["nbytes"] for each in document["shards"]]
    assert sizes == [(here / "out" / each["file"]).stat().st_size for each in document["shards"]]
    assert document["nbytes"] == sum(path.stat().st_size for path in Path("out").iterdir())


def test_a_dry_run_shows_the_shards_and_writes_nothing(run: Run, here: Path) -> None:
    before = listing(here)
    done = run("convert", "-n", "--max-shard-size", 170, "in.pth", "out")
    assert done.code == 0
    assert "model-00001-of-00002.safetensors   1 key" in done.out
    assert listing(here) == before


# Sizes, names, refusals.


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("5GB", 5 * 10**9), ("500 MB", 5 * 10**8), ("1.5kb", 1500), ("2GiB", 2 << 30),
        ("1TiB", 1 << 40), ("123", 123), ("7B", 7), ("999999999999999999", 999999999999999999),
    ],
)  # fmt: skip
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_size(text, "") == nbytes


@pytest.mark.parametrize("text", ["", "0", "GB", "-1", "5XB", "5 G B", "1e9", "0.1", "9" * 30])
def test_what_is_no_size_is_refused(run: Run, here: Path, text: str) -> None:
    with pytest.raises(EditError):
        parse_size(text, "")
    done = run("convert", f"--max-shard-size={text}", "in.pth", "out")
    assert (done.code, "is not a size" in done.err) == (2, True)


def test_refusals_before_a_byte_is_written(run: Run, here: Path, good: Path) -> None:
    (here / "file").write_bytes(b"x")
    (here / "set").mkdir()
    (here / "set" / "model.safetensors").write_bytes(b"old")
    shutil.copytree(good / "sharded_safetensors", "input")
    before = listing(here)
    for arguments, code, said in (
        (("in.pth", "out.safetensors"), 2, "is the name of a file"),
        (("--in-place", "in.pth"), 2, "writes a folder"),
        (("in.pth", "file"), 5, "file is not a folder"),
        (("in.pth", "no/such/out"), 5, "hint: mkdir -p "),
        (("in.pth", "set"), 5, "set holds model.safetensors already"),
        (("--force", "input", "input"), 5, "error[same-file]: input/model"),
        ((good / "extra_state.pth", "out"), 5, "error[not-representable]"),
        ((good.parent / "hostile" / "in_state_dict.pth", "--to", "torch", "out"), 4, "unsafe"),
    ):
        done = run("convert", "--max-shard-size", 100, *arguments)
        assert done.code == code, (arguments, done.err)
        assert said in done.err
        assert done.out == ""
        assert listing(here) == before


def test_files_of_others_in_the_folder_stay(run: Run, here: Path) -> None:
    (here / "out").mkdir()
    for name in ("config.json", "pytorch_model.bin", "model.safetensors.backup"):
        (here / "out" / name).write_text(name)
    before = listing(here / "out")
    assert run("convert", "--max-shard-size", 170, "in.pth", "out").code == 0
    after = listing(here / "out")
    assert before.items() <= after.items()
    assert len(after) == len(before) + 3


def test_force_replaces_a_set_of_another_count_whole(run: Run, here: Path) -> None:
    assert run("convert", "--max-shard-size", 70, "in.pth", "out").code == 0
    assert len(listing(here / "out")) > 4
    assert run("convert", "--force", "--max-shard-size", 170, "in.pth", "out").code == 0
    assert sorted(listing(here / "out")) == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX,
    ]  # fmt: skip
    assert run("convert", "--force", "--max-shard-size", "5GB", "in.pth", "out").code == 0
    assert list(listing(here / "out")) == ["model.safetensors"]
    assert run("keys", "out").code == 0


def test_the_current_folder_can_be_the_output(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "out").mkdir(mode=0o750)
    monkeypatch.chdir(here / "out")
    assert run("convert", "--max-shard-size", 170, "../in.pth", ".").code == 0
    assert len(os.listdir(".")) == 3
    assert (here / "out").stat().st_mode & 0o777 == 0o750


def test_same_input_same_bytes(run: Run, here: Path) -> None:
    for name in ("one", "two"):
        assert run("convert", "--max-shard-size", 100, "in.pth", name).code == 0
    assert listing(here / "one") == listing(here / "two")


# Faults.


def no_swap(*_: Any, **more: Any) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


CALLS = ["mkdir", "ftruncate", "pwrite", "fsync", "rename", "link"]


@pytest.mark.parametrize("old", ["no folder", "empty", "a set"])
@pytest.mark.parametrize("name", CALLS)
def test_any_fault_leaves_the_folder_as_it_was(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, name: str, old: str
) -> None:
    """Each call in turn fails, until there is none left to fail."""
    if old != "no folder":
        (here / "out").mkdir()
    if old == "a set":
        assert run("convert", "--max-shard-size", 100, "in.pth", "out").code == 0
    before = listing(here)
    done = 0
    for turn in range(1, 100):
        fault = Fault(name, turn, errno.ENOSPC)
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fault)
            found = run("convert", "--force", "--max-shard-size", 170, "in.pth", "out")
        if "was written, but its folder" in found.err:
            assert found.code == 0, found.err
            done += 1
            assert run("keys", "out").code == 0
            break
        if fault.count < turn or found.code == 0:
            break  # a file system without links, or all turns done
        assert found.code == 5, found.err
        assert "no space left while writing" in found.err
        assert listing(here) == before, turn
    assert not list(here.rglob("*.tmp"))
    assert done == (name == "fsync")


@pytest.mark.parametrize("exchanged", [True, False])
def test_no_index_ever_stands_beside_shards_of_another_set(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, exchanged: bool
) -> None:
    """At each change in the folder, what reads as a set is the old one or the new one, whole.

    Where folders can be exchanged at once, there is a set at any time.
    """
    if not exchanged:
        monkeypatch.setattr(moves, "swap", no_swap)
    elif sys.platform != "linux":
        pytest.skip("renameat2 of Linux")
    torch.save({key: value + 1 for key, value in model().items()}, "new.pth")
    assert run("convert", "--max-shard-size", 170, "in.pth", "out").code == 0
    assert run("convert", "--max-shard-size", 170, "new.pth", "other").code == 0
    allowed = [listing(here / name) for name in ("out", "other")]
    seen: list[str] = []

    def look() -> None:
        files = {k: v for k, v in listing(here / "out").items() if ".tmp" not in k}
        if INDEX in files:
            assert files in allowed
            seen.append("whole")
            return
        with pytest.raises(CkptoolError):
            containers.read(here / "out")
        seen.append("none")

    def watched(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            look()
            result = real(*arguments, **more)
            look()
            return result

        monkeypatch.setattr(os, name, call)

    for name in ("rename", "link", "unlink", "fsync"):
        watched(name)
    assert run("convert", "--force", "--max-shard-size", 170, "new.pth", "out").code == 0
    assert seen[0] == seen[-1] == "whole"
    assert ("none" in seen) is not exchanged
    assert listing(here / "out") == allowed[1]


def test_old_files_that_cannot_be_moved_back_are_kept(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("convert", "--max-shard-size", 170, "in.pth", "out").code == 0
    before = set(listing(here / "out").values())
    real, count = os.rename, 0

    def fail_later(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise OSError(errno.EIO, "Input/output error")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(moves, "swap", no_swap)
        patch.setattr(os, "link", no_swap)
        patch.setattr(os, "rename", fail_later)
        assert run("convert", "--force", "--max-shard-size", 170, "in.pth", "out").code == 5
    assert before <= set(listing(here / "out").values())


def test_what_another_writer_put_there_is_not_undone(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the second of two that replace a set, where folders cannot be exchanged nor locked."""
    assert run("convert", "--max-shard-size", 170, "in.pth", "out").code == 0
    place = {path.name: b"theirs" for path in (here / "out").iterdir()}
    real = os.link

    def late(source: Any, target: Any, **more: Any) -> None:
        if Path(target).parent == here / "out":  # all old ones are gone from there
            for name, data in place.items():
                write_anew(here / "out" / name, data)
        real(source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(moves, "swap", no_swap)
        patch.setattr(os, "link", late)
        done = run("convert", "--force", "--max-shard-size", 170, "in.pth", "out")
    assert (done.code, "by another process" in done.err) == (5, True)
    assert {name: (here / "out" / name).read_bytes() for name in place} == place


def test_a_folder_that_is_replaced_while_its_files_are_written(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("convert", "--max-shard-size", 170, "in.pth", "out").code == 0
    real = publish._write

    def late(*arguments: Any) -> Any:
        written = real(*arguments)
        (here / "out").rename(here / "away")
        shutil.copytree(here / "away", here / "out", ignore=shutil.ignore_patterns(".*"))
        return written

    before = listing(here / "out")
    with monkeypatch.context() as patch:
        patch.setattr(publish, "_write", late)
        done = run("convert", "--force", "--max-shard-size", 170, "in.pth", "out")
    assert (done.code, "was replaced by another process meanwhile" in done.err) == (5, True)
    assert listing(here / "out") == before


def test_a_folder_that_appears_meanwhile_is_left_alone(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = publish._move

    def late(*arguments: Any) -> None:
        (here / "out").mkdir()
        (here / "out" / "theirs").write_text("theirs")
        real(*arguments)

    monkeypatch.setattr(publish, "_move", late)
    done = run("convert", "--max-shard-size", 170, "in.pth", "out")
    assert (done.code, "error[output-exists]" in done.err) == (5, True)
    assert list(listing(here / "out")) == ["theirs"]
    assert not list(here.glob(".*.tmp"))


def test_what_does_not_read_back_is_not_published(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite

    def wrong(fd: int, data: Any, position: int) -> int:
        return real(fd, bytes(data).replace(b"h.10", b"h.99"), position)

    before = listing(here)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", wrong)
        assert run("convert", "--max-shard-size", 170, "in.pth", "out").code != 0
    assert listing(here) == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_set(here: Path, make_safetensors: Any, number: int) -> None:
    make_safetensors(here / "big.safetensors", {f"k{n}": [1 << 20] for n in range(40)})
    command = ["convert", "--max-shard-size", "9MB", "big.safetensors", "out"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command],
        cwd=here, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while not list(here.glob(".out.*.tmp/model-00002-*")):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(number)
    process.wait(timeout=30)
    assert not (here / "out").exists()
    left = [path.name for path in here.iterdir() if path.name.startswith(".out.")]
    assert len(left) == (number == signal.SIGKILL)
