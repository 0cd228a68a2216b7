"""A sharded set: several checkpoint files, and an index that says which key lies in which.

The index is what transformers and huggingface_hub write (huggingface_hub/serialization/_torch.py,
`save_torch_state_dict`): `{"metadata": {"total_size": N}, "weight_map": {key: file name}}`. Index
and shards must agree both ways, so that nothing is lost or taken from the wrong place.

The order of the keys is that of the index, which huggingface_hub writes in the model's order.
transformers sorts it by name: then it is that of the shards by their number, each in its own
order. Where that would not give back what was meant, the index notes the order in its `metadata`
under `ckptool`, and `_metadata` where the shards have no place for it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from ckptool.containers import _json
from ckptool.containers._container import Container, Traits
from ckptool.containers._folder import shard_of
from ckptool.containers._order import NOTE, restored
from ckptool.containers._sets import by_number, combined, read_part
from ckptool.errors import (
    AmbiguousStateDict,
    FormatError,
    LimitExceeded,
    Malformed,
    NoStateDict,
    NotACheckpoint,
)
from ckptool.files import budget, paths
from ckptool.files.fileio import Reader
from ckptool.pickles.pickle_reader import remembered
from ckptool.pickles.tree import Node
from ckptool.state import module_metadata
from ckptool.state.checkpoint import (
    Checkpoint,
    StateDict,
    beside,
    find,
    state_dict_node,
    text_items,
)
from ckptool.state.replacing import make_state_dict
from ckptool.tensors.tensor import TENSORS, TensorInfo, tensors_of
from ckptool.text import counted, listed

PATTERNS = ("*.index.json", "*.index.*.json")
MAX_INDEX = 100_000_000
SHOWN = 8
_INDEX = re.compile(rb'\s*\{\s*("(metadata|weight_map)"\s*:|.*"weight_map"\s*:)', re.DOTALL)
_COMPUTED = ("total_size", "total_parameters")  # of the index's metadata, written anew


def sniff_safetensors(head: bytes) -> bool:
    """Check for the start of an index of safetensors shards."""
    return b'.safetensors"' in head and bool(_INDEX.match(head))


def sniff_torch(head: bytes) -> bool:
    """Check for the start of an index of other shards."""
    return b'.safetensors"' not in head and bool(_INDEX.match(head))


def read(reader: Reader) -> Checkpoint:
    """Read an index and its shards as one checkpoint.

    Raises `Malformed` where they disagree, and what reading a shard raises.
    """
    weight_map, metadata, note = _index(reader)
    folder = paths.folder_of(reader.file)
    names = _shard_names(weight_map)
    budget.current().spend(len(weight_map) * budget.NODE + len(names) * budget.NAME)
    _refuse_absent(folder, names)
    shards: dict[str, Checkpoint] = {}
    files = [paths.join(folder, name) for name in names]
    with remembered(shards.values()):
        for number, name in enumerate(names):
            shards[name] = read_part(files, number)
        parts = {name: _entries(shard, weight_map, name) for name, shard in shards.items()}
        entries = _joined(weight_map, parts)
    entries, versions, notes = restored(entries, note)
    texts, differing = _texts([_said(each, parts[name]) for name, each in shards.items()], metadata)
    state_dict = make_state_dict(entries, versions or _module_metadata(parts.values()))
    has_pickles = any(shard.pickle_name for shard in shards.values())
    name = "torch-sharded" if has_pickles else "safetensors-sharded"
    tree = module_metadata.with_texts(state_dict, texts)
    made = combined(reader.path, name, tree, shards, (*notes, *differing))
    return replace(
        made,
        nbytes=reader.nbytes + made.nbytes,
        generation="",
        protocol=None,
        metadata=texts,
        unread=tuple(_left_behind(shards, parts, metadata)),
        files=((reader.file, reader.stamp), *made.files),
        notes=(
            *made.notes,
            *_size_notes(metadata.get("total_size"), entries),
            *_unnamed_notes(folder, names),
        ),
    )


# The index.


def _index(reader: Reader) -> tuple[dict[str, str], dict[str, Any], str | None]:
    """Return the weight map, the metadata and the note of an index."""
    if reader.nbytes > MAX_INDEX:
        raise LimitExceeded(f"an index of {reader.nbytes} bytes")
    budget.current().read(reader.nbytes)
    index = _json.load(reader.read(0, reader.nbytes), "the index")
    weight_map, metadata = index.get("weight_map"), index.get("metadata") or {}
    if weight_map is None:
        raise NotACheckpoint(
            f"{reader.path} is a JSON text without a `weight_map`, so it is not an index of shards"
        )
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise Malformed("the index is not a map of keys to shards")
    note = metadata.pop(NOTE, index.get(NOTE))  # beside it until ckptool 0.6
    return weight_map, metadata, note if isinstance(note, str) else None


def _shard_names(weight_map: Mapping[str, Any]) -> list[str]:
    """List the shards by their number, then name; refuse names that lead out of the folder."""
    for key, name in weight_map.items():
        if not isinstance(name, str) or not paths.stays_inside(name):
            what = f"the index puts {key} into {str(name)[:80]!r}"
            raise Malformed(f"{what}, which is not the name of a file next to it")
    if not weight_map:
        raise Malformed("the index names no shards")
    return sorted(set(weight_map.values()), key=by_number)


def _refuse_absent(folder: str, names: Sequence[str]) -> None:
    absent = [name for name in names if not paths.is_file(paths.join(folder, name))]
    if absent:
        raise Malformed(
            f"{len(absent)} of {counted(len(names), 'shard')} that the index names are missing",
            evidence=absent[:SHOWN],
            hint="get them from the source of the index",
        )


def _unnamed_notes(folder: str, names: Sequence[str]) -> list[str]:
    """Note files in the folder that look like shards of this set, and that no key is in."""
    sets = {shard[0] for name in names if (shard := shard_of(name))}
    beside: set[str] = set()
    with suppress(FormatError):  # a folder that may be entered, and not listed
        beside.update(each.name for each in paths.listing(folder))
    others = [
        name for name in sorted(beside - {*names}) if (shard := shard_of(name)) and shard[0] in sets
    ]
    return [f"not named by the index, and not read: {listed(others)}"] if others else []


# The shards.


def _entries(shard: Checkpoint, weight_map: Mapping[str, str], name: str) -> StateDict:
    """Return the state_dict of a shard: its top where keys of the index are there."""
    top = text_items(shard.tree)
    if top is not None and any(weight_map.get(key) == name for key, _ in top):
        has_tensors = any(isinstance(value, TENSORS) for _, value in top)
        return find(shard, ".") if has_tensors else StateDict((), dict(top))
    try:
        return find(shard)
    except (AmbiguousStateDict, NoStateDict) as error:
        what = f"{name} holds none of the keys that the index puts there"
        raise Malformed(what, evidence=error.evidence) from None


def _joined(weight_map: Mapping[str, str], parts: Mapping[str, StateDict]) -> dict[str, Node]:
    """Join the entries of all shards; each key must be where the index says, and there alone."""
    promised: dict[str, list[str]] = {name: [] for name in parts}
    for key, name in weight_map.items():
        promised[name].append(key)
    entries: dict[str, Node] = {}
    for name, part in parts.items():
        _refuse_other_keys(name, part, promised[name], weight_map)
        entries.update(part.entries)
    return {key: entries[key] for key in ordered(weight_map, list(entries))}


def ordered(listed: Iterable[str], held: Sequence[str]) -> list[str]:
    """Order keys as an index lists them, or as the shards hold them if that is by name.

    What the index does not list, ties that a shard notes, comes last.
    """
    keys = list(listed)
    if keys == sorted(keys):
        return list(held)
    return list(dict.fromkeys([*keys, *held]))


def _refuse_other_keys(
    name: str, part: StateDict, promised: Sequence[str], weight_map: Mapping[str, str]
) -> None:
    """Refuse a shard that lacks keys, or has some that the index puts elsewhere or does not name.

    A tie that the shard notes is not named: its bytes are, under the key it is tied to.
    """
    absent = [key for key in promised if key not in part.entries]
    named = (part.entries.get(key) for key in promised)
    views = {value.view for value in named if isinstance(value, TensorInfo)}
    twice, extra = [], []
    for key, value in part.entries.items():
        if key in weight_map:
            twice += [key] if weight_map[key] != name else []
        elif not isinstance(value, TensorInfo) or value.view not in views:
            extra.append(key)
    for keys, lacks, puts in (
        (absent, "lacks", "puts there"),
        (twice, "holds", "puts into another shard"),
        (extra, "holds", "does not name"),
    ):
        if keys:
            raise Malformed(
                f"{name} {lacks} {counted(len(keys), 'key')} that the index {puts}",
                evidence=keys[:SHOWN],
                hint="index and shards are from different sets; get all of them from one source",
            )


# What is beside the entries.


def _module_metadata(parts: Iterable[StateDict]) -> Node:
    """Join the `_metadata` of the shards; each may hold all of it, or its own modules alone."""
    joined: dict[str, Node] = {}
    for part in parts:
        for path, entry in text_items(part.metadata) or []:
            joined.setdefault(path, entry)
    return make_state_dict(joined, None) if joined else None


def _said(shard: Checkpoint, part: StateDict) -> dict[str, str]:
    """Return the texts of a shard: of safetensors, or kept in a torch file."""
    node = state_dict_node(shard.tree, part.at)
    return {**shard.metadata, **module_metadata.own_texts(node)}


def _texts(
    shards: Iterable[Mapping[str, str]], index: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """Join the metadata of the shards, and the texts in that of the index."""
    joined: dict[str, str] = {}
    differing: dict[str, None] = {}
    of_index = {name: text for name, text in index.items() if isinstance(text, str)}
    for texts in (*shards, of_index):
        for name, text in texts.items():
            if joined.setdefault(name, text) != text:
                differing[name] = None
    notes = [f"the shards differ in their metadata; kept of the first: {listed(differing)}"]
    return joined, notes if differing else []


def _left_behind(
    shards: Mapping[str, Checkpoint], parts: Mapping[str, StateDict], index: Mapping[str, Any]
) -> Iterator[str]:
    """Name what is in the shards beside their entries, and what else is in the index."""
    for name, shard in shards.items():
        for what in (*beside(shard.tree, parts[name].at), *shard.unread):
            yield f"{name}: {what}"
    for name, value in index.items():
        if not isinstance(value, str) and name not in _COMPUTED:
            yield f"{name} of the index"


def _size_notes(total: Any, entries: Mapping[str, Node]) -> list[str]:
    """Note a total size that fits neither all tensors, nor those not tied, nor the storages."""
    tensors = tensors_of(entries).values()
    dense = [value for value in tensors if isinstance(value, TensorInfo)]
    every = sum(value.nbytes for value in tensors)
    untied = sum({value.view: value.nbytes for value in dense}.values())
    stored = sum(storage.nbytes for storage in {value.storage for value in dense})
    if total is None or total in (every, untied, stored):
        return []
    return [f"the index says {str(total)[:20]} bytes in all, the shards hold {every}"]


CONTAINERS = (
    Container(
        "safetensors-sharded",
        "sharded safetensors",
        index_patterns=PATTERNS,
        sniff=sniff_safetensors,
        read=read,
        traits=Traits(beside_files=True),
        written_as="safetensors",
    ),
    Container(
        "torch-sharded",
        "sharded torch",
        index_patterns=PATTERNS,
        sniff=sniff_torch,
        read=read,
        traits=Traits(beside_files=True),
    ),
)
