"""TorchScript archives: what torch.jit.load shows as the state_dict, taken out without torch."""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome

from ckptool import containers
from ckptool.errors import EditError
from ckptool.state import checkpoint as places, walk
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good"
BY_HAND = ("script_2018.pt", "script_2019.pt")  # torch reads them no more
NO_STATE = ("script_no_source.pt",)  # nor what has no source
WRITTEN = sorted(
    path.name for path in GOOD.glob("script*") if path.name not in (*BY_HAND, *NO_STATE)
)
CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
INDEX = CORPUS / "index.json"
ROWS = json.loads(INDEX.read_text(encoding="utf-8")) if INDEX.exists() else []
REAL = [CORPUS / row["path"] for row in ROWS if row["format"] == "torchscript"]
FILES = [*(GOOD / name for name in WRITTEN), *REAL]
FROZEN = "script_frozen.pt"  # its weights are constants of the code, its state_dict is empty
LOOSELY = {"containers": False, "metadata": False, "identity": False, "storage": False}


def of_torch(path: Path) -> Any:
    """Return the state_dict that torch.jit shows; it makes up its `_metadata`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(path, map_location="cpu").state_dict()


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.name != FROZEN], ids=lambda path: path.name
)
def test_the_state_dict_is_that_of_torch(path: Path, tmp_path: Path) -> None:
    wanted = of_torch(path)
    for edit in ({"bare": True, "unwrap": True}, {}):
        out = tmp_path / "out.pth"
        surgery.rewrite(path, out, options=Options(sync=False, force=True), **edit)
        found = judge.load(out)
        assert list(found) == list(wanted)
        assert judge.same(wanted, found, **LOOSELY) == []
        assert not any(tensor.requires_grad for tensor in found.values())
        assert not hasattr(found, "_metadata")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_keys_lists_it_in_the_same_order(path: Path, run: Run) -> None:
    wanted = of_torch(path)
    document = run("keys", "--json", path).document
    assert document["container"] == "torchscript"
    assert [each["key"] for each in document["tensors"]] == list(wanted)
    assert [each["shape"] for each in document["tensors"]] == [[*t.shape] for t in wanted.values()]


@pytest.mark.skipif(not REAL, reason="CKPTOOL_CORPUS names no folder with index.json")
@pytest.mark.parametrize("path", REAL, ids=lambda path: path.name)
def test_every_tensor_of_a_real_archive_is_listed_or_counted(path: Path) -> None:
    """`tensor_references` counts those of data.pkl that have elements or none, all of them."""
    row = next(row for row in ROWS if CORPUS / row["path"] == path)
    checkpoint = containers.read(path)
    told = [note for note in checkpoint.notes if "in other attributes" in note]
    left = int(told[0].split()[2]) if told else 0
    listed = len(list(walk.tensors(checkpoint.tree)))
    assert listed + left == row["tensor_references"]


def test_what_is_left_behind_is_named(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "script.pt", tmp_path / "out.pth")
    assert done.err.splitlines() == [
        "not written: code/ (3 records), constants.pkl",
        "took the state_dict out of a TorchScript module good_torchscript.Whole",
        "a TorchScript archive is a program; none of its code was run or judged",
        "left out 2 tensors in other attributes, as torch.jit.load's state_dict does: maybe, plain",
        f"{tmp_path / 'out.pth'}: 15 tensors, 220 B",
        "read 15, renamed 0, dropped 0, written 15",
    ]


def test_constants_of_a_frozen_module_are_counted(run: Run) -> None:
    done = run("keys", GOOD / FROZEN)
    assert (done.code, done.out) == (0, "")
    assert "left out 4 tensors without a name, constants of the code" in done.err


def test_a_frozen_module_is_not_written_without_its_weights(run: Run, tmp_path: Path) -> None:
    assert not of_torch(GOOD / FROZEN)
    done = run("convert", GOOD / FROZEN, tmp_path / "out.pth")
    assert (done.code, done.out, [*tmp_path.iterdir()]) == (2, "", [])
    assert "none of the weights would be written" in done.err
    assert "constants of the code" in done.err


def test_ties_stay_ties(tmp_path: Path) -> None:
    surgery.rewrite(GOOD / "script.pt", tmp_path / "out.pth", options=Options(sync=False))
    found = judge.load(tmp_path / "out.pth")
    for one, other in (("again", "part.weight"), ("tied.weight", "layers.1.weight")):
        assert found[one].data_ptr() == found[other].data_ptr()


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    ("command", "prefix"),
    [(["add-prefix", "--prefix", "net"], "net."), (["transfer"], ""), (["convert"], "")],
)
def test_edits_write_the_state_dict_alone(
    run: Run, tmp_path: Path, command: list[str], prefix: str, suffix: str
) -> None:
    out = tmp_path / f"out.{suffix}"
    assert run(*command, GOOD / "script_traced.pt", out).code == 0
    wanted = [prefix + key for key in of_torch(GOOD / "script_traced.pt")]
    state = places.find(containers.read(out))
    assert (state.at, list(state.entries)) == ((), wanted)


def test_it_is_not_replaced_by_its_state_dict(run: Run, tmp_path: Path) -> None:
    copy = tmp_path / "script.pt"
    copy.write_bytes((GOOD / "script.pt").read_bytes())
    with pytest.raises(EditError):
        surgery.rewrite(copy, None, bare=True, options=Options(in_place=True))
    done = run("strip-prefix", "--prefix", "part", "--in-place", copy)
    assert (done.code, done.out) == (2, "")
    assert "its state_dict cannot take its place" in done.err
    assert copy.read_bytes() == (GOOD / "script.pt").read_bytes()


def test_without_source_all_tensors_are_taken(run: Run) -> None:
    done = run("keys", "--names", GOOD / "script_no_source.pt")
    assert done.out.splitlines() == ["scale", "layer.bias"]
    assert "no source says which attributes of Net, layers.Linear are parameters" in done.err


def test_modules_that_only_code_restores_are_named(run: Run, tmp_path: Path) -> None:
    """A class whose `__setstate__` would make parameters: they cannot be told."""
    import zipfile

    source = tmp_path / "own.pt"
    with zipfile.ZipFile(GOOD / "script.pt") as old, zipfile.ZipFile(source, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name.endswith("good_torchscript.py"):
                text = "  def __setstate__(self, state: Tensor) -> None:\n    pass\n"
                head, mark, rest = data.partition(b"class Part(Module):")
                body, split, tail = rest.partition(b"  def forward(")
                data = head + mark + body + text.encode() + split + tail
            new.writestr(name, data)
    done = run("keys", "--names", source)
    assert done.code == 0
    assert "part.weight" not in done.out
    assert "determines the parameters of part, layers.0: left out" in done.err


def test_archives_of_2019_hold_what_their_tables_say(tmp_path: Path) -> None:
    """torch no longer reads them: the values here are those that the fixture wrote."""
    out = tmp_path / "out.pth"
    result = surgery.rewrite(GOOD / "script_2019.pt", out, options=Options(sync=False))
    found = judge.load(out)
    grid = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    assert list(found) == [
        "weight", "bias", "row", "counted", "tied.weight", "tied.bias", "layers.0.weight",
    ]  # fmt: skip
    assert found["weight"].equal(grid)
    assert found["tied.weight"].equal(grid.T)
    assert found["row"].equal(grid[1])
    assert found["bias"].tolist() == found["tied.bias"].tolist() == [7, 8]
    assert found["counted"].dtype is torch.int64
    assert found["counted"].item() == 5
    quantized = found["layers.0.weight"]
    assert (quantized.q_scale(), quantized.q_zero_point()) == (0.5, 3)
    assert quantized.int_repr().tolist() == [[1, 2], [-2, -1]]
    assert found["weight"].data_ptr() == found["tied.weight"].data_ptr()
    assert found["row"].storage_offset() == 3
    assert result.not_carried == ("code/Net.py", "attributes.pkl")


def test_archives_of_2018_leave_out_what_has_a_default(run: Run, tmp_path: Path) -> None:
    assert run("convert", GOOD / "script_2018.pt", tmp_path / "out.safetensors").code == 0
    data = (tmp_path / "out.safetensors").read_bytes()
    assert data.endswith(struct.pack("<2f", 7, 8))


def of_2019(path: Path, rows: list[dict[str, Any]], values: bytes, inner: list[Any]) -> Path:
    """Write an archive whose modules have attributes; tensors are three floats each."""
    import zipfile

    table = [
        {"dims": ["1"], "strides": ["1"], "dataType": "FLOAT", "data": {"key": f"tensors/{index}"}}
        for index in range(4)
    ]
    weight = {"name": "weight", "tensorId": "0"}
    counted = {"name": "counted", "tensorId": "1", "isBuffer": True}
    main = {"name": "Net", "parameters": [weight, counted], "attributes": rows}
    main["submodules"] = [{"name": "inner", "attributes": inner}]
    said = {"protoVersion": "5", "mainModule": main, "tensors": table}
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/version", b"1\n")
        archive.writestr("net/model.json", json.dumps(said))
        archive.writestr("net/attributes.pkl", values)
        for index in range(4):
            archive.writestr(f"net/tensors/{index}", struct.pack("<f", index))
    return path


def attribute(name: str, index: int, kind: str = "Tensor") -> dict[str, Any]:
    return {"type": kind, "name": name, "id": str(index)}


# What torch 1.2 writes (pickler.cpp): (tensor 1, 5, tensor 2, [tensor 3]), and torch 1.1 for one.
BY_ID = b"ctorch.jit._pickle\nbuild_tensor_from_id\n"
VALUES = (
    b"\x80\x02(" + BY_ID + b"q\0(K\x01tRK\x05h\0(K\x02tR]q\x01(h\0(K\x03tRet."
)  # fmt: skip
OF_1_1 = b"\x80\x02(c__main__\nTensorID\nq\0)\x81K\x02bt."


def test_attributes_of_2019_are_keys_where_they_are_tensors(run: Run, tmp_path: Path) -> None:
    rows = [attribute("counted", 0), attribute("rate", 1, "int"), attribute("kept", -1, "int")]
    inner = [attribute("value", 2), attribute("several", 3, "List[Tensor]")]
    path = of_2019(tmp_path / "net.pt", rows, VALUES, inner)
    done = run("keys", "--names", path)
    assert done.out.split() == ["weight", "counted", "inner.value"]
    assert run("keys", "--all", "--names", path).out.split()[-1].endswith("inner.value")
    assert run("convert", path, tmp_path / "out.safetensors").code == 0
    assert (tmp_path / "out.safetensors").read_bytes().endswith(struct.pack("<3f", 1, 2, 0))
    info = run("info", path).out
    assert "left out 1 tensor in other attributes" in info
    assert "inner.several.0" in info


def test_constants_of_2019_are_counted(run: Run, tmp_path: Path) -> None:
    path = of_2019(tmp_path / "net.pt", [], b"\x80\x02).", [])
    assert "left out 2 tensors without a name, constants of the code" in run("info", path).out


def test_attributes_of_1_1_too(run: Run, tmp_path: Path) -> None:
    path = of_2019(tmp_path / "net.pt", [attribute("value", 0)], OF_1_1, [])
    assert run("keys", "--names", path).out.split() == ["weight", "counted", "value"]


@pytest.mark.parametrize(
    "values",
    [
        b"\x80\x02(" + BY_ID + b"(K\x04tRt.",
        b"\x80\x02(" + BY_ID + b"(J\xff\xff\xff\xfftRt.",
        b"\x80\x02(" + BY_ID + b"(\x88tRt.",
        b"\x80\x02}.",
        b"\x80\x02).",
    ],
)
def test_attributes_that_count_beyond_are_damaged(run: Run, tmp_path: Path, values: bytes) -> None:
    path = of_2019(tmp_path / "net.pt", [attribute("value", 0)], values, [])
    assert run("keys", path).code == 3


def test_what_attributes_name_is_reported(run: Run, tmp_path: Path) -> None:
    values = b"\x80\x02(cposix\nsystem\n(X\x02\0\0\0idtRt."
    path = of_2019(tmp_path / "net.pt", [], values, [])
    done = run("check", path)
    assert done.code == 4
    assert "posix.system" in done.out + done.err


@pytest.mark.parametrize(
    "text", ["-1", "+1", " 1", "1_0", "1.0", "\u0661", "", "one", 1.0, True, -1]
)
@pytest.mark.parametrize("field", ["dims", "strides", "offset", "tensorId", "id"])
def test_numbers_of_2019_are_plain(run: Run, tmp_path: Path, field: str, text: object) -> None:
    path = of_2019(tmp_path / "net.pt", [attribute("value", 2)], VALUES, [])
    assert run("keys", path).code == 0
    import zipfile

    with zipfile.ZipFile(path) as old:
        records = {name: old.read(name) for name in old.namelist()}
    said = json.loads(records["net/model.json"])
    main, row = said["mainModule"], said["tensors"][0]
    place = {"tensorId": main["parameters"][0], "id": main["attributes"][0]}.get(field, row)
    place[field] = [text] if field in ("dims", "strides") else text
    with zipfile.ZipFile(path, "w") as new:
        for name, data in {**records, "net/model.json": json.dumps(said).encode()}.items():
            new.writestr(name, data)
    kept = field == "id" and str(text) == "-1"  # an attribute without a value
    assert run("keys", path).code == (0 if kept else 3)
