"""The safetensors reader is stricter than the library, the writer is the library to the byte."""

from __future__ import annotations

import contextlib
import json
import struct
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from conftest import write_anew

import ckptool
from ckptool import containers as formats
from ckptool.containers import safetensors as ours
from ckptool.errors import (
    CkptoolError,
    FormatError,
    LimitExceeded,
    Malformed,
    NotACheckpoint,
    NotRepresentable,
    Unsupported,
)
from ckptool.state.checkpoint import Checkpoint, text_items
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TensorInfo
from ckptool.verbs.checked import Status
from ckptool.verbs.surgery import Options, rewrite

torch = pytest.importorskip("torch")
library = pytest.importorskip("safetensors")
safetensors_torch = pytest.importorskip("safetensors.torch")

FOLDER = Path(__file__).parent.parent.parent / "fixtures"
sys.path.append(str(FOLDER))

from containers import safetensors  # noqa: E402

QUIET = Options(sync=False)


def entry(dtype: str, shape: list[Any], begin: Any, end: Any, **more: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end], **more}


A, B = entry("F32", [2], 0, 8), entry("I64", [1, 1], 8, 16)
DATA = struct.pack("<2fq", 1, 2, 3)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "in.safetensors"


def read(path: Path, content: bytes) -> Checkpoint:
    write_anew(path, content)
    return formats.read(path)


def entries(checkpoint: Checkpoint) -> dict[str, TensorInfo]:
    return dict(text_items(checkpoint.tree) or [])


def taken(content: bytes) -> bool:
    """Tell whether the library takes a file."""
    try:
        library.deserialize(content)
    except library.SafetensorError:
        return False
    return True


# Reading.


def test_a_header_becomes_tensors(path: Path) -> None:
    content = safetensors({"__metadata__": {"x": "y"}, "b": B, "a": A}, DATA)
    found = read(path, content)
    base = len(content) - len(DATA)
    assert (found.container, found.metadata) == ("safetensors", {"x": "y"})
    assert list(entries(found)) == ["b", "a"]
    for key, dtype, shape, start in (("b", DType.I64, (1, 1), 8), ("a", DType.F32, (2,), 0)):
        info = entries(found)[key]
        assert (info.dtype, info.shape, info.storage.start) == (dtype, shape, base + start)
        assert (info.storage.nbytes, info.storage.location) == (8, "cpu")


FINE = {
    "no tensors": ({}, b""),
    "no metadata": ({"a": A}, DATA[:8]),
    "null metadata": ({"__metadata__": None, "a": A}, DATA[:8]),
    "empty tensors anywhere": (
        {
            "x": entry("F32", [0], 0, 0),
            "a": A,
            "y": entry("F32", [3, 0], 8, 8),
            "b": B,
            "z": entry("U8", [0], 16, 16),
        },
        DATA,
    ),
    "a scalar": ({"a": entry("F64", [], 0, 8)}, DATA[:8]),
    "overlapping names": ({"a": A, "a.b": B}, DATA),
    "a name that is a field": ({"dtype": A, "shape": B}, DATA),
    "an empty name": ({"": A}, DATA[:8]),
    "six bits": ({"a": entry("F6_E3M2", [4], 0, 3)}, DATA[:3]),
    "four bits": ({"a": entry("F4", [2, 2], 0, 2)}, DATA[:2]),
    "any field order": (
        '{"a":{"data_offsets":[0,8],"shape":[2],"dtype":"F32"}}',
        DATA[:8],
    ),
    "spaces inside": ('{ "a" : {"dtype":"F32","shape":[ 2 ],"data_offsets":[0,8]} }   ', DATA[:8]),
    "unaligned": ('{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} ', DATA[:8]),
    "a far zero": ({"a": entry("F32", [2**40, 0], 0, 0)}, b""),
}


@pytest.mark.parametrize(("header", "data"), FINE.values(), ids=FINE.keys())
def test_fine_header(header: Any, data: bytes, path: Path) -> None:
    content = safetensors(header, data, alignment=1)
    assert taken(content)
    found = entries(read(path, content))
    meant = json.loads(header) if isinstance(header, str) else header
    assert list(found) == [key for key in meant if key != "__metadata__"]


BROKEN: dict[str, tuple[Any, bytes, type[FormatError]]] = {
    "gap": ({"a": A, "b": entry("F32", [1], 12, 16)}, DATA, Malformed),
    "overlap": ({"a": A, "b": entry("F32", [3], 4, 16)}, DATA, Malformed),
    "same bytes twice": ({"a": A, "b": A}, DATA[:8], Malformed),
    "same bytes twice, others never": ({"a": A, "b": A}, DATA, Malformed),
    "trailing": ({"a": A}, DATA, Malformed),
    "beyond the end": ({"a": entry("F32", [4], 0, 16)}, DATA[:8], Malformed),
    "first not at zero": ({"b": B}, DATA, Malformed),
    "backwards": ({"a": entry("F32", [0], 8, 0)}, DATA[:8], Malformed),
    "size and shape": ({"a": entry("F32", [3], 0, 8)}, DATA[:8], Malformed),
    "negative size": ({"a": entry("F32", [-2], 0, 8)}, DATA[:8], Malformed),
    "negative offset": ({"a": entry("F32", [2], -8, 0)}, DATA[:8], Malformed),
    "float size": ({"a": entry("F32", [2.0], 0, 8)}, DATA[:8], Malformed),
    "bool size": ({"a": entry("F32", [True, 2], 0, 8)}, DATA[:8], Malformed),
    "text size": ({"a": entry("F32", ["2"], 0, 8)}, DATA[:8], Malformed),
    "size 2^64": ({"a": entry("F32", [2**64, 0], 0, 0)}, b"", Malformed),
    "three offsets": (
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}},
        DATA[:8],
        Malformed,
    ),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, DATA[:8], Malformed),
    "entry is a list": ({"a": []}, b"", Malformed),
    "entry is null": ({"a": None}, b"", Malformed),
    "dtype is a number": ({"a": entry(32, [2], 0, 8)}, DATA[:8], Malformed),  # type: ignore[arg-type]
    "unknown dtype": ({"a": entry("F31", [2], 0, 8)}, DATA[:8], Unsupported),
    "dtype in small letters": ({"a": entry("f32", [2], 0, 8)}, DATA[:8], Unsupported),
    "half a byte": ({"a": entry("F4", [1], 0, 1)}, DATA[:1], Malformed),
    "an odd row of halves": ({"a": entry("F4", [2, 3], 0, 3)}, DATA[:3], Malformed),
    "six bits, no whole byte": ({"a": entry("F6_E3M2", [1], 0, 1)}, DATA[:1], Malformed),
    "metadata of numbers": ({"__metadata__": {"x": 1}, "a": A}, DATA[:8], Malformed),
    "metadata is a list": ({"__metadata__": [], "a": A}, DATA[:8], Malformed),
    "metadata nests": ({"__metadata__": {"x": {}}, "a": A}, DATA[:8], Malformed),
    "a list": ("[]", b"", NotACheckpoint),
    "two values": ('{"a":1} {}', b"", Malformed),
    "a comma at the end": ('{"a":null,}', b"", Malformed),
    "NaN": ('{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', DATA[:8], Malformed),
    "Infinity": ('{"a":{"dtype":"F32","shape":[],"data_offsets":[0,Infinity]}}', b"", Malformed),
    "a key twice": (
        '{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        '"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        Malformed,
    ),
    "a field twice": (
        '{"a":{"dtype":"U8","dtype":"I8","shape":[1],"data_offsets":[0,1]}}',
        b"\0",
        Malformed,
    ),
    "deep": ('{"a":' + "[" * 100 + "]" * 100 + "}", b"", LimitExceeded),
    "deep after a quote": ('{"\\"":' + "[" * 100 + "]" * 100 + "}", b"", LimitExceeded),
    "a number of many digits": (
        '{"a":{"dtype":"F32","shape":[' + "1" * 5000 + '],"data_offsets":[0,8]}}',
        DATA[:8],
        Malformed,
    ),
}
# The library takes these.
LENIENT = {"a key twice", "an odd row of halves"}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_header(name: str, path: Path) -> None:
    header, data, error = BROKEN[name]
    content = safetensors(header, data, alignment=1)
    with pytest.raises(FormatError) as caught:
        read(path, content)
    assert type(caught.value) is error
    assert caught.value.path == str(path)
    assert taken(content) == (name in LENIENT)


W = '{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
# What Python's JSON takes and serde_json does not, or the other way round.
TEXTS = {
    "minus zero": W.replace("[0,4]", "[-0,4]"),
    "minus zero in a shape": W.replace("[1]", "[1,-0]"),
    "minus zero as a float": W.replace("[0,4]", "[-0.0,4]"),
    "an exponent": W.replace("[1]", "[1e0]"),
    "a float": W.replace("[1]", "[1.0]"),
    "a leading zero": W.replace("[1]", "[01]"),
    "a plus": W.replace("[1]", "[+1]"),
    "an underscore": W.replace("4]", "0_4]"),
    "other digits": W.replace("[1]", "[\u0661]"),
    "beyond 2^64": W.replace("[1]", f"[{1 << 64}]"),
    "NaN": W.replace("[1]", "[NaN]"),
    "infinity in what nobody reads": W.replace("[1]", '[1],"x":-Infinity'),
    "beyond the floats in what nobody reads": W.replace("[1]", '[1],"x":1e999'),
    "many digits in what nobody reads": W.replace("[1]", f'[1],"x":{"9" * 400}'),
    "half a character as a key": W.replace('"w"', r'"\ud800"'),
    "the other half": W.replace('"w"', r'"\uDFFFx"'),
    "halves the wrong way round": W.replace('"w"', r'"\udc00\ud800"'),
    "half before a whole": W.replace('"w"', r'"\ud800\ud83d\ude00"'),
    "half behind a backslash": W.replace('"w"', r'"\\\ud800"'),
    "half in the metadata": W.replace("{", r'{"__metadata__":{"a":"\ud800"},', 1),
    "half in what nobody reads": W.replace("[1]", r'[1],"x":["\ud800"]'),
    "half as raw bytes": W.replace('"w"', '"\ud800"'),
    "a whole character": W.replace('"w"', r'"\ud83d\ude00"'),
    "no escape": W.replace('"w"', r'"\\ud800"'),
    "a control character": W.replace('"w"', '"a\tb"'),
    "a trailing comma": W.replace("[1]", "[1,]"),
    "a comment": W.replace("[1]", "[1]/**/"),
    "single quotes": W.replace('"', "'"),
    "an odd escape": W.replace('"w"', r'"\x41"'),
    "a short escape": W.replace('"w"', r'"\u12"'),
    "space of other kinds": W.replace("[1]", "\u00a0[1]"),
    "a form feed": W.replace("[1]", "\f[1]"),
    "zeros behind it": W + "\0",
    "metadata of numbers": W.replace("{", '{"__metadata__":{"a":1},', 1),
    "metadata of null": W.replace("{", '{"__metadata__":{"a":null},', 1),
    "a shape that wraps": W.replace("[1]", f"[{1 << 62},{1 << 62},0]").replace("0,4", "0,0"),
    "a dtype as an object": W.replace('"F32"', '{"F32":null}'),
    "a tensor as a list": '{"w":["F32",[1],[0,4]]}',
    "a null shape": W.replace("[1]", "null"),
    "three offsets": W.replace("4]", "4,4]"),
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_what_the_library_refuses_is_not_ok(text: str, path: Path) -> None:
    header = text.encode("utf-8", "surrogatepass")
    data = b"" if '"data_offsets":[0,0]' in text else b"1234"
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    with contextlib.suppress(library.SafetensorError):
        safetensors_torch.load_file(path)
        return
    assert ckptool.check(path).status is Status.DAMAGED


def test_brackets_inside_text_do_not_nest(path: Path) -> None:
    key = "[" * 1000 + '"\\' + "{" * 1000
    assert list(entries(read(path, safetensors({key: A}, DATA[:8])))) == [key]


def test_what_stands_before_the_brace_is_refused(path: Path) -> None:
    text = json.dumps({"a": A}).encode()
    for before in (b" ", b"\n", b"\xef\xbb\xbf"):
        with pytest.raises(FormatError):
            read(path, struct.pack("<Q", len(before + text)) + before + text + DATA[:8])


@pytest.mark.parametrize("size", [100_000_001, 2**40, 2**55])
def test_header_of_a_hundred_megabytes_is_the_limit(size: int, path: Path) -> None:
    with pytest.raises(LimitExceeded):
        read(path, struct.pack("<Q", size) + b"{}")


def test_truncated_at_every_byte(path: Path) -> None:
    content = safetensors({"a": A, "b": B}, DATA)
    for size in range(len(content)):
        with pytest.raises(FormatError):
            read(path, content[:size])


def test_every_byte_changed_is_refused_or_read_as_the_library_does(path: Path) -> None:
    content = safetensors({"__metadata__": {"k": "v"}, "a": A, "b": B}, DATA)
    for place, byte in enumerate(content[: -len(DATA)]):
        for value in {0, 0x20, 0x22, 0x30, 0x39, 0x5B, 0x7D, 0xFF, byte ^ 1} - {byte}:
            changed = content[:place] + bytes([value]) + content[place + 1 :]
            try:
                found = entries(read(path, changed))
            except CkptoolError:
                continue
            theirs = dict(library.deserialize(changed))
            assert found.keys() == theirs.keys()
            for key, info in found.items():
                start = info.storage.start
                assert list(info.shape) == list(theirs[key]["shape"])
                assert info.dtype.safetensors_name == theirs[key]["dtype"]
                assert changed[start : start + info.nbytes] == bytes(theirs[key]["data"])


# Sniffing.


def test_sniff() -> None:
    assert ours.sniff(safetensors({}, b""))
    assert ours.sniff(safetensors({"a": A}, DATA[:8]))
    for other in (b"", b"{", b"{}" * 20, b'        {"a": 1}', b"template{{", b"\0" * 8 + b"["):
        assert not ours.sniff(other)


# Writing.


def header_of(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header


def saved(state: dict[str, Any], tmp_path: Path) -> Path:
    torch.save(state, tmp_path / "state.pth")
    out = tmp_path / "out.safetensors"
    rewrite(tmp_path / "state.pth", out, options=QUIET)
    return out


def test_data_starts_at_a_multiple_of_eight(tmp_path: Path) -> None:
    for size in range(1, 17):
        (tmp_path / str(size)).mkdir()
        out = saved({"k" * size: torch.ones(1)}, tmp_path / str(size))
        length = int.from_bytes(out.read_bytes()[:8], "little")
        assert length % 8 == 0
        text = out.read_bytes()[8 : 8 + length]
        assert text.endswith(b"}" + b" " * (len(text) - len(text.rstrip())))
        assert len(text) - len(text.rstrip()) < 8


def test_format_is_said_and_nothing_else_where_nothing_else_is_needed(tmp_path: Path) -> None:
    out = saved({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path)
    assert header_of(out)["__metadata__"] == {"format": "pt"}


def test_order_is_noted_where_it_differs(tmp_path: Path) -> None:
    out = saved({"b": torch.ones(1), "a": torch.ones(1)}, tmp_path)
    note = json.loads(header_of(out)["__metadata__"]["ckptool"])
    assert note == {"v": 1, "order": ["b", "a"]}
    assert list(safetensors_torch.load_file(out)) == ["a", "b"]
    assert list(entries(formats.read(out))) == ["b", "a"]


def test_note_does_not_reach_the_next_file(tmp_path: Path) -> None:
    out = saved({"b": torch.ones(1), "a": torch.ones(1)}, tmp_path)
    assert formats.read(out).metadata == {"format": "pt"}
    torch_file, again = tmp_path / "x.pth", tmp_path / "again.safetensors"
    rewrite(out, torch_file, options=QUIET)
    rewrite(torch_file, again, options=QUIET)
    assert again.read_bytes() == out.read_bytes()


def test_ties_of_three(tmp_path: Path) -> None:
    shared = torch.arange(4.0)
    state = OrderedDict(z=shared, y=shared.view(4), other=torch.ones(2), x=shared)
    out = saved(state, tmp_path)
    note = json.loads(header_of(out)["__metadata__"]["ckptool"])
    assert note["ties"] == {"y": "z", "x": "z"}
    assert note["order"] == ["z", "y", "other", "x"]
    assert set(safetensors_torch.load_file(out)) == {"z", "other"}
    found = entries(formats.read(out))
    assert found["x"].storage == found["y"].storage == found["z"].storage


def test_empty_tensors_are_no_ties(tmp_path: Path) -> None:
    empty = torch.empty(0)
    out = saved({"a": empty, "b": empty, "c": torch.empty(0, 3)}, tmp_path)
    assert set(safetensors_torch.load_file(out)) == {"a", "b", "c"}


def test_six_bits_stay_in_safetensors(path: Path, tmp_path: Path) -> None:
    path.write_bytes(safetensors({"a": entry("F6_E3M2", [4], 0, 3)}, b"abc"))
    out = tmp_path / "out.safetensors"
    rewrite(path, out, options=QUIET)
    assert header_of(out)["a"] == entry("F6_E3M2", [4], 0, 3)
    assert out.read_bytes().endswith(b"abc")
    with pytest.raises(NotRepresentable):
        rewrite(path, tmp_path / "out.pth", options=QUIET)
    assert not (tmp_path / "out.pth").exists()


def test_other_layouts_are_put_in_order(path: Path, tmp_path: Path) -> None:
    path.write_bytes(safetensors({"b": B, "a": A}, DATA, alignment=1))
    out = tmp_path / "out.safetensors"
    rewrite(path, out, options=QUIET)
    assert [key for key in header_of(out) if key != "__metadata__"] == ["b", "a"]  # I64 first
    assert header_of(out)["b"]["data_offsets"] == [0, 8]
    assert out.read_bytes().endswith(DATA[8:] + DATA[:8])


def test_keys_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    keys = ['quo"te', "back\\slash", "tab\t", "nul\0", "\x7f", "\u2028", "\u5c42", "\U0001f600"]
    state = {key: torch.ones(1) for key in sorted(keys, key=str.encode)}
    out, theirs = saved(state, tmp_path), tmp_path / "theirs.safetensors"
    safetensors_torch.save_file(state, theirs, {"format": "pt"})
    assert out.read_bytes() == theirs.read_bytes()
