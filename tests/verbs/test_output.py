"""Output is old or new, never partial, whatever the machine does; the input is never touched."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Outcome, environment, listing, sampled
from test_cli import SLOW

from ckptool.files import publish
from ckptool.files.copying import Done

Run = Callable[..., Outcome]
TARGETS = ["out.pth", "out.safetensors"]


@pytest.fixture
def here(tmp_path: Path, good: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a folder with an input, `in.pth`, as the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(good / "model_best.pth.tar", "in.pth")
    return tmp_path


@pytest.fixture
def expected(run: Run, good: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Give what a run writes where nothing goes wrong."""
    folder = tmp_path_factory.mktemp("expected")
    for target in TARGETS:
        assert run("convert", good / "model_best.pth.tar", folder / target).code == 0
    return {target: (folder / target).read_bytes() for target in TARGETS}


class Fault:
    """A system call that fails at its n-th turn; it counts its turns."""

    def __init__(self, name: str, turn: int, code: int) -> None:
        self.real = getattr(os, name)
        self.turn, self.code, self.count = turn, code, 0

    def __call__(self, *arguments: Any, **more: Any) -> Any:
        self.count += 1
        if self.count == self.turn:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments, **more)


# Faults.

FAULTS = [
    (name, code)
    for name in ("ftruncate", "fsync", "replace")
    for code in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("name", "code"), FAULTS)
def test_a_fault_leaves_the_target_as_it_was(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int, target: str
) -> None:
    (here / target).write_bytes(b"old")
    before = listing(here)
    fault = Fault(name, 1, code)
    with monkeypatch.context() as patch:
        patch.setattr(os, name, fault)
        done = run("convert", "--force", "in.pth", target)
    assert fault.count == 1
    assert_refused(done, code)
    assert listing(here) == before


def assert_refused(done: Outcome, code: int) -> None:
    full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    assert (done.code, done.out) == (5, "")
    assert done.err.startswith("error[no-space]: " if full else "error[write-error]: ")
    limit = "a limit on the size of files" in done.err and "ulimit -f" in done.err
    assert limit == (code == errno.EFBIG)
    assert ("no space left" in done.err) == (full and not limit)
    assert "nothing was kept" in done.err
    assert ("hint: make room" in done.err) is (full and not limit)
    assert full or "input/output error" in done.err


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "replaced"])
def test_a_fault_at_any_write(
    run: Run,
    here: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
    code: int,
    old: bytes | None,
) -> None:
    """Each write in turn fails, until there is none left to fail."""
    if old:
        (here / target).write_bytes(old)
    before = listing(here)
    for turn in range(1, 200):
        fault = Fault("pwrite", turn, code)
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", fault)
            done = run("convert", "--force", "in.pth", target)
        if fault.count < turn:
            break
        assert_refused(done, code)
        assert listing(here) == before
    assert turn > 2
    assert done.code == 0
    assert (here / target).read_bytes() == expected[target]


def test_a_fault_when_the_temporary_file_is_made(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def refuse(path: Any, flags: int, *more: Any, **named: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(path, flags, *more, **named)

    before = listing(here)
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        done = run("convert", "in.pth", "out.pth")
    assert done.code == 5
    assert "too many open files" in done.err
    assert listing(here) == before


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK, errno.EIO])
def test_without_hard_links_a_rename_publishes(
    run: Run, here: Path, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr(os, "link", Fault("link", 1, code))
    assert run("convert", "in.pth", "out.pth").code == 0
    assert listing(here).keys() == {"in.pth", "out.pth"}
    assert (here / "out.pth").read_bytes() == expected["out.pth"]


def test_a_fault_at_the_last_rename(run: Run, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(here)
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", Fault("link", 1, errno.EPERM))
        patch.setattr(os, "rename", Fault("rename", 1, errno.EIO))
        assert_refused(run("convert", "in.pth", "out.pth"), errno.EIO)
    assert listing(here) == before


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["new", "replaced"])
def test_a_fault_while_the_folder_is_flushed_says_that_the_file_is_there(
    run: Run,
    here: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    force: list[str],
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", Fault("fsync", 2, errno.EIO))
        done = run("convert", *force, "in.pth", "out.pth")
    assert done.code == 0
    assert "nothing was kept" not in done.err
    assert "warning: " in done.err
    assert "out.pth was written, but " in done.err
    assert (here / "out.pth").read_bytes() == expected["out.pth"]
    assert listing(here).keys() == {"in.pth", "out.pth"}


def test_a_file_system_that_cannot_flush_folders_will_do(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", Fault("fsync", 2, errno.EINVAL))
    assert run("convert", "in.pth", "out.pth").code == 0
    assert listing(here).keys() == {"in.pth", "out.pth"}


def test_what_does_not_read_back_is_not_published(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A write that goes wrong without an error is found by the strict reader."""
    real = os.pwrite

    def wrong(fd: int, data: Any, position: int) -> int:
        return real(fd, b"\0" * len(data) if position == 0 else data, position)

    before = listing(here)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", wrong)
        done = run("convert", "in.pth", "out.safetensors")
    assert done.code != 0
    assert listing(here) == before


def test_headers_that_are_written_with_tensors_between_them_are_read_back(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tensors were read back when they were copied, and are written once more."""
    assert run("convert", "in.pth", "good.pth").code == 0
    with zipfile.ZipFile("good.pth") as archive:
        record = archive.getinfo("archive/data/1")
    place, real, flipped = record.header_offset - 1, os.pwrite, list[int]()
    assert record.file_size < 4096

    def wrong(fd: int, data: Any, position: int) -> int:
        written = bytearray(data)
        if b"PK\3\4" in written and 0 <= (at := place - position) < len(written):
            written[at] ^= 1
            flipped.append(at)
        return real(fd, written, position)

    before = listing(here)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", wrong)
        done = run("convert", "in.pth", "out.pth")
    assert (len(flipped), done.code, "reads back differently" in done.err) == (1, 5, True)
    assert listing(here) == before


HELD = """
import gc
from ckptool import containers
from ckptool.cli.main import main
from ckptool.tensors.tensor import Storage
real = containers.read
def read(path, **more):
    held = [each for each in gc.get_objects() if type(each) is Storage]
    print(sum(each.path.endswith("in.pth") for each in held))
    return real(path, **more)
containers.read = read
main(["convert", "-q", "in.pth", "out.pth"])
"""


def test_the_input_is_let_go_before_the_output_is_read_back(here: Path) -> None:
    """Both at once are what a file of many tensors would take most memory for."""
    done = subprocess.run(
        [sys.executable, "-c", HELD], cwd=here, capture_output=True, text=True, check=False,
        env=environment(),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["0", "0"], done.stdout + done.stderr


# Full disks.


def test_a_file_size_limit_is_no_space(here: Path) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1024, 1024))

    before = listing(here)
    done = subprocess.run(
        [sys.executable, "-m", "ckptool", "convert", "in.pth", "out.pth"],
        capture_output=True, text=True, timeout=60, env=environment(), preexec_fn=limited,
    )  # fmt: skip
    assert_refused(Outcome(done.returncode, done.stdout, done.stderr), errno.EFBIG)
    assert listing(here) == before


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB, where that is allowed."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def test_too_little_space_is_refused_before_writing(
    run: Run,
    small_disk: Path,
    tmp_path: Path,
    make_safetensors: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_safetensors(tmp_path / "in.safetensors", {"module.a": [100_000]})
    monkeypatch.setattr(publish, "publish", None)  # a call would be a defect, exit 70
    done = run("strip-prefix", source, small_disk / "out.safetensors")
    assert done.code == 5
    assert done.err.startswith("error[no-space]: ")
    assert "free" in done.err
    assert listing(small_disk) == {}


def test_a_disk_that_fills_up_leaves_nothing(
    run: Run,
    small_disk: Path,
    tmp_path: Path,
    make_safetensors: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = make_safetensors(tmp_path / "in.safetensors", {"module.a": [100_000]}, b"data")
    monkeypatch.setattr(publish, "free_space", lambda target: None)
    (small_disk / "out.safetensors").write_bytes(b"old")
    done = run("strip-prefix", "--force", source, small_disk / "out.safetensors")
    assert_refused(done, errno.ENOSPC)
    assert listing(small_disk) == {"out.safetensors": b"old"}


def test_a_read_only_file_system_is_refused(run: Run, here: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    done = run("convert", "in.pth", small_disk / "out.pth")
    assert (done.code, done.out) == (5, "")
    assert "cannot be written" in done.err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(run: Run, here: Path) -> None:
    (here / "locked").mkdir(mode=0o555)
    done = run("convert", "in.pth", "locked/out.pth")
    assert (done.code, done.out) == (5, "")
    assert "cannot be written" in done.err


# Others at work.


def test_a_target_that_appears_meanwhile_is_left_alone(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def late(source: str, target: str) -> None:
        Path(target).write_bytes(b"theirs")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", late)
        done = run("convert", "in.pth", "out.pth")
    assert (done.code, done.out) == (5, "")
    assert done.err.startswith("error[output-exists]: ")
    assert listing(here).keys() == {"in.pth", "out.pth"}
    assert (here / "out.pth").read_bytes() == b"theirs"


def test_a_target_that_appears_meanwhile_without_hard_links(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(source: str, target: str) -> None:
        Path(target).write_bytes(b"theirs")
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", late)
        done = run("convert", "in.pth", "out.pth")
    assert done.err.startswith("error[output-exists]: ")
    assert (here / "out.pth").read_bytes() == b"theirs"


def slowly(*arguments: str, cwd: Path) -> subprocess.Popen[bytes]:
    """Start a run whose every read takes its time."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments],
        cwd=cwd, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["new", "forced"])
def test_two_writers_at_once(
    run: Run, here: Path, make_safetensors: Callable[..., Path], force: list[str]
) -> None:
    """Without --force one of them wins and the other says so; the file is whole in any case."""
    make_safetensors(here / "in.safetensors", {"module.a": [1 << 20]}, b"some data")
    assert run("strip-prefix", "in.safetensors", "expected.safetensors").code == 0
    arguments = ("strip-prefix", *force, "in.safetensors", "out.safetensors")
    started = [slowly(*arguments, cwd=here) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in started]
    codes = sorted(process.returncode for process in started)
    assert codes == ([0, 0] if force else [0, 5])
    assert sum(text.startswith(b"error[output-exists]: ") for text in said) == (not force)
    files = listing(here)
    assert files.keys() == {"in.pth", "in.safetensors", "expected.safetensors", "out.safetensors"}
    assert files["out.safetensors"] == files["expected.safetensors"]


def test_a_killed_run_leaves_the_target_and_the_next_one_works(
    run: Run, here: Path, make_safetensors: Callable[..., Path]
) -> None:
    make_safetensors(here / "in.safetensors", {"module.a": [8 << 20]})
    (here / "out.safetensors").write_bytes(b"old")
    count = len(os.listdir(here))
    process = slowly("strip-prefix", "--force", "in.safetensors", "out.safetensors", cwd=here)
    while len(os.listdir(here)) == count and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert (here / "out.safetensors").read_bytes() == b"old"
    assert run("strip-prefix", "--force", "in.safetensors", "out.safetensors").code == 0
    assert run("keys", "--names", "out.safetensors").out == "a\n"


# The input changes while it is read.


def changed(path: Path, how: str) -> None:
    if how == "longer":
        with path.open("ab") as file:
            file.write(b"more")
    elif how == "shorter":
        os.truncate(path, path.stat().st_size - 100)
    elif how == "rewritten":
        path.write_bytes(path.read_bytes())
        os.utime(path, ns=(1, 1))
    else:
        other = path.with_name("other")
        other.write_bytes(b"\0" * path.stat().st_size)
        os.replace(other, path)


@pytest.mark.parametrize("how", ["longer", "shorter", "rewritten"])
def test_an_input_that_changes_while_it_is_copied(
    run: Run,
    here: Path,
    make_safetensors: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    source = make_safetensors(here / "in.safetensors", {"module.a": [3 << 20]})
    real, turns = os.preadv, iter(range(1000))

    def late(fd: int, views: Any, start: int) -> int:
        copies = len(views[0]) > 1 << 17  # the end of a file is looked at before
        if start > 1 << 20 and copies and next(turns) == 0:
            changed(source, how)
        return real(fd, views, start)

    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", late)
        done = run("strip-prefix", source, "out.safetensors")
    assert next(turns) > 1
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error[malformed]: ")
    assert "while it was read" in done.err
    assert listing(here).keys() == {"in.pth", "in.safetensors"}


@pytest.mark.parametrize("how", ["longer", "shorter", "rewritten"])
def test_an_input_that_changes_before_it_is_copied(
    run: Run,
    here: Path,
    make_safetensors: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """Between the header and the data: another training run saves, say."""
    source = make_safetensors(here / "in.safetensors", {"module.a": [100]}, b"data")
    real = publish.publish

    def late(*arguments: Any, **named: Any) -> Any:
        changed(source, how)
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(publish, "publish", late)
        done = run("strip-prefix", source, "out.safetensors")
    assert (done.code, done.out) == (3, "")
    assert "while it was read" in done.err or "too early" in done.err
    assert listing(here).keys() == {"in.pth", "in.safetensors"}


# Memory.

LIMITS = range(
    20, 84, 2
)  # MiB of address space: from where Python does not start to where all is well


def limited(mib: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    size = mib << 20
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False,
        env=environment(), preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (size, size)),
    )  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
@pytest.mark.parametrize("mib", sampled(LIMITS, 4))
def test_a_run_without_memory_says_so(here: Path, mib: int) -> None:
    if limited(mib, "-c", "import ckptool.cli.main").returncode:
        pytest.skip("Python alone takes more")
    done = limited(mib, "-m", "ckptool", "strip-prefix", "in.pth", "out.pth")
    assert done.returncode in (0, 7), done.stderr
    assert ("error[out-of-memory]" in done.stderr) is (done.returncode == 7)
    assert Path("out.pth").exists() is (done.returncode == 0)
    assert not list(here.glob(".*"))


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of the address space")
@pytest.mark.parametrize("mib", sampled(range(70, 270, 10), 4))
def test_a_run_without_memory_for_numpy_leaves_nothing(here: Path, good: Path, mib: int) -> None:
    """OpenBLAS ends the process where it finds too little."""
    done = limited(mib, "-m", "ckptool", "convert", str(good / "strided.pth"), "out.safetensors")
    assert done.returncode in (0, 7), done.stderr
    assert Path("out.safetensors").exists() is (done.returncode == 0)
    assert not list(here.glob(".*"))


# What is read back is what was moved.


@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
@pytest.mark.parametrize("target", ["out.pth", "out.safetensors"])
def test_what_no_job_has_moved_is_not_published(
    run: Run, here: Path, make_safetensors: Callable[..., Path], monkeypatch: pytest.MonkeyPatch,
    name: str, target: str,
) -> None:  # fmt: skip
    make_safetensors(here / "in.safetensors", {"module.a": [100]}, b"data")
    real = publish.write_file

    def miscounted(*arguments: Any, **named: Any) -> list[Done]:
        return [Done(each.crc32, each.nbytes - 1) for each in real(*arguments, **named)]

    monkeypatch.setattr(publish, "write_file", miscounted)
    done = run("strip-prefix", name, target)
    assert (done.code, done.out) == (70, "")
    assert "does not read back" in done.err
    assert listing(here).keys() == {"in.pth", "in.safetensors"}


# Modes, links, names.


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077, 0o002])
def test_the_mode_follows_the_umask(run: Run, here: Path, umask: int, target: str) -> None:
    before = os.umask(umask)
    try:
        assert run("convert", "in.pth", target).code == 0
    finally:
        os.umask(before)
    assert mode(here / target) == 0o666 & ~umask


@pytest.mark.parametrize("bits", [0o600, 0o644, 0o664, 0o604])
def test_a_replaced_file_keeps_its_mode(run: Run, here: Path, bits: int) -> None:
    (here / "out.pth").write_bytes(b"old")
    (here / "out.pth").chmod(bits)
    (here / "in.pth").chmod(0o640)
    assert run("convert", "--force", "in.pth", "out.pth").code == 0
    assert mode(here / "out.pth") == bits
    assert run("strip-prefix", "--in-place", "in.pth").code == 0
    assert mode(here / "in.pth") == 0o640


def test_a_symbolic_link_is_written_through(
    run: Run, here: Path, expected: dict[str, bytes]
) -> None:
    (here / "real").mkdir()
    (here / "real/file.pth").write_bytes(b"old")
    (here / "out.pth").symlink_to("real/file.pth")
    assert run("convert", "in.pth", "out.pth").code == 5
    assert (here / "real/file.pth").read_bytes() == b"old"
    assert run("convert", "--force", "in.pth", "out.pth").code == 0
    assert (here / "out.pth").readlink() == Path("real/file.pth")
    assert (here / "real/file.pth").read_bytes() == expected["out.pth"]
    assert listing(here / "real").keys() == {"file.pth"}


def test_a_dangling_link_is_written_through(
    run: Run, here: Path, expected: dict[str, bytes]
) -> None:
    (here / "real").mkdir()
    (here / "out.pth").symlink_to("real/new.pth")
    assert run("convert", "in.pth", "out.pth").code == 0
    assert (here / "out.pth").is_symlink()
    assert (here / "real/new.pth").read_bytes() == expected["out.pth"]
    (here / "lost.pth").symlink_to("nowhere/new.pth")
    assert run("convert", "in.pth", "lost.pth").code == 5


def test_a_linked_input_is_edited_in_place_through_the_link(run: Run, here: Path) -> None:
    (here / "link.pth").symlink_to("in.pth")
    assert run("strip-prefix", "--in-place", "link.pth").code == 0
    assert (here / "link.pth").is_symlink()
    assert "module." not in run("keys", "--names", "in.pth").out


def test_a_hard_link_to_a_replaced_file_keeps_the_old_one(run: Run, here: Path) -> None:
    (here / "out.pth").write_bytes(b"old")
    os.link("out.pth", "kept.pth")
    assert run("convert", "--force", "in.pth", "out.pth").code == 0
    assert (here / "kept.pth").read_bytes() == b"old"


@pytest.mark.parametrize(
    "name",
    [
        "a" * 251 + ".pth",
        "\u5c42" * 83 + ".pth",
        "\U0001f600" * 62 + ".pth",
        "new\nline.pth",
        "-n.pth",
        "--force",
        " .pth",
        "'\"$(x)`.pth",
        ".pth",
    ],
    ids=ascii,
)
def test_odd_names_work(run: Run, here: Path, expected: dict[str, bytes], name: str) -> None:
    assert len(os.fsencode(name)) <= 255
    done = run("convert", "--", "in.pth", name)
    assert done.code == 0, done.err
    assert listing(here).keys() == {"in.pth", name}
    assert (here / name).read_bytes() == expected["out.pth"]


def test_a_name_too_long_is_refused(run: Run, here: Path) -> None:
    done = run("convert", "in.pth", "a" * 256)
    assert done.code == 5
    assert "file name too long" in done.err
    assert listing(here).keys() == {"in.pth"}


@pytest.mark.parametrize("target", ["/dev/null", "pipe"])
def test_only_regular_files_are_outputs(run: Run, here: Path, target: str) -> None:
    os.mkfifo("pipe")
    for force in ([], ["--force"]):
        done = run("convert", *force, "in.pth", target)
        assert done.code == 5
        assert "not a regular file" in done.err
    assert stat.S_ISFIFO(os.stat("pipe").st_mode)


# Systems that do less.


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["in.pth", "strided.pth", "rezipped.pth", "plain_legacy.pth"])
def test_short_reads_and_writes_are_gone_on_with(
    run: Run, good: Path, here: Path, monkeypatch: pytest.MonkeyPatch, source: str, target: str
) -> None:
    if source != "in.pth":
        shutil.copy(good / source, source)
    assert run("convert", source, f"whole.{target}").code == 0
    preadv, pwrite = os.preadv, os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", lambda fd, views, start: preadv(fd, [views[0][:7]], start))
        patch.setattr(os, "pwrite", lambda fd, data, start: pwrite(fd, data[:7], start))
        assert run("convert", source, target).code == 0
    assert (here / target).read_bytes() == (here / f"whole.{target}").read_bytes()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "lacking",
    [
        ["preadv", "pwrite"],
        ["fchmod"],
        ["O_DIRECTORY"],
        ["statvfs"],
        ["posix_fadvise"],
        ["preadv", "pwrite", "fchmod", "O_DIRECTORY", "statvfs", "posix_fadvise", "O_CLOEXEC"],
    ],
    ids=str,
)
def test_systems_that_lack_calls_write_the_same(
    run: Run,
    here: Path,
    expected: dict[str, bytes],
    monkeypatch: pytest.MonkeyPatch,
    lacking: list[str],
    target: str,
) -> None:
    with monkeypatch.context() as patch:
        for name in lacking:
            patch.delattr(os, name)
        assert run("convert", "in.pth", target).code == 0
        plan = run("convert", "-n", "--force", "in.pth", target).out
    assert (here / target).read_bytes() == expected[target]
    assert ("unknown free" in plan) is ("statvfs" in lacking)


@pytest.mark.parametrize("command", ["strip-prefix", "unwrap", "convert", "transfer"])
def test_the_input_is_never_touched(run: Run, here: Path, command: str) -> None:
    source = here / "in.pth"
    before = (source.read_bytes(), source.stat().st_mtime_ns, source.stat().st_ino)
    assert run(command, "in.pth", "out.pth").code == 0
    assert (source.read_bytes(), source.stat().st_mtime_ns, source.stat().st_ino) == before
