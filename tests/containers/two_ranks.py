"""Run by torchrun, on two gloo processes: load with sharding what ckptool wrote, save it sharded.

Arguments: the folder to load, a torch file with the same content, the folder to save into.
"""

from __future__ import annotations

import os
import sys
import warnings

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a sharded tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def zeros(like: torch.Tensor, mesh: object, placement: object) -> torch.Tensor:
    """Make a sharded tensor of zeros to load into."""
    return distribute_tensor(torch.zeros_like(like), mesh, [placement])


def main(folder: str, reference: str, out: str) -> None:
    """Load under three shardings, compare, and save under all of them."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    wanted = torch.load(reference)["model"]

    placed = {}
    for name, placement in (("rows", Shard(0)), ("columns", Shard(1)), ("both", Replicate())):
        state = {
            key: zeros(value, mesh, placement if value.dim() > 1 else Replicate())
            for key, value in wanted.items()
        }
        dcp.load({"model": state}, checkpoint_id=folder)
        for key, value in wanted.items():
            assert torch.equal(whole(state[key]), value), (name, key)
        placed[name] = state

    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    fully_shard(model, mesh=mesh)
    state = get_model_state_dict(model)
    dcp.load({"model": state}, checkpoint_id=folder)
    set_model_state_dict(model, state)
    for key, value in get_model_state_dict(model).items():
        assert isinstance(value, DTensor)
        assert torch.equal(whole(value), wanted[key]), key

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():  # in torch 2.6, fully_shard runs no model on a CPU
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    saved = {"model": get_model_state_dict(model), "optim": optimizer.state_dict(), **placed}
    dcp.save({**saved, "epoch": 4}, checkpoint_id=out)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(*sys.argv[1:])
    # All is done and flushed; threads of gloo that outlive their group would abort a slow exit.
    os._exit(0)
