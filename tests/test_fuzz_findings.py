"""What fuzzing found, each as it can be told without the fuzzer; none may come back."""

from __future__ import annotations

import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, listing

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
safetensors_torch = pytest.importorskip("safetensors.torch")

sys.path.append(str(FIXTURES))

import containers  # noqa: E402
import opcodes as op  # noqa: E402

Run = Callable[..., Outcome]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "dtype",
    [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16],
    ids=str,
)
def test_a_pending_negation_of_integers_is_no_sign_bit(run: Run, here: Path, dtype: Any) -> None:
    """The sign bit was flipped whatever the dtype: -54 became 74 in the safetensors file."""
    values = torch.tensor([0, 1, 54, 127, 2])
    pending = torch._neg_view(values.to(dtype))
    torch.save({"a": pending}, "in.pth")
    assert judge.load("in.pth")["a"].is_neg()
    assert run("convert", "in.pth", "out.safetensors").code == 0
    found = safetensors_torch.load_file("out.safetensors")["a"]
    meant = pending.resolve_neg()
    assert found.view(torch.uint8).tolist() == meant.view(torch.uint8).tolist()


def test_a_pending_negation_that_torch_cannot_do_is_refused(run: Run, here: Path) -> None:
    torch.save({"a": torch._neg_view(torch.tensor([True, False])), "b": torch.zeros(1)}, "in.pth")
    done = run("convert", "in.pth", "out.safetensors")
    assert (done.code, done.out) == (5, "")
    assert "a   a pending operation that torch does not do on bool" in done.err
    assert listing(here).keys() == {"in.pth"}
    assert run("convert", "in.pth", "out.pth").code == 0
    assert judge.load("out.pth")["a"].is_neg()


def test_a_record_that_says_it_is_a_folder_is_refused(run: Run, here: Path, good: Path) -> None:
    """torch leaves such a storage as memory happens to be; ckptool used to read its bytes."""
    data = bytearray((good / "no_byteorder.pth").read_bytes())
    entry = data.rindex(b"archive/data/2") - 46
    assert data[entry : entry + 4] == b"PK\1\2"
    data[entry + 38 : entry + 42] = struct.pack("<I", 0x10)
    (here / "in.pth").write_bytes(data)
    for command in (["keys", "in.pth"], ["convert", "in.pth", "out.pth"]):
        done = run(*command)
        assert (done.code, done.out) == (3, "")
        assert "record archive/data/2 says that it is a folder, and has data" in done.err
    (truth,) = [
        value for key, value in judge.load(good / "no_byteorder.pth").items() if "1.bias" in key
    ]
    (theirs,) = [value for key, value in judge.load("in.pth").items() if "1.bias" in key]
    assert theirs.shape == truth.shape  # and its bytes are anyone's guess


def test_a_state_dict_that_nobody_edits_keeps_its_identity(run: Run, here: Path) -> None:
    """It was made anew, so that references to it from elsewhere led to the old one."""
    state: Any = OrderedDict(weight=torch.ones(2))
    state["itself"] = state
    around = {"state_dict": state, "best": {"model": state}}
    for name, content in (("inside.pth", state), ("beside.pth", around)):
        torch.save(content, name)
        done = run(
            "convert", name, f"out_{name}", "--at", "." if content is state else "state_dict"
        )
        assert done.code == 0, done.err
        assert judge.same(judge.load(name), judge.load(f"out_{name}")) == []


def test_a_call_that_is_its_own_argument_is_refused(run: Run, here: Path) -> None:
    """Two copies of the call were written in its place: found when read back, exit 70.

    The dict holds a Namespace made of the dict: a pickle can say that from the dict on only, and
    an edited state_dict is another dict.
    """
    body = b"}q\0(" + op.text("module.a") + op.tensor(op.storage(op.text("0"), 2), (2,))
    body += op.text("module.b") + op.name("argparse", "Namespace") + b"(h\0tRu"
    data = containers.torch_zip(op.pickled(body), {"0": b"12345678"})
    (here / "in.pth").write_bytes(data)
    done = run("strip-prefix", "in.pth", "out.pth")
    assert (done.code, done.out) == (5, "")
    assert "a call that is one of its own arguments cannot be pickled" in done.err
    assert listing(here).keys() == {"in.pth"}
    assert run("convert", "in.pth", "out.pth").code == 0
    assert run("strip-prefix", "--tensors-only", "in.pth", "tensors.pth").code == 0
    assert set(judge.load("tensors.pth")) == {"a"}


def test_complex128_that_lies_in_two_ways_is_compared(run: Run, here: Path) -> None:
    """An element of 16 bytes was no number to gather: exit 70."""
    values = torch.complex(torch.arange(12.0).double(), -torch.arange(12.0).double()).view(3, 4)
    torch.save({"a": values}, "rows.pth")
    torch.save({"a": values.t().contiguous().t()}, "columns.pth")
    other = values.clone()
    other[1, 2] += 1
    torch.save({"a": other.t().contiguous().t()}, "other.pth")
    assert run("diff", "rows.pth", "columns.pth").code == 0
    assert run("diff", "rows.pth", "other.pth").code == 1
    assert run("convert", "columns.pth", "out.pth").code == 0
    assert judge.same(judge.load("columns.pth"), judge.load("out.pth")) == []


def test_json_is_utf8_and_no_other_codec_is_looked_for(
    spawn: Callable[..., Outcome], tmp_path: Path
) -> None:
    """`json.loads` of bytes guesses an encoding, and imports its codec at the wish of a file."""
    (tmp_path / "model.json").write_bytes(b"{" + bytes(63) + b"\n  ")
    script = (
        "import sys; from ckptool.cli.main import main; code = main(); "
        "print([name for name in sys.modules if 'utf_32' in name or 'utf_16' in name]); "
        "sys.exit(code)"
    )
    done = spawn("keys", "model.json", program=("-c", script))
    assert (done.code, done.out) == (3, "[]\n")


@pytest.mark.parametrize("kept", [3, 8, 11])
def test_a_zip64_field_that_is_cut_off_is_refused(
    run: Run, here: Path, good: Path, kept: int
) -> None:
    """Its numbers were taken apart by the length that it states: exit 70."""
    data = (good / "odd_storage_keys.pth").read_bytes()
    at = data.rindex(b"PK\5\6")
    *_, count, size, start, _ = containers.END.unpack_from(data, at)
    (name,) = struct.unpack_from("<H", data, start + 28)
    entry = bytearray(data[start : start + 46 + name])
    entry[20:28] = b"\xff" * 8  # both sizes stand in the extra field
    extra = struct.pack("<HHQQ", 1, 16, 0, 0)[: 4 + kept]
    struct.pack_into("<H", entry, 30, len(extra))
    directory = bytes(entry) + extra + data[start + len(entry) : start + size]
    end = containers.endings(count, start, len(directory))
    (here / "in.pth").write_bytes(data[:start] + directory + end)
    done = run("keys", "in.pth")
    assert (done.code, done.out) == (3, "")
    assert "a zip64 entry without its sizes" in done.err


def test_untie_leaves_a_state_dict_that_holds_itself_alone(run: Run, here: Path) -> None:
    """It was made anew though nothing was tied; the old one stood on inside it."""
    state: dict[str, Any] = {"weight": torch.ones(2)}
    state["again"] = {"deeper": state}
    torch.save({"c": state}, "in.pth")
    assert run("convert", "--untie", "in.pth", "out.pth").code == 0
    found = judge.load("out.pth")["c"]
    assert found["again"]["deeper"] is found
    assert run("diff", "in.pth", "out.pth").code == 0
