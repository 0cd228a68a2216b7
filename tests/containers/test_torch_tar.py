"""The tar of torch 0.1, judged by torch, which still reads it; tars in general, by tarfile."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome
from hypothesis import HealthCheck, given, settings, strategies as st

import ckptool
from ckptool import containers
from ckptool.errors import FormatError
from ckptool.files import tars
from ckptool.files.fileio import Reader
from ckptool.state import checkpoint as places
from ckptool.verbs import surgery
from ckptool.verbs.checked import Status
from ckptool.verbs.surgery import Options

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good"
CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
INDEX = CORPUS / "index.json"
ROWS = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else []


@pytest.mark.parametrize("name", ["torch_0_1.tar", "torch_0_1_gnu.tar"])
def test_tensors_are_those_of_torch(name: str, tmp_path: Path) -> None:
    wanted = judge.load(GOOD / name, weights_only=False)
    for out in (tmp_path / "out.pth", tmp_path / "bare.pth"):
        surgery.rewrite(GOOD / name, out, bare="bare" in out.name, options=Options(sync=False))
        found = judge.load(out)
        found.pop("empty", None)  # the judge leaves it out of a tar
        # torch cuts views of storages out of them; here they stay where they are.
        assert judge.same(wanted, found, storage=False) == []


def test_an_empty_tensor_has_no_element() -> None:
    """torch 0.1 had no scalars: what has no dimensions there has no elements."""
    entries = places.find(containers.read(GOOD / "torch_0_1_gnu.tar")).entries
    assert (entries["empty"].shape, entries["empty"].numel) == ((0,), 0)


def test_the_imitation_is_read_too(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "torch_0_1_imitation.tar", tmp_path / "out.pth")
    assert done.code == 0, done.err
    found = judge.load(tmp_path / "out.pth")
    assert {key: tensor.tolist() for key, tensor in found.items()} == {
        "weight": [[0, 1, 2], [3, 4, 5]],
        "bias": [0, 1],
    }


# What the script that wrote these files says it put in them.
VALUES = {
    "tar_weight_bias.tar": {"weight": [[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]], "bias": [0.01, 0.02]},
    "tar_multi_dtype.tar": {
        "float_tensor": [1.5, 2.5, 3.5],
        "double_tensor": [1.111, 2.222],
        "int_tensor": [10, 20, 30, 40],
    },
}


@pytest.mark.skipif(not ROWS, reason="CKPTOOL_CORPUS names no folder with index.json")
@pytest.mark.parametrize("name", VALUES)
def test_real_imitations(name: str, tmp_path: Path) -> None:
    row = next(row for row in ROWS if row["path"].endswith(name))
    out = tmp_path / "out.pth"
    surgery.rewrite(CORPUS / row["path"], out, options=Options(sync=False))
    found = judge.load(out)
    assert len(found) == row["tensor_references"]
    assert list(found) == list(VALUES[name])
    for key, values in VALUES[name].items():
        assert found[key].equal(torch.tensor(values, dtype=found[key].dtype))


def test_info_and_keys_name_it(run: Run) -> None:
    done = run("keys", "--json", GOOD / "torch_0_1.tar")
    assert done.document["container"] == "torch-tar"
    assert "torch tar" in run("info", GOOD / "torch_0_1.tar").out


# Tars in general.

NAMES = st.text("abcdefghij-_.\u00e9\u4e2d/", min_size=1, max_size=180).map(
    lambda text: "/".join(step for step in text.split("/") if step.strip(".")) or "name"
)
MEMBERS = st.dictionaries(NAMES, st.binary(max_size=1500), max_size=6)
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.mark.parametrize("kind", FORMATS)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(members=MEMBERS)
def test_members_are_those_that_tarfile_wrote(
    kind: str, members: dict[str, bytes], tmp_path: Path
) -> None:
    path = tmp_path / "some.tar"
    written = {}
    with tarfile.open(path, "w", format=FORMATS[kind]) as tar:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            try:
                tar.addfile(header, io.BytesIO(data))
            except ValueError:  # ustar has no place for it
                continue
            written[name] = data
        link = tarfile.TarInfo("the link")
        link.type, link.linkname = tarfile.SYMTYPE, "x" * 150 if kind != "ustar" else "x"
        tar.addfile(link)
        folder = tarfile.TarInfo("the folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    with Reader(path) as reader:
        assert tars.is_tar(reader.read(0, 512))
        found = tars.read_members(reader)
        assert found.pop("the link").kind == "symbolic link"
        assert found.pop("the folder").kind == "folder"
        assert {
            name: reader.read(member.start, member.nbytes) for name, member in found.items()
        } == written


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(at=st.integers(0, 10239), value=st.integers(0, 255), end=st.integers(0, 10240))
def test_damage_is_refused_or_read(at: int, value: int, end: int, tmp_path: Path) -> None:
    """Any byte changed, cut anywhere: an error of ours or a checkpoint, never another error."""
    content = bytearray((GOOD / "torch_0_1.tar").read_bytes())
    content[at] = value
    path = tmp_path / "damaged.tar"
    path.write_bytes(content[:end] if end % 3 else content)
    with suppress(FormatError):
        containers.read(path)


# Headers that readers of tar disagree about.

PICKLED = (GOOD / "torch_0_1.tar").read_bytes()


def header(name: str, kind: bytes = b"0", nbytes: int = 0, **fields: bytes) -> bytes:
    """Return a raw header; `fields` replace what tarfile writes at offsets `at_124=...`."""
    info = tarfile.TarInfo(name)
    info.type, info.size = kind, nbytes
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT)[:512])
    for at, data in fields.items():
        block[int(at[3:]) : int(at[3:]) + len(data)] = data
    if "at_148" not in fields:
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def about(kind: bytes, data: bytes) -> bytes:
    """Return a header about the next member with its data."""
    return header("about", kind, len(data)) + data.ljust(-(-len(data) // 512) * 512, b"\0")


def record(key: str, value: str = "1") -> bytes:
    """Return a record of pax; its length has two digits."""
    return b"%d %s=%s\n" % (len(key) + len(value) + 5, key.encode(), value.encode())


PADDED = bytearray(about(b"x", record("comment", "abc")))
PADDED[512 + 15 :] = record("path", "pickled").ljust(497, b"\0")
REFUSED = {
    "signed size": (header("a", at_124=b"-0000001000\0"), "not an octal number"),
    "underscore in a size": (header("a", at_124=b"0000000_000\0"), "not an octal number"),
    "negative size of pax": (about(b"x", record("size", "-1000")), "is not a number"),
    "long name and pax": (about(b"L", b"b\0") + about(b"x", record("path", "c")), "types Lx"),
    "two long names": (about(b"L", b"b\0") + about(b"L", b"c\0"), "types LL"),
    "pax twice": (about(b"x", record("path", "b")) + about(b"x", record("path", "c")), "types xx"),
    "a path twice": (about(b"x", record("path", "b") + record("path", "c")), "pax header"),
    "a record in the padding": (bytes(PADDED), "pax header"),
    "name of a sparse file": (about(b"x", record("GNU.sparse.name", "b")), "sparse file"),
    "pax of Solaris": (about(b"X", record("path", "b")), "unknown type 'X'"),
    "unknown type": (header("a", b"V"), "unknown type 'V'"),
    "path of all": (about(b"g", record("path", "b")), "about all members"),
    "much about all": (
        about(b"g", b"".join(record(f"key{n:02}") for n in range(65))),
        "about all members",
    ),
    "long name of 2 MiB": (header("a", b"L", 2 << 20) + bytes(2 << 20), "bytes about one member"),
    "a thousand headers": (about(b"g", record("comment")) * 1000, "types gg"),
    "long name of nothing": (about(b"L", b"b\0") + bytes(512), "two ways"),
    "mode that is none": (header("a", at_100=b"rwxrwx\0\0"), "checksum"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_readers_disagree_about_is_refused(name: str, tmp_path: Path) -> None:
    first, words = REFUSED[name]
    (tmp_path / "odd.tar").write_bytes(header("before") + first + PICKLED)
    with pytest.raises(FormatError, match=words):
        containers.read(tmp_path / "odd.tar")


def test_members_that_torch_does_not_find(tmp_path: Path) -> None:
    """It asks `tarfile` for the very names; one of GNU tar's `tar -c .` is not found."""
    path = tmp_path / "model.tar"
    for prefix in ("", "./"):
        with tarfile.open(GOOD / "torch_0_1.tar") as source, tarfile.open(path, "w") as target:
            for info in source:
                content = source.extractfile(info)
                info.name = prefix + info.name
                target.addfile(info, content)
        found = ckptool.check(path)
        if prefix:
            with pytest.raises(KeyError):
                torch.load(path, weights_only=False)
            assert "torch.load finds no member sys_info: it is named ./sys_info" in found.detail
        else:
            torch.load(path, weights_only=False)
        assert found.status is (Status.DAMAGED if prefix else Status.OK)


def test_a_comment_about_all_is_as_git_writes_it(tmp_path: Path) -> None:
    (tmp_path / "git.tar").write_bytes(about(b"g", record("comment", "a" * 40)) + PICKLED)
    assert containers.read(tmp_path / "git.tar").container == "torch-tar"


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"at_257": bytes(8)}, ""),
        ({"at_148": b"\x80" + bytes(7)}, "checksum"),
        ({"at_148": b"000000\0?"}, "checksum"),
    ],
)
def test_tarfile_decides_what_is_a_tar(
    fields: dict[str, bytes], refused: str, tmp_path: Path
) -> None:
    """No magic, a checksum in base 256 or before rubbish: torch reads the tar, not the pickle."""
    block = header("before", **fields)
    total = 256 + sum(block[:148] + block[156:])
    if refused:
        number = b"%06o\0?" % total if b"?" in block else b"\x80" + total.to_bytes(7, "big")
        block = block[:148] + number + block[156:]
    (tmp_path / "odd.tar").write_bytes(block + PICKLED)
    with tarfile.open(tmp_path / "odd.tar", "r:") as tar:
        assert tar.getnames()[1] == "sys_info"
    assert tars.is_tar(block)
    if refused:
        with pytest.raises(FormatError, match=refused):
            containers.read(tmp_path / "odd.tar")
    else:
        assert containers.read(tmp_path / "odd.tar").container == "torch-tar"
