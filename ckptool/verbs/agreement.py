"""Whether all ranks of a group would write the same output from the same inputs."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
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


_WORDS = {
    "version": ("has ckptool {}", "install one version on all machines"),
    "inputs": ("reads other inputs", "name inputs on a file system that all machines share"),
    "target": ("finds another target", "name an output on a file system that all machines share"),
    "plan": ("would write another output", "start all ranks with the same arguments"),
}


def refuse_others(group: Group, checkpoint: Checkpoint, place: Target, output: Output) -> None:
    """Raise `RanksDiffer` where ranks would not write parts of one output."""
    if group.size > 1:
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
        for name, (what, hint) in _WORDS.items():
            mine, theirs = (dict(each)[name] for each in (first, other))
            if mine != theirs:
                raise RanksDiffer(
                    f"rank {rank} {what.format(theirs)}, and rank 0 {what.format(mine)}"
                    if name == "version"
                    else f"rank {rank} {what} than rank 0",
                    evidence=_shown(first, other) if name == "inputs" else (),
                    hint=hint,
                )


def _shown(first: _Facts, other: _Facts) -> list[str]:
    """Show the first inputs that differ."""
    from itertools import zip_longest

    for pair in zip_longest(first["inputs"], other["inputs"]):
        if pair[0] != pair[1]:
            return [
                f"{who}: {each[0]}, {each[1]} B, written to at {each[2]} ns"
                if each
                else f"{who}: no more"
                for who, each in zip(("rank 0", "other"), pair, strict=True)
            ]
    return []


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
            yield sha256(kernel(0, storage.nbytes)).digest()
        yield from _of_values(computed.args, files)
    if chunked := storage.chunked:
        yield chunked.shape, [chunk.offsets for chunk in chunked.chunks]
        yield from _of_values((chunk.source for chunk in chunked.chunks), files)


def _of_values(values: Iterable[TensorInfo], files: dict[str, int]) -> Iterator[object]:
    for value in values:
        yield value.dtype.name, value.shape, value.stride, value.storage_offset, sorted(value.lazy)
        yield from _of_storage(value.storage, files)
