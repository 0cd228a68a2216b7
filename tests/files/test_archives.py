"""Archives around a checkpoint: what is inside is told, and a member is read by its name."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome, environment, listing

from ckptool import containers
from ckptool.errors import CkptoolError, FormatError, LimitExceeded
from ckptool.files import spool
from ckptool.files.fileio import Reader
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good"
PLAIN = (GOOD / "plain.pth").read_bytes()
OTHERS = {"config.json": b'{"a": 1}', "vocabulary/tokens.txt": b"the\n" * 50}
CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")


@pytest.fixture(autouse=True)
def spools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Temporary files go to a folder of the test, which is empty again at its end."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert list(folder.iterdir()) == []


def zipped(content: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(content: dict[str, bytes], *more: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in content.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
        for header in more:
            archive.addfile(header)
    return buffer.getvalue()


def packed(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


WEIGHTS = {**OTHERS, "weights.th": PLAIN}
# name of the archive, its bytes, the member
SHAPES: dict[str, tuple[bytes, str]] = {
    "model.tar.gz": (packed(tarred(WEIGHTS)), "weights.th"),
    "agent.zip": (
        zipped({"data": b"{}", "policy.pth": PLAIN, "policy.optimizer.pth": PLAIN[:0]}),
        "policy.pth",
    ),
    "packed.zip": (zipped({"a/policy.pth": PLAIN, **OTHERS}, zipfile.ZIP_DEFLATED), "a/policy.pth"),
    "speech.nemo": (tarred({f"./{key}": data for key, data in WEIGHTS.items()}), "weights.th"),
    "weights.pth.gz": (packed(PLAIN), "weights.pth"),
    "renamed.pth": (packed(PLAIN), "renamed.pth"),
    "two.pth.gz": (packed(PLAIN[:100]) + packed(PLAIN[100:]), "two.pth"),
    "padded.pth.gz": (packed(PLAIN) + bytes(1000), "padded.pth"),
    "nested.zip": (zipped({"in.tar.gz": packed(tarred(WEIGHTS))}), "in.tar.gz::weights.th"),
    "legacy.tar": (tarred({"w.pth": (GOOD / "plain_legacy.pth").read_bytes()}), "w.pth"),
    "safe.zip": (
        zipped({"w.safetensors": (GOOD / "plain.safetensors").read_bytes()}, zipfile.ZIP_DEFLATED),
        "w.safetensors",
    ),
}


@pytest.fixture
def archives(tmp_path: Path) -> Path:
    for name, (content, _) in SHAPES.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


@pytest.mark.parametrize("name", SHAPES)
def test_a_member_is_read_as_the_file_itself(name: str, archives: Path) -> None:
    out = archives / "out.pth"
    source = f"{archives / name}::{SHAPES[name][1]}"
    result = surgery.rewrite(source, out, options=Options(sync=False))
    assert result.source == source
    loosely = {"containers": False, "metadata": False, "order": False, "storage": False}
    assert judge.same(judge.load(GOOD / "plain.pth"), judge.load(out), **loosely) == []


@pytest.mark.parametrize("name", SHAPES)
def test_the_archive_itself_is_refused_and_shown(name: str, archives: Path, run: Run) -> None:
    """The hint, pasted, lists the tensors; for archives in archives, after as many steps."""
    command = ["keys", str(archives / name)]
    for step in SHAPES[name][1].split("::"):
        done = run(*command)
        assert (done.code, done.out) == (3, "")
        assert done.err.startswith("error[not-a-checkpoint]: ")
        assert f"    {step}" in done.err
        hint = done.err.splitlines()[-1]
        assert hint.startswith("hint: ckptool info ")
        command = ["keys", *hint.removeprefix("hint: ckptool info ").split()]
    assert command[-1].endswith(SHAPES[name][1])
    assert len(run(*command).out.splitlines()) == 8


def test_every_command_takes_a_member(archives: Path, run: Run) -> None:
    member = f"{archives / 'packed.zip'}::a/policy.pth"
    out = archives / "out.pth"
    for command in (
        ["keys", "--json", member],
        ["info", member],
        ["check", member],
        ["diff", member, GOOD / "plain.pth"],
        ["strip-prefix", "--prefix", "features", member, out],
        ["transfer", GOOD / "plain.pth", "--force", out, "--like", member],
        ["convert", "--force", member, archives / "out.safetensors"],
    ):
        done = run(*command)
        assert done.code == 0, (command, done.err)
    document = run("keys", "--json", member).document
    assert (document["file"], document["container"], document["count"]) == (member, "torch-zip", 8)


def test_a_real_file_of_that_name_wins(archives: Path, run: Run) -> None:
    shutil.copy(GOOD / "tied.pth", archives / "agent.zip::policy.pth")
    assert "lm_head.weight" in run("keys", "--names", archives / "agent.zip::policy.pth").out


def test_members_are_listed_for_programs(archives: Path) -> None:
    found = containers.members(str(archives / "model.tar.gz"))
    assert [(each.name, each.nbytes, each.likely) for each in found] == [
        ("weights.th", len(PLAIN), True),
        ("vocabulary/tokens.txt", 200, False),
        ("config.json", 8, False),
    ]
    assert containers.members(str(GOOD / "plain_legacy.pth")) == []


def test_output_onto_the_archive_or_a_member_is_refused(archives: Path, run: Run) -> None:
    agent = archives / "agent.zip"
    before = listing(archives)
    member = f"{agent}::policy.pth"
    for command, slug in (
        (["convert", "--force", member, agent], "same-file"),
        (["convert", GOOD / "plain.pth", f"{agent}::new.pth"], "write-error"),
        (["strip-prefix", "--prefix", "features", "--in-place", member], "write-error"),
    ):
        done = run(*command)
        assert (done.code, done.out) == (5, ""), done.err
        assert f"error[{slug}]: " in done.err
    assert listing(archives) == before


MISSING = {
    "agent.zip::polcy.pth": ("there is no polcy.pth in", "did you mean", "policy.pth"),
    "agent.zip::../policy.pth": ("there is no ../policy.pth in", "policy.pth", ""),
    "absent.zip::policy.pth": ("absent.zip does not exist", "", ""),
    "model.tar.gz::config.json": ("is a JSON text", "", ""),
    "agent.zip::policy.pth::x": ("there is no x in", "", ""),
    "model.tar.gz::config.json::x": ("config.json is not an archive that ckptool reads", "", ""),
}


@pytest.mark.parametrize("name", MISSING)
def test_what_is_not_there_is_said(name: str, archives: Path, run: Run) -> None:
    done = run("keys", archives / name)
    assert (done.code, done.out) == (3, "")
    assert all(words in done.err for words in MISSING[name])


def test_what_is_not_looked_into_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "x.tar.bz2").write_bytes(bz2.compress(tarred(WEIGHTS)))
    done = run("keys", tmp_path / "x.tar.bz2")
    assert done.code == 3
    assert "is a bzip2 archive" in done.err
    assert "unpack it, then look inside" in done.err


def test_an_archive_that_changes_is_noticed(archives: Path) -> None:
    source = f"{archives / 'agent.zip'}::policy.pth"
    checkpoint = containers.read(source)
    time.sleep(0.01)
    with open(archives / "agent.zip", "ab") as file:
        file.write(b"\0")
    with pytest.raises(FormatError, match="changed while it was read"):
        surgery.rewrite(
            source, archives / "out.pth", opened=checkpoint, options=Options(sync=False)
        )


def test_a_spool_lives_as_long_as_what_reads_it(archives: Path, spools: Path) -> None:
    checkpoint = containers.read(f"{archives / 'packed.zip'}::a/policy.pth")
    assert len(list(spools.iterdir())) == 1
    surgery.rewrite("again", archives / "out.pth", opened=checkpoint, options=Options(sync=False))
    assert len(list(spools.iterdir())) == 1
    del checkpoint
    assert list(spools.iterdir()) == []


def test_stored_members_are_read_in_place(archives: Path, spools: Path) -> None:
    for name in ("agent.zip", "speech.nemo", "legacy.tar"):
        checkpoint = containers.read(f"{archives / name}::{SHAPES[name][1]}")
        assert list(spools.iterdir()) == []
        assert checkpoint.held == ()


# Hostile.

SYMLINK = tarfile.TarInfo("weights.th")
SYMLINK.type, SYMLINK.linkname = tarfile.SYMTYPE, "/etc/passwd"
HARDLINK = tarfile.TarInfo("weights.th")
HARDLINK.type, HARDLINK.linkname = tarfile.LNKTYPE, "config.json"
DEVICE = tarfile.TarInfo("weights.th")
DEVICE.type = tarfile.CHRTYPE


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def torn(name: str) -> bytes:
    """State another checksum for a member which has none of its own inside."""
    data = (GOOD / "plain_legacy.pth").read_bytes()
    content = zipped({"weights.th": data}, getattr(zipfile, name))
    told, other = (struct.pack("<L", zlib.crc32(data) ^ change) for change in (0, 1))
    assert content.count(told) == 2
    return content.replace(told, other)


HOSTILE: dict[str, tuple[bytes, str]] = {
    "slip.tar": (tarred({"../weights.th": PLAIN}), "malformed"),
    "absolute.tar": (tarred({"/tmp/weights.th": PLAIN}), "malformed"),
    "twice.tar": (tarred({"weights.th": PLAIN, "./weights.th": PLAIN}), "malformed"),
    "symlink.tar": (tarred({}, SYMLINK), "unsupported"),
    "hardlink.tar": (tarred(OTHERS, HARDLINK), "unsupported"),
    "device.tar": (tarred({}, DEVICE), "unsupported"),
    "slip.zip": (zipped({"../weights.th": PLAIN}), "malformed"),
    "torn.tar": (tarred(WEIGHTS)[:3000], "malformed"),
    "cut.tar.gz": (packed(tarred(WEIGHTS))[:-9], "malformed"),
    "cut_early.tar.gz": (packed(tarred(WEIGHTS))[:40], "malformed"),
    "head.tar.gz": (packed(b"")[:9], "malformed"),
    "wrong_sum.tar.gz": (flipped(packed(tarred(WEIGHTS)), -7), "malformed"),
    "trailing.tar.gz": (packed(tarred(WEIGHTS)) + b"trailing", "malformed"),
    "second_cut.tar.gz": (packed(tarred(WEIGHTS)) + packed(b"x")[:12], "malformed"),
    "bomb.gz": (packed(bytes(80 << 20)), "limit-exceeded"),
    "wrong_sum_stored.zip": (torn("ZIP_STORED"), "malformed"),
    "wrong_sum_deflated.zip": (torn("ZIP_DEFLATED"), "malformed"),
    "bomb.zip": (zipped({"weights.th": bytes(80 << 20)}, zipfile.ZIP_DEFLATED), "limit-exceeded"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(name: str, tmp_path: Path, spools: Path, run: Run) -> None:
    content, slug = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    before = listing(tmp_path)
    for command in (
        ["keys", f"{tmp_path / name}::weights.th"],
        ["convert", f"{tmp_path / name}::weights.th", tmp_path / "out.pth"],
    ):
        done = run(*command)
        assert (done.code, done.out) == (3, ""), done.err
        assert f"error[{slug}]: " in done.err
        assert name in done.err
    done = run("keys", tmp_path / name)
    assert (done.code, done.out) == (3, "")
    assert listing(tmp_path) == before


def test_truncation_at_every_byte_of_a_gzip(tmp_path: Path) -> None:
    content = packed(tarred({"w.th": b"no checkpoint" * 20}))
    path = tmp_path / "cut.tar.gz"
    for end in range(len(content)):
        path.write_bytes(content[:end])
        with pytest.raises(FormatError):
            containers.read(f"{path}::w.th")


def test_gunzip_gives_what_gzip_gives(tmp_path: Path) -> None:
    data = os.urandom(300_000) + bytes(3 << 20) + os.urandom(700_000)
    path = tmp_path / "x.gz"
    for content in (
        packed(data),
        packed(data[:5]) + packed(data[5:]) + bytes(600_000),
        packed(b""),
    ):
        path.write_bytes(content)
        with Reader(path) as reader:
            assert b"".join(spool.gunzipped(reader)) == gzip.decompress(content)


def test_a_spool_goes_when_unpacking_fails(spools: Path) -> None:
    def blocks() -> Iterator[bytes]:
        yield b"some"
        raise LimitExceeded("enough")

    with pytest.raises(CkptoolError):
        spool.Spool(blocks())
    assert list(spools.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_no_spool_stays_behind_a_signal(number: int, tmp_path: Path, spools: Path) -> None:
    """The job waits for a pipe nobody reads, its spool open; then the signal comes."""
    keys = {f"a.long.name.of.a.layer.number.{n}.weight": torch.zeros(1) for n in range(4000)}
    buffer = io.BytesIO()
    torch.save(keys, buffer)
    (tmp_path / "many.pth.gz").write_bytes(packed(buffer.getvalue()))
    job = subprocess.Popen(
        [sys.executable, "-m", "ckptool", "keys", str(tmp_path / "many.pth.gz::many.pth")],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment({"TMPDIR": str(spools)}),
    )  # fmt: skip
    until = time.monotonic() + 30
    while not list(spools.iterdir()) and time.monotonic() < until:
        time.sleep(0.01)
    time.sleep(0.5)
    assert len(list(spools.iterdir())) == 1
    job.send_signal(number)
    job.communicate(timeout=30)
    assert job.returncode != 0
    assert list(spools.iterdir()) == []


@pytest.mark.skipif(not CORPUS.exists(), reason="CKPTOOL_CORPUS names no folder")
def test_real_archives(tmp_path: Path, run: Run) -> None:
    """The archives of AllenNLP: tarfile finds the weights, torch loads them."""
    rows = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))
    paths = [CORPUS / row["path"] for row in rows if row["format"].startswith("tar.gz")]
    assert paths
    for path in paths:
        with tarfile.open(path) as archive:
            member = next(name for name in archive.getnames() if name.endswith("weights.th"))
            weights = archive.extractfile(member)
            assert weights
            (tmp_path / "weights.th").write_bytes(weights.read())
        assert run("convert", "--force", f"{path}::{member}", tmp_path / "out.pth").code == 0
        wanted = judge.load(tmp_path / "weights.th")
        assert judge.same(wanted, judge.load(tmp_path / "out.pth")) == []


def test_an_empty_member_is_told(run: Run, good: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ppo.zip", "w") as archive:
        archive.write(good / "plain.pth", "policy.pth")
    done = run("info", f"{tmp_path / 'ppo.zip'}::")
    assert done.code == 3
    assert "::::" not in done.err
    assert "policy.pth" in done.err


@pytest.mark.parametrize("name", ["model_best.pth.tar", "model_best_legacy.pth.tar"])
def test_a_place_is_no_member(run: Run, good: Path, name: str) -> None:
    done = run("keys", f"{good / name}::state_dict")
    assert done.code == 3
    assert "--at chooses a place in a checkpoint" in done.err
