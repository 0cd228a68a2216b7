"""What the machine refuses: each error names its path and its cause, and what helps; none is a bug.

As an ordinary user where root may do anything, and on small file systems where that can be made.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Outcome, environment, listing

import ckptool
from ckptool.files import moves

Run = Callable[..., Outcome]

ROOT = os.geteuid() == 0
NOBODY = 65534
pytestmark = pytest.mark.skipif(os.name == "nt", reason="users and modes of POSIX")


@contextmanager
def as_nobody() -> Iterator[None]:
    """Be a user who is not root."""
    if ROOT:
        os.setegid(NOBODY)
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if ROOT:
            os.seteuid(0)
            os.setegid(0)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder that everybody may enter, with a checkpoint."""
    folder = tmp_path
    while folder != folder.parent and folder.stat().st_uid == os.geteuid() and ROOT:
        folder.chmod(folder.stat().st_mode | 0o755)
        folder = folder.parent
    monkeypatch.chdir(tmp_path)
    torch.save({"module.a": torch.arange(100.0)}, "in.pth")
    return tmp_path


def refused(done: Outcome, slug: str, *said: str) -> None:
    first, *rest = done.err.splitlines()
    assert first.startswith(f"error[{slug}]: "), done
    for words in said:
        assert words in first, done
    assert any(line.startswith("hint: ") for line in rest), done
    assert done.out == ""


# Permission denied, and places that lead nowhere.


@pytest.mark.parametrize("command", ["keys {s}", "info {s}", "convert {s} out.pth", "diff {s} {s}"])
@pytest.mark.parametrize("denied", ["in.pth", "locked/in.pth"])
def test_an_input_that_may_not_be_read(run: Run, here: Path, command: str, denied: str) -> None:
    (here / "locked").mkdir()
    shutil.copy("in.pth", "locked/in.pth")
    (here / denied).chmod(0)
    (here / "locked").chmod(0 if denied.startswith("locked") else 0o755)
    run(*command.format(s="missing").split())  # imports what is needed
    with as_nobody():
        done = run(*command.format(s=denied).split())
    (here / "locked").chmod(0o755)
    assert done.code == 3
    refused(done, "permission-denied", denied, "permission denied")


def test_check_says_what_it_may_not_read(run: Run, here: Path) -> None:
    (here / "in.pth").chmod(0)
    run("check", "missing")
    with as_nobody():
        done = run("check", "in.pth")
    assert done.code == 3
    assert done.out.startswith("in.pth\tunsupported\tcannot be opened: permission denied")


def test_an_output_that_may_not_be_written(run: Run, here: Path) -> None:
    (here / "locked").mkdir()
    (here / "locked").chmod(0o555)
    for target in ("locked/out.pth", "locked/out/"):
        more = ["--max-shard-size", "1KB"] if target.endswith("/") else []
        run("convert", "in.pth", "-n", "out", *more)
        with as_nobody():
            done = run("convert", "in.pth", target, *more)
        assert done.code == 5
        refused(done, "permission-denied", target.rstrip("/"), "permission denied")


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("circle", "too many levels of symbolic links"),
        ("circle/out.pth", "too many levels of symbolic links"),
        ("x" * 300 + ".pth", "file name too long"),
        ("in.pth/out.pth", "not a directory"),
    ],
)
def test_an_output_that_leads_nowhere(run: Run, here: Path, target: str, said: str) -> None:
    (here / "circle").symlink_to("circle")
    before = listing(here)
    done = run("strip-prefix", "in.pth", target)
    assert done.code == 5
    refused(done, "write-error", target, said)
    assert listing(here) == before


# Temporary files.


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system with room for a page or two."""
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)  # of an error that is kept, too


@pytest.fixture
def packed(here: Path) -> Path:
    """Make files that are unpacked to be read, larger than the full disk."""
    torch.save({"a": torch.rand(40, 1000)}, "large.pth")
    shutil.make_archive("packed", "gztar", here, "large.pth")
    shutil.unpack_archive("large.pth", "unpacked", "zip")
    shutil.make_archive("rezipped", "zip", here / "unpacked")
    Path("rezipped.zip").rename("rezipped.pth")
    torch.save({"a": torch.rand(40, 1000)}, "other.pth")
    return here


@pytest.mark.parametrize(
    "command",
    [
        "keys packed.tar.gz::large.pth",
        "check packed.tar.gz::large.pth",
        "convert packed.tar.gz::large.pth out.pth",
    ],
)
def test_a_full_folder_of_temporary_files(packed: Path, full_disk: Path, command: str) -> None:
    done = spawned(packed, full_disk, command)
    assert done.code == 5
    said = [line for line in done.err.splitlines() if line.startswith("error")][-1]
    assert said == f"error[no-space]: no space left while writing a temporary file in {full_disk}"
    assert "hint: TMPDIR=FOLDER" in done.err
    assert not (packed / "out.pth").exists()
    assert not list(full_disk.iterdir())


def test_a_state_dict_for_which_there_is_no_room(
    here: Path, full_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(full_disk))
    with pytest.raises(ckptool.CkptoolError) as caught:
        ckptool.diff({"a": torch.rand(100, 1000)}, "in.pth")
    said = f"no space left while writing a temporary file in {full_disk}"
    assert (caught.value.slug, caught.value.message) == ("no-space", said)


def spawned(folder: Path, temporary: Path, command: str) -> Outcome:
    done = subprocess.run(
        [sys.executable, "-m", "ckptool", *command.split()], cwd=folder, capture_output=True,
        text=True, check=False, timeout=60, env=environment({"TMPDIR": str(temporary)}),
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def test_no_folder_for_temporary_files(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    def none() -> str:
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(ckptool.CkptoolError) as caught:
        ckptool.keys("packed.tar.gz::large.pth")
    assert "no usable temporary directory found" in caught.value.message
    assert "TMPDIR=FOLDER" in caught.value.hint


# Whatever the system says, wherever it says it.

CODES = [
    errno.EIO, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT,
    errno.ENAMETOOLONG, errno.ELOOP, errno.ENOTDIR, errno.ENOSPC, errno.ESTALE, errno.ENOENT,
    errno.ENODEV,
]  # fmt: skip
CALLS = ["open", "stat", "fstat", "preadv", "pwrite", "listdir", "scandir", "mkdir", "link",
         "ftruncate", "fsync", "statvfs", "lstat"]  # fmt: skip
LINES = [
    "keys in.pth", "info set", "check set", "diff in.pth set", "convert set out.pth",
    "convert in.pth out --max-shard-size 300", "strip-prefix --in-place in.pth",
]  # fmt: skip


@pytest.mark.product(8)
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("line", LINES)
def test_no_refusal_of_the_system_is_a_bug(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, name: str, line: str
) -> None:
    """Each call fails from the n-th on, with each error in turn."""
    torch.save({f"module.{n}": torch.arange(100.0) for n in range(3)}, "more.pth")
    assert run("convert", "-q", "more.pth", "set", "--max-shard-size", "500").code == 0
    before = listing(here)
    real = getattr(os, name)
    for turn in range(12):
        code, calls = CODES[turn % len(CODES)], 0

        def failing(*arguments: Any, code: int = code, turn: int = turn, **more: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > turn:
                named = [each for each in arguments if isinstance(each, str)][:1]
                raise OSError(code, os.strerror(code), *named)
            return real(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, failing)
            done = run(*line.split())
        assert "error[bug]" not in done.err, (turn, code, done)
        assert done.code in (0, 1, 3, 5), (turn, code, done)
        if done.code == 5:
            assert "standard output" not in done.err, (turn, code, done)
        if done.code in (0, 1) and "check" not in line:
            for made in ("out", "out.pth"):
                path = here / made
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            (here / "in.pth").write_bytes(before["in.pth"] or b"")
        assert listing(here).keys() == before.keys(), (turn, code, done)
        if calls <= turn:
            break


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["keys in.pth", "--help", "--version", "keys --help"])
def test_a_full_stdout_is_named_as_such(here: Path, line: str) -> None:
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "ckptool", *line.split()], stdout=full, stderr=subprocess.PIPE,
            check=False, timeout=60, env=environment(), text=True,
        )  # fmt: skip
    assert done.returncode == 5
    said = "error[write-error]: the standard output cannot be written: no space left on device"
    assert done.stderr.startswith(said)


# Owners.


@pytest.mark.skipif(not ROOT, reason="root alone may give files away")
@pytest.mark.parametrize(
    "line",
    ["strip-prefix --in-place in.pth", "convert --force other.pth in.pth",
     "convert --force other.pth set --max-shard-size 300",
     "convert --force other.pth dcp --to dcp"],
)  # fmt: skip
def test_root_keeps_owner_group_and_mode(run: Run, here: Path, line: str) -> None:
    torch.save({f"module.{n}": torch.arange(90.0) for n in range(3)}, "other.pth")
    assert run("convert", "-q", "other.pth", "set", "--max-shard-size", "500").code == 0
    assert run("convert", "-q", "other.pth", "dcp", "--to", "dcp").code == 0
    place = here / line.replace("other.pth", "").split()[2]
    for path in (place, *place.glob("*"), *place.glob(".metadata")):
        path.chmod(0o2750 if path.is_dir() else 0o640)
        os.chown(path, NOBODY, 12)
    (here / "set/config.json").write_text("theirs")
    done = run(*line.split())
    assert done.code == 0, done
    found = [path.stat() for path in (place, *place.glob("*")) if path.name != "config.json"]
    assert {(each.st_uid, each.st_gid) for each in found} == {(NOBODY, 12)}
    assert {stat.S_IMODE(each.st_mode) for each in found} <= {0o2750, 0o640}
    theirs = (here / "set/config.json").stat()
    assert (theirs.st_uid, theirs.st_nlink) == (0, 1)


# A folder that was being replaced when the run was killed.


def test_what_is_in_a_folder_may_be_files_of_others(run: Run, here: Path) -> None:
    torch.save({f"module.{n}": torch.arange(90.0) for n in range(3)}, "other.pth")
    assert run("convert", "-q", "other.pth", "set", "--max-shard-size", "500").code == 0
    (here / "set/config.json").write_text("theirs")
    (here / "set/link").symlink_to("nowhere")
    for folders in (False, True):
        if folders:
            (here / "set/onnx").mkdir()
            (here / "set/onnx/model.onnx").write_text("theirs")
        node = (here / "set").stat().st_ino
        done = run("convert", "--force", "other.pth", "set", "--max-shard-size", "500")
        assert (done.code, "warning" in done.err) == (0, False), done
        assert ((here / "set").stat().st_ino == node) is (folders or sys.platform != "linux")
        assert (here / "set/config.json").read_text() == "theirs"
        assert os.readlink(here / "set/link") == "nowhere"
        assert run("check", "set").code == 0
        assert not [path for path in here.rglob("*") if path.name.endswith(".tmp")]
    assert (here / "set/onnx/model.onnx").read_text() == "theirs"


def test_a_folder_one_is_in_stays(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("convert", "-q", "in.pth", "set", "--max-shard-size", "500").code == 0
    monkeypatch.chdir("set")
    assert run("convert", "--force", "../in.pth", ".", "--max-shard-size", "500").code == 0
    assert os.listdir(".") == ["model.safetensors"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("form", ["--max-shard-size 300", "--to dcp"])
def test_info_leads_to_the_old_set(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """Where folders cannot be exchanged at once: killed at each step."""
    torch.save({f"module.{n}": torch.arange(90.0) + n for n in range(3)}, "other.pth")
    torch.save({f"module.{n}": torch.arange(95.0) + n for n in range(4)}, "new.pth")

    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    def never(*_: Any, **more: Any) -> None:
        return None

    monkeypatch.setattr(moves, "swap", unsupported)
    seen = set()
    for turn in range(1, 60):
        shutil.rmtree("set", ignore_errors=True)
        assert run("convert", "-q", "other.pth", "set", *form.split()).code == 0
        left = turn

        def step(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **more: Any) -> Any:
                nonlocal left
                left -= 1
                if not left:
                    raise Killed
                return real(*arguments, **more)

            return call

        with monkeypatch.context() as patch:
            for name in ("rename", "unlink", "link"):
                patch.setattr(os, name, step(getattr(os, name)))
            patch.setattr(moves, "remove", never)
            patch.setattr(moves, "_back", never)
            patch.setattr(moves, "_unlink", never)
            with suppress(Killed):
                run("convert", "--force", "new.pth", "set", *form.split())
        found = run("info", "set")
        if left > 0:
            break
        if found.code == 0:
            seen.add("whole")
            continue
        seen.add("aside")
        assert "error[malformed]: set was being replaced when ckptool was killed" in found.err
        hint = next(line for line in found.err.splitlines() if line.startswith("hint: "))
        old = hint.rpartition(" ")[2]
        assert run("diff", old, "other.pth").code == 0, (turn, found)
        assert run("convert", "--force", "new.pth", "set", *form.split()).code == 0
        assert run("diff", "set", "new.pth").code == 0
    assert seen == {"whole", "aside"}
