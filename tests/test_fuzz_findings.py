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
    assert "a call that is one of its own arguments has no place in a pickle" in done.err
    assert listing(here).keys() == {"in.pth"}
    assert run("convert", "in.pth", "out.pth").code == 0
    assert run("strip-prefix", "--tensors-only", "in.pth", "tensors.pth").code == 0
    assert set(judge.load("tensors.pth")) == {"a"}
