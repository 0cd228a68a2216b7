"""Distributed checkpoint in safetensors: files of ranks, each with pieces of tensors.

`HuggingFaceStorageWriter(save_distributed=True)` writes `shard-00001-model-00001-of-00002
.safetensors`, rank and part of the model (torch/distributed/checkpoint/_hf_utils.py,
`_gen_file_name`), and never an index. `DCP_SHARDING_INFO` in the metadata of each says where the
pieces of that file begin, in the order of the model; how large a tensor is, and how many ranks
there were, is in no file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace

from ckptool.containers import _json, _pieces
from ckptool.containers._container import Container, Traits
from ckptool.containers._sets import combined, read_part
from ckptool.errors import EditError, Malformed
from ckptool.pickles.holdings import Sizes, sizes_of
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import named_items
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.parts import SHARDING_INFO
from ckptool.state.replacing import make_state_dict
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, listed

NAME = "safetensors-dcp"
_OWN = (SHARDING_INFO, "DCP_VERSION")  # of the metadata, which is of this file's pieces alone
_Placed = tuple[Sizes, TensorInfo]


def join(files: Sequence[str], values: str) -> Checkpoint | None:
    """Read all files as one checkpoint; None where they do not say what they hold pieces of.

    Raises `Malformed` where the pieces leave a gap or overlap.
    """
    shards: dict[str, Checkpoint] = {}
    pieces: dict[str, list[_Placed]] = {}
    orders: list[list[str]] = []
    with remembered(shards.values()):
        for number, path in enumerate(files):
            shard = read_part(files, number)
            if SHARDING_INFO not in shard.metadata:
                return None
            shards[os.path.basename(path)] = shard
            placed = _placed(shard)
            orders.append(list(placed))
            for key, piece in placed.items():
                pieces.setdefault(key, []).append(piece)
        if values:
            raise EditError("a distributed checkpoint in safetensors holds one value of each")
        entries = {key: _whole(key, pieces[key]) for key in merged(orders)}
    note = f"{counted(len(shards), 'file')} joined; how many ranks wrote is not in any of them"
    first, *others = shards.values()
    texts = {name: text for each in (*others, first) for name, text in each.metadata.items()}
    made = combined(first.path, NAME, make_state_dict(dict(entries), None), shards, [note])
    return replace(made, metadata={name: texts[name] for name in texts if name not in _OWN})


def _placed(shard: Checkpoint) -> dict[str, _Placed]:
    """Return the pieces of a file by their keys, in the order of the model."""
    about = _json.load(shard.metadata[SHARDING_INFO].encode(), SHARDING_INFO)
    held = dict(named_items(shard.tree))
    placed: dict[str, _Placed] = {}
    for key, said in about.items():
        begins = sizes_of(said.get("saved_offsets")) if isinstance(said, dict) else None
        if begins is None or key not in held:
            what = "does not say where its piece begins" if key in held else "is of no tensor there"
            raise Malformed(f"{shard.path}: {SHARDING_INFO} of {key} {what}", path=shard.path)
        placed[key] = begins, held.pop(key)
    if held:
        what = f"{SHARDING_INFO} does not say where {listed(held, 3)} begin"
        raise Malformed(f"{shard.path}: {what}", path=shard.path)
    return placed


def _whole(key: str, pieces: Sequence[_Placed]) -> TensorInfo:
    """Join the pieces of a tensor, which is as large as they reach."""
    begins, first = pieces[0]
    if any(len(at) != len(first.shape) or len(at) != len(each.shape) for at, each in pieces):
        raise Malformed(f"the pieces of {key} have several numbers of dimensions")
    shape = tuple(
        max(at[dim] + piece.shape[dim] for at, piece in pieces) for dim in range(len(begins))
    )
    return _pieces.assembled(key, shape, pieces)


def merged(orders: Iterable[Sequence[str]]) -> list[str]:
    """Merge lists of keys, of which each leaves some out, in the order of all as far as it is said.

    What one has alone comes before the key that follows there, or else after the last.
    """
    keys: list[str] = []
    for order in orders:
        known, last = {*keys}, ""
        before: dict[str, list[str]] = {}
        waiting: list[str] = []
        for key in order:
            if key in known:
                before[key], waiting, last = waiting, [], key
            else:
                waiting.append(key)
        after = {last: waiting} if last else {}
        keys = [
            each for key in keys for each in (*before.get(key, ()), key, *after.get(key, ()))
        ] + ([] if last else waiting)
    return keys


CONTAINERS = (
    Container(
        NAME,
        "distributed checkpoint in safetensors",
        traits=Traits(beside_files=True, remade=True),
        written_as="safetensors",
    ),
)
