"""Several files with one command: lists of them, outputs in a folder, a pipe on either side."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, environment, listing, sampled, step
from safetensors.torch import load_file
from test_cli import on_terminal

import ckptool
from ckptool.files import publish

Run = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, good: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change into a folder with a few checkpoints: two good ones, one broken, one hostile."""
    for name in ("plain.pth", "model_best.pth.tar", "plain.safetensors"):
        shutil.copy(good / name, tmp_path)
    shutil.copy(hostile / "os_system.pth", tmp_path)
    (tmp_path / "broken.pth").write_bytes((good / "plain.pth").read_bytes()[:2000])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def parts(listed: dict[str, Any]) -> list[str]:
    """Return what became of each file: the schema of its document, or its error."""
    return [each.get("error") or each["schema"] for each in listed["files"]]


# Reading.


@pytest.mark.parametrize("form", [(), ("--names",), ("--tree",), ("--stats",)], ids=str)
def test_rows_of_several_files_begin_with_the_file(
    run: Run, here: Path, form: tuple[str, ...]
) -> None:
    names = ("plain.pth", "model_best.pth.tar")
    done = run("keys", *form, *names)
    alone = {name: run("keys", *form, name) for name in names}
    assert done.code == 0
    assert done.out.splitlines() == [
        f"{name}\t{line}" for name in names for line in alone[name].out.splitlines()
    ]
    assert done.err == "".join(each.err for each in alone.values())


@pytest.mark.parametrize("command", ["keys", "keys --stats", "info"])
def test_documents_of_several_files_are_those_of_each(run: Run, here: Path, command: str) -> None:
    names = ("plain.pth", "broken.pth", "missing.pth", "model_best.pth.tar")
    done = run(*command.split(), "--json", *names)
    assert done.code == 3
    document = done.document
    kind = f"{command.split()[0]}/1"
    assert list(document) == ["schema", "files"]
    assert document["schema"] == "many/1"
    assert parts(document) == [kind, "malformed", "no-such-file", kind]
    for at in (0, 3):
        assert document["files"][at] == run(*command.split(), "--json", names[at]).document
    assert document["files"][2] == {
        "file": "missing.pth", "error": "no-such-file", "message": "missing.pth does not exist",
        "evidence": [], "hint": "", "exit": 3,
    }  # fmt: skip


def test_one_file_alone_is_what_it_was(run: Run, here: Path) -> None:
    assert run("keys", "--json", "plain.pth").document["schema"] == "keys/1"
    assert "plain.pth" not in run("keys", "plain.pth").out
    done = run("info", "--json", "broken.pth")
    assert (done.code, done.out) == (3, "")


def test_the_worst_exit_counts_and_an_error_ends_no_other(run: Run, here: Path) -> None:
    done = run("info", "broken.pth", "plain.pth", "--at", "nowhere", "os_system.pth")
    assert done.code == 3
    assert done.err.count("error[") == 3
    assert run("keys", "plain.pth", "plain.pth", "--select", "none*").code == 2


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
def test_on_a_terminal_each_file_is_under_its_name(here: Path) -> None:
    code, shown = on_terminal("keys", "plain.pth", "missing.pth", "plain.safetensors", cwd=here)
    lines = [line.rstrip() for line in shown.splitlines()]
    assert code == 3
    first, second = (next(n for n, line in enumerate(lines) if f"==> {name} <==" in line)
                     for name in ("plain.pth", "plain.safetensors"))  # fmt: skip
    assert lines[first + 1].startswith("KEY")
    assert lines[second + 1].startswith("KEY")
    assert lines[second - 1] == ""


# Outputs in a folder.


def test_outputs_are_those_of_one_after_the_other(run: Run, here: Path) -> None:
    names = ("plain.pth", "model_best.pth.tar")
    done = run("convert", *names, "out/new/", "--to", "safetensors")
    assert done.code == 0, done.err
    for name, stem in zip(names, ("plain", "model_best"), strict=True):
        run("convert", name, f"{stem}.alone.safetensors")
        made = (here / f"out/new/{stem}.safetensors").read_bytes()
        assert made == (here / f"{stem}.alone.safetensors").read_bytes()
    assert sorted(os.listdir(here / "out/new")) == ["model_best.safetensors", "plain.safetensors"]
    lines = done.err.splitlines()
    assert lines[0] == "out/new/plain.safetensors: 8 tensors, 704 B"
    assert any(line.startswith("model_best.pth.tar: took the state_dict at") for line in lines)
    assert lines[-1] == (
        "out/new/: 2 of 2 files written; read 16, renamed 0, dropped 0, written 16"
    )


@pytest.mark.parametrize(
    ("name", "options", "made"),
    [
        ("model_best.pth.tar", ["--to", "safetensors"], "model_best.safetensors"),
        ("model_best.pth.tar", ["--to", "torch"], "model_best.pth.tar"),
        ("model_best.pth.tar", [], "model_best.pth.tar"),
        ("plain.safetensors", ["--to", "torch"], "plain.pth"),
        ("plain.safetensors", [], "plain.safetensors"),
        ("x.model", ["--to", "torch"], "x.model.pth"),
        ("v1.5/x.ckpt", [], "x.ckpt"),
    ],
)
def test_names_are_kept_and_suffixes_are_those_of_to(
    run: Run, here: Path, name: str, options: list[str], made: str
) -> None:
    if not (here / name).exists():
        (here / name).parent.mkdir(exist_ok=True)
        shutil.copy(here / "plain.pth", here / name)
    done = run("convert", *options, name, "out/")
    assert done.code == 0, done.err
    assert os.listdir(here / "out") == [made]
    document = run("convert", *options, name, "out/", "--force", "--json").document
    assert document["schema"] == "many/1"
    assert document["files"][0]["target"] == f"out/{made}"


@pytest.mark.parametrize(
    ("fixture", "made"),
    [
        ("sharded_safetensors", "sharded_safetensors.safetensors"),
        ("sharded_safetensors/model.safetensors.index.json", "model.safetensors"),
        ("sharded_bin", "sharded_bin.pth"),
        ("dcp", "dcp.pth"),
        ("dcp/.metadata", "dcp.pth"),
    ],
)
def test_sets_become_files_of_their_name(
    run: Run, good: Path, here: Path, fixture: str, made: str
) -> None:
    done = run("convert", good / fixture, "plain.pth", "out/")
    assert done.code == 0, done.err
    assert sorted(os.listdir(here / "out")) == sorted([made, "plain.pth"])
    assert ckptool.diff(str(good / fixture), str(here / "out" / made)).equal


@pytest.mark.parametrize("options", [["--max-shard-size", "300"], ["--to", "dcp"]], ids=str)
def test_sets_are_folders_in_the_folder(run: Run, here: Path, options: list[str]) -> None:
    done = run("convert", *options, "plain.pth", "model_best.pth.tar", "out/")
    assert done.code == 0, done.err
    assert sorted(os.listdir(here / "out")) == ["model_best", "plain"]
    assert ckptool.diff("plain.pth", "out/plain").equal
    assert run("convert", *options, "plain.pth", "alone/").code == 0
    assert sorted(os.listdir(here / "alone")) == sorted(os.listdir(here / "out/plain"))


@pytest.mark.parametrize("json", [False, True])
def test_what_is_wrong_with_one_ends_no_other(run: Run, here: Path, json: bool) -> None:
    names = ("broken.pth", "plain.pth", "os_system.pth", "model_best.pth.tar")
    done = run("convert", *names, "out/", *(["--json"] if json else []))
    assert done.code == 4
    assert sorted(os.listdir(here / "out")) == ["model_best.pth.tar", "plain.pth"]
    if json:
        assert parts(done.document) == ["malformed", "rewrite/1", "unsafe-pickle", "rewrite/1"]
        assert [each.get("file") for each in done.document["files"]] == [
            "broken.pth", None, "os_system.pth", None,
        ]  # fmt: skip
        return
    lines = done.err.splitlines()
    assert lines[0].startswith("error[malformed]: broken.pth ")
    assert lines[1].startswith("error[unsafe-pickle]: os_system.pth ")
    assert lines[2].startswith("out/plain.pth: 8 tensors")
    assert "os_system.pth: hint: --tensors-only   keeps the tensors" in done.err
    assert lines[-1].startswith("out/: 2 of 4 files written; read 16, ")


def test_outputs_that_exist_are_left_and_named(run: Run, here: Path) -> None:
    assert run("convert", "plain.pth", "out/").code == 0
    before = (here / "out/plain.pth").stat()
    done = run("convert", "plain.pth", "model_best.pth.tar", "out/", "-q")
    assert done.code == 5
    assert done.err == "error[output-exists]: out/plain.pth exists\n"
    assert (here / "out/plain.pth").stat().st_ino == before.st_ino
    assert (here / "out/model_best.pth.tar").exists()
    assert run("convert", "plain.pth", "model_best.pth.tar", "out/", "--force").code == 0


def test_every_edit_takes_several(run: Run, here: Path) -> None:
    shutil.copy("model_best.pth.tar", "second.pth.tar")
    names = ("model_best.pth.tar", "second.pth.tar")
    for number, edit in enumerate(
        (
            "strip-prefix",
            "add-prefix --prefix backbone",
            "unwrap",
            "transfer --drop classifier",
            "transfer --like plain.safetensors",
            "convert --strip-prefix module --dtype f16",
        )
    ):
        done = run(*edit.split(), *names, f"out{number}/")
        assert done.code == 0, done.err
        assert done.err.splitlines()[-1].startswith(f"out{number}/: 2 of 2 files written; read 16")
        one = run(*edit.split(), names[0], f"alone{number}.pth", "--json")
        several = run(*edit.split(), *names, f"again{number}/", "--json").document["files"]
        assert {**several[0], "target": ""} == {**one.document, "target": ""}
        assert (here / f"out{number}" / names[0]).read_bytes() == (
            here / f"alone{number}.pth"
        ).read_bytes()


def test_a_dry_run_of_several_writes_nothing(run: Run, here: Path) -> None:
    before = listing(here)
    done = run("convert", "plain.pth", "broken.pth", "model_best.pth.tar", "out/x/", "-n")
    assert done.code == 3
    first, second, last = done.out.splitlines()
    assert first == "out/x/plain.pth: 8 tensors, 704 B"
    assert second.startswith("out/x/model_best.pth.tar: ")
    assert last.startswith(
        "out/x/: 2 of 3 files would be written; "
        "read 16, renamed 0, dropped 0, would write 16; 8.5 KiB to write, "
    )
    assert last.endswith(" free")
    document = run("convert", "plain.pth", "broken.pth", "out/x/", "-n", "--json").document
    assert parts(document) == ["rewrite/1", "malformed"]
    assert document["files"][0]["dry_run"] is True
    assert listing(here) == before


# What is wrong with all together: nothing is written.


@pytest.mark.parametrize(
    ("line", "code", "slug"),
    [
        ("convert plain.pth sub/plain.pth out/", 2, "name-collision"),
        ("convert plain.pth ./plain.pth out/", 2, "name-collision"),
        ("convert --to safetensors plain.pth plain.safetensors out/", 2, "name-collision"),
        ("convert --max-shard-size 300 plain.pth plain.safetensors out/", 2, "name-collision"),
        ("convert plain.pth model_best.pth.tar plain.safetensors", 2, "usage"),
        ("convert plain.pth model_best.pth.tar out", 2, "usage"),
        ("convert plain.pth model_best.pth.tar plain.safetensors/", 5, "write-error"),
        ("convert plain.pth model_best.pth.tar -", 2, "usage"),
        ("convert --distributed plain.pth model_best.pth.tar out/", 2, "usage"),
        ("strip-prefix --in-place plain.pth model_best.pth.tar out/", 2, "edit-error"),
        ("average plain.pth plain.safetensors out/", 5, "write-error"),
    ],
)
def test_refusals_of_all(run: Run, here: Path, line: str, code: int, slug: str) -> None:
    (here / "sub").mkdir()
    shutil.copy("plain.pth", "sub")
    before = listing(here)
    done = run(*line.split())
    assert done.code == code, done.err
    assert f"error[{slug}]" in done.err
    assert done.out == ""
    assert listing(here) == before


@pytest.mark.skipif(sys.platform == "win32", reason="symlinks need a right there")
def test_two_names_of_one_place_collide(run: Run, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out/plain.pth").symlink_to("model_best.pth.tar")
    done = run("convert", "plain.pth", "model_best.pth.tar", "out/", "--force")
    assert done.code == 2
    assert "error[name-collision]" in done.err
    assert os.listdir(here / "out") == ["plain.pth"]


def test_an_input_in_the_folder_is_not_replaced(run: Run, here: Path) -> None:
    (here / "out").mkdir()
    shutil.copy("plain.pth", "out/plain.pth")
    before = listing(here)
    done = run("convert", "model_best.pth.tar", "out/plain.pth", "out/", "--force", "-n")
    assert done.code == 5
    assert "error[same-file]: out/plain.pth is the input itself" in done.err
    os.symlink("out/plain.pth", "link.pth")
    (here / "sub").mkdir()
    shutil.copy("model_best.pth.tar", "sub/plain.pth")
    before = listing(here)
    done = run("convert", "sub/plain.pth", "link.pth", "out/", "--force")
    assert done.code == 5
    assert "error[same-file]: out/plain.pth would replace link.pth, which is an input" in done.err
    assert listing(here) == before


def test_files_of_one_checkpoint_are_not_written_twice(run: Run, good: Path, here: Path) -> None:
    ranks = sorted((good / "fsdp2_ranks").glob("*.pt"))
    done = run("convert", *ranks, "out/")
    assert done.code == 2
    assert f"{ranks[0]} and {ranks[1]} are files of one checkpoint" in done.err
    assert not (here / "out").exists()
    assert run("convert", ranks[0], "plain.pth", "out/").code == 0


def test_too_little_room_for_all_is_refused_before_the_first(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = listing(here)
    monkeypatch.setattr("ckptool.cli._batch.free_space", lambda place: 6000)
    done = run("convert", "plain.pth", "model_best.pth.tar", "out/")
    assert done.code == 5
    assert "error[no-space]: out/ needs " in done.err
    assert "; 5.9 KiB are free" in done.err
    assert listing(here) == before


def test_replaced_files_make_room(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("plain.pth", "model_best.pth.tar")
    assert run("convert", *names, "out/").code == 0
    monkeypatch.setattr("ckptool.cli._batch.free_space", lambda place: 6000)
    assert run("convert", *names, "out/", "--force").code == 0


# A batch: 200 files, one broken, one hostile, and a disk that gets full.

MANY, BROKEN, HOSTILE, FULL = 200, 17, 60, 120


@pytest.fixture
def batch(here: Path) -> list[str]:
    """Write 200 inputs, one broken and one hostile, and give their names."""
    (here / "in").mkdir()
    names = [f"in/{number:03}.pth" for number in range(MANY)]
    for number, name in enumerate(names):
        source = {BROKEN: "broken.pth", HOSTILE: "os_system.pth"}.get(number, "plain.pth")
        shutil.copy(source, name)
    return names


def ending_at(count: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writing of one file end in its middle, after `count` others."""
    real, calls = publish.write_file, Iterations()

    def write_file(fd: int, planned: Any, *rest: Any, **more: Any) -> Any:
        if calls.next() == count:
            os.write(fd, b"half")
            raise error
        return real(fd, planned, *rest, **more)

    monkeypatch.setattr(publish, "write_file", write_file)


class Iterations:
    """Counts calls."""

    def __init__(self) -> None:
        self._count = -1

    def next(self) -> int:
        self._count += 1
        return self._count


def is_as_alone(here: Path, made: str) -> bool:
    """Check an output with the reader of another library."""
    return set(torch.load(here / "out" / made, weights_only=True)) == set(
        torch.load(here / "plain.pth", weights_only=True)
    )


def test_a_batch_leaves_what_is_bad_and_writes_the_rest(
    run: Run, here: Path, batch: list[str]
) -> None:
    done = run("convert", *batch, "out/", "--no-sync")
    assert done.code == 4
    made = sorted(os.listdir(here / "out"))
    assert made == [f"{n:03}.pth" for n in range(MANY) if n not in (BROKEN, HOSTILE)]
    assert all(is_as_alone(here, name) for name in made[:: step(20)])
    lines = done.err.splitlines()
    assert sum(line.startswith("error[") for line in lines) == 2
    assert sum(line.startswith("out/") for line in lines) == len(made) + 1
    assert len(lines) == MANY + 1 + 2  # with a hint for either error
    assert lines[-1].startswith("out/: 198 of 200 files written; read 1584, ")


@pytest.mark.parametrize("as_json", [False, True])
def test_a_disk_that_gets_full_in_the_middle(
    run: Run, here: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch, as_json: bool
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    ending_at(FULL - 2, full, monkeypatch)  # two of those before are not written
    done = run("convert", *batch, "out/", "--no-sync", *(["--json"] if as_json else []))
    assert done.code == 5
    made = [f"{n:03}.pth" for n in range(FULL) if n not in (BROKEN, HOSTILE)]
    assert sorted(os.listdir(here / "out")) == made
    assert all(is_as_alone(here, name) for name in made[:: step(20)])
    if as_json:
        found = parts(done.document)
        assert [found[n] for n in (BROKEN, HOSTILE, FULL)] == [
            "malformed", "unsafe-pickle", "no-space",
        ]  # fmt: skip
        assert found.count("rewrite/1") == len(made)
        assert set(found[FULL + 1 :]) == {"not-reached"}
        assert done.document["files"][-1] == {
            "file": batch[-1], "error": "not-reached", "evidence": [], "hint": "", "exit": 5,
            "message": f"{batch[-1]} was not written: the disk is full",
        }  # fmt: skip
        return
    lines = done.err.splitlines()
    assert any(line.startswith(f"error[no-space]: no space left while writing {here}/out/{FULL}")
               for line in lines)  # fmt: skip
    assert lines[-1] == (
        "out/: 118 of 200 files written; read 944, renamed 0, dropped 0, written 944; "
        "not reached: in/121.pth, in/122.pth, in/123.pth and 76 more"
    )


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root mounts")
def test_a_disk_that_is_really_full(
    run: Run, here: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody tells how much room there is: a quota, a file system over a network."""
    (here / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(here / "disk")]
    if shutil.which("mount") is None or subprocess.run(mount, check=False).returncode:
        pytest.skip("no file system can be mounted here")
    monkeypatch.delattr(os, "statvfs")
    try:
        done = run("convert", *batch, "disk/out/")
        made = sorted(os.listdir(here / "disk/out"))
        whole = {(here / "disk/out" / name).read_bytes() for name in made}
    finally:
        subprocess.run(["umount", str(here / "disk")], check=True)
    assert done.code == 5
    left_out = (BROKEN, HOSTILE)
    assert made == [f"{n:03}.pth" for n in range(MANY) if n not in left_out][: len(made)]
    assert 10 < len(made) < MANY - 2
    assert len(whole) == 1
    assert f"disk/out/: {len(made)} of 200 files written; " in done.err


def test_an_error_of_one_output_ends_no_other(
    run: Run, here: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_at(3, OSError(errno.EIO, os.strerror(errno.EIO)), monkeypatch)
    done = run("convert", *batch[:6], "out/")
    assert done.code == 5
    assert sorted(os.listdir(here / "out")) == [
        "000.pth",
        "001.pth",
        "002.pth",
        "004.pth",
        "005.pth",
    ]


def test_a_folder_without_an_output_is_not_left(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    ending_at(0, full, monkeypatch)
    before = listing(here)
    assert run("convert", "plain.pth", "model_best.pth.tar", "out/deep/").code == 5
    assert listing(here) == before
    assert run("convert", "broken.pth", "os_system.pth", "out/deep/").code == 4
    assert listing(here) == before


def test_an_interruption_says_what_was_written(
    run: Run, here: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ending_at(30, KeyboardInterrupt(), monkeypatch)
    done = run("convert", *batch[:50], "out/", "--no-sync", "--json")
    assert done.code == 130
    assert len(os.listdir(here / "out")) == 30
    found = parts(done.document)
    assert (
        found == ["rewrite/1"] * BROKEN + ["malformed"] + ["rewrite/1"] * 13 + ["not-reached"] * 19
    )
    assert {each["exit"] for each in done.document["files"][31:]} == {130}
    assert json.loads(done.err)["message"] == (
        "interrupted; out/: 30 of 50 files written; "
        "read 240, renamed 0, dropped 0, written 240; "
        "not reached: in/031.pth, in/032.pth, in/033.pth and 16 more"
    )


def test_an_interruption_counts_no_old_outputs(
    run: Run, here: Path, batch: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run("convert", *batch[:6], "out/", "--no-sync").code == 0
    ending_at(2, KeyboardInterrupt(), monkeypatch)
    done = run("convert", *batch[:6], "out/", "--no-sync", "--force")
    assert done.code == 130
    assert "out/: 2 of 6 files written; read 16, " in done.err
    assert "; not reached: in/002.pth, in/003.pth, in/004.pth and 1 more" in done.err


@pytest.mark.skipif(sys.platform == "win32", reason="signals are those of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_whole_outputs(
    here: Path, batch: list[str], number: signal.Signals
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "convert", *batch, "out/"],
        stderr=subprocess.PIPE, text=True, env=environment(),
    )  # fmt: skip
    assert process.stderr
    for line in process.stderr:
        if line.startswith("out/005"):
            process.send_signal(number)
            break
    said = process.stderr.read()
    assert process.wait(timeout=60) == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    made = sorted(os.listdir(here / "out"))
    assert f"out/: {len(made)} of 200 files written; " in said
    assert "; not reached: in/" in said
    assert all(name.endswith(".pth") and is_as_alone(here, name) for name in made)


# Pipes.


def piped(
    *arguments: object, given: bytes | None = None, file: Path | None = None
) -> tuple[int, bytes, str]:
    """Run a command with bytes on a pipe, or with a file, as its standard input."""
    done = subprocess.run(
        [sys.executable, "-m", "ckptool", *map(str, arguments)],
        **({"input": given} if file is None else {"stdin": file.open("rb")}),  # type: ignore[arg-type]
        capture_output=True, check=False, timeout=60, env=environment(),
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr.decode()


@pytest.mark.parametrize(
    "line",
    [
        "keys -", "keys --json -", "info -", "check --sha256 -", "show - classifier.bias",
        "diff - plain.safetensors", "diff plain.safetensors -", "keys - model_best.pth.tar",
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_file", [False, True])
def test_standard_input_is_read_as_a_file(run: Run, here: Path, line: str, as_file: bool) -> None:
    plain = here / "plain.pth"
    given = None if as_file else plain.read_bytes()
    code, out, err = piped(*line.split(), given=given, file=plain if as_file else None)
    expected = run(
        *[word.replace("-", "plain.pth") if word == "-" else word for word in line.split()]
    )
    assert (code, expected.code) == (0, 0), err
    unnamed = out.decode().replace('"file": "-"', '"file": "plain.pth"')
    unnamed = "\n".join(f"plain.pth{row[1:]}" if row.startswith("-\t") else row
                        for row in unnamed.split("\n"))  # fmt: skip
    if line != "info -":
        assert unnamed == expected.out
    assert "./-" not in err


def test_a_file_that_is_called_so_is_read_by_its_path(run: Run, here: Path) -> None:
    shutil.copy("plain.pth", "-")
    assert run("keys", "./-").code == 0
    assert piped("keys", "-", given=b"")[0] == 3
    assert not [name for name in os.listdir(here) if name.startswith("ckptool")]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("keys - -", 2, "which can be read once"),
        ("diff - -", 2, "which can be read once"),
        ("strip-prefix - out/", 2, "- has no name for an output"),
        ("strip-prefix --in-place -", 5, ""),
        ("keys -", 3, "error[malformed]: - (torch zip, byte "),
    ],
)
def test_what_standard_input_cannot_be(here: Path, line: str, code: int, said: str) -> None:
    before = listing(here)
    given = (here / "plain.pth").read_bytes()
    found, out, err = piped(*line.split(), given=given[:3000] if code == 3 else given)
    assert (found, out) == (code, b""), err
    assert said in err
    assert listing(here) == before


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
def test_a_terminal_is_no_pipe(here: Path) -> None:
    assert on_terminal("keys", "-", cwd=here)[0] == 2
    code, shown = on_terminal("convert", "plain.pth", "-", cwd=here)
    assert code == 2
    assert "- is standard output, which is a terminal" in shown


EDITS = (
    "convert --to safetensors", "convert --to torch", "strip-prefix --to torch",
    "convert --to safetensors --dtype f16", "convert --dtype f16", "unwrap --to safetensors",
    "transfer --drop classifier",
)  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
def test_a_pipe_gets_the_bytes_of_a_file(run: Run, here: Path, edit: str) -> None:
    alone = run(*edit.split(), "model_best.pth.tar", "out.any")
    assert alone.code == 0, alone.err
    code, out, err = piped(*edit.split(), "model_best.pth.tar", "-")
    assert code == 0, err
    assert out == (here / "out.any").read_bytes()
    given = (here / "model_best.pth.tar").read_bytes()
    assert piped(*edit.split(), "-", "-", given=given)[:2] == (0, out)


@pytest.mark.product(16)
@pytest.mark.parametrize("to", ["torch", "safetensors"])
@pytest.mark.parametrize(
    "name", sampled(sorted(os.listdir(Path(__file__).parents[2] / "fixtures/good")), 5)
)
def test_a_pipe_gets_the_bytes_of_a_file_of_every_fixture(
    run: Run, good: Path, tmp_path: Path, name: str, to: str
) -> None:
    far = (
        name == "expanded_far.pth"
    )  # 4 GiB, which are refused: neither disk nor memory may have them
    options = ["--to", to, "-q", *([] if far else ["--allow-expand"])]
    alone = run("convert", *options, good / name, tmp_path / "out")
    code, out, _ = piped("convert", *options, good / name, "-")
    assert code == alone.code
    assert out == ((tmp_path / "out").read_bytes() if code == 0 else b"")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("convert plain.pth - --to dcp", 5),
        ("convert plain.pth - --max-shard-size 300", 5),
        ("convert plain.pth - --json", 2),
        ("convert os_system.pth -", 4),
        ("convert broken.pth -", 3),
    ],
)
def test_what_a_pipe_does_not_take(here: Path, line: str, code: int) -> None:
    found, out, err = piped(*line.split())
    assert (found, out) == (code, b"")
    assert ('"hint": ' if "--json" in line else "\nhint: ") in err


def test_a_cast_that_overflows_sends_nothing(here: Path) -> None:
    torch.save({"w": torch.full((1000,), 1e6)}, "large.pth")
    for to in ("torch", "safetensors"):
        code, out, err = piped("convert", "--dtype", "f16", "--to", to, "large.pth", "-")
        assert (code, out) == (1, b""), err


def test_damage_that_is_met_on_the_way_leaves_a_stream_that_no_reader_takes(here: Path) -> None:
    torch.save({"a": torch.arange(300_000.0), "b": torch.ones(300_000)}, "in.pth")
    data = bytearray((here / "in.pth").read_bytes())
    at = data.index(torch.ones(16).numpy().tobytes()) + 100
    data[at] ^= 1
    (here / "in.pth").write_bytes(data)
    code, out, err = piped("convert", "in.pth", "-", "--to", "safetensors")
    assert code == 3
    assert err.splitlines()[0].endswith("; the output is cut off")
    (here / "cut.safetensors").write_bytes(out)
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|buffer"):
        load_file(here / "cut.safetensors")
    assert piped("convert", "in.pth", "-", "--to", "torch")[1] == b""


def test_a_full_disk_behind_a_pipe(here: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no full device")
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ckptool", "convert", "plain.pth", "-"],
            stdout=full, stderr=subprocess.PIPE, check=False, env=environment(), text=True,
        )  # fmt: skip
    assert done.returncode == 5
    assert done.stderr.startswith("error[no-space]: no space left while writing -; ")


def test_a_reader_that_goes_away(here: Path) -> None:
    torch.save({"a": torch.zeros(1_000_000)}, "in.pth")
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "convert", "in.pth", "-"],
        stdout=subprocess.PIPE, env=environment(),
    )  # fmt: skip
    assert process.stdout
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(timeout=60) == 141
