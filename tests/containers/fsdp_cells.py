"""Write what the ranks of FSDP and tensor parallelism save, with the truth beside it, on gloo.

usage: python fsdp_cells.py FOLDER WORLD [CELL ...]

FOLDER/CELL_WORLD/ then holds the file of each rank and `truth.pth`; `expect.txt` says what is
refused. `fsdp_matrix.py FOLDER` judges them. Cells that a version of torch lacks are left out.
"""

from __future__ import annotations

import io
import os
import socket
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)


class Net(nn.Module):
    """Odd widths, rows fewer than ranks, statistics, buffers of two kinds."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.emb, self.fc1, self.norm = nn.Embedding(33, 16), nn.Linear(16, 7), nn.LayerNorm(7)
        self.bn, self.fc2, self.one = nn.BatchNorm1d(7), nn.Linear(7, 3), nn.Linear(3, 1)
        self.conv = nn.Conv1d(3, 5, 2)
        self.register_buffer("scale", torch.rand(7))
        self.register_buffer("count", torch.tensor(7))
        self.to(dtype)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Return a number that all parameters take part in."""
        x = self.bn(self.norm(self.fc1(self.emb(ids).mean(1)))) * self.scale
        x = self.fc2(x)
        return self.one(x).sum() + self.conv(x.unsqueeze(-1).expand(-1, -1, 3)).sum()


class Mlp(nn.Module):
    """What tensor parallelism cuts by columns and by rows."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(16), nn.Linear(16, hidden)
        self.down, self.head = nn.Linear(hidden, 16), nn.Linear(16, 6, bias=False)
        self.register_buffer("steps", torch.tensor(5))


class Cells:
    """What one rank writes; each method is a cell."""

    def __init__(self, folder: str, rank: int, world: int) -> None:
        self.folder, self.rank, self.world = folder, rank, world

    def save(self, cell: str, name: str, content: Any, truth: Any, expect: str = "") -> None:
        """Save the file of this rank; rank 0 saves the truth."""
        place = f"{self.folder}/{cell}_{self.world}"
        os.makedirs(place, exist_ok=True)
        torch.save(content, f"{place}/{name.format(rank=self.rank, world=self.world)}")
        if self.rank == 0:
            torch.save(truth, f"{place}/truth.pth")
            with open(f"{place}/expect.txt", "w", encoding="utf-8") as file:
                file.write(expect)
        dist.barrier()

    def mesh(self, *names: str) -> Any:
        """Make a mesh, its last dimension of two where there are several."""
        sizes = [self.world] if len(names) == 1 else [self.world // 2 ** (len(names) - 1)]
        sizes += [2] * (len(names) - 1)
        return init_device_mesh("cpu", tuple(sizes), mesh_dim_names=names)

    def fsdp(self, model: nn.Module, mesh: Any) -> nn.Module:
        """Shard each child of a model, and the rest of it."""
        for child in model.children():
            fully_shard(child, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    def fsdp2(self) -> None:
        """Save state_dicts, and Parameters, in two dtypes."""
        for dtype in (torch.float32, torch.bfloat16):
            model, truth = made(Net, dtype)
            self.fsdp(model, self.mesh("fsdp"))
            word = str(dtype).removeprefix("torch.")
            name = "model_world_size_{world}_rank_{rank}.pt"
            self.save(f"fsdp2_{word}", name, model.state_dict(), truth)
            held = dict(model.named_parameters())
            whole = {key: truth[key] for key in held}
            self.save(f"fsdp2_params_{word}", "weights.rank_{rank}.pth", held, whole)

    def fsdp2_some(self) -> None:
        """Shard some modules; the others stay plain."""
        model, truth = made(Net)
        for child in (model.emb, model.fc1, model.conv):
            fully_shard(child, mesh=self.mesh("fsdp"))
        self.save("fsdp2_some", "ckpt_rank{rank}.pt", model.state_dict(), truth)

    def fsdp2_tied(self) -> None:
        """Tie a head to the embedding."""
        torch.manual_seed(0)
        model = Net()
        model.head = nn.Linear(16, 33, bias=False)
        model.head.weight = model.emb.weight
        truth = copied(model.state_dict())
        fully_shard(model, mesh=self.mesh("fsdp"))
        name = "model_world_size_{world}_rank_{rank}.pt"
        self.save("fsdp2_tied", name, model.state_dict(), truth)

    def fsdp2_dim1(self) -> None:
        """Cut columns where they are even."""
        model, truth = made(Mlp, 12)
        fully_shard(
            model,
            mesh=self.mesh("fsdp"),
            shard_placement_fn=lambda p: Shard(int(p.dim() > 1 and p.shape[1] % self.world == 0)),
        )
        name = "model_world_size_{world}_rank_{rank}.pt"
        self.save("fsdp2_dim1", name, model.state_dict(), truth)

    def fsdp2_optim(self) -> None:
        """Train, and save the optimizer too; a statistic differs between ranks."""
        model, _ = made(Net)
        self.fsdp(model, self.mesh("fsdp"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            model(torch.randint(0, 33, (4, 6))).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.bn.running_mean.add_(self.rank)
        held = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 2}
        truth = gathered(held)
        truth["model"] = OrderedDict(truth["model"])
        truth["model"]._metadata = held["model"]._metadata
        self.save("fsdp2_optim", "state_rank_{rank}.pt", held, truth, "note: bn.running_mean")

    def hsdp(self) -> None:
        """Replicate and shard."""
        model, truth = made(Net)
        self.fsdp(model, self.mesh("replicate", "shard"))
        name = "model_world_size_{world}_rank_{rank}.pt"
        self.save("hsdp", name, model.state_dict(), truth)

    def tp(self) -> None:
        """Cut columns and rows, unevenly."""
        model, truth = made(Mlp, 11)
        parallelize_module(model, self.mesh("tp"), plan())
        self.save("tp", "model.rank_{rank}.pth", model.state_dict(), truth)

    def fsdp_tp(self) -> None:
        """FSDP2 over tensor parallelism: strided pieces; tensor parallelism in a larger world."""
        name = "model_world_size_{world}_rank_{rank}.pt"
        for hidden in (12, 11, 5):
            mesh = self.mesh("dp", "tp")
            model, truth = made(Mlp, hidden)
            parallelize_module(model, mesh["tp"], plan())
            self.save(f"ddp_tp_{hidden}", name, model.state_dict(), truth)
            try:  # torch 2.6 takes even widths alone
                self.fsdp(model, mesh["dp"])
            except NotImplementedError:
                continue
            self.save(f"fsdp_tp_{hidden}", name, model.state_dict(), truth)

    def hsdp_tp(self) -> None:
        """Three dimensions, for eight ranks."""
        mesh = self.mesh("dp_replicate", "dp_shard", "tp")
        model, truth = made(Mlp, 12)
        parallelize_module(model, mesh["tp"], plan())
        self.fsdp(model, mesh["dp_replicate", "dp_shard"])
        name = "model_world_size_{world}_rank_{rank}.pt"
        self.save("hsdp_tp", name, model.state_dict(), truth)

    def dtensor(self) -> None:
        """Cut any dimension, one and two of a mesh; empty, scalar, replicated; summands."""
        torch.manual_seed(0)
        shapes = {"a": (5, 6), "b": (7, 3), "c": (1, 4), "d": (9,), "e": (2, 3, 5), "z": (0, 4)}
        truth = {key: torch.rand(shape) for key, shape in shapes.items()}
        truth["scalar"] = torch.tensor(3.5)
        one: dict[str, list[Any]] = {key: [Shard(0)] for key in "adz"}
        one |= {"b": [Shard(1)], "c": [Replicate()], "e": [Shard(2)], "scalar": [Replicate()]}
        mesh = self.mesh("x")
        held = {key: distribute_tensor(truth[key], mesh, how) for key, how in one.items()}
        self.save("dtensor", "t_rank_{rank}.pt", held, {key: truth[key] for key in held})
        summand = DTensor.from_local(torch.rand(3, 4), mesh, [Partial()], run_check=False)
        self.save("partial", "t_rank_{rank}.pt", {"sum": summand, **held}, None, "refused: Partial")
        if self.world > 2:
            two = {"a": [Shard(0), Shard(0)], "b": [Shard(1), Shard(0)], "e": [Shard(2), Shard(1)]}
            two |= {"c": [Replicate(), Shard(1)], "d": [Shard(0), Replicate()]}
            mesh = self.mesh("x", "y")
            held = {key: distribute_tensor(truth[key], mesh, how) for key, how in two.items()}
            self.save("dtensor_two", "t_rank_{rank}.pt", held, {key: truth[key] for key in held})

    def fsdp1(self) -> None:
        """The three kinds of state_dict, whole or wrapped, with original parameters or without."""
        policy = ModuleWrapPolicy({nn.Linear, nn.Embedding})
        for how, wrap in (("one", None), ("wrapped", policy)):
            for orig in (True, False):
                model, truth = made(Net)
                sharded = FullyShardedDataParallel(
                    model,
                    use_orig_params=orig,
                    device_id=torch.device("cpu"),
                    auto_wrap_policy=wrap,
                )
                for kind in StateDictType:
                    word = kind.name.split("_")[0].lower()
                    with FullyShardedDataParallel.state_dict_type(sharded, kind):
                        held = sharded.state_dict()
                    cell = f"fsdp1_{how}_{word}_{'orig' if orig else 'flat'}"
                    expect = "refused: _flat_param" if word == "local" else ""
                    self.save(cell, f"{word}_rank_{{rank}}.pt", held, truth, expect)

    def fsdp1_hybrid(self) -> None:
        """FSDP1 on a mesh of two dimensions saves DTensors."""
        model, truth = made(Net)
        sharded = FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), device_mesh=self.mesh("replicate", "shard")
        )
        with FullyShardedDataParallel.state_dict_type(sharded, StateDictType.SHARDED_STATE_DICT):
            held = sharded.state_dict()
        self.save("fsdp1_hybrid", "sharded_rank_{rank}.pt", held, truth)

    def dcp_safetensors(self) -> None:
        """A distributed checkpoint in safetensors, in one part of the model and in two."""
        from torch.distributed.checkpoint import HuggingFaceStorageWriter, save

        for parts in (1, 2):
            model, truth = made(Net, torch.bfloat16)
            self.fsdp(model, self.mesh("fsdp"))
            where = {key: 1 + (at > 5) * (parts > 1) for at, key in enumerate(truth)}
            place = f"{self.folder}/dcp_safetensors_{parts}_{self.world}"
            os.makedirs(place, exist_ok=True)
            writer = HuggingFaceStorageWriter(
                path=place, save_distributed=True, fqn_to_index_mapping=where
            )
            save(model.state_dict(), storage_writer=writer)
            if self.rank == 0:
                torch.save(dict(truth), f"{place}/truth.pth")


def made(kind: Callable[..., nn.Module], *arguments: Any) -> tuple[Any, Any]:
    """Make a model, the same on all ranks, and copy its state_dict."""
    torch.manual_seed(0)
    model = kind(*arguments)
    return model, copied(model.state_dict())


def copied(content: Any) -> Any:
    """Save and load; ties stay."""
    torch.save(content, buffer := io.BytesIO())
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def plan() -> Mapping[str, Any]:
    """Say how the layers of an `Mlp` are cut."""
    return {"up": ColwiseParallel(), "down": RowwiseParallel()}


def gathered(held: Any) -> Any:
    """Gather the DTensors in anything."""
    if isinstance(held, DTensor):
        return held.full_tensor().detach().clone()
    if isinstance(held, dict):
        return {key: gathered(value) for key, value in held.items()}
    return [gathered(each) for each in held] if isinstance(held, list) else held


# Cells that need so many ranks.
LEAST = {"hsdp": 4, "fsdp_tp": 4, "fsdp1_hybrid": 4, "hsdp_tp": 8}
HELPERS = {"save", "mesh", "fsdp"}


def work(rank: int, folder: str, world: int, port: int, chosen: list[str]) -> None:
    """Write the cells as one rank."""
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    cells = Cells(folder, rank, world)
    names = [name for name in vars(Cells) if not name.startswith("_") and name not in HELPERS]
    for name in names:
        if LEAST.get(name, 1) <= world and (not chosen or name in chosen):
            try:
                getattr(cells, name)()
            except (ImportError, AttributeError, TypeError, RuntimeError) as error:
                print(f"{name}: {error!s:.200}" if rank == 0 else "", end="\n" * (rank == 0))
            dist.barrier()
    dist.destroy_process_group()


def main(folder: str, world: str, *chosen: str) -> None:
    """Start the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (folder, int(world), port, list(chosen)), int(world))


if __name__ == "__main__":
    main(*sys.argv[1:])
