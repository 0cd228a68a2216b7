"""`check`: is it whole, would it run code; judged by zipfile, hashlib and torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, environment, write_anew

import ckptool
from ckptool import containers
from ckptool.errors import CkptoolError
from ckptool.tensors.counts import Tally
from ckptool.tensors.dtype import DType
from ckptool.tensors.numbers import FLOATS, swap, tally
from ckptool.verbs import checking
from ckptool.verbs.checked import Checked, Status

Run = Callable[..., Outcome]

# Folders that are no set give a line for each file in them.
SEVERAL = ("transformers", "sharded_missing_index", "dcp_megatron")
GOOD, HOSTILE = (
    sorted(path for path in (FIXTURES / kind).iterdir() if path.name not in SEVERAL)
    for kind in ("good", "hostile")
)
ZIPS = [path for path in GOOD if path.is_file() and path.read_bytes()[:4] == b"PK\3\4"]
named = pytest.mark.parametrize("path", GOOD, ids=lambda path: path.name)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows(done: Outcome) -> list[list[str]]:
    return [line.split("\t") for line in done.out.splitlines()]


def status(path: object, **how: bool) -> str:
    return checking.check(str(path), **how).status.value


# What reads is whole, and says what was compared.


@named
def test_good_files_are_ok(run: Run, path: Path) -> None:
    try:
        containers.read(path)
        expected, code = "ok", 0
    except CkptoolError as error:
        expected, code = error.slug, 3
    done = run("check", path)
    ((name, found, detail),) = rows(done)
    assert (found, done.code) == (expected, code), detail
    ranks = containers.sets_of_ranks(str(path)) if path.is_dir() else []
    firsts = [files[0] for files in ranks]  # a set is named by the first of its files
    assert name in map(str, [path, path / ".metadata", *path.glob("*.index*.json"), *firsts])
    said = "".join(done.err.splitlines()[-1:]).startswith("not checked: ")
    assert said == (found != "not-a-checkpoint")


@pytest.mark.parametrize("path", ZIPS, ids=lambda path: path.name)
def test_every_record_is_compared(path: Path) -> None:
    """As many as zipfile finds; where all are zero, none were recorded."""
    with zipfile.ZipFile(path) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
    detail = checking.check(path).detail
    if any(info.CRC for info in infos):
        assert f"; {len(infos)} checksums match" in detail
    else:
        assert "; no checksums recorded" in detail


@pytest.mark.parametrize("name", ["plain.pth", "rezipped.pth", "model_best.pth.tar"])
def test_a_flipped_byte_in_any_record_is_found(here: Path, good: Path, name: str) -> None:
    """Every record of a zip, stored and deflated; `zipfile` finds each as well."""
    content = (good / name).read_bytes()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = [info for info in archive.infolist() if info.compress_size]
    for info in infos:
        fields = struct.unpack_from("<2H", content, info.header_offset + 26)
        start = info.header_offset + 30 + sum(fields)
        damaged = bytearray(content)
        damaged[start + info.compress_size // 2] ^= 1
        (here / "in.pth").write_bytes(damaged)
        assert first_bad(damaged) == info.filename
        found = checking.check("in.pth")
        assert found.status is Status.DAMAGED, info.filename
        record = info.filename.partition("/")[2]
        named = any(f"{what} " in found.detail for what in (record, info.filename))
        assert named, found.detail


def first_bad(content: bytes | bytearray) -> str | None:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for info in archive.infolist():
            try:
                archive.read(info)
            except (zipfile.BadZipFile, zlib.error):
                return info.filename
    return None


def test_all_damaged_records_are_named(here: Path, good: Path) -> None:
    content = bytearray((good / "plain.pth").read_bytes())
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename][:2]
    for info in infos:
        fields = struct.unpack_from("<2H", content, info.header_offset + 26)
        content[info.header_offset + 30 + sum(fields)] ^= 1
    (here / "in.pth").write_bytes(content)
    detail = checking.check("in.pth").detail
    assert "record data/0 does not match" in detail
    assert "record data/1 does not match" in detail


def test_what_is_odd_is_a_note(here: Path, good: Path, hostile: Path) -> None:
    with zipfile.ZipFile(here / "more.pth", "w") as made:
        with zipfile.ZipFile(good / "plain.pth") as archive:
            for info in archive.infolist():
                made.writestr(info.filename, archive.read(info))
        made.writestr("plain/extra.txt", "hello")
    assert checking.check("more.pth").notes == ("nothing in it refers to extra.txt (5 B)",)
    (note,) = checking.check(hostile / "legacy_sixth_pickle.pth").notes
    assert note == "nothing in it refers to what follows the storages (52 B)"
    (note,) = checking.check(good / "duplicate_keys.pth").notes
    assert "appears twice; the last one counts" in note


def test_bytes_between_records_are_noted(here: Path, good: Path) -> None:
    """A record that the directory no longer lists: zipfile does not see it either."""
    content = bytearray((good / "no_byteorder.pth").read_bytes())
    with zipfile.ZipFile(here / "in.pth", "w") as made, zipfile.ZipFile(io.BytesIO(content)) as old:
        for info in old.infolist():
            made.writestr(info.filename, old.read(info))
            if info.filename.endswith("data.pkl"):
                made.fp.write(b"hidden" * 10)  # type: ignore[union-attr]
                made.start_dir = made.fp.tell()  # type: ignore[union-attr, attr-defined]
    with zipfile.ZipFile("in.pth") as archive:
        assert archive.testzip() is None
    found = checking.check("in.pth")
    assert found.status is Status.OK
    assert found.notes == ("60 B of the file are outside of all its records",)


# What is refused, and what would run code.


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_hostile_files_have_a_status(run: Run, path: Path) -> None:
    """By the tables of bad input: what is dangerous is unsafe, however broken it is."""
    from test_bad_input import DANGEROUS, HARMLESS, REFUSED

    done = run("check", path)
    (_, found, detail), *others = rows(done)  # of a set: what its index stands for, then shards
    assert not others or path.is_dir()
    assert done.code == Status(found).exit_code
    if path.name in DANGEROUS or path.name in BROKEN_AND_DANGEROUS:
        assert found == "unsafe"
        assert done.err.startswith("warning: ")
    elif path.name in HARMLESS:
        # Modules in a ring are whole; it is their state_dict that there cannot be.
        worse = "malformed" in HARMLESS[path.name] and not path.name.startswith("module_")
        worse = worse or path.name == "missing_version.pth"
        assert found == ("damaged" if worse else "ok"), detail
    else:
        (slug,) = (slug for slug, names in REFUSED.items() if path.name in names.split())
        damaged = ("malformed", "limit-exceeded", "partial-checkpoint")
        expected = "damaged" if slug in damaged else slug
        assert found == expected, detail


# Refused by the reader, and run by whoever loads them before they find the fault.
BROKEN_AND_DANGEROUS = (
    "bare_pickle.pkl", "in_persistent_id.pth", "legacy_magic_call.pth", "legacy_module_call.pth",
    "legacy_popped_magic.pth", "unknown_storage_class.pth",
)  # fmt: skip


def test_a_broken_pickle_is_judged_as_far_as_it_runs(here: Path, hostile: Path) -> None:
    """Cut behind the call, where a loader has run it already."""
    whole = (hostile / "legacy_os_system.pth").read_bytes()
    assert status(hostile / "legacy_os_system.pth") == "unsafe"
    (here / "cut.pth").write_bytes(whole[:-3])
    found = checking.check("cut.pth")
    assert found.status is Status.UNSAFE
    assert "; damaged: " in found.detail
    (here / "text.pth").write_text("cos\nsystem\n(S'echo'\ntR and no more", encoding="ascii")
    assert status("text.pth") == "unsafe"
    (here / "code.pth").write_text("class Net:\n    pass\n", encoding="ascii")
    assert status("code.pth", strict=True) == "not-a-checkpoint"


def test_calls_are_listed_with_place_and_arguments(run: Run, hostile: Path) -> None:
    done = run("check", "--json", hostile / "os_system.pth")
    document = done.document
    assert document["schema"] == "check/1"
    (found,) = document["files"]
    assert (found["status"], found["safety"]) == ("unsafe", "dangerous")
    (call,) = found["calls"]
    assert call["offset"] == 386
    assert {key: call[key] for key in ("module", "name", "pickle", "at")} == {
        "module": "os", "name": "system", "pickle": "data.pkl", "at": "hook",
    }  # fmt: skip
    assert call["arguments"] == ["'echo > ckptool-was-executed'"]


def test_strict_refuses_foreign_names(run: Run, good: Path) -> None:
    done = run("check", good / "foreign.pth")
    assert done.code == 0
    assert "foreign names: argparse.Namespace" in done.out
    assert "does load them imports the code that they name" in done.err
    assert "foreign names" not in run("check", good / "plain.pth").err
    done = run("check", "--strict", good / "foreign.pth")
    assert (done.code, rows(done)[0][1]) == (4, "unsafe")
    assert run("check", "--strict", good / "plain.pth").code == 0


def test_code_in_a_file_is_said_and_not_judged(run: Run, good: Path) -> None:
    """A TorchScript archive holds a program: no name in its pickles says what that does."""
    done = run("check", good / "script.pt")
    assert done.code == 0
    assert "; holds the code of a TorchScript module" in done.out
    assert "what the code of a TorchScript module does" in done.err
    assert run("check", "--strict", good / "script.pt").code == 4


# Many files, folders, missing ones.


def test_the_exit_is_the_worst(run: Run, here: Path, good: Path, hostile: Path) -> None:
    ok, damaged, other, unsafe = (
        good / "plain.pth", hostile / "crc_mismatch.pth", hostile / "png.pth",
        hostile / "os_system.pth",
    )  # fmt: skip
    for files, code in (
        ([ok], 0), ([ok, damaged], 1), ([damaged, other, ok], 3), ([other, "missing.pth"], 3),
        ([unsafe, other, damaged, ok], 4),
    ):  # fmt: skip
        done = run("check", *files)
        assert done.code == code
        assert [row[0] for row in rows(done)] == [str(file) for file in files]


EVIL = (FIXTURES / "hostile" / "os_system.pth").read_bytes()


def test_a_missing_file_does_not_stop_the_others(run: Run, here: Path, good: Path) -> None:
    done = run("check", "missing.pth", good / "plain.pth")
    assert done.code == 3
    assert rows(done)[0] == ["missing.pth", "not-a-checkpoint", "does not exist"]
    assert rows(done)[1][1] == "ok"


@pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and sockets of POSIX")
def test_folders_give_their_files(run: Run, here: Path, good: Path) -> None:
    """Every file by its bytes, sorted, nested; no hidden folder, and no loop through a link."""
    for name in ("b.pth", "sub/a.safetensors", ".hidden.pth", ".git/c.pth", "notes.txt", "A.PT"):
        place = here / "folder" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        source = "plain.safetensors" if name.endswith("safetensors") else "plain.pth"
        shutil.copy(good / source, place)
    os.symlink("..", here / "folder" / "sub" / "loop")
    done = run("check", "folder")
    assert done.code == 0
    names = [row[0] for row in rows(done)]
    wanted = ".hidden.pth A.PT b.pth notes.txt sub/a.safetensors"
    assert names == [f"folder/{name}" for name in wanted.split()]
    assert "not looked at: folder/.git (hidden)" in done.err
    assert "not looked at: folder/sub/loop (a link to a folder)" in done.err
    (here / "empty").mkdir()
    done = run("check", "empty", "folder/b.pth")
    assert done.code == 3
    assert rows(done)[0][:2] == ["empty", "not-a-checkpoint"]
    assert rows(done)[0][2] == "a folder (empty)"


@pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and sockets of POSIX")
def test_a_folder_is_looked_at_whatever_names_are_in_it(run: Run, here: Path, good: Path) -> None:
    """Hostile files under odd names have lines; the rest is named, in text and JSON."""
    folder = here / "downloads"
    folder.mkdir()
    for name in ("mace.model", "policy.dat", "tetris", "weights.h5"):
        (folder / name).write_bytes(EVIL)
    (folder / "README.md").write_text("Download them all.")
    shutil.copytree(good / "sharded_safetensors", folder / "set")
    with tarfile.open(folder / "more.tar.gz", "w:gz") as tar:
        tar.add(good / "plain.pth", "plain.pth")
    os.mkfifo(folder / "pipe")
    done = run("check", "downloads")
    assert done.code == 4
    assert [row[0].split("/")[1] for row in rows(done)] == [
        "mace.model", "policy.dat", "tetris", "weights.h5", "set",
    ]  # fmt: skip
    assert [row[1] for row in rows(done)] == ["unsafe"] * 4 + ["ok"]
    assert "1 other file, not checkpoints: downloads/README.md (a text " in done.err
    assert "not looked at: downloads/pipe (not a regular file)" in done.err
    assert "not looked at: downloads/more.tar.gz (a gzip archive " in done.err
    document = run("check", "--json", "downloads").document
    assert len(document["files"]) == 5
    assert [each["file"] for each in document["not_checkpoints"]] == ["downloads/README.md"]
    unseen = {each["file"] for each in document["not_looked_at"]}
    assert unseen == {"downloads/pipe", "downloads/more.tar.gz"}
    assert not (here / "ckptool-was-executed").exists()


def test_quiet_leaves_data_and_warnings(run: Run, hostile: Path, good: Path) -> None:
    done = run("check", "-q", good / "plain.pth", hostile / "os_system.pth", hostile / "png.pth")
    assert len(rows(done)) == 3
    assert done.err.startswith("warning: ")
    assert "not checked" not in done.err


# Hashes.


def test_sha256(run: Run, here: Path, good: Path) -> None:
    content = (good / "plain.pth").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (here / "net.pth").write_bytes(content)
    assert digest in run("check", "--sha256", "net.pth").out
    assert digest not in run("check", "net.pth").out
    (here / f"net-{digest[:8]}.pth").write_bytes(content)
    done = run("check", "--json", f"net-{digest[:8]}.pth")
    assert done.document["files"][0]["sha256"] == digest
    assert "as its name says" in done.document["files"][0]["notes"][0]
    (here / "net-5c106cde.pth").write_bytes(content)
    done = run("check", "net-5c106cde.pth")
    assert done.code == 0  # names lie
    assert "does not start with 5c106cde" in done.err
    (here / "net-20240115.pth").write_bytes(content)
    assert "sha256" not in run("check", "net-20240115.pth").err


def test_a_damaged_file_is_hashed_too(run: Run, hostile: Path) -> None:
    path = hostile / "truncated.pth"
    assert hashlib.sha256(path.read_bytes()).hexdigest() in run("check", "--sha256", path).out


# NaN and infinity.


FLOATING = sorted(FLOATS, key=lambda dtype: dtype.rank)


@pytest.mark.parametrize("dtype", FLOATING, ids=lambda dtype: dtype.label)
def test_every_float_is_judged_as_by_torch(dtype: DType) -> None:
    """All patterns of one and two bytes; for wider floats those around the exponent's limits."""
    torch = pytest.importorskip("torch")
    kind = getattr(torch, dtype.torch_name, None)
    if kind is None:
        pytest.skip("this torch has no such dtype")
    part = {DType.C128: torch.float64, DType.C64: torch.float32, DType.C32: torch.float16}.get(
        dtype, torch.bfloat16 if dtype is DType.BC32 else kind
    )
    width = part.itemsize
    if width <= 2:
        numbers = range(1 << 8 * width)
    else:
        exponents = {4: (0xFF, 23), 8: (0x7FF, 52)}[width]
        top, shift = exponents
        numbers = [
            sign << (8 * width - 1) | exponent << shift | mantissa
            for sign in (0, 1)
            for exponent in (0, 1, top >> 1, top - 1, top)
            for mantissa in (0, 1, 1 << (shift - 1), (1 << shift) - 1, 255, 1 << 8)
        ]
    data = b"".join(number.to_bytes(width, "little") for number in numbers)
    values = torch.frombuffer(bytearray(data), dtype=part)
    wide = values.to(torch.float64)
    expected = Tally(int(wide.isnan().sum()), int(wide.isinf().sum()))
    assert tally(data, dtype) == expected
    swapped = bytearray(b"".join(number.to_bytes(width, "big") for number in numbers))
    if width > 1:
        swap(swapped, width)
    assert tally(swapped, dtype) == expected


def test_floats_are_counted_as_torch_counts_them(here: Path) -> None:
    torch = pytest.importorskip("torch")
    nan, inf = float("nan"), float("inf")
    flat = torch.arange(24, dtype=torch.float32)
    flat[[3, 7]], flat[11] = nan, -inf
    content = {
        "whole": flat, "transposed": flat.view(4, 6).t(), "steps": flat[1::2], "part": flat[8:10],
        "tied": flat, "expanded": flat[3].expand(1000, 1000), "count": torch.tensor(3),
        "half": torch.tensor([inf, 1, nan], dtype=torch.float16),
        "complex": torch.tensor([complex(nan, inf), 1], dtype=torch.complex128),
        "complex_steps": torch.tensor([1, complex(0, nan), 1, 1], dtype=torch.complex128)[1::2],
        "sparse": torch.tensor([[0, nan], [0, 0]]).to_sparse(),
        "empty": torch.zeros(0), "fine": torch.ones(3),
    }  # fmt: skip
    torch.save({"state_dict": content, "best": torch.tensor(nan)}, "in.pth")
    with zipfile.ZipFile("in.pth") as old, zipfile.ZipFile("zip.pth", "w", 8) as made:
        for each in old.namelist():
            made.writestr(each, old.read(each))
    found = dict(checking.check("in.pth", finite=True).not_finite)
    assert dict(checking.check("zip.pth", finite=True).not_finite) == found
    expected = {}
    for key, value in [*content.items(), ("best", torch.tensor(nan))]:
        dense = value.to_dense() if value.is_sparse else value
        real = torch.view_as_real(dense) if dense.is_complex() else dense
        counts = Tally(int(real.isnan().sum()), int(real.isinf().sum()))
        if counts != Tally():
            expected[key if key == "best" else f"state_dict.{key}"] = counts
    assert found == expected


@pytest.mark.parametrize("name", ["special_values.pth", "big_endian_odd.pth", "every_dtype.pth"])
def test_finite_on_fixtures(run: Run, good: Path, name: str) -> None:
    torch = pytest.importorskip("torch")
    content = torch.load(good / name, weights_only=True)
    odd = {
        key
        for key, value in content.items()
        if value.is_floating_point() and not value.to(torch.float64).isfinite().all()
    }
    done = run("check", "--finite", "--json", good / name)
    (found,) = done.document["files"]
    assert {each["key"] for each in found["not_finite"]} == odd
    assert (done.code, found["status"]) == ((1, "damaged") if odd else (0, "ok"))


def test_overlapping_views_cost_no_more_than_the_file(here: Path) -> None:
    """A megabyte that declares gigabytes is not walked through, and that is said."""
    torch = pytest.importorskip("torch")
    flat = torch.zeros(1 << 20)
    views = {f"v{n}": flat[n : n + 1000].as_strided((500_000, 500_000), (1, 1)) for n in range(3)}
    torch.save({"flat": flat, **views}, "in.pth")
    found = checking.check("in.pth", finite=True)
    assert found.status is Status.OK
    assert "overlap many times over: v0, v1, v2" in " ".join(found.not_checked)


# As a function.


def test_the_function(good: Path, hostile: Path) -> None:
    found = ckptool.check(good / "plain.pth")
    assert (found.status.value, found.safety, found.container) == ("ok", "plain", "torch-zip")
    assert "names" in found.checked
    assert ckptool.check(hostile / "png.pth").status.exit_code == 3


def test_a_file_that_changes_meanwhile_is_not_ok(
    here: Path, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(good / "plain.pth", "in.pth")

    def begin(total: int) -> Callable[[int], None]:
        with (here / "in.pth").open("ab") as file:
            file.write(b"more")
        return lambda nbytes: None

    found = checking.check("in.pth", progress=begin)
    assert found.status is Status.DAMAGED
    assert "was changed while it was read" in found.detail


# Whatever a byte becomes, and whatever stands in the place of a file.


VALUES = (0, 1, 0x2E, 0x7F, 0x80, 0xFE, 0xFF)


@pytest.mark.parametrize(
    "name", ["odd_storage_keys.pth", "legacy_views.pth", "metadata.safetensors"]
)
def test_any_byte_may_be_another(here: Path, good: Path, name: str) -> None:
    """Each byte of each container: a status, no exception; what zipfile finds bad is not ok."""
    content = (good / name).read_bytes()
    path = here / "in.pth"
    for index in range(len(content)):
        value = VALUES[index % len(VALUES)]
        changed = content[:index] + bytes([value]) + content[index + 1 :]
        write_anew(path, changed)
        found = checking.check(path)
        assert found.detail
        if found.status is Status.OK and found.container == "torch-zip":
            with suppress(NotImplementedError):  # a later version of zip, which changes nothing
                assert first_bad(changed) is None, (index, value)


def test_any_byte_of_a_pickle_may_be_anything(here: Path) -> None:
    """Eight values a byte, in a file without checksums, which would find them all."""
    path = here / "in.pth"
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02}(X\x01\0\0\0aq\0K\x01X\x01\0\0\0b)]h\0au.")
        made.writestr("archive/version", b"3\n")
    content = path.read_bytes()
    for crc in {info.CRC for info in zipfile.ZipFile(path).infolist()}:
        content = content.replace(struct.pack("<L", crc), bytes(4))
    start = content.index(b"\x80\x02")
    statuses = set()
    for index in range(start, content.index(b"u.") + 2):
        for value in {*VALUES, content[index] ^ 1} - {content[index]}:
            write_anew(path, content[:index] + bytes([value]) + content[index + 1 :])
            statuses.add(checking.check(path).status)
    assert statuses <= {Status.OK, Status.DAMAGED, Status.UNSUPPORTED, Status.UNSAFE}
    assert {Status.OK, Status.DAMAGED} <= statuses


@pytest.mark.skipif(sys.platform == "win32", reason="links, pipes and sockets of POSIX")
def test_what_is_no_regular_file_is_named(here: Path, good: Path) -> None:
    """In a process of its own, so that one that hangs can be ended."""
    os.mkfifo("pipe.pth")
    os.symlink("nowhere", "dangling.pth")
    os.symlink("circle.pth", "circle.pth")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind("socket.pth")
    names = ["pipe.pth", "dangling.pth", "circle.pth", "socket.pth", "/dev/zero", "", "x" * 300]
    done = subprocess.run(
        [sys.executable, "-m", "ckptool", "check", "--sha256", *names, str(good / "plain.pth")],
        capture_output=True, text=True, timeout=30, check=False, env=environment(),
    )  # fmt: skip
    listener.close()
    found = [line.split("\t") for line in done.stdout.splitlines()]
    assert done.returncode == 3
    assert [row[0] for row in found] == [*names, str(good / "plain.pth")]
    assert [row[1] for row in found] == ["not-a-checkpoint"] * 7 + ["ok"]
    assert "Traceback" not in done.stderr


def test_deflated_floats_are_counted_across_blocks(here: Path) -> None:
    torch = pytest.importorskip("torch")
    values = torch.randn(700_001, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    values[::50_000] = float("nan")
    torch.save({"part": values[1:], "whole": values}, "stored.pth")
    with zipfile.ZipFile("stored.pth") as old, zipfile.ZipFile("in.pth", "w", 8) as made:
        for each in old.namelist():
            made.writestr(each, old.read(each))
    found = dict(checking.check("in.pth", finite=True).not_finite)
    assert found == {"part": Tally(14, 0), "whole": Tally(15, 0)}


def test_a_defect_at_one_file_hides_no_other(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = checking.check

    def broken(path: str, **how: Any) -> Checked:
        if path == "bad.pth":
            raise ZeroDivisionError("division by zero")
        return before(path, **how)

    monkeypatch.setattr(checking, "check", broken)
    done = run("check", "bad.pth", good / "plain.pth")
    assert done.code == 70
    assert [row[1] for row in rows(done)] == ["ok"]
    assert "bad.pth: error[bug]: ZeroDivisionError: not checked" in done.err


# Real files: a folder that `CKPTOOL_CORPUS` names; skipped without.

CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
INDEX = CORPUS / "index.json"
ROWS = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else []


@pytest.mark.skipif(not ROWS, reason="CKPTOOL_CORPUS names no folder with index.json")
def test_real_files(run: Run) -> None:
    """What torch or safetensors reads is ok; and every hash that the index has is ours."""
    done = run("check", "--sha256", "--json", *(CORPUS / row["path"] for row in ROWS))
    files = done.document["files"]
    assert done.code == 3
    for row, found in zip(ROWS, files, strict=True):
        assert found["sha256"] in (row["sha256"], None), row
        if row["torch_weights_only"] == "OK":
            assert (found["status"], found["safety"]) == ("ok", "plain"), (row, found)
        if row["format"].startswith("safetensors"):
            assert found["status"] == "ok", (row, found)
        if row["format"].startswith("other"):
            assert found["status"] == "not-a-checkpoint", (row, found)
        assert found["status"] not in ("damaged", "unsafe"), (row, found)


def test_files_without_checksums_are_told_once(run: Run, good: Path) -> None:
    names = ("plain.safetensors", "plain_legacy.pth", "model.safetensors", "plain.pth")
    done = run("check", *(good / name for name in names))
    assert "whether bytes of tensors changed in 3 files (without checksums); " in done.err
    assert done.err.count("whether bytes") == 1
    alone = run("check", good / "plain.safetensors")
    assert "whether bytes of tensors changed (safetensors files have no checksums)" in alone.err


def test_a_misspelled_name_gets_the_one_meant(run: Run, here: Path, good: Path) -> None:
    shutil.copy(good / "plain.pth", here)
    done = run("check", "plain.pht")
    assert (done.code, rows(done)[0][1]) == (3, "not-a-checkpoint")
    assert done.err == "plain.pht: hint: did you mean plain.pth?\n"


def test_shards_without_their_index_are_damaged(run: Run, here: Path, good: Path) -> None:
    shutil.copytree(good / "sharded_safetensors", here / "parts")
    for index in (here / "parts").glob("*.index.json"):
        index.unlink()
    done = run("check", "parts")
    assert done.code == 1
    assert rows(done)[0][:2] == ["parts", "damaged"]
    assert {row[1] for row in rows(done)[1:]} == {"ok"}
    assert "without their index" in rows(done)[0][2]


def test_a_verdict_that_depends_on_torch_says_on_which(run: Run) -> None:
    said = "only torch newer than 2.6 accepts torch.float8_e8m0fnu"
    path = FIXTURES / "good" / "every_dtype.pth"
    assert said in run("check", path).out
    assert said in run("info", path).out
    for command in ("check", "info"):
        document = run(command, path, "--json").document
        assert document.get("files", [document])[0]["versions"] == [said]


def test_a_jagged_tensor_is_foreign(run: Run, tmp_path: Path) -> None:
    """Made of a list, it notes between which lengths it may vary."""
    torch = pytest.importorskip("torch")
    rows = [torch.ones(2), torch.ones(3)]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.save({"w": torch.ones(2), "rows": jagged}, tmp_path / "jagged.pth")
    done = run("check", tmp_path / "jagged.pth")
    assert (done.code, done.out.split("\t")[1]) == (0, "ok")
    assert "only torch up to 2.14 accepts" in done.out


# Size.


def test_what_is_larger_than_asked_fails(run: Run, good: Path) -> None:
    nbytes = (good / "plain.pth").stat().st_size
    assert run("check", good / "plain.pth", "--max-size", nbytes).code == 0
    done = run("check", "--json", good / "plain.pth", "--max-size", nbytes - 1)
    assert (done.code, done.document["files"][0]["status"]) == (1, "too-large")
    assert done.document["files"][0]["detail"].startswith("more than 4.0 KiB; torch zip, 4.0 KiB")


def test_a_set_is_as_large_as_all_its_files(run: Run, good: Path) -> None:
    index = good / "sharded_safetensors" / "model.safetensors.index.json"
    largest = max(path.stat().st_size for path in index.parent.iterdir())
    assert run("check", index, "--max-size", largest).code == 1


@pytest.mark.parametrize(
    ("name", "status"), [("crc_mismatch.pth", "damaged"), ("os_system.pth", "unsafe")]
)
def test_what_is_worse_is_said_first(hostile: Path, name: str, status: str) -> None:
    found = checking.check(hostile / name, max_size="1KB")
    assert found.status.value == status
    assert found.detail.endswith("; more than 1000 B")


@pytest.mark.parametrize("option", [("--max-size", "0"), ("--max-size", "big"), ("--as", "int8")])
def test_an_option_that_is_wrong_ends_it_before_any_file(
    run: Run, good: Path, option: tuple[str, str]
) -> None:
    done = run("check", good / "plain.pth", good / "half.pth", *option)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error[")
