"""Distributed checkpoints as ckptool writes them, judged by torch: alone, and on two ranks."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, environment, listing

from ckptool import containers
from ckptool.errors import UnsafePickle
from ckptool.state import walk
from ckptool.verbs import api
from ckptool.verbs.options import WriteOptions

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
pytest.importorskip("torch.distributed.checkpoint")

from torch.distributed.checkpoint._nested_dict import flatten_state_dict  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good"
DCP: WriteOptions = {"to": "dcp", "sync": False}
# What makes no distributed checkpoint, and why.
REFUSED = {
    "aliases.pth": "a value that holds itself",
    "bare_tensor.pth": "holds no dict",
    "list_of_tensors.pth": "holds no dict",
    "dino.pth": "argparse.Namespace",
    "foreign.pth": "argparse.Namespace",
    "foreign_legacy.pth": "argparse.Namespace",
    "expanded_far.pth": "the output would have 4.0 GiB",
    "odd_dtypes.pth": "bits8: no plain tensor",
    "qtensors.pth": "qint8: no plain tensor",
    "sparse.pth": "coo: no plain tensor",
    "stdlib.pth": "is not a plain value",
    "storages.pth": "typed: a storage is not a plain value",
    "whole_model.pth": "holds no dict",
    "whole_model_legacy.pth": "holds no dict",
}
SOURCES = """
    aligned_4096.pth bf16.pth big_endian.pth big_endian_odd.pth compiled.pth complex32.pth
    conj.pth data_parallel.pth duplicate_keys.pth ema.pth empty.pth empty.safetensors
    end_record_inside.pth every_dtype.pth every_dtype.safetensors every_dtype_legacy.pth
    extra_state.pth half.pth huge_view.pth integer_keys.pth legacy_views.pth lightning.ckpt
    model_best.pth.tar model_best_legacy.pth.tar nested.pth no_crc.pth no_tensors.pth
    non_tensor.pth optimizer.pth other_order.safetensors parameters.pth parts.pth plain.pth
    plain.safetensors plain_legacy.pth protocol5.pth quantized.pth rezipped.pth
    shared_with_optimizer.pth slices.pth special_values.pth strided.pth tied.pth
    unaligned.safetensors unicode_keys.pth
""".split()


def told(folder: Path) -> Any:
    """What torch makes of a folder."""
    out = folder.parent / "told.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, out)
    return judge.load(out, weights_only=False)


def flat(content: Any) -> dict[str, Any]:
    """What torch flattens a content into before it saves it."""
    resolved = flatten_state_dict(content)[0]
    return {
        key: value.resolve_conj().resolve_neg() if torch.is_tensor(value) else value
        for key, value in resolved.items()
    }


def same(left: Any, right: Any) -> list[str]:
    loosely = {"containers": False, "metadata": False, "attributes": False}
    return judge.same(
        left, right, stride=False, storage=False, sharing=False, identity=False, **loosely
    )


def original(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return judge.load(path, weights_only=False)


@pytest.mark.parametrize("name", SOURCES)
def test_torch_loads_what_was_in_the_file(name: str, tmp_path: Path) -> None:
    judge.skip_unread(name)
    result = api.convert(GOOD / name, tmp_path / "out", **DCP)
    assert (result.container, result.written) == ("torch-dcp", len(result.map))
    wanted, found = flat(original(GOOD / name)), flat(told(tmp_path / "out"))
    if name.endswith(".safetensors"):  # the library loads in an order of its own
        wanted = {key: wanted[key] for key in sorted(wanted, key=list(found).index)}
    assert same(wanted, found) == []
    api.convert(tmp_path / "out", tmp_path / "back.pth", sync=False)
    assert same(told(tmp_path / "out"), judge.load(tmp_path / "back.pth", weights_only=False)) == []


def test_edits_are_applied_first(run: Run, tmp_path: Path) -> None:
    source, out = GOOD / "model_best.pth.tar", tmp_path / "out"
    options = ["--to", "dcp", "--strip-prefix", "module", "--drop", "classifier", "--unwrap"]
    done = run("convert", source, out, *options)
    assert (done.code, done.out) == (0, "")
    assert "read 8, renamed 6, dropped 2, written 6" in done.err
    assert "not written: epoch, arch, best_acc1, optimizer" in done.err
    state = original(source)["state_dict"]
    wanted = {key.removeprefix("module."): value for key, value in state.items()}
    wanted = {key: value for key, value in wanted.items() if not key.startswith("classifier")}
    assert same(wanted, told(out)) == []


def test_what_is_lost_is_said(run: Run, tmp_path: Path) -> None:
    content = {
        "w": torch.nn.Parameter(torch.ones(2)),
        "tied": (shared := torch.ones(3)),
        "again": shared,
        "none": {},
        "groups": [{"p": torch.ones(1)}, {}],
        1: torch.zeros(1),
    }
    torch.save(content, tmp_path / "in.pth")
    done = run("convert", tmp_path / "in.pth", tmp_path / "out", "--to", "dcp")
    assert done.code == 0
    assert "an empty dict leaves no trace in it: none, groups.1" in done.err
    assert "keys that are not text become text: 1" in done.err
    assert "Parameters become plain tensors: w" in done.err
    assert "written one by one: 1 copy more" in done.err


def test_a_plan_is_printed_and_nothing_written(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "plain.pth", tmp_path / "out", "--to", "dcp", "-n", "--json")
    assert (done.code, done.document["container"], done.document["dry_run"]) == (
        0,
        "torch-dcp",
        True,
    )
    assert list(tmp_path.iterdir()) == []


def test_the_document_counts_the_bytes_of_the_folder(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "plain.pth", tmp_path / "out", "--to", "dcp", "--json")
    assert done.code == 0
    assert done.document["nbytes"] == sum(
        path.stat().st_size for path in (tmp_path / "out").iterdir()
    )


def test_same_input_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "other"):
        api.convert(GOOD / "model_best.pth.tar", tmp_path / name, **DCP)
    assert listing(tmp_path / "one") == listing(tmp_path / "other")
    assert sorted(listing(tmp_path / "one")) == [".metadata", "__0_0.distcp"]


# What is refused.


def test_what_is_there_is_not_replaced_without_force(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    assert run("convert", GOOD / "plain.pth", out, "--to", "dcp").code == 0  # an empty one
    before = listing(out)
    refused = run("convert", GOOD / "half.pth", out, "--to", "dcp")
    assert (refused.code, "is not empty" in refused.err, listing(out)) == (5, True, before)
    assert run("convert", GOOD / "half.pth", out, "--to", "dcp", "--force").code == 0
    assert same(flat(original(GOOD / "half.pth")), flat(told(out))) == []
    (out / "notes.txt").write_text("mine")
    before = listing(out)
    refused = run("convert", GOOD / "plain.pth", out, "--to", "dcp", "--force")
    assert (refused.code, "holds other files: notes.txt" in refused.err) == (5, True)
    assert listing(out) == before
    refused = run("convert", GOOD / "plain.pth", GOOD / "half.pth", "--to", "dcp", "--force")
    assert (refused.code, "is not a folder" in refused.err) == (5, True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "told.pth"]


def test_the_input_is_not_the_output(run: Run, tmp_path: Path) -> None:
    api.convert(GOOD / "plain.pth", tmp_path / "out", **DCP)
    before = listing(tmp_path)
    refused = run("convert", tmp_path / "out", tmp_path / "out", "--to", "dcp", "--force")
    assert (refused.code, "error[same-file]" in refused.err) == (5, True)
    refused = run("convert", tmp_path / "out", "--in-place", "--to", "dcp")
    assert (refused.code, "is a folder" in refused.err) == (2, True)
    assert listing(tmp_path) == before


@pytest.mark.parametrize("command", ["strip-prefix", "add-prefix", "unwrap", "transfer"])
def test_other_commands_point_to_convert(run: Run, tmp_path: Path, command: str) -> None:
    source, out = GOOD / "model_best.pth.tar", tmp_path / "out"
    done = run(command, source, out, "--to", "dcp")
    assert (done.code, f"ckptool convert {source} {out} --to dcp" in done.err) == (2, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_distributed_checkpoint(run: Run, tmp_path: Path, name: str) -> None:
    done = run("convert", GOOD / name, tmp_path / "out", "--to", "dcp")
    assert (done.code, done.out, REFUSED[name] in done.err) == (5, "", True)
    assert list(tmp_path.iterdir()) == []


def test_a_list_that_held_an_empty_dict_is_read_back(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "set_and_bytes.pth", tmp_path / "out", "--to", "dcp")
    assert (done.code, "an empty dict leaves no trace in it: empty.1" in done.err) == (0, True)
    done = run("convert", tmp_path / "out", tmp_path / "back.pth")
    assert done.code == 0
    found = judge.load(tmp_path / "back.pth", weights_only=False)
    assert found["empty"] == [[], None, set(), (), ""]
    assert found["bytearray"] == bytearray(b"\1\2")


def test_what_is_not_plain_is_refused_or_left_behind(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "foreign.pth", tmp_path / "out", "--to", "dcp")
    assert (done.code, "error[not-representable]" in done.err) == (5, True)
    assert "args: a argparse.Namespace" in done.err
    done = run("convert", GOOD / "foreign.pth", tmp_path / "out", "--to", "dcp", "--tensors-only")
    assert (done.code, "not written: " in done.err) == (0, True)
    assert "args" in done.err
    told(tmp_path / "out")


def test_what_is_dangerous_is_refused(tmp_path: Path) -> None:
    hostile = FIXTURES / "hostile" / "os_system.pth"
    with pytest.raises(UnsafePickle):
        api.convert(hostile, tmp_path / "out", **DCP)
    assert list(tmp_path.iterdir()) == []


def test_two_entries_of_one_name_are_refused(run: Run, tmp_path: Path) -> None:
    content = {"a": {"b.c": torch.ones(1)}, "a.b": {"c": torch.ones(2)}}
    torch.save(content, tmp_path / "in.pth")
    done = run("convert", tmp_path / "in.pth", tmp_path / "out", "--to", "dcp")
    assert (done.code, "error[key-collision]" in done.err, "a.b.c" in done.err) == (2, True, True)


def test_no_dict_is_refused(run: Run, tmp_path: Path) -> None:
    done = run("convert", GOOD / "bare_tensor.pth", tmp_path / "out", "--to", "dcp")
    assert (done.code, "holds no dict" in done.err) == (5, True)


def test_a_damaged_source_is_noticed(run: Run, tmp_path: Path) -> None:
    source = FIXTURES / "hostile" / "crc_mismatch.pth"
    done = run("convert", source, tmp_path / "out", "--to", "dcp")
    assert (done.code, "do not match their checksum" in done.err) == (3, True)
    assert list(tmp_path.iterdir()) == []


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None
from ckptool.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def test_without_torch(tmp_path: Path) -> None:
    arguments = ["convert", GOOD / "model_best.pth.tar", "out", "--to", "dcp"]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert same(flat(original(GOOD / "model_best.pth.tar")), flat(told(tmp_path / "out"))) == []


LIMITED = """
import resource, signal, sys
from ckptool.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_nothing(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(100_000)}, tmp_path / "in.pth")
    command = [sys.executable, "-c", LIMITED, "convert", "in.pth", "out", "--to", "dcp"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, "error[no-space]" in done.stderr) == (5, True), done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["in.pth"]


# A cluster of two.


@pytest.mark.thorough
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
def test_two_ranks_load_it_and_what_they_save_is_read(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 3))
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "in.pth")
    api.convert(tmp_path / "in.pth", tmp_path / "written", **DCP)
    script = Path(__file__).with_name("two_ranks.py")
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2".split()
    done = subprocess.run(
        [sys.executable, *launch, script, "written", "in.pth", "saved"],
        cwd=tmp_path,
        env=environment({"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    api.convert(tmp_path / "saved", tmp_path / "back.pth", sync=False)
    back = judge.load(tmp_path / "back.pth", weights_only=False)
    assert same(told(tmp_path / "saved"), back) == []
    for name in ("rows", "columns", "both"):
        assert (
            same(dict(sorted(model.state_dict().items())), dict(sorted(back[name].items()))) == []
        )
    assert back["epoch"] == 4
    shards = {Path(path).name for path, _ in containers.read(tmp_path / "saved").files}
    assert shards == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    chunked = [
        walk.dotted(path)
        for path, info in walk.tensors(containers.read(tmp_path / "saved").tree)
        if info.storage.chunked is not None
    ]
    assert {"model.0.weight", "rows.0.weight", "columns.0.weight"} <= set(chunked)
