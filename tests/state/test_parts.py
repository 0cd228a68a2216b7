"""Files of one rank: named for what they are, and never taken for the weights."""

from __future__ import annotations

import argparse
import json
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

WEIGHT = torch.arange(28.0).reshape(7, 4)


class Call:
    """What a pickle calls, with its arguments and the state that it gives."""

    def __init__(self, function: Any, *args: Any, state: Any = None) -> None:
        self.parts = (function, args, state)

    def __reduce__(self) -> tuple[Any, ...]:
        return self.parts


def _named(module: str, name: str) -> type:
    """Make a class that pickles write under the name of one that is not installed."""
    made = type(name, (), {})
    made.__module__, made.__qualname__ = module, name
    steps = module.split(".")
    for end in range(1, len(steps) + 1):
        sys.modules.setdefault(".".join(steps[:end]), types.ModuleType(".".join(steps[:end])))
    setattr(sys.modules[module], name, made)
    return made


def _zero_3() -> dict[str, Any]:
    empty = OrderedDict({"fc.weight": torch.zeros(0), "scale": torch.ones(3)})
    shapes = [OrderedDict({"fc.weight": torch.Size([7, 4])})]
    return {"module": empty, "param_shapes": shapes, "dp_world_size": 2, "ds_version": "0.15"}


def _zero_optimizer(name: str, stage: int, count: Any) -> dict[str, Any]:
    state = {"zero_stage": stage, "partition_count": count, name: [torch.ones(14)]}
    return {"optimizer_state_dict": state, "ds_config": {}, "ds_version": "0.15"}


def _not_gathered() -> dict[str, Any]:
    keys = [f"layers.{index}.weight" for index in range(4)]
    return {**dict.fromkeys(keys, torch.zeros(0)), "norm.weight": torch.ones(4)}


def _megatron() -> dict[str, Any]:
    args = argparse.Namespace(tensor_model_parallel_size=2, pipeline_model_parallel_size=2, rank=1)
    return {"args": args, "model": {"a.weight": WEIGHT}, "iteration": 1, "checkpoint_version": 3.0}


def _references() -> dict[str, Any]:
    kind = _named("torch_xla.utils.serialization", "TensorReference")
    return {"model_state_dict": {"a": kind(), "b": kind()}, "epoch": 1}


PARTS: dict[str, tuple[str, Callable[[], Any], tuple[int | None, int | None]]] = {
    "zero 3": ("zero_pp_rank_1_mp_rank_00_model_states.pt", _zero_3, (1, 2)),
    "zero 2": (
        "zero_pp_rank_0_mp_rank_00_optim_states.pt",
        lambda: _zero_optimizer("single_partition_of_fp32_groups", 2, [2, 2]),
        (0, 2),
    ),
    "zero 3, optimizer": (
        "bf16_zero_pp_rank_3_mp_rank_00_optim_states.pt",
        lambda: _zero_optimizer("fp32_flat_groups", 3, 4),
        (3, 4),
    ),
    "not gathered": ("pytorch_model.bin", _not_gathered, (None, None)),
    "fairscale": ("model.pt", lambda: {"flat_param_0": torch.ones(28)}, (None, None)),
    "fsdp in a wrapper": (
        "model.pt",
        lambda: {"model": {"_fsdp_wrapped_module._flat_param": torch.ones(28)}},
        (None, None),
    ),
    "megatron": ("model_optim_rng.pt", _megatron, (None, 4)),
    "nemo": (
        "model.ckpt",
        lambda: {
            "state_dict": {"a.weight": WEIGHT},
            "hyper_parameters": {"cfg": {"tensor_model_parallel_size": 2}},
        },
        (None, 2),
    ),
    "xser": ("model.pt", _references, (None, None)),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_part_is_named_and_refused_as_weights(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    name, make, (rank, world) = PARTS[kind]
    monkeypatch.chdir(tmp_path)
    torch.save(make(), name)
    torch.save({"fc.weight": WEIGHT}, "whole.pth")
    _is_refused(run, name, rank, world)


def _is_refused(run: Callable[..., Any], name: str, rank: int | None, world: int | None) -> None:
    for line in (
        f"convert {name} out.safetensors",
        f"convert {name} out.pth",
        f"convert --tensors-only {name} out.pth",
        f"strip-prefix --prefix fc {name} out.pth",
        f"unwrap {name} out.pth",
        f"transfer {name} out.pth --like whole.pth",
        f"transfer whole.pth out.pth --like {name}",
        f"diff {name} whole.pth",
        f"keys {name}",
    ):
        refused = run(*line.split())
        assert refused.code == 3, (line, refused)
        assert "error[partial-checkpoint]" in refused.err
        assert refused.out == ""
        assert not list(Path().glob("out*"))
    for line in (f"keys --all {name}", f"info {name}", f"check {name}"):
        shown = run(*line.split(), "--json")
        found = shown.document["files"][0] if line.startswith("check") else shown.document
        assert (found["part"]["rank"], found["part"]["world"]) == (rank, world), line
        assert shown.code in (0, 4)
    assert "only" in run("check", name).out
    suggested = run("info", name, "--json").document["suggestions"]
    for each in suggested:
        assert run(*each["command"].split()[1:]).code == 0


def test_what_is_whole_is_no_part(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model of ZeRO stage 1 and 2, sizes of one, empty buffers, sharded optimizers."""
    monkeypatch.chdir(tmp_path)
    whole = {"fc.weight": WEIGHT, "min_val": torch.zeros(0), "max_val": torch.zeros(0)}
    shapes = [OrderedDict({"fc.weight": torch.Size([7, 4])})]
    one = argparse.Namespace(tensor_model_parallel_size=1, pipeline_model_parallel_size=1)
    files = {
        "zero_2.pt": {"module": whole, "param_shapes": shapes, "dp_world_size": 2},
        "megatron.pt": {"args": one, "model": whole, "iteration": 1},
        "model_rank_0.pt": whole,
    }
    for name, content in files.items():
        torch.save(content, name)
        assert run("check", name, "--json").document["files"][0]["part"] is None
        assert run("convert", name, f"{name}.safetensors").code == 0
        assert torch.equal(load_file(f"{name}.safetensors")["fc.weight"], WEIGHT)


def test_a_shard_of_a_distributed_checkpoint_in_safetensors(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = {"DCP_SHARDING_INFO": json.dumps({"fc.weight": {"saved_offsets": [4, 0]}})}
    save_file({"fc.weight": WEIGHT[4:].clone()}, "shard-00002.safetensors", said)
    torch.save({"fc.weight": WEIGHT}, "whole.pth")
    _is_refused(run, "shard-00002.safetensors", None, None)
    assert "begins at [4, 0]" in run("check", "shard-00002.safetensors").out


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Make a world of one."""
    if not dist.is_available():
        pytest.skip("torch was built without distributed")
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    from torch.distributed.device_mesh import init_device_mesh

    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def _sharded(pieces: list[tuple[int, torch.Tensor]], size: list[int]) -> Any:
    from torch.distributed._shard.sharded_tensor import Shard, init_from_local_shards

    made = [Shard.from_tensor_and_offsets(each, [begin, 0], 0) for begin, each in pieces]
    return init_from_local_shards(made, size)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_world_of_one_holds_the_tensor(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Any
) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    monkeypatch.chdir(tmp_path)
    torch.save(
        {
            "shard.weight": distribute_tensor(WEIGHT, mesh, [Shard(0)]),
            "copy.weight": torch.nn.Parameter(distribute_tensor(WEIGHT, mesh, [Replicate()])),
            "sharded.weight": _sharded([(0, WEIGHT.clone())], [7, 4]),
            "plain.weight": WEIGHT,
        },
        "one.pt",
    )
    listed = run("keys", "one.pt", "--json").document["tensors"]
    assert [(each["shape"], each["nbytes"]) for each in listed] == [([7, 4], 112)] * 4
    written = run("convert", "one.pt", "one.safetensors", "--json")
    assert written.code == 0
    assert not [note for note in written.document["notes"] if "attributes" in note]
    for value in load_file("one.safetensors").values():
        assert torch.equal(value, WEIGHT)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_rank_of_several_holds_pieces(
    run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mesh: Any
) -> None:
    from torch.distributed.tensor import DTensor, Partial, Shard

    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": WEIGHT}, "whole.pth")
    piece = DTensor.from_local(
        WEIGHT[:4].clone(), mesh, [Shard(0)], run_check=False, shape=WEIGHT.shape, stride=(4, 1)
    )
    for value in (piece, DTensor.from_local(WEIGHT, mesh, [Partial()])):
        torch.save({"fc.weight": value, "n": torch.ones(1)}, "piece.pt")
        _is_refused(run, "piece.pt", 0, 1)
        (listed, _) = run("keys", "--all", "piece.pt", "--json").document["tensors"]
        assert (listed["layout"], listed["shape"]) == ("DTensor", [7, 4])


def test_a_folder_of_ranks_in_safetensors_is_joined(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Each file alone is a part; the folder, or any file of it, is the whole."""
    folder = tmp_path / "saved"
    folder.mkdir()
    for rank, (start, end) in enumerate(((0, 4), (4, 7)), 1):
        about = {"DCP_SHARDING_INFO": json.dumps({"fc.weight": {"saved_offsets": [start, 0]}})}
        name = f"shard-{rank:05d}-model-00001-of-00001.safetensors"
        save_file({"fc.weight": WEIGHT[start:end].clone()}, folder / name, metadata=about)
    assert run("convert", folder, tmp_path / "out.safetensors").code == 0
    assert torch.equal(load_file(tmp_path / "out.safetensors")["fc.weight"], WEIGHT)
    assert run("check", folder).out.count("only a part of") == 0
    assert "only a part of" in run("check", folder / name).out


@pytest.mark.parametrize(
    ("names", "rank"),
    [
        (("consolidated.00.pth", "consolidated.01.pth"), 0),
        (("layer_01-model_00-model_states.pt", "layer_02-model_00-model_states.pt"), None),
        (("model-rank-1-part-0.safetensors", "model-rank-0-part-0.safetensors"), 1),
        (("rank0.safetensors", "rank1.safetensors"), 0),
    ],
)
def test_a_name_that_always_means_a_part(
    run: Callable[..., Any],
    names: tuple[str, str],
    rank: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"fc.weight": WEIGHT}, "whole.pth")
    first, second = names
    for name in names:
        write = save_file if name.endswith(".safetensors") else torch.save
        write({"w": WEIGHT, "b": WEIGHT[0].clone()}, name)
    _is_refused(run, first, rank, 2)
    Path(second).unlink()
    assert run("convert", first, "out.pth").code == 0  # one alone is the whole of a smaller model
