"""What is not a checkpoint is named for what it is, by bytes that such files begin with."""

from __future__ import annotations

import pickle
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


def text(words: bytes) -> bytes:
    return struct.pack("<i", len(words)) + words


KINDS = {
    "a Flax checkpoint": b"\x81\xa6params\x81\xa5dense\x80",
    "parameters of MXNet": struct.pack("<QQQ", 0x112, 0, 1) + bytes(60),
    "a program of ExecuTorch": struct.pack("<I", 28) + b"ET12" + bytes(99),
    "a model of onnxruntime": struct.pack("<I", 28) + b"ORTM" + bytes(99),
    "whisper.cpp": struct.pack("<12I", 0x67676D6C, 51864, *[1] * 10),
    "a frozen TensorFlow graph": b"\x0a\x41\x0a\x07input_1\x12\x0bPlaceholder*\x0b" + bytes(30),
    "a network of Caffe": b"\x0a\x03net\xa2\x06\x30\x0a\x05conv1\x12\x0bConvolution" + bytes(9),
    "an object of Lua Torch": struct.pack("<ii", 4, 1) + text(b"V 1") + text(b"nn.Sequential"),
    "a table of Lua Torch": struct.pack("<4i", 3, 1, 2, 2) + text(b"epoch"),
    "the network of ncnn": b"7767517\n3 3\nInput data 0 1 data\n",
    "a state_dict of PaddlePaddle": pickle.dumps({"w": 1, "StructuredToParameterName@@": {}}, 2),
}


@pytest.mark.parametrize("kind", KINDS)
def test_other_formats_are_named(run: Run, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(KINDS[kind])
    done = run("info", path)
    assert done.code == 3
    assert kind in done.err
    for end in range(1, len(KINDS[kind])):  # no cut of it is taken for another
        path.write_bytes(KINDS[kind][:end])
        assert run("check", path).code in (1, 3, 4)


def test_what_a_failed_save_left(run: Run, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "failed.pt"
    with pytest.raises(TypeError):
        torch.save({"w": torch.ones(3), "lock": threading.Lock()}, path)
    assert "an unfinished torch.save" in run("info", path).err
    with pytest.raises(TypeError):
        torch.save({"lock": threading.Lock()}, path, _use_new_zipfile_serialization=False)
    assert "an unfinished torch.save" in run("info", path).err


def test_a_package_is_named(run: Run, tmp_path: Path) -> None:
    package = pytest.importorskip("torch.package")
    path = tmp_path / "packaged.pt"
    with package.PackageExporter(path) as exporter:
        exporter.save_pickle("model", "model.pkl", {"a": 1})
    assert "a package of torch.package" in run("info", path).err


@pytest.mark.parametrize("suffix", [".gguf", ".onnx", ".npz", ".h5", ".msgpack", ".tflite"])
def test_names_of_other_formats_are_refused(
    run: Run, tmp_path: Path, good: Path, suffix: str
) -> None:
    out = tmp_path / f"out{suffix}"
    done = run("convert", good / "plain.pth", out)
    assert (done.code, out.exists()) == (2, False)
    assert "--to" in done.err
    assert run("convert", good / "plain.pth", out, "--to", "safetensors").code == 0
