"""Distributed checkpoint: the folder that `torch.distributed.checkpoint` writes.

`.metadata` is a pickle that says what there is; a file `__<rank>_<number>.distcp` is what
`torch.save` wrote for each chunk of a tensor and each other object of that rank, one archive behind
another (torch/distributed/checkpoint/filesystem.py, `_write_item`). Keys and order are those of
`dcp_to_torch_save` (format_utils.py): nested as the planner's paths say, flat where it kept none.
It is written in `_dcp_output.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import field
from math import prod

from zlib_ng.zlib_ng import crc32

from ckptool.containers import _dcp_metadata, torch_zip
from ckptool.containers._container import Container, Traits
from ckptool.containers._dcp_metadata import Box, Entry, Index, Part, Step, shape_text
from ckptool.errors import FormatError, LimitExceeded, Malformed, TooCostly, Unsupported
from ckptool.files import budget, fileio, paths
from ckptool.files.fileio import Reader, Stamp
from ckptool.pickles import pickle_reader, safety
from ckptool.pickles.names import Level
from ckptool.pickles.tree import Dict, Global, Node, Object
from ckptool.records import dataclass, grouped
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import (
    Chunk,
    Chunked,
    Packing,
    Storage,
    TensorInfo,
    contiguous_stride,
    problem,
)
from ckptool.text import counted, listed

INDEX = ".metadata"
SHARD = ".distcp"
# An index names a class of this module near its start; torch 1.12 had it under _shard.
_NAMED = re.compile(rb"torch\.distributed\.(_shard\.)?checkpoint\.metadata")
_OWN = re.compile(r"torch\.distributed\.(checkpoint|_shard)(\.|$)")
# Files of Megatron core beside the index that hold what is no tensor of the model.
_COMMON = "common.pt"
_BOX = budget.CALL + budget.NAME  # bytes of memory
_SMALL = 1 << 10
_PART = 2 * budget.TENSOR + budget.NAME  # a tensor that was read, and its record


def sniff(head: bytes) -> bool:
    """Tell whether a file starts as the pickled index of a distributed checkpoint."""
    return head.startswith(b"\x80") and b"state_dict_metadata" in head and bool(_NAMED.search(head))


def read(reader: Reader) -> Checkpoint:
    """Read the index, and of every saved object the directory and the pickle."""
    folder, name = paths.split(reader.file)
    spending, seen = budget.current(), _Seen()
    spent = spending.spent
    spending.read(reader.nbytes)
    vocabulary = _dcp_metadata.IndexVocabulary()
    parsed = pickle_reader.load(reader.read(0, reader.nbytes), 0, vocabulary)
    seen.note(name, parsed.globals, parsed.calls, carried=False)
    with pickle_reader.remembered([seen]):
        if parsed.end != reader.nbytes:
            raise Malformed("the index has bytes after its end", offset=parsed.end)
        index = _dcp_metadata.parse(parsed.tree)
        parsed.tree, parsed.calls = None, []  # of 60 000 chunks, these take more than all else
        spending.spent = spent
        spending.spend(sum(2 * budget.NAME + len(each.boxes) * _BOX for each in index.entries))
        beside = _files(folder)
        beside.pop(name, None)
        parts = _read_parts(folder, index, beside, seen)
        tree = _nested(index, parts, folder or ".")
    used = {each.file for each in parts}
    unread = {each: nbytes for each, nbytes in beside.items() if each not in used}
    return Checkpoint(
        reader.path,
        "torch-dcp",
        tree,
        reader.nbytes + sum(nbytes for _, (_, nbytes, _) in seen.files),
        globals=seen.globals,
        calls=seen.calls,
        pickle_name=listed(seen.dangerous, 3) or name,
        generation=index.generation,
        protocol=parsed.protocol,
        unread=tuple(unread),
        unread_nbytes=sum(unread.values()),
        records=seen.records,
        unlisted=seen.unlisted,
        flaws=tuple(seen.flaws),
        files=((reader.file, reader.stamp), *seen.files),
        notes=(*index.notes, *_notes(folder, unread)),
    )


def _files(folder: str) -> dict[str, int]:
    """Give the files of a folder by name, with their sizes."""
    return {each.name: each.nbytes for each in paths.listing(folder, sizes=True) if each.is_file}


def _notes(folder: str, unread: Iterable[str]) -> Iterator[str]:
    shards = [name for name in unread if name.endswith(SHARD)]
    if shards:
        yield f"no entry is in {listed(shards)}: left from another save, or its index is older"
    if _COMMON in unread:
        path = paths.join(folder, _COMMON)
        yield f"Megatron core keeps what is not sharded in {path}, a checkpoint of its own"


@dataclass(slots=True)
class _Seen:
    """What was met on the way through a folder: see the fields of `Checkpoint`.

    `dangerous` are the pickles that would run code, `plain` names that need no judgement again.
    """

    globals: dict[Global, int] = field(default_factory=dict)
    calls: list[Object] = field(default_factory=list)
    dangerous: dict[str, None] = field(default_factory=dict)
    plain: set[Global] = field(default_factory=set)
    files: list[tuple[str, Stamp]] = field(default_factory=list)
    records: dict[str, Storage] = field(default_factory=dict)
    unlisted: int = 0
    flaws: list[str] = field(default_factory=list)

    def note(
        self, pickle: str, named: dict[Global, int], calls: list[Object], *, carried: bool
    ) -> None:
        """Add what one pickle names; of the index, which no output carries, not its own records."""
        if calls or not self.plain.issuperset(named):
            verdict = safety.judge(named, calls)
            self.plain |= named.keys() - verdict.foreign.keys() - verdict.dangerous.keys()
            if verdict.level is Level.DANGEROUS:
                self.dangerous[pickle] = None
                self.calls += calls
            if not carried:
                foreign = {each for each in verdict.foreign if not _OWN.match(each.module)}
                named = {each: named[each] for each in named if each in foreign} | verdict.dangerous
        elif not carried:
            named = {}
        for each, offset in named.items():
            self.globals.setdefault(each, offset)


# The saved objects.


def _read_parts(
    folder: str, index: Index, beside: Collection[str], seen: _Seen
) -> dict[Part, Node]:
    """Read all saved objects, file by file."""
    boxes = ((box, entry) for entry in index.entries for box in entry.boxes)
    wanted = grouped((each[0].part.file, each) for each in boxes)
    if not paths.can_list(folder):
        beside = [name for name in wanted if _is_beside(folder, name)]
    _refuse_missing(wanted, beside, index)
    parts: dict[Part, Node] = {}
    for name in sorted(wanted):
        with Reader(paths.join(folder, name)) as shard:
            seen.files.append((shard.file, shard.stamp))
            end = 0
            for box, entry in sorted(wanted[name], key=lambda each: each[0].part.offset):
                part = box.part
                if part.offset < end:
                    raise Malformed(
                        f"{entry.key} overlaps what comes before it",
                        path=shard.path,
                        offset=part.offset,
                    )
                seen.unlisted += part.offset - end
                end = part.offset + part.nbytes
                parts[part] = _read_part(shard, box, entry, seen)
            seen.unlisted += shard.nbytes - end
        fileio.spare(shard.file, len(seen.files))
    return parts


def _is_beside(folder: str, name: str) -> bool:
    return paths.stays_inside(name) and paths.is_file(paths.join(folder, name))


def _refuse_missing(
    wanted: dict[str, list[tuple[Box, Entry]]], beside: Collection[str], index: Index
) -> None:
    missing = [name for name in sorted(wanted) if name not in beside]
    if not missing:
        return
    keys = list(dict.fromkeys(entry.key for name in missing for _, entry in wanted[name]))
    raise Malformed(
        f"{len(missing)} of its {counted(len(wanted), 'file')} are not in the folder: "
        f"{listed(missing)}",
        evidence=[f"{len(keys)} of {len(index.entries)} entries are in them: {listed(keys, 3)}"],
        hint="each machine that saved it kept its own; copy all files into one folder",
    )


def _read_part(shard: Reader, box: Box, entry: Entry, seen: _Seen) -> Node:
    """Read one saved object; errors give the byte of the file, not that of the object."""
    part = box.part
    if part.offset + part.nbytes > shard.nbytes:
        raise Malformed(
            f"{entry.key} should end at byte {part.offset + part.nbytes}, and the file has "
            f"{shard.nbytes}",
            path=shard.path,
            offset=shard.nbytes,
            hint="it is truncated; download or copy it again",
        )
    inner = shard.part(part.offset, part.nbytes, shard.path)
    _refuse_other(inner, part, entry)
    spending = budget.current()
    spent = spending.spent
    try:
        found = torch_zip.read(inner)
        small = _compared(inner, found.records) if found else ()
    except TooCostly:
        raise
    except FormatError as error:
        kind = type(error) if isinstance(error, Unsupported | LimitExceeded) else Malformed
        at = part.offset + (error.offset or 0)
        message = f"{entry.key}: {error.message}"
        raised = kind(message, path=shard.path, offset=at, hint=error.hint)
        raised.named, raised.calls = error.named, error.calls
        raise raised from error
    if found is None:
        raise Malformed(f"{entry.key} is not a torch zip", path=shard.path, offset=part.offset)
    chunk = f" at {shape_text(box.offsets)}" if len(entry.boxes) > 1 else ""
    pickle = f"{paths.name_of(shard.file)} ({entry.key}{chunk})"
    kept = {name: each for name, each in found.records.items() if name not in small}
    seen.records |= {f"{pickle}/{name}": record for name, record in kept.items()}
    seen.unlisted += found.unlisted
    seen.flaws += [f"{entry.key}: {flaw}" for flaw in found.flaws]
    seen.note(pickle, found.globals, list(found.calls), carried=True)
    if len(kept) < 2 and type(found.tree) is TensorInfo and found.tree.origin is None:
        spending.spent = spent
        spending.spend(_PART + len(pickle))
    return found.tree


def _compared(inner: Reader, records: dict[str, Storage]) -> set[str]:
    """Return the small records of an archive that are as their checksums say: six a chunk.

    What is wrong stays among those that `check` looks at.
    """
    return {
        name
        for name, each in records.items()
        if each.crc32 is not None
        and each.nbytes <= _SMALL
        and each.packing is Packing.PLAIN
        and not name.startswith("data/")
        and crc32(inner.read(each.start - inner.base, each.nbytes)) == each.crc32
    }


def _refuse_other(inner: Reader, part: Part, entry: Entry) -> None:
    head = inner.read(0, min(9, inner.nbytes))
    if torch_zip.sniff(head):
        return
    if head[8:] == b"{":
        raise Unsupported(
            f"{entry.key} is saved as safetensors, which an index of torch does not describe",
            path=inner.path,
            offset=part.offset,
        )
    raise Malformed(f"{entry.key} is not a torch zip", path=inner.path, offset=part.offset)


# Tensors.


def _value(entry: Entry, parts: dict[Part, Node], folder: str) -> Node:
    """Make the tensor of an entry, or give the object that it is."""
    if entry.dtype is None:
        return parts[entry.boxes[0].part]
    chunks = [Chunk(box.offsets, _chunk(entry, box, parts[box.part])) for box in entry.boxes]
    if len(chunks) == 1:
        return chunks[0].source
    return _assembled(entry, chunks, folder)


def _chunk(entry: Entry, box: Box, found: Node) -> TensorInfo:
    if not isinstance(found, TensorInfo):
        raise Malformed(f"what is saved for {entry.key} is not a tensor that can be a chunk")
    if found.dtype is not entry.dtype or found.shape != box.sizes:
        assert entry.dtype is not None
        raise Malformed(
            f"a chunk of {entry.key} should be {entry.dtype.label} {shape_text(box.sizes)} and is "
            f"{found.dtype.label} {shape_text(found.shape)}",
            path=found.storage.path,
            offset=box.part.offset,
        )
    return found


def _assembled(entry: Entry, chunks: list[Chunk], folder: str) -> TensorInfo:
    """Make a tensor of several chunks: a storage of its own, in pieces."""
    dtype, sources = entry.dtype, [chunk.source for chunk in chunks]
    assert dtype is not None
    orders = {source.storage.byteorder for source in sources}
    packings = {source.storage.packing for source in sources}
    odd = any(source.lazy or source.origin is not None for source in sources)
    if len(orders) > 1 or packings - {Packing.PLAIN} or odd or dtype.bits % 8:
        raise Unsupported(f"{entry.key} is saved in chunks that cannot be joined byte by byte")
    nbytes = dtype.nbytes(prod(entry.shape))
    storage = Storage(
        folder,
        entry.key,
        0,
        nbytes,
        dtype if dtype.storage_class else None,
        byteorder=orders.pop() if orders else "little",
        packing=Packing.CHUNKED,
        chunked=Chunked(entry.shape, dtype.itemsize, tuple(chunks)),
    )
    info = TensorInfo(dtype, entry.shape, contiguous_stride(entry.shape), storage)
    wrong = problem(info)
    if wrong:
        raise Malformed(f"{entry.key} {wrong}")
    return info


# The nested dict.


@dataclass(slots=True)
class _Branch:
    """A dict or list that is being filled: by name, or by place in it."""

    names: bool
    members: dict[Step, Node] = field(default_factory=dict)


def _nested(index: Index, parts: dict[Part, Node], folder: str) -> Node:
    """Build what the planner had flattened (torch/distributed/checkpoint/_traverse.py)."""
    root = _Branch(names=True)
    # A list is as long as its last place says: that many places for so many entries.
    places = 1000 + 10 * len(index.entries)
    for entry in index.entries:
        here = root
        for step, following in zip(entry.path, entry.path[1:], strict=False):
            inner = _slot(here, step, entry, places).setdefault(
                step, _Branch(names=isinstance(following, str))
            )
            if not isinstance(inner, _Branch):
                raise Malformed(f"{entry.key} is inside another entry")
            here = inner
        last = entry.path[-1]
        if last in _slot(here, last, entry, places):
            raise Malformed(f"{entry.key} is where another entry is")
        here.members[last] = _value(entry, parts, folder)
    return _grown(root, [places])


def _slot(here: _Branch, step: Step, entry: Entry, places: int) -> dict[Step, Node]:
    if isinstance(step, str) is not here.names:
        raise Malformed(f"{entry.key} is in a list by name, or in a dict by number")
    if isinstance(step, int) and step >= places:
        raise Malformed(f"{entry.key} is number {step} of a list")
    return here.members


def _grown(branch: _Branch, places: list[int]) -> Node:
    """Make the nodes of a branch; what a list holds between its entries is None, as in torch."""

    def node(member: Node) -> Node:
        return _grown(member, places) if isinstance(member, _Branch) else member

    if branch.names:
        return Dict([(step, node(member)) for step, member in branch.members.items()])
    length = 1 + max(int(step) for step in branch.members)
    places[0] -= length
    if places[0] < 0:
        raise LimitExceeded("lists with more gaps than entries")
    return [node(branch.members.get(index)) for index in range(length)]


CONTAINERS = (
    Container(
        "torch-dcp",
        "distributed checkpoint",
        index_patterns=(".metadata", "__*.metadata"),
        sniff=sniff,
        read=read,
        traits=Traits(beside_files=True, read_as=("pickle",)),
    ),
)
