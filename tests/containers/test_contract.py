"""Every container keeps the contract that `ckptool.testing` states."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from ckptool import containers
from ckptool.containers import Container, Writer
from ckptool.containers._container import nothing
from ckptool.files.fileio import Reader
from ckptool.testing import check_container

GOOD = FIXTURES / "good"
SAMPLES = {
    "torch-zip": ("plain.pth", "model_best.pth.tar", "tied.pth", "strided.pth", "big_endian.pth"),
    "safetensors": ("plain.safetensors", "metadata.safetensors", "empty.safetensors"),
    "torch-tar": ("torch_0_1.tar", "torch_0_1_imitation.tar"),
    "torch-legacy": ("plain_legacy.pth", "legacy_views.pth"),
    "torchscript": ("script.pt", "script_2018.pt"),
    "torch-dcp": ("dcp/.metadata", "dcp_two_ranks/.metadata"),
    "safetensors-sharded": ("sharded_safetensors/model.safetensors.index.json",),
    "torch-sharded": ("sharded_bin/pytorch_model.bin.index.json",),
}
# A container of a set reads no file alone.
CONTAINERS = {each.name: each for each in containers.built_in() if each.read is not nothing}
PLAIN = CONTAINERS["safetensors"]


def plain_pickle(folder: Path) -> Path:
    """Pickle the call that gives what a torch file in memory holds."""
    file = (GOOD / "plain_legacy.pth").read_bytes()
    load = b"ctorch.storage\n_load_from_bytes\n"
    pickled = b"\x80\x03" + load + b"B" + struct.pack("<I", len(file)) + file + b"\x85R."
    (folder / "sample").write_bytes(pickled)
    return folder / "sample"


def unpacked(folder: Path) -> Path:
    with zipfile.ZipFile(GOOD / "plain.pth") as archive:
        archive.extractall(folder)
    return next(folder.glob("*/data.pkl"))


def exported(folder: Path) -> Path:
    size = [{"as_int": 2}, {"as_int": 3}]
    meta = {"dtype": 7, "layout": 7, "sizes": size, "strides": [{"as_int": 3}, {"as_int": 1}]}
    meta |= {"storage_offset": {"as_int": 0}, "device": {"type": "cpu", "index": None}}
    row = {"path_name": "weight_0", "is_param": True, "use_pickle": False, "tensor_meta": meta}
    with zipfile.ZipFile(folder / "a.pt2", "w") as archive:
        archive.writestr("a/archive_format", "pt2")
        archive.writestr("a/data/weights/weight_0", bytes(24))
        config = json.dumps({"config": {"w": row}})
        archive.writestr("a/data/weights/model_weights_config.json", config)
    return folder / "a.pt2"


MADE = {"torch-export": exported, "plain-pickle": plain_pickle, "torch-folder": unpacked}


def files(name: str) -> list[Path]:
    return [GOOD / sample for sample in SAMPLES[name]]


def test_every_container_has_samples() -> None:
    assert SAMPLES.keys() | MADE.keys() == CONTAINERS.keys()


@pytest.mark.parametrize("name", MADE)
def test_made_samples_keep_the_contract(name: str, tmp_path: Path) -> None:
    check_container(CONTAINERS[name], [MADE[name](tmp_path)], [GOOD / "plain.pth"])


@pytest.mark.parametrize("name", SAMPLES)
def test_containers_keep_the_contract(name: str) -> None:
    others = [files(other)[0] for other in SAMPLES if other != name]
    check_container(CONTAINERS[name], files(name), others)


def trips_over_a_cut(reader: Reader) -> Any:
    return PLAIN.read(reader) if reader.nbytes > 99 else [][1]


def lay_out_first(checkpoint: Any, entries: dict[str, Any], untie: bool) -> Any:
    assert PLAIN.writer is not None
    return PLAIN.writer.lay_out(checkpoint, dict([*entries.items()][:1]), untie)


def imports(reader: Reader) -> Any:
    exec("pass")
    return PLAIN.read(reader)


BROKEN: dict[str, tuple[Container, str]] = {
    "takes all": (PLAIN._replace(sniff=lambda head: True), "for its own"),
    "takes none": (PLAIN._replace(sniff=lambda head: False), "does not recognise"),
    "another name": (PLAIN._replace(name="tensors"), "it calls"),
    "runs code": (PLAIN._replace(read=imports), "causes"),
    "trips over a cut": (PLAIN._replace(read=trips_over_a_cut), "out of range"),
    "loses entries": (
        PLAIN._replace(writer=Writer(lay_out_first, ".safetensors", "model", ".safetensors")),
        "not read back",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_the_contract_can_be_broken(fault: str) -> None:
    container, message = BROKEN[fault]
    with pytest.raises((AssertionError, IndexError), match=message):
        check_container(container, [GOOD / "plain.safetensors"])
