"""How a state_dict is split into shards, and their index: names and layout of huggingface_hub.

Source: huggingface_hub/serialization/_base.py (`split_state_dict_into_shards_factory`) and
`_torch.py` (`save_torch_state_dict`). Tensors that share a storage stay in one shard; one that is
larger than the limit has a shard of its own, before the one that was being filled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence

from ckptool.containers._order import noted
from ckptool.containers.sharded import ordered
from ckptool.pickles.tree import Node
from ckptool.records import dataclass, grouped
from ckptool.tensors.tensor import CompositeTensor, TensorInfo


@dataclass(frozen=True, slots=True)
class Names:
    """What the files of a set are called: `stem-00001-of-00002.suffix`."""

    stem: str
    suffix: str

    @property
    def index(self) -> str:
        """Name the index."""
        return f"{self.stem}{self.suffix}.index.json"

    def shards(self, count: int) -> list[str]:
        """Name so many shards; a single one is a file like any other."""
        if count == 1:
            return [self.stem + self.suffix]
        numbers = range(1, count + 1)
        return [f"{self.stem}-{number:05d}-of-{count:05d}{self.suffix}" for number in numbers]

    def owns(self, name: str) -> bool:
        """Tell whether a file is of a set of this name, whatever its number of shards."""
        stem, suffix = re.escape(self.stem), re.escape(self.suffix)
        return bool(re.fullmatch(rf"{stem}(-\d+-of-\d+)?{suffix}(\.index\.json)?", name))


@dataclass(frozen=True, slots=True)
class Split:
    """The keys of each shard, and how many bytes all tensors take, shared ones counted once."""

    shards: list[list[str]]
    total_nbytes: int


def split(entries: Mapping[str, Node], limit: int, *, storages: bool) -> Split:
    """Split entries into shards of at most `limit` bytes of tensors, in order.

    With `storages` a storage is written whole, as torch does it; else only what tensors see of it.
    """
    groups = grouped((_shared(key, value), key) for key, value in entries.items())
    shards: list[list[str]] = []
    current: list[str] = []
    filled = total = 0
    for keys in groups.values():
        nbytes = _nbytes([entries[key] for key in keys], storages=storages)
        total += nbytes
        if nbytes > limit:
            shards.append(keys)
            continue
        if filled + nbytes > limit:
            shards.append(current)
            current, filled = [], 0
        current, filled = current + keys, filled + nbytes
    if current or not shards:
        shards.append(current)
    position = {key: number for number, key in enumerate(entries)}
    return Split([sorted(keys, key=position.__getitem__) for keys in shards], total)


def _shared(key: str, value: Node) -> object:
    """Give what entries must have in common to need the same shard."""
    parts = value.parts if isinstance(value, CompositeTensor) else (value,)
    for part in parts:
        if isinstance(part, TensorInfo) and part.storage.nbytes:
            return part.storage
    return key


def _nbytes(values: Sequence[Node], *, storages: bool) -> int:
    """Count the bytes that tensors of one storage take in a file."""
    dense = [value for value in values if isinstance(value, TensorInfo)]
    views = {value.view: value.nbytes for value in dense}
    whole = {value.storage: value.storage.nbytes for value in dense}
    rest = sum(value.nbytes for value in values if isinstance(value, CompositeTensor))
    return rest + sum((whole if storages else views).values())


def index(
    order: Sequence[str],
    shards: Mapping[str, Sequence[str]],
    left_out: Collection[str],
    total_nbytes: int,
    versions: Node,
) -> bytes:
    """Write the index of shards: their keys by name, all of them in `order`.

    Keys `left_out` of a shard, which it notes as tied, are not named. `versions` are the
    `_metadata` that shards have no place for.
    """
    place = {key: name for name, keys in shards.items() for key in keys if key not in left_out}
    weight_map = {key: place[key] for key in order if key in place}
    held = [key for keys in shards.values() for key in keys]
    note = noted(order, {}, ordered(weight_map, held), versions)
    metadata = {"total_size": total_nbytes, **note}
    return json.dumps({"metadata": metadata, "weight_map": weight_map}, indent=2).encode()
