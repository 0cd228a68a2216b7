"""Folders of Megatron-LM and NeMo, one for each rank: the parts of every tensor, side by side.

`mp_rank_00/model_optim_rng.pt` has what rank 0 of tensor parallelism holds of every tensor
(megatron/training/checkpointing.py, `get_checkpoint_name`). Along which dimension each was cut is
known to the code of the model alone, and with a gate in it a plain join is wrong: so every tensor
keeps its part, under a key that begins with the folder of its rank, and a recipe fuses them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

from ckptool.containers._container import Container, Traits
from ckptool.containers._sets import combined, read_part
from ckptool.errors import EditError, PartialCheckpoint
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Node
from ckptool.state.checkpoint import Checkpoint, beside, locate, part_of
from ckptool.state.replacing import make_state_dict
from ckptool.text import counted, listed

NAME = "megatron-ranks"


def join(files: Sequence[str], values: str) -> Checkpoint | None:
    """Read the files of all ranks, each under the name of its folder; None for whole models.

    Raises `PartialCheckpoint` where a rank is missing.
    """
    parts: dict[str, Checkpoint] = {}
    entries: dict[str, Node] = {}
    left: list[str] = []
    world = 0
    with remembered(parts.values()):
        for number, path in enumerate(files):
            rank = os.path.basename(os.path.dirname(path))
            read = parts[rank] = read_part(files, number)
            state = locate(read)
            part = part_of(read, state)
            if part is None or part.world is None:
                return None
            world = part.world
            entries |= {f"{rank}.{key}": value for key, value in state.entries.items()}
            left += [f"{rank}: {what}" for what in beside(read.tree, state.at)]
        if values:
            raise EditError("parts of Megatron hold one value of each tensor")
        _refuse_missing(list(parts), world, files[0])
    note = (
        f"{counted(len(parts), 'part')} of each tensor, cut in a way that no file says: keys begin "
        "with the folder of the rank; a recipe with `fuse` joins them (ckptool help containers)"
    )
    tree = make_state_dict(entries, None)
    made = combined(next(iter(parts.values())).path, NAME, tree, parts, [note])
    return replace(made, unread=(*made.unread, *left))


def _refuse_missing(ranks: Sequence[str], world: int, path: str) -> None:
    if len(ranks) != world:
        raise PartialCheckpoint(
            f"{len(ranks)} of {counted(world, 'rank')} of the model are there: {listed(ranks)}",
            path=path,
            hint="each machine that saved it kept its own; copy all folders into one",
        )


CONTAINERS = (
    Container(NAME, "folders of Megatron's ranks", traits=Traits(beside_files=True, remade=True)),
)
