"""Files of ranks of FSDP and tensor parallelism: read as one checkpoint, or refused by name."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome

import ckptool
from ckptool import containers
from ckptool.containers.dcp_safetensors import merged

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
safetensors_torch = pytest.importorskip("safetensors.torch")

sys.path.append(str(FIXTURES))
from good_ranks import PLACED  # noqa: E402
from rank_pickles import Mesh, Piece, Shard, at, cut, write  # noqa: E402

Run = Callable[..., Outcome]
Entries = dict[str, Any]
TWO = Mesh((2,))
WEIGHT = torch.arange(20.0).reshape(5, 4)
SETS = {
    "fsdp2_ranks": "model_world_size_3_rank_1.pt",
    "mesh_ranks": "weights.rank_3.pth",
    "dcp_safetensors": "shard-00002-model-00001-of-00002.safetensors",
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def equal(found: Any, wanted: Any, *, order: bool = True) -> bool:
    """Compare two dicts of tensors by key, dtype, shape and bytes."""
    assert (list(found) == list(wanted)) if order else (found.keys() == wanted.keys())
    return all(
        (each.dtype, each.shape) == (found[key].dtype, found[key].shape)
        and torch.equal(each, found[key])
        for key, each in wanted.items()
    )


def saved(ranks: list[tuple[Mesh, Entries]], name: str = "model_rank_{}.pt") -> None:
    for rank, (mesh, entries) in enumerate(ranks):
        write(Path(name.format(rank)), mesh, entries)


def of_two(*entries: Callable[[Mesh], Entries] | Entries) -> list[tuple[Mesh, Entries]]:
    """Make the files of two ranks, each with a piece of one weight, and with more."""
    ranks = []
    for rank in range(2):
        mesh = at(TWO, rank)
        more = entries[rank % len(entries)] if entries else {}
        held = more(mesh) if callable(more) else more
        ranks.append((mesh, {"fc.weight": cut(WEIGHT, mesh, "S0"), **held}))
    return ranks


# Joined.


@pytest.mark.parametrize("name", ["", *(f"model_world_size_3_rank_{rank}.pt" for rank in range(3))])
def test_a_folder_or_any_file_of_it_is_the_model(run: Run, good: Path, name: str) -> None:
    """Uneven pieces and empty ones; order, buffers and `_metadata` are those of rank 0."""
    wanted = judge.load(good / "plain.pth")
    source = good / "fsdp2_ranks" / name
    assert run("convert", source, "out.pth").code == 0
    assert judge.same(judge.load("out.pth"), wanted, storage=False) == []
    assert run("convert", source, "out.safetensors").code == 0
    assert equal(safetensors_torch.load_file("out.safetensors"), wanted, order=False)
    assert run("diff", source, good / "plain.pth").code == 0
    assert equal(ckptool.load_state_dict(source), wanted)
    assert [row[0] for row in map(str.split, run("keys", source).out.splitlines())] == [*wanted]


def test_meshes_of_two_dimensions(run: Run, good: Path) -> None:
    """Tensor parallelism under FSDP2 cuts rows first, replicas are one; the step stays."""
    done = run("convert", good / "mesh_ranks", "out.pth")
    assert done.code == 0
    assert "4 rank files" in done.err
    assert "on a mesh of dp 2 x tp 2" in done.err
    found = judge.load("out.pth")
    wanted = {key: value for key, (value, _) in PLACED.items()} | {"steps": torch.tensor(5)}
    assert found["step"] == 3
    assert equal(found["model"], wanted)


@pytest.mark.parametrize("sizes", [(2,), (4,), (2, 3), (2, 2, 2)])
@pytest.mark.parametrize("shape", [(7,), (1,), (0,), (5, 6), (12, 8, 3), (1, 1)])
def test_every_cut_is_joined(sizes: tuple[int, ...], shape: tuple[int, ...]) -> None:
    """Each dimension of a mesh cuts one of the tensor or none, plain or strided."""
    value = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    mesh = Mesh(sizes, names=tuple("abc"[: len(sizes)]))
    ways = [[f"S{at % len(shape)}" for at in range(len(sizes))], ["S0"] * len(sizes)]
    ways += [[*["R"] * (len(sizes) - 1), "S0"], ["S0", *["R"] * (len(sizes) - 1)]]
    if len(sizes) > 1:
        behind = torch.Size(sizes[1:]).numel()
        ways.append([f"_S0/{behind}", *["S0"] * (len(sizes) - 1)])
    for number, way in enumerate(ways):
        count = torch.Size(sizes).numel()
        ranks = [at(mesh, rank) for rank in range(count)]
        held = {"even": value.repeat(count, *[1] * (value.dim() - 1)), "weight": value}
        saved(
            [(each, {key: cut(v, each, *way) for key, v in held.items()}) for each in ranks],
            f"way{number}_rank_{{}}.pt",
        )
        assert equal(ckptool.load_state_dict(f"way{number}_rank_0.pt"), held), way


def test_ties_stay_ties(run: Run) -> None:
    """Pieces that two keys share are joined once."""
    for rank in range(2):
        piece = cut(WEIGHT, at(TWO, rank), "S0")
        write(Path(f"m_rank_{rank}.pt"), at(TWO, rank), {"a.weight": piece, "b.weight": piece})
    assert run("convert", "m_rank_0.pt", "out.pth").code == 0
    found = judge.load("out.pth")
    assert equal(found, {"a.weight": WEIGHT, "b.weight": WEIGHT})
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()


def sharded(rank: int, value: Any, starts: list[int]) -> Shard:
    ends = [*starts[1:], len(value)]
    boxes = tuple(
        ((start, 0), (end - start, value.shape[1])) for start, end in zip(starts, ends, strict=True)
    )
    piece = value[starts[rank] : ends[rank]] if rank < len(starts) else None
    begins = (starts[rank] if rank < len(starts) else 0, 0)
    return Shard(piece, begins, tuple(value.shape), boxes)


def test_sharded_tensors_of_fsdp1(run: Run) -> None:
    """A rank may hold no shard; what their files name is inert, and not carried."""
    for rank in range(3):
        held = {"a": sharded(rank, WEIGHT, [0, 3]), "b": sharded(rank, WEIGHT, [0, 2, 4])}
        write(Path(f"sharded_rank_{rank}.pt"), at(Mesh((3,)), rank), held)
    for out in ("out.pth", "out.safetensors"):
        done = run("convert", "sharded_rank_2.pt", out)
        assert (done.code, "would run code" in done.err) == (0, False)
    assert run("check", ".").code == 0
    assert equal(judge.load("out.pth", weights_only=True), {"a": WEIGHT, "b": WEIGHT})
    assert equal(safetensors_torch.load_file("out.safetensors"), {"a": WEIGHT, "b": WEIGHT})


def test_a_distributed_checkpoint_in_safetensors(run: Run, good: Path) -> None:
    """Pieces begin where the metadata says; that metadata is not carried."""
    done = run("convert", good / "dcp_safetensors", "out.safetensors")
    assert done.code == 0
    assert "how many ranks wrote is not in any" in done.err
    found = safetensors_torch.load_file("out.safetensors")
    for key, value in found.items():
        parts = [
            tensors[key]
            for path in sorted((good / "dcp_safetensors").iterdir())
            if key in (tensors := safetensors_torch.load_file(path))
        ]
        assert torch.equal(torch.cat(parts), value)
    assert "metadata" not in str(run("info", "out.safetensors", "--json").document["metadata"])


def test_orders_are_merged() -> None:
    """A file has the keys that its rank wrote; what one has alone is next to its neighbours."""
    assert merged([["a", "c", "d"], ["b", "c", "d", "e"]]) == ["a", "b", "c", "d", "e"]
    assert merged([["a", "b"], ["x", "y"], ["a", "c"]]) == ["a", "c", "b", "x", "y"]
    assert merged([]) == []


# Megatron: parts side by side.


def megatron(world: int = 2) -> dict[str, Any]:
    """Cut a small model as Megatron-LM does, a folder for each rank; return the model."""
    torch.manual_seed(0)
    shapes = {"linear_qkv.weight": (24, 8), "linear_fc1.weight": (32, 8), "linear_fc1.bias": (32,)}
    shapes |= {"linear_proj.weight": (8, 8), "linear_fc2.weight": (8, 32), "norm.weight": (8,)}
    model = {"embedding.word_embeddings.weight": torch.rand(32, 8)}
    model |= {f"decoder.layers.0.{key}": torch.rand(shape) for key, shape in shapes.items()}
    for rank in range(world):
        held = {
            key: value
            if "norm" in key
            else value.chunk(world, int("proj" in key or "fc2" in key))[rank].clone()
            for key, value in model.items()
        }
        args = argparse.Namespace(tensor_model_parallel_size=world)
        os.makedirs(f"iter/mp_rank_{rank:02}")
        path = f"iter/mp_rank_{rank:02}/model_optim_rng.pt"
        torch.save({"args": args, "model": held, "iteration": 10}, path)
    return model


def test_parts_of_megatron_are_listed_and_a_recipe_fuses_them(run: Run) -> None:
    """The recipe of the manual; without it each part keeps a key of its own."""
    model = megatron()
    for source in ("iter", "iter/mp_rank_01/model_optim_rng.pt"):
        done = run("keys", source)
        keys = [line.split("\t")[0] for line in done.out.splitlines()]
        assert keys == [f"mp_rank_{rank:02}.{key}" for rank in range(2) for key in model]
        assert "a recipe with `fuse` joins them" in done.err
    page = (Path(ckptool.__file__).parent / "manual" / "containers.md").read_text()
    Path("two.toml").write_text(page.partition("```toml\n")[2].partition("```")[0])
    done = run("convert", "iter", "out.safetensors", "--recipe", "two.toml")
    assert done.code == 0
    assert equal(safetensors_torch.load_file("out.safetensors"), model, order=False)


def test_a_missing_rank_of_megatron_is_refused(run: Run) -> None:
    megatron()
    shutil.rmtree("iter/mp_rank_00")
    for source in ("iter", "iter/mp_rank_01/model_optim_rng.pt"):
        assert "1 of 2 ranks" in lines(run("convert", source, "out.pth"))
    assert run("keys", "--all", "iter/mp_rank_01/model_optim_rng.pt").code == 0


def test_a_model_of_megatron_that_was_not_cut_is_whole(run: Run) -> None:
    model = megatron(1)
    done = run("unwrap", "iter/mp_rank_00/model_optim_rng.pt", "out.pth", "--at", "model")
    assert done.code == 0
    assert equal(judge.load("out.pth"), model)


# What is no piece.


def test_buffers_that_differ_are_named(run: Run) -> None:
    saved(
        of_two(
            {"bn.running_mean": torch.zeros(3), "count": torch.tensor(3), "same": torch.ones(2)},
            {"bn.running_mean": torch.ones(3), "count": torch.tensor(4), "same": torch.ones(2)},
        )
    )
    done = run("convert", "model_rank_1.pt", "out.pth", "--json")
    (said,) = [each for each in done.document["notes"] if "differ" in each]
    assert "bn.running_mean, count" in said
    assert "same" not in said
    found = judge.load("out.pth")
    assert torch.equal(found["bn.running_mean"], torch.zeros(3))
    assert found["count"] == 3


@pytest.mark.parametrize("case", ["differs", "missing", "shape"])
def test_parameters_that_differ_are_refused(run: Run, case: str) -> None:
    other: Entries = {"norm.weight": torch.zeros(3)}
    other = {"differs": other, "missing": {}, "shape": {"norm.weight": torch.ones(4)}}[case]
    saved(of_two({"norm.weight": torch.ones(3)}, other))
    done = run("convert", "model_rank_0.pt", "out.pth")
    assert (done.code, done.out, os.path.exists("out.pth")) == (3, "", False)
    assert "error[malformed]" in done.err
    assert "norm.weight" in done.err
    assert "model_rank_1.pt" in done.err


def test_bytes_decide_where_no_checksum_is_recorded(run: Run) -> None:
    """Legacy files record none: the bytes are read."""
    for differ in (0.0, 1.0):
        for rank, (mesh, entries) in enumerate(of_two()):
            norm = torch.full((1000,), differ * rank)
            write(Path(f"m_rank_{rank}.pt"), mesh, {**entries, "norm.weight": norm})
            data = bytearray(Path(f"m_rank_{rank}.pt").read_bytes())
            crcs = [m.start() for m in re.finditer(b"PK\1\2", data)]
            for start in crcs:  # no CRC-32 in the directory: none is recorded
                data[start + 16 : start + 20] = bytes(4)
            Path(f"m_rank_{rank}.pt").write_bytes(data)
        assert run("keys", "m_rank_0.pt").code == (3 if differ else 0)


# Refused.


def lines(done: Outcome) -> str:
    assert done.code == 3
    assert done.out == ""
    assert done.err.count("error[") == 1
    assert list(Path().glob("out*")) == []
    return done.err


@pytest.mark.parametrize("name", ["fsdp2_ranks", "mesh_ranks"])
def test_each_file_that_is_missing_is_named(run: Run, good: Path, name: str) -> None:
    files = sorted(path.name for path in (good / name).iterdir())
    for number, missing in enumerate(files):
        shutil.copytree(good / name, "set")
        os.unlink(f"set/{missing}")
        for source in ("set", f"set/{files[number - 1]}"):
            said = lines(run("convert", source, "out.pth"))
            assert f"without rank {number}" in said
            assert f"{len(files) - 1} of {len(files)} rank files" in said
        shutil.rmtree("set")


@pytest.mark.parametrize("name", SETS)
def test_each_file_that_is_cut_off_is_named(run: Run, good: Path, name: str) -> None:
    for path in sorted((good / name).iterdir()):
        shutil.copytree(good / name, "set")
        Path("set", path.name).write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert path.name in lines(run("convert", "set", "out.pth"))
        shutil.rmtree("set")


def test_a_damaged_file_of_another_model_is_in_no_way(run: Run) -> None:
    """`lora_rank4.pt` and `lora_rank16.pt` are named as ranks are, and are none."""
    Path("lora_rank4.pt").write_bytes(b"PK")
    torch.save({"a.weight": WEIGHT}, "lora_rank16.pt")
    assert run("convert", "lora_rank16.pt", "out.pth").code == 0
    saved(of_two())
    Path("model_rank_0.pt").write_bytes(b"PK")
    os.unlink("out.pth")
    assert "model_rank_0.pt" in lines(run("convert", "model_rank_1.pt", "out.pth"))


def test_a_missing_shard_of_the_first_rank_leaves_a_gap(run: Run, good: Path) -> None:
    shutil.copytree(good / "dcp_safetensors", "set")
    os.unlink("set/shard-00001-model-00002-of-00002.safetensors")
    assert "out.weight [3, 5] leave a gap" in lines(run("convert", "set", "out.pth"))


def test_files_of_another_world_are_refused(run: Run, good: Path) -> None:
    shutil.copytree(good / "fsdp2_ranks", "set")
    saved([(at(Mesh((4,)), 2), {"classifier.bias": torch.zeros(10)})], "set/x{}.pt")
    os.replace("set/x0.pt", "set/model_world_size_3_rank_2.pt")
    said = lines(run("convert", "set", "out.pth"))
    assert "model_world_size_3_rank_2.pt" in said


def test_several_sets_are_listed(run: Run, good: Path) -> None:
    shutil.copytree(good / "fsdp2_ranks", "set")
    shutil.copytree(good / "mesh_ranks", "set", dirs_exist_ok=True)
    done = run("convert", "set", "out.pth")
    assert done.code == 2
    assert "model_world_size_3_rank_0.pt" in done.err
    assert "weights.rank_0.pth" in done.err


def test_flat_parameters_say_what_is_missing(run: Run, hostile: Path) -> None:
    said = lines(run("convert", hostile / "ranks_flat", "out.pth"))
    assert "no file says their names and shapes" in said
    assert "FULL_STATE_DICT" in said


def test_what_a_rank_calls_is_told_and_not_carried(run: Run) -> None:
    from hostile_pickles import RUN

    saved(of_two({}, {"hook": RUN}))
    done = run("convert", "model_rank_0.pt", "out.pth")
    assert done.code == 0
    assert "would run code when loaded; the output does not carry it" in done.err
    assert equal(judge.load("out.pth", weights_only=True), {"fc.weight": WEIGHT})
    assert run("check", ".").code == 4


# Whole, and parts alone.


def test_whole_files_of_ranks_are_whole(run: Run) -> None:
    """FULL_STATE_DICT, and what was replicated: each is a checkpoint of its own."""
    saved([(at(TWO, rank), {"fc.weight": WEIGHT + rank}) for rank in range(2)], "full_rank_{}.pt")
    copies = [Piece(WEIGHT + rank, (5, 4), ("R",)) for rank in range(2)]
    saved([(at(TWO, rank), {"w": each}) for rank, each in enumerate(copies)], "copy_rank_{}.pt")
    for rank in range(2):
        for name, key in (("full", "fc.weight"), ("copy", "w")):
            done = run("convert", f"{name}_rank_{rank}.pt", "out.safetensors", "--force")
            assert (done.code, "joined" in done.err) == (0, False)
            found = safetensors_torch.load_file("out.safetensors")
            assert torch.equal(found[key], WEIGHT + rank)


@pytest.mark.parametrize("name", SETS)
def test_a_file_alone_is_a_part(run: Run, good: Path, name: str) -> None:
    path = good / name / SETS[name]
    assert run("keys", "--all", path).code == 0
    for command in ("info", "check"):
        found = run(command, path, "--json").document
        part = (found["files"][0] if command == "check" else found)["part"]
        assert part is not None
    shutil.copytree(good / name, "set")
    offered = run("info", f"set/{SETS[name]}", "--json").document["suggestions"]
    commands = [each["command"].split() for each in offered]
    assert [words[1] for words in commands] == ["convert", "keys"]
    for words in commands:
        assert run(*words[1:]).code == 0
    assert run("check", good / name).code == 0
    checked = run("check", good / name, "--json").document
    assert [each["part"] for each in checked["files"]] == [None]


def test_a_mesh_that_lies_takes_no_time(run: Run, hostile: Path) -> None:
    said = lines(run("keys", hostile / "ranks_huge_mesh"))
    assert "2 of 4611686018427387904 rank files" in said
    assert len(said) < 1000


def test_a_set_is_read_in_little_memory() -> None:
    """What is said of each piece is dropped file by file: many ranks pass the budget of one."""
    count = 24
    mesh = Mesh((count,))
    value = torch.arange(float(count))
    for rank in range(count):
        here = at(mesh, rank)
        write(
            Path(f"m_rank_{rank}.pt"),
            here,
            {f"layers.{number}.weight": cut(value, here, "S0") for number in range(60)},
        )
    with ckptool.max_memory("64MiB"):
        read = containers.read("m_rank_0.pt")
    assert len(read.shards) == count
    assert [each.tree is None for each in read.shards] == [False, *[True] * (count - 1)]
