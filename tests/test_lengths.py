"""Numbers from outside that count something: plain ones alone, whatever `int` would take."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import ckptool
from ckptool.errors import Malformed
from ckptool.pickles import pickle_reader
from ckptool.text import length

pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")

TEXTS = [
    "",
    "-5",
    "+5",
    " 5",
    "5 ",
    "1_000",
    "0x5",
    "5.0",
    "1e3",
    "٥",
    "²",
    "five",
    "9" * 19,
    "0" * 5000,
]
NUMBERS: list[Any] = [-1, -1000, True, 5.0, 1 << 63, None, "5", b"5", float("nan")]


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_is_no_length(text: str) -> None:
    assert length(text, 10) is None
    assert length(text.encode("utf-8"), 10) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_number_that_is_no_length(number: object) -> None:
    assert length(number) is None


def test_a_length() -> None:
    assert [length(each) for each in (0, 5, (1 << 63) - 1)] == [0, 5, (1 << 63) - 1]
    assert [length(each, 10) for each in ("0", b"0005", "9223372036854775807")] == [0, 5, 2**63 - 1]
    assert [length(each, 16) for each in (b"ff", "FF", b"-ff", "0xff", "g")] == [255, 255] + [
        None
    ] * 3
    assert [length(each, 8) for each in (b"17", b"18")] == [15, None]


class Rebuilt:
    """Pickles as a call of torch's with these arguments."""

    def __init__(self, name: str, *args: Any) -> None:
        self.call = getattr(torch._utils, name), args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


class Pickler(pickle.Pickler):
    """Writes storages by a number of elements of our choice."""

    numel: Any = 4

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, torch.storage.TypedStorage):
            return ("storage", torch.FloatStorage, "0", "cpu", self.numel)
        return None


def torch_file(path: Path, node: Any, numel: Any = 4) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        with archive.open("archive/data.pkl", "w") as out:
            pickler = Pickler(out, 2)
            pickler.numel = numel
            pickler.dump({"a": node})
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(16))
    return path


def tensor(size: Any = (2,), stride: Any = (1,), offset: Any = 0) -> Rebuilt:
    return Rebuilt("_rebuild_tensor_v2", torch.FloatStorage(4), offset, size, stride, False, {})


def test_the_sound_one_loads(tmp_path: Path) -> None:
    path = torch_file(tmp_path / "a.pth", tensor())
    assert torch.load(path, weights_only=True)["a"].tolist() == [0, 0]
    assert len(ckptool.keys(path).entries) == 1


@pytest.mark.parametrize("bad", [-1, True, "2", 2.0, 1 << 63, None])
@pytest.mark.parametrize("which", ["size", "stride", "offset", "numel"])
def test_a_tensor_of_impossible_numbers_is_damaged(tmp_path: Path, which: str, bad: Any) -> None:
    if which == "numel":
        path = torch_file(tmp_path / "a.pth", tensor(), bad)
    else:
        path = torch_file(
            tmp_path / "a.pth", tensor(**{which: bad if which == "offset" else (bad,)})
        )
    with pytest.raises(Malformed):
        ckptool.keys(path)


def test_a_sparse_tensor_of_a_negative_size_is_damaged(tmp_path: Path) -> None:
    indices = Rebuilt("_rebuild_tensor_v2", torch.FloatStorage(4), 0, (1, 2), (2, 1), False, {})
    node = Rebuilt("_rebuild_sparse_tensor", torch.sparse_coo, (indices, tensor(), (-5,), True))
    with pytest.raises(Malformed, match="sparse"):
        ckptool.keys(torch_file(tmp_path / "a.pth", node))


def text_of(shape: str = "[2]", offsets: str = "[0,8]") -> bytes:
    text = f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'.encode()
    return len(text).to_bytes(8, "little") + text + bytes(8)


@pytest.mark.parametrize(
    "more",
    [
        {"shape": "[-2]"},
        {"shape": "[true]"},
        {"shape": '["2"]'},
        {"shape": "[2.0]"},
        {"shape": "[2e0]"},
        {"shape": "[9223372036854775808]"},
        {"offsets": "[-8,0]"},
        {"offsets": '["0","8"]'},
        {"offsets": "[false,8]"},
        {"offsets": "[0,8.0]"},
    ],
)
def test_a_safetensors_file_of_impossible_numbers_is_damaged(
    tmp_path: Path, more: dict[str, str]
) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(text_of())
    assert len(ckptool.keys(path).entries) == 1
    path.write_bytes(text_of(**more))
    with pytest.raises(Malformed):
        ckptool.keys(path)


@pytest.mark.parametrize("line", [b"p-1\n", b"p+1\n", b"p 1\n", b"p1_0\n", b"p\n"])
def test_a_memo_key_is_digits(line: bytes) -> None:
    with pytest.raises(Malformed, match="memo key"):
        pickle_reader.load(b"\x80\x02}" + line + b".")


@pytest.mark.parametrize("numel", ["-4", "+4", " 4", "4_0", "\u0664", "4.0", "", "9" * 5000])
def test_a_storage_that_protocol_0_writes_counts_in_digits(tmp_path: Path, numel: str) -> None:
    said = "('storage', <class 'torch.FloatStorage'>, '0', 'cpu', %s)"
    head = b"\x80\x02}X\1\0\0\0actorch._utils\n_rebuild_tensor_v2\n("
    tail = b"QK\0K\2\x85K\1\x85\x89}tRs."

    def file(count: str) -> Path:
        text = (said % count).encode()
        path = torch_file(tmp_path / "a.pth", None)
        with zipfile.ZipFile(path, "w") as archive:
            unicode = b"X" + struct.pack("<I", len(text)) + text
            archive.writestr("archive/data.pkl", head + unicode + tail)
            archive.writestr("archive/version", b"3\n")
            archive.writestr("archive/data/0", bytes(16))
        return path

    assert list(ckptool.keys(file("4"))) == ["a"]
    with pytest.raises(Malformed):
        ckptool.keys(file(numel))
