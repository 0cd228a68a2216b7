"""Files that are one thing to ckptool and another to a laxer reader; `check` calls none ok."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import write_anew
from safetensors import safe_open
from safetensors.torch import save_file

import ckptool
from ckptool.files.fileio import Reader
from ckptool.verbs.checked import Status

RUN = b"cposix\nsystem\n(X\4\0\0\0trueltR."


def safetensors_with(content: bytes) -> bytes:
    """Return a safetensors whose bytes are a pickle that goes on in the data: `content`.

    Its length begins with `U`, a text of as many bytes as the next one says; from there on other
    texts lead through one of the metadata, the last of them over the end of the header.
    """
    first = 0x20
    size = 0x55 | first << 8
    fields = {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}
    start = b'{"__metadata__":{"a":"'.ljust(2 + first - 8, b"x")
    end = b'"},"w":' + json.dumps(fields).encode() + b"}"
    left = size - len(start)
    count = -(-left // 128)
    steps = [left // count + (index < left % count) for index in range(count)]
    texts = [b"U" + bytes([step - 2]) + b"y" * (step - 2) for step in steps]
    texts[-1] = texts[-1][: -len(end)] + end
    return struct.pack("<Q", size) + start + b"".join(texts) + content


def names_of(data: bytes) -> list[str]:
    """Return what Python's own unpickler looks up in bytes, up to where it fails."""
    found = []

    class Noting(pickle._Unpickler):  # type: ignore[name-defined]
        def find_class(self, module: str, name: str) -> Any:
            found.append(f"{module}.{name}")
            return dict

    file = io.BytesIO(data)
    try:
        while True:
            Noting(file).load()
    except Exception:
        return found


PICKLES = {
    "a call": RUN,
    "a name that nothing calls": b"cposix\nsystem\n.",
    "INST": b"(X\4\0\0\0trueiposix\nsystem\n.",
    "STACK_GLOBAL": b"\x8c\5posix\x8c\6system\x93.",
    "STACK_GLOBAL, long texts": b"X\5\0\0\0posix\x8d\6" + b"\0" * 7 + b"system\x93.",
    "behind what ckptool's reader refuses": b"]NaK\0K\1s" + RUN,
    "behind a text of Python 2 and numbers": b"S'a'\nI1\nF1.5\nL3L\nVb\n" + RUN,
    "behind a STOP": b"." + RUN,
    "behind persistent ids of the second pickle": b".NQP1\n" + RUN,
    "in a frame": b"\x95" + struct.pack("<Q", len(RUN)) + RUN,
    "far behind": b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20) + RUN,
}


@pytest.mark.parametrize("content", PICKLES.values(), ids=PICKLES)
def test_a_safetensors_that_is_a_pickle_too(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_with(content))
    with safe_open(path, "pt") as opened:
        assert [*opened.keys()] == ["w"]
    found = ckptool.check(path)
    assert found.status is not Status.OK
    assert "a pickle as well" in found.detail
    if b"Q" not in content and b"\x95" not in content:
        assert names_of(path.read_bytes()) == ["posix.system"]
        assert found.status is Status.UNSAFE
        assert found.globals == ("posix.system",)


def test_a_safetensors_that_is_a_harmless_pickle_too(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_with(b"ccollections\nOrderedDict\n."))
    found = ckptool.check(path)
    assert found.status is Status.DAMAGED
    assert "names collections.OrderedDict" in found.detail


def test_a_safetensors_that_is_a_legacy_torch_file_too(tmp_path: Path) -> None:
    out = io.BytesIO()
    torch.save({"a": 1}, out, _use_new_zipfile_serialization=False)
    path = tmp_path / "model.safetensors"
    path.write_bytes(safetensors_with(out.getvalue().replace(b"K\1s.", b"cposix\nsystem\ns.")))
    found = ckptool.check(path)
    assert found.status is Status.UNSAFE


def test_headers_of_any_length_are_no_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    body = b'{"a.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    for size, high in itertools.product(range(256), (1, 40)):
        whole = 256 * high + size
        write_anew(path, struct.pack("<Q", whole) + body.ljust(whole) + b"\n\0\x93.")
        assert ckptool.check(path).status is Status.OK, whole


def legacy_behind(header: bytes) -> bytes:
    """Return a legacy file that begins with a tar header, in a text of its third pickle."""
    out = io.BytesIO()
    torch.save({"weight": torch.arange(3.0)}, out, _use_new_zipfile_serialization=False)
    data = out.getvalue()
    start = data.index(b"\x80\2}q\0(X\x10\0\0\0protocol_version")
    before = data[:start] + b"\x80\2X" + struct.pack("<I", 2048)
    text = bytearray(before.ljust(len(before) + 2048, b"\0"))
    text[100:512] = header[100:512]
    text[148:156] = b" " * 8
    text[148:156] = b"%06o\0 " % sum(text[:512])
    return bytes(text) + b"0" + data[start + 2 :]


@pytest.mark.parametrize("magic", [b"ustar\00000", b"ustar  \0", b"\0" * 8])
def test_a_legacy_file_that_tarfile_opens(tmp_path: Path, magic: bytes) -> None:
    """torch.load looks for the members of a tar in it, and does not find them."""
    header = bytearray(tarfile.TarInfo("x").tobuf())
    header[257:265] = magic
    path = tmp_path / "model.pth"
    path.write_bytes(legacy_behind(bytes(header)))
    assert tarfile.is_tarfile(path)
    with pytest.raises(KeyError):
        torch.load(path, weights_only=False)
    found = ckptool.check(path)
    assert found.status is Status.DAMAGED
    assert "tar" in found.detail


def zipped() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", RUN)
    return out.getvalue()


def test_files_with_a_zip_at_their_end(tmp_path: Path) -> None:
    content = zipped()
    tensor = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    paths = [tmp_path / name for name in ("a.safetensors", "b.pth", "c.pth")]
    save_file({"w": tensor}, paths[0])
    torch.save({"w": tensor}, paths[1], _use_new_zipfile_serialization=False)
    torch.save({"w": torch.ones(2)}, paths[2], _use_new_zipfile_serialization=False)
    with paths[2].open("ab") as file:
        file.write(content + b"more")
    for path in paths:
        assert zipfile.is_zipfile(path)
        found = ckptool.check(path)
        assert found.status is Status.DAMAGED
        assert "its end is a zip archive as well" in found.detail


ENTRIES = ("other/", "__MACOSX/", "archive/", "archive/data/", "Archive/", "x/archive/", "archive")


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("place", [0, 1, 9])
def test_entries_of_folders_that_torch_does_not_take(tmp_path: Path, name: str, place: int) -> None:
    """torch takes the folder of the first entry for that of all, and refuses others."""
    out = io.BytesIO()
    torch.save({"w": torch.ones(2)}, out)
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(out) as source, zipfile.ZipFile(path, "w") as archive:
        rows = [(each, source.read(each)) for each in source.namelist()]
        for each, content in [*rows[:place], (name, b""), *rows[place:]]:
            archive.writestr(each, content)
    try:
        torch.load(path, weights_only=True)
        loads = True
    except RuntimeError:
        loads = False
    assert (ckptool.check(path).status is Status.OK) is loads


def torch_zip(more: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """Return a torch zip with further records."""
    out = io.BytesIO()
    torch.save({"w": torch.ones(2)}, out)
    with zipfile.ZipFile(out, "a", method) as archive:
        for name, content in more.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize(
    "inner",
    [
        b"\x80\2" + RUN,
        torch_zip({"more.pkl": b"\x80\2" + RUN}),
        torch_zip({"more.pkl": b"\x80\2" + RUN}, zipfile.ZIP_DEFLATED),
    ],
)
def test_pickles_that_a_checkpoint_does_not_use(tmp_path: Path, method: int, inner: bytes) -> None:
    """Others may: torch.export loads weights of odd classes with torch.load."""
    path = tmp_path / "model.pth"
    for name in ("extra.pkl", "data/weights/x.pt", "notes.txt"):
        path.write_bytes(torch_zip({name: inner}, method))
        torch.load(path, weights_only=True)
        found = ckptool.check(path)
        assert found.status is Status.UNSAFE, name
        assert found.globals == ("posix.system",)
    path.write_bytes(torch_zip({"extra.pkl": pickle.dumps({"a": 1}), "notes.txt": b"code\n"}))
    assert ckptool.check(path).status is Status.OK


def test_a_pickle_behind_a_plain_one(tmp_path: Path) -> None:
    """Whoever loads until the file ends gets to it."""
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps({"w": torch.ones(2)}, 2))
    assert ckptool.check(path).status is Status.OK
    with path.open("ab") as file:
        file.write(RUN)
    found = ckptool.check(path)
    assert found.status is Status.UNSAFE
    assert "another pickle follows its own, which names posix.system" in found.detail


def test_a_record_of_a_zip_with_two_names(tmp_path: Path) -> None:
    """Newer versions of Python's zipfile take the second."""
    path = tmp_path / "model.pth"
    data = torch_zip({})
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            info = zipfile.ZipInfo(name)
            second = name.encode().replace(b"/version", b"/another")
            info.extra = b"up" + struct.pack("<HBI", 5 + len(second), 1, 0) + second
            target.writestr(info, source.read(name))
    found = ckptool.check(path)
    assert found.status is Status.DAMAGED
    assert "record archive/version has two names" in found.detail


def test_a_shard_that_is_a_pickle_too(tmp_path: Path) -> None:
    (tmp_path / "model-00001-of-00001.safetensors").write_bytes(safetensors_with(RUN))
    index = {"metadata": {}, "weight_map": {"w": "model-00001-of-00001.safetensors"}}
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps(index))
    found = ckptool.check(path)
    assert found.status is Status.UNSAFE
    assert found.globals == ("posix.system",)


def test_zeros_after_a_header_that_begins_like_an_opcode_are_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A length whose low byte is `c` begins a name, which no module has that goes on for 64 KiB."""
    fields = {"w": {"dtype": "U8", "shape": [1 << 28], "data_offsets": [0, 1 << 28]}}
    header = json.dumps(fields).encode()
    header += b" " * ((0x63 - len(header)) % 256)
    path = tmp_path / "zeros.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + (1 << 28))
    counted: list[int] = []
    read = Reader.read

    def counting(self: Reader, start: int, nbytes: int) -> bytes:
        counted.append(nbytes)
        return read(self, start, nbytes)

    monkeypatch.setattr(Reader, "read", counting)
    with safe_open(path, "pt") as opened:
        assert [*opened.keys()] == ["w"]
    assert [*ckptool.keys(path)] == ["w"]
    assert sum(counted) < 1 << 20
