"""The container npz: one file beside this one, which ckptool finds by an entry point."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import FIXTURES, Outcome, environment

np = pytest.importorskip("numpy")
safetensors_numpy = pytest.importorskip("safetensors.numpy")

HERE = Path(__file__).parent
GOOD = FIXTURES / "good"
Command = Callable[..., Outcome]

ARRAYS = {
    "c": np.arange(6, dtype="<f4").reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(24, dtype="<f8").reshape(2, 3, 4)),
    "big": np.arange(5, dtype=">i4"),
    "bool": np.array([True, False]),
    "complex": np.array([1 + 2j], dtype="<c8"),
    "half": np.arange(3, dtype="<f2"),
    "scalar": np.array(7, dtype="<u8"),
    "empty": np.zeros((0, 4), dtype="i1"),
    "layer.weight": np.ones((3, 1), dtype="u1"),
}


@pytest.fixture(scope="module")
def arrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "x.npz", **ARRAYS)
    np.savez_compressed(folder / "packed.npz", **ARRAYS)
    np.savez(folder / "objects.npz", o=np.array([print, None], dtype=object))
    return folder


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Command]:
    """Make what runs a command line where a plugin is installed; an empty target is none."""

    def installed(target: str = "npz_container:CONTAINER", **variables: str) -> Command:
        folder = tmp_path / "site"
        info = folder / "ckptool_npz-1.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ckptool-npz\nVersion: 1.0\n")
        entry_points = f"[ckptool.containers]\nnpz = {target}\n" if target else ""
        (info / "entry_points.txt").write_text(entry_points)
        paths = os.pathsep.join(map(str, (FIXTURES.parent, HERE, folder)))

        def run(*arguments: object) -> Outcome:
            found = subprocess.run(
                [sys.executable, "-m", "ckptool", *map(str, arguments)],
                cwd=tmp_path,
                env=environment({"PYTHONPATH": paths, **variables}),
                capture_output=True,
                text=True,
                timeout=60,
                check=False,
            )
            return Outcome(found.returncode, found.stdout, found.stderr)

        return run

    return installed


@pytest.mark.parametrize("name", ["x.npz", "packed.npz"])
def test_the_reader_keeps_the_contract(arrays: Path, name: str) -> None:
    from npz_container import CONTAINER

    from ckptool.testing import check_container

    others = [GOOD / other for other in ("plain.pth", "script.pt", "torch_0_1.tar")]
    check_container(CONTAINER, [arrays / name], others)


@pytest.mark.parametrize("name", ["x.npz", "packed.npz"])
def test_an_npz_is_converted_as_numpy_reads_it(
    command: Callable[..., Command], arrays: Path, tmp_path: Path, name: str
) -> None:
    run = command()
    listed = run("keys", arrays / name)
    assert listed.code == 0, listed.err
    rows = [line.split("\t") for line in listed.out.splitlines()]
    assert {row[0]: int(row[3]) for row in rows} == {k: a.nbytes for k, a in ARRAYS.items()}
    converted = run("convert", arrays / name, "out.safetensors")
    assert converted.code == 0, converted.err
    written = safetensors_numpy.load_file(tmp_path / "out.safetensors")
    with np.load(arrays / name) as read:
        assert written.keys() == set(read)
        for key in read:
            assert written[key].shape == read[key].shape
            assert written[key].dtype == read[key].dtype.newbyteorder("=")
            np.testing.assert_array_equal(written[key], read[key])
    assert run("diff", arrays / name, "out.safetensors").code == 0


def test_info_names_the_plugin(command: Callable[..., Command], arrays: Path) -> None:
    run = command()
    assert "numpy arrays (.npz), plugin ckptool-npz" in run("info", arrays / "x.npz").out
    document = json.loads(run("info", "--json", arrays / "x.npz").out)
    assert (document["container"], document["plugin"]) == ("npz", "ckptool-npz")
    document = json.loads(run("info", "--json", GOOD / "plain.pth").out)
    assert "plugin" not in document


def test_check_asks_plugins_only_when_it_is_told(
    command: Callable[..., Command], arrays: Path
) -> None:
    run = command()
    alone = run("check", arrays / "x.npz")
    assert alone.code == 3
    assert "not-a-checkpoint" in alone.out
    told = run("check", "--plugins", "--finite", arrays / "x.npz")
    assert told.code == 0, told.out
    assert "9 checksums match" in told.out
    data = bytearray((arrays / "x.npz").read_bytes())
    data[data.index(ARRAYS["c"].tobytes()) + 5] ^= 1
    (arrays / "bad.npz").write_bytes(data)
    assert run("check", "--plugins", arrays / "bad.npz").code == 1


@pytest.mark.parametrize("setting", ["absent", "off"])
def test_without_its_plugin_an_npz_is_no_checkpoint(
    command: Callable[..., Command], arrays: Path, setting: str
) -> None:
    run = command("") if setting == "absent" else command(CKPTOOL_NO_PLUGINS="1")
    for line in (["keys", arrays / "x.npz"], ["check", "--plugins", arrays / "x.npz"]):
        outcome = run(*line)
        assert outcome.code == 3
        assert "not-a-checkpoint" in outcome.out + outcome.err


def test_an_array_of_objects_is_refused(command: Callable[..., Command], arrays: Path) -> None:
    outcome = command()("keys", arrays / "objects.npz")
    assert outcome.code == 3
    assert "error[unsupported]" in outcome.err
    assert "holds objects" in outcome.err
    assert "plugin ckptool-npz" in outcome.err


FAILING = """
from npz_container import CONTAINER

def fail(reader):
    raise ValueError("a bug of its own")

READER = CONTAINER._replace(read=fail)
NUMBER = 7
"""


@pytest.mark.parametrize("target", ["failing:READER", "failing:NUMBER", "failing:GONE", "gone:X"])
def test_what_a_plugin_raises_names_it(
    command: Callable[..., Command], arrays: Path, tmp_path: Path, target: str
) -> None:
    run = command(target)
    (tmp_path / "site" / "failing.py").write_text(FAILING)
    outcome = run("keys", arrays / "x.npz")
    assert outcome.code == 3
    assert "error[plugin-failed]" in outcome.err
    assert "the plugin ckptool-npz failed: " in outcome.err
    assert "CKPTOOL_NO_PLUGINS=1" in outcome.err
    assert run("check", "--plugins", arrays / "x.npz").code == 3
    assert run("check", arrays / "x.npz").out.split("\t")[1] == "not-a-checkpoint"
    for line in (["keys", GOOD / "plain.pth"], ["--help"], ["convert", "--help"]):
        assert run(*line).code == 0


WRITING = """
from ckptool import containers
from npz_container import CONTAINER

safe = containers.by_word("safetensors")
PLAIN = safe._replace(
    name="plain", title="plain", word="plain", suffixes=(), sniff=lambda head: False
)
"""


def test_to_names_the_writer_of_a_plugin(command: Callable[..., Command], tmp_path: Path) -> None:
    run = command("writing:PLAIN")
    (tmp_path / "site" / "writing.py").write_text(WRITING)
    source = GOOD / "plain.pth"
    wrong = run("convert", source, "out.x", "--to", "xyz")
    assert wrong.code == 2
    assert "'xyz' is not one of 'torch', 'safetensors', 'dcp'" in wrong.err
    written = run("convert", source, "out.x", "--to", "plain")
    assert written.code == 0, written.err
    assert safetensors_numpy.load_file(tmp_path / "out.x")
