"""Distributed checkpoints: read without torch, and judged by `dcp_to_torch_save`."""

from __future__ import annotations

import os
import pickle
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome, write_anew

from ckptool import containers
from ckptool.errors import FormatError, LimitExceeded, Malformed, Unsupported
from ckptool.state import walk
from ckptool.tensors.tensor import Packing
from ckptool.verbs import surgery
from ckptool.verbs.surgery import Options

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
pytest.importorskip("torch.distributed.checkpoint")

sys.path.append(str(FIXTURES))
import ranks  # noqa: E402
from ranks import held  # noqa: E402
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save  # noqa: E402
from torch.distributed.checkpoint.metadata import StorageMeta, TensorProperties  # noqa: E402

Run = Callable[..., Outcome]


def tensor(*shape: int, dtype: Any = torch.float32, seed: int = 0) -> Any:
    count = int(torch.Size(shape).numel())
    return (torch.arange(count) + 1 + seed).to(dtype).reshape(shape)


def two_ranks() -> list[dict[str, Any]]:
    """What two ranks of a training job hold: sharded, replicated, and plain."""
    rows = held(tensor(5, 4), [3])
    columns = held(tensor(6, 7, dtype=torch.bfloat16), [], [2])
    grid = held(tensor(5, 6, dtype=torch.int64), [2], [1, 5])
    cube = held(tensor(3, 4, 5, dtype=torch.float16), [1], [], [2])
    short = held(tensor(1, 3), [1])  # nothing is left for the second rank
    empty = held(tensor(0, 3), [0])
    moments = held(tensor(5, 4, seed=50), [3])
    return [
        {
            "model": {
                "rows": rows[rank],
                "columns": columns[rank],
                "grid": grid[rank],
                "cube": cube[rank],
                "short": short[rank],
                "empty": empty[rank],
                "replicated": tensor(3),
                "scalar": torch.tensor(2.5),
                "_extra_state": {"scale": [1.0, 2.0], "name": "fp8"},
            },
            "optim": {
                "state": {"rows": {"step": torch.tensor(7.0), "exp_avg": moments[rank]}},
                "param_groups": [{"lr": 0.5, "betas": (0.5, 0.25), "w": tensor(2)}, {"lr": 1.0}],
            },
            "epoch": 3,
            "note": None,
        }
        for rank in range(2)
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    ranks.save(tmp_path / "ckpt", two_ranks())
    return tmp_path / "ckpt"


def told(folder: Path) -> Any:
    """What torch itself makes of a folder."""
    out = folder.parent / "by_torch.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder, out)
    return judge.load(out, weights_only=False)


def converted(folder: Path, *steps: Any, **options: Any) -> Any:
    out = folder.parent / "by_ckptool.pth"
    surgery.rewrite(folder, out, steps, options=Options(sync=False, **options))
    return judge.load(out, weights_only=False)


def same(left: Any, right: Any) -> list[str]:
    return judge.same(left, right, stride=False, storage=False, sharing=False, identity=False)


def test_what_two_ranks_saved_is_what_torch_joins(folder: Path) -> None:
    assert same(converted(folder), told(folder)) == []


@pytest.mark.skipif(judge.VERSION < (2, 7), reason="torch 2.6 needs planner_data to convert")
def test_without_the_planners_paths_keys_stay_flat(tmp_path: Path) -> None:
    whole = tensor(4, 3)
    states = [{"model.w": each, "step": 3} for each in held(whole, [1])]
    ranks.save(tmp_path / "ckpt", states, flatten=False)
    assert list(told(tmp_path / "ckpt")) == ["model.w", "step"]
    assert same(converted(tmp_path / "ckpt"), told(tmp_path / "ckpt")) == []


def test_lists_have_none_where_an_empty_dict_was(tmp_path: Path) -> None:
    """The planner drops empty dicts; torch itself does not load such a folder into nothing."""
    ranks.save(tmp_path / "ckpt", [{"groups": [{}, {"w": tensor(2)}, {}, {"v": tensor(3)}]}])
    found = converted(tmp_path / "ckpt")["groups"]
    assert (found[0], found[2]) == (None, None)
    assert same([found[1], found[3]], [{"w": tensor(2)}, {"v": tensor(3)}]) == []


def test_a_whole_chunk_is_a_plain_tensor_and_others_are_assembled(folder: Path) -> None:
    found = dict(walk.tensors(containers.read(folder).tree))
    assert found["model", "replicated"].storage.packing is Packing.PLAIN
    assert found["model", "short"].storage.packing is Packing.PLAIN
    assert found["model", "rows"].storage.packing is Packing.CHUNKED


def test_the_index_can_be_named_itself(run: Run, folder: Path) -> None:
    listed = run("keys", folder)
    assert listed.code == 0
    assert run("keys", folder / ".metadata").out == listed.out


def test_an_index_of_torch_2_15_reads_as_an_older_one_does(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a sixth field for each tensor, and says where, when and by which code it was saved."""
    before = described(folder)
    metadata = index_of(folder)
    five = TensorProperties.__getstate__
    monkeypatch.setattr(
        TensorProperties, "__getstate__", lambda properties: (*five(properties)[:5], (1,))
    )
    metadata.storage_meta = StorageMeta(folder, "save", None)
    metadata.storage_meta.modules = []
    metadata.version = "1.0.0"
    rewritten(folder, metadata)
    assert described(folder) == before


def described(folder: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    found = walk.tensors(containers.read(folder).tree)
    return [(walk.dotted(at), info.dtype.label, info.shape) for at, info in found]


def test_every_file_is_watched(folder: Path) -> None:
    found = containers.read(folder)
    names = {Path(path).name for path, _ in found.files}
    assert names == {".metadata", "__0_0.distcp", "__1_0.distcp"}
    assert found.nbytes == sum(path.stat().st_size for path in folder.iterdir())


def test_commands_take_the_folder(run: Run, folder: Path, tmp_path: Path) -> None:
    listed = run("keys", "--names", folder)
    assert listed.out.split() == [*"rows columns grid cube short empty replicated scalar".split()]
    assert "state_dict at `model`" in listed.err
    assert "also contains: optim, epoch, note" in listed.err
    done = run("transfer", folder, tmp_path / "t.pth", "--drop", "grid", "--drop", "_extra_state")
    assert (done.code, "dropped 2" in done.err) == (0, True)
    assert same(judge.load(tmp_path / "t.pth")["cube"], told(folder)["model"]["cube"]) == []
    done = run("convert", folder, tmp_path / "t.safetensors", "--drop", "_extra_state")
    assert done.code == 0
    assert run("strip-prefix", "--prefix", "sh", folder, tmp_path / "s.pth").code == 2
    assert run("unwrap", folder, tmp_path / "u.pth").code == 0
    refused = run("unwrap", folder, "--in-place")
    assert refused.code == 2
    assert "is a folder" in refused.err


def test_nested_values_are_described(run: Run, folder: Path) -> None:
    done = run("info", folder)
    assert done.code == 0
    assert "distributed checkpoint" in done.out


def test_checksums_of_chunks_are_compared(run: Run, folder: Path) -> None:
    shard = folder / "__1_0.distcp"
    data = bytearray(shard.read_bytes())
    info = dict(walk.tensors(containers.read(folder).tree))["model", "rows"]
    storage = info.storage.chunked.chunks[1].source.storage
    assert storage.path == str(shard)
    data[storage.start] ^= 1
    shard.write_bytes(data)
    done = run("convert", folder, folder.parent / "out.pth")
    assert (done.code, "do not match their checksum" in done.err) == (3, True)


# Damaged and hostile.


def index_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def rewritten(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def replaced_part(metadata: Any, key: str, **fields: Any) -> None:
    index = next(index for index in metadata.storage_data if index.fqn == key)
    for name, value in fields.items():
        setattr(metadata.storage_data[index], name, value)


class Call:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch ckptool-was-executed",)


def moved(metadata: Any, key: str, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(metadata.state_dict_metadata[key].chunks[0], name, torch.Size(value))


def sized(metadata: Any, key: str, *shape: int) -> None:
    metadata.state_dict_metadata[key].size = torch.Size(shape)


Change = Callable[[Any], Any]
BROKEN: dict[str, tuple[Change, type[FormatError], str]] = {
    "absolute": (
        lambda m: replaced_part(m, "epoch", relative_path="/etc/passwd"),
        Malformed,
        "not the name of a file in the folder",
    ),
    "traversal": (
        lambda m: replaced_part(m, "epoch", relative_path="../ckpt/__0_0.distcp"),
        Malformed,
        "not the name of a file in the folder",
    ),
    "nul": (
        lambda m: replaced_part(m, "epoch", relative_path="__0_0\0.distcp"),
        Malformed,
        "not the name of a file in the folder",
    ),
    "dots": (lambda m: replaced_part(m, "epoch", relative_path=".."), Malformed, "not the name of"),
    "itself": (
        lambda m: replaced_part(m, "epoch", relative_path=".metadata"),
        Malformed,
        "1 of its 3 files are not in the folder",
    ),
    "missing": (
        lambda m: replaced_part(m, "epoch", relative_path="__7_0.distcp"),
        Malformed,
        "1 of its 3 files are not in the folder: __7_0.distcp",
    ),
    "beyond": (
        lambda m: replaced_part(m, "model.rows", length=10**9),
        Malformed,
        "and the file has",
    ),
    "far": (lambda m: replaced_part(m, "model.rows", offset=1 << 61), Malformed, "the file has"),
    "vast": (
        lambda m: replaced_part(m, "model.rows", offset=1 << 80),
        Malformed,
        "has no entry for",
    ),
    "negative": (lambda m: replaced_part(m, "epoch", offset=-4), Malformed, "impossible place"),
    "shifted": (
        lambda m: replaced_part(m, "model._extra_state.scale", offset=4, length=900),
        Malformed,
        "is not a torch zip",
    ),
    "short": (lambda m: replaced_part(m, "note", length=40), Malformed, "no end record"),
    "float offset": (
        lambda m: replaced_part(m, "epoch", offset=0.5),
        Malformed,
        "has no entry for",
    ),
    "overlap": (
        lambda m: m.storage_data.update(
            {
                index: m.storage_data[type(index)("note")]
                for index in list(m.storage_data)
                if index.fqn == "epoch"
            }
        ),
        Malformed,
        "overlaps what comes before it",
    ),
    "transformed": (
        lambda m: replaced_part(m, "epoch", transform_descriptors=["stream.zstd/1"]),
        Unsupported,
        "stream.zstd/1",
    ),
    "no place": (
        lambda m: [m.storage_data.pop(i) for i in list(m.storage_data) if i.fqn == "model.grid"],
        Malformed,
        "no entry for the chunk of model.grid at (0, 0)",
    ),
    "no place for an object": (
        lambda m: [m.storage_data.pop(i) for i in list(m.storage_data) if i.fqn == "epoch"],
        Malformed,
        "no entry for epoch",
    ),
    "gap": (
        lambda m: m.state_dict_metadata["model.grid"].chunks.pop(),
        Malformed,
        "leave a gap: they hold 27 of 30 elements",
    ),
    "no chunks": (
        lambda m: m.state_dict_metadata["model.rows"].chunks.clear(),
        Malformed,
        "they hold 0 of 20",
    ),
    "chunk moved": (
        lambda m: moved(m, "model.rows", offsets=(1, 0)),
        Malformed,
        "overlap, and leave a gap elsewhere",
    ),
    "chunk beyond": (
        lambda m: moved(m, "model.rows", offsets=(3, 0)),
        Malformed,
        "is outside of it",
    ),
    "chunk grown": (
        lambda m: moved(m, "model.rows", sizes=(4, 4)),
        Malformed,
        "overlap: they hold",
    ),
    "chunk flat": (lambda m: moved(m, "model.rows", sizes=(12,)), Malformed, "another number of"),
    "tensor grown": (lambda m: sized(m, "model.rows", 6, 4), Malformed, "leave a gap"),
    "tensor vast": (lambda m: sized(m, "model.rows", 1 << 61, 4), Malformed, "beyond 2^62"),
    "tensor negative": (lambda m: sized(m, "model.rows", -5, 4), Malformed, "negative"),
    "dtype": (
        lambda m: setattr(m.state_dict_metadata["model.rows"].properties, "dtype", torch.float16),
        Malformed,
        "should be F16 [3, 4] and is F32 [3, 4]",
    ),
    "tensor for an object": (
        lambda m: m.storage_data.update(
            {
                index: part
                for index in list(m.storage_data)
                if index.fqn == "model.replicated"
                for part in [m.storage_data[type(index)("epoch")]]
            }
        ),
        Malformed,
        "overlaps",
    ),
    "inside a tensor": (
        lambda m: m.planner_data.update({"note": ("model", "rows", "x")}),
        Malformed,
        "note is inside another entry",
    ),
    "same place": (
        lambda m: m.planner_data.update({"note": ("epoch",)}),
        Malformed,
        "note is where another entry is",
    ),
    "list and dict": (
        lambda m: m.planner_data.update({"note": ("model", 3)}),
        Malformed,
        "in a list by name, or in a dict by number",
    ),
    "long list": (
        lambda m: m.planner_data.update({"note": ("optim", "param_groups", 1 << 40)}),
        Malformed,
        "is number 1099511627776 of a list",
    ),
    "odd path": (
        lambda m: m.planner_data.update({"note": ("optim", 1.5)}),
        Malformed,
        "other things than names and numbers",
    ),
    "deep path": (
        lambda m: m.planner_data.update({"note": ("a",) * 500}),
        LimitExceeded,
        "nested more than 200 deep",
    ),
    "no storage": (lambda m: setattr(m, "storage_data", None), Malformed, "no storage_data"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_indices(run: Run, folder: Path, name: str) -> None:
    change, kind, says = BROKEN[name]
    metadata = index_of(folder)
    change(metadata)
    rewritten(folder, metadata)
    with pytest.raises(kind) as caught:
        containers.read(folder)
    assert says in caught.value.message
    done = run("convert", folder, folder.parent / "out.pth")
    assert (done.code, done.out, f"error[{caught.value.slug}]" in done.err) == (3, "", True)
    assert not (folder.parent / "out.pth").exists()


def test_a_missing_shard_is_named(run: Run, folder: Path) -> None:
    (folder / "__1_0.distcp").unlink()
    done = run("keys", folder)
    assert done.code == 3
    assert "1 of its 2 files are not in the folder: __1_0.distcp" in done.err
    assert "copy all files into one folder" in done.err


def test_what_is_missing_is_named_in_the_order_of_the_index(spawn: Run, folder: Path) -> None:
    for shard in folder.glob("*.distcp"):
        shard.unlink()
    seeds = [{"PYTHONHASHSEED": str(seed)} for seed in range(4)]
    assert len({spawn("keys", folder, env=seed).err for seed in seeds}) == 1


def test_a_truncated_shard_is_refused(run: Run, folder: Path) -> None:
    shard = folder / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-100])
    done = run("keys", folder)
    assert (done.code, "__1_0.distcp" in done.err) == (3, True)
    assert "truncated" in done.err


def test_a_shard_of_another_save_is_noted(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "__2_0.distcp").write_bytes((folder / "__1_0.distcp").read_bytes())
    assert "no entry is in __2_0.distcp" in run("keys", folder).err
    done = run("convert", folder, tmp_path / "out.pth")
    assert (done.code, "not written: __2_0.distcp" in done.err) == (0, True)


def test_a_shard_alone_asks_for_its_folder(run: Run, folder: Path) -> None:
    done = run("keys", folder / "__0_0.distcp")
    assert done.code == 3
    assert "of a distributed checkpoint" in done.err
    assert "give the folder that contains it" in done.err


@pytest.mark.parametrize("where", ["index", "popped", "object"])
def test_what_would_run_is_named_and_not_carried(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(folder.parent)
    if where == "index":
        metadata = index_of(folder)
        metadata.storage_meta = Call()
        rewritten(folder, metadata)
    elif where == "popped":
        call = pickle.dumps(Call(), 2)[2:-1]
        data = (folder / ".metadata").read_bytes()
        unframed = data[:2] + data[11:-1] if data[2:3] == b"\x95" else data[:-1]
        (folder / ".metadata").write_bytes(unframed + call + b"0.")
    else:
        states = two_ranks()
        for state in states:
            state["epoch"] = Call()
        ranks.save(folder, states)
    said = ".metadata" if where != "object" else ".distcp (epoch)"
    listed = run("keys", folder)
    assert (listed.code, "would run code when loaded" in listed.err) == (0, True)
    refused = run("convert", folder, "out.pth")
    assert (refused.code, f"{said}, byte" in refused.err) == (4, True)
    assert "posix.system('touch ckptool-was-executed')" in refused.err
    kept = run("convert", folder, "out.pth", "--tensors-only")
    assert kept.code == 0
    judge.load("out.pth")
    assert not Path("ckptool-was-executed").exists()


@pytest.mark.parametrize("position", range(0, 4000, 97))
def test_changed_bytes_of_the_index_raise_nothing_else(folder: Path, position: int) -> None:
    data = bytearray((folder / ".metadata").read_bytes())
    for value in (0x00, 0x28, 0x2E, 0x52, 0x7D, 0x94, 0xFF):
        changed = data[:]
        changed[position % len(data)] = value
        write_anew(folder / ".metadata", bytes(changed))
        try:
            containers.read(folder)
        except FormatError:
            continue


def test_an_index_that_breaks_off_is_refused(folder: Path) -> None:
    data = (folder / ".metadata").read_bytes()
    for size in range(0, len(data), 211):
        write_anew(folder / ".metadata", data[:size])
        with pytest.raises(FormatError):
            containers.read(folder)


def test_many_parts_are_many_small_reads(tmp_path: Path) -> None:
    state = {f"layers.{number}.w": tensor(2, seed=number) for number in range(600)}
    ranks.save(tmp_path / "ckpt", [{"model": state}])
    assert same(converted(tmp_path / "ckpt"), told(tmp_path / "ckpt")) == []


def test_check_reads_every_record_of_every_file(run: Run, folder: Path) -> None:
    done = run("check", folder)
    assert (done.code, done.out.startswith(f"{folder}/.metadata\tok\tdist")) == (0, True)
    info = dict(walk.tensors(containers.read(folder).tree))["model", "grid"]
    storage = info.storage.chunked.chunks[0].source.storage
    shard = Path(storage.path)
    data = shard.read_bytes()
    shard.write_bytes(data[: storage.start] + b"?" + data[storage.start + 1 :])
    done = run("check", folder)
    assert (done.code, f"record {shard.name} (model.grid at [0, 0])/data/0" in done.out) == (
        1,
        True,
    )


LIMITED = """
import resource, sys
from ckptool.cli.main import main
resource.setrlimit(resource.RLIMIT_NOFILE, (25, 25))
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a limit on open files")
def test_more_shards_than_files_may_be_open(spawn: Run, tmp_path: Path) -> None:
    """Reading has one open at a time; copying has all."""
    parts = held(tensor(40, 2), range(1, 40), by=40)
    ranks.save(tmp_path / "ckpt", [{"model": {"w": each}} for each in parts])
    assert spawn("keys", "ckpt", program=("-c", LIMITED)).code == 0
    done = spawn("convert", "ckpt", "out.pth", program=("-c", LIMITED))
    assert (done.code, "hint: ulimit -n" in done.err) == (3, True)
    assert not (tmp_path / "out.pth").exists()


def text(value: str) -> bytes:
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


@pytest.mark.parametrize("how", ["ignored", "popped", "called again"])
def test_a_call_in_what_is_made_small_is_judged(run: Run, tmp_path: Path, how: str) -> None:
    """Records of chunks are read at once into a few numbers; what else they hold is not lost."""
    call = b"cborrowed.tools\nrun\n" + text("os.system") + b"\x85R"
    inside = {
        "ignored": text("more") + call,
        "popped": call + b"0",
        "called again": text("more") + call + text("x") + b"\x85R",
    }[how]
    where = b"ctorch.distributed.checkpoint.metadata\n"
    index = b"\x80\x02" + where + b"Metadata\n)\x81}(" + text("state_dict_metadata") + b"}"
    index += text("storage_data") + b"}(" + where + b"MetadataIndex\n)\x81}(" + text("fqn")
    index += text("a") + text("offset") + b"N" + inside + b"ubNuub."
    (tmp_path / ".metadata").write_bytes(index)
    done = run("check", tmp_path / ".metadata")
    assert (done.code, "would run borrowed.tools.run('os.system')" in done.out) == (4, True)
