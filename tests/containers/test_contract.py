"""Every container keeps the contract that `ckptool.testing` states."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES

from ckptool import containers
from ckptool.containers import Container, Writer
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
MADE = {"plain-pickle": lambda: embedded((GOOD / "plain_legacy.pth").read_bytes())}
CONTAINERS = {container.name: container for container in containers.built_in()}
PLAIN = CONTAINERS["safetensors"]


def embedded(file: bytes) -> bytes:
    """Pickle the call that gives what a torch file in memory holds."""
    load = b"ctorch.storage\n_load_from_bytes\n"
    return b"\x80\x03" + load + b"B" + struct.pack("<I", len(file)) + file + b"\x85R."


def files(name: str) -> list[Path]:
    return [GOOD / sample for sample in SAMPLES[name]]


def test_every_container_has_samples() -> None:
    assert SAMPLES.keys() | MADE.keys() == CONTAINERS.keys()


@pytest.mark.parametrize("name", MADE)
def test_made_samples_keep_the_contract(name: str, tmp_path: Path) -> None:
    sample = tmp_path / "sample"
    sample.write_bytes(MADE[name]())
    check_container(CONTAINERS[name], [sample], [GOOD / "plain.pth"])


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
