"""Whether all ranks of a group would write the same output from the same inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from itertools import zip_longest
from typing import TypedDict

from ckptool import __version__
from ckptool.errors import RanksDiffer
from ckptool.files.group import Group
from ckptool.files.target import Output, Target
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.casting import Rounding
from ckptool.tensors.tensor import Storage, TensorInfo


class _Facts(TypedDict):
    """What ranks compare; inputs are their names, sizes and when they were written to."""

    version: str
    inputs: list[tuple[str, int, int]]
    target: list[bool]
    plan: str


def refuse_others(group: Group, checkpoint: Checkpoint, place: Target, output: Output) -> None:
    """Raise `RanksDiffer` where ranks would not write parts of one output."""
    facts = group.gather(lambda: _facts(checkpoint, place, output))
    group.share(lambda: _compare(facts))


def _facts(checkpoint: Checkpoint, place: Target, output: Output) -> _Facts:
    inputs = [(os.path.basename(path), *stamp[1:]) for path, stamp in checkpoint.files]
    return {
        "version": __version__,
        "inputs": inputs,
        "target": [place.force, place.sync, place.inside],
        "plan": digest(output),
    }


def _compare(facts: list[_Facts]) -> None:
    first = facts[0]
    for rank, other in enumerate(facts):
        if other["version"] != first["version"]:
            raise RanksDiffer(
                f"rank {rank} has ckptool {other['version']}, rank 0 has {first['version']}",
                hint="install one version on all machines",
            )
        if other["inputs"] != first["inputs"]:
            pairs = zip_longest(first["inputs"], other["inputs"], fillvalue=())
            mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise RanksDiffer(
                f"rank {rank} reads other inputs than rank 0",
                evidence=[_shown(0, *mine), _shown(rank, *theirs)],
                hint="name inputs on a file system that all machines share",
            )
        if other["target"] != first["target"]:
            raise RanksDiffer(
                f"rank {rank} finds another target than rank 0",
                hint="name an output on a file system that all machines share",
            )
        if other["plan"] != first["plan"]:
            raise RanksDiffer(
                f"rank {rank} would write another output than rank 0",
                hint="start all ranks with the same arguments",
            )


def _shown(rank: int, name: str = "", nbytes: int = 0, modified: int = 0) -> str:
    what = f"{name}, {nbytes} B, modified at {modified} ns" if name else "no more"
    return f"rank {rank}: {what}"


def digest(output: Output) -> str:
    """Return a hash of all that decides which bytes an output has."""
    made, files = sha256(), dict[str, int]()
    for file in output.files:
        made.update(repr((file.name, file.nbytes, len(file.literals))).encode())
        for offset, data in file.literals:
            made.update(b"%d %d " % (offset, len(data)))
            made.update(data)
        for job in file.jobs:
            made.update(repr((job.target, job.start, job.nbytes)).encode())
            for fact in _of_storage(job.storage, files):
                made.update(repr(fact).encode())
    return made.hexdigest()


def _of_storage(storage: Storage, files: dict[str, int]) -> Iterator[object]:
    """Iterate over where the bytes of a storage are, and over what they are computed from.

    Files have numbers, as machines may have them under several paths.
    """
    yield files.setdefault(storage.path, len(files)), storage.start, storage.nbytes, storage.crc32
    yield storage.packing.value, storage.packed_nbytes, storage.byteorder
    if computed := storage.computed:
        kernel = computed.kernel
        yield type(kernel).__name__
        if isinstance(kernel, Rounding):
            yield kernel.source.name, kernel.target.name, kernel.clamp, kernel.byteorder
        if not computed.args:
            kernel(held := bytearray(storage.nbytes), 0)
            yield sha256(held).digest()
        yield from _of_values(computed.args, files)
    if chunked := storage.chunked:
        yield chunked.shape, [chunk.offsets for chunk in chunked.chunks]
        yield from _of_values((chunk.source for chunk in chunked.chunks), files)


def _of_values(values: Iterable[TensorInfo], files: dict[str, int]) -> Iterator[object]:
    for value in values:
        yield value.dtype.name, value.shape, value.stride, value.storage_offset, sorted(value.lazy)
        yield from _of_storage(value.storage, files)
