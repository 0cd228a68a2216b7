"""Plan how tensors get where a writer wants them: contiguous, little-endian, nothing pending."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from ckptool.files.blocks import blocks
from ckptool.files.copying import Compute, Copy, Job
from ckptool.tensors.tensor import Storage, TensorInfo, is_contiguous, needs_swap

GATHER_BLOCK = 8 << 20


def jobs(tensors: Iterable[tuple[TensorInfo, int]]) -> list[Job]:
    """Plan tensors, each with its place in the output; every storage is checked once."""
    pairs = list(tensors)
    planned = [job(info, target) for info, target in pairs if info.nbytes]
    return [*planned, *checks(planned, (info.storage for info, _ in pairs))]


def job(info: TensorInfo, target: int) -> Job:
    """Copy what is in order already, compute the rest."""
    plain = is_contiguous(info.shape, info.stride) and not info.lazy
    if plain and not needs_swap(info.storage, info.dtype.swap):
        return Copy(info.storage, target, info.start, info.nbytes)
    block = partial(blocks, info, limit=GATHER_BLOCK)
    return Compute(info.storage, block, target, info.nbytes)


def checks(planned: Iterable[Job], storages: Iterable[Storage]) -> list[Job]:
    """Read the storages that have a recorded checksum and are not copied whole."""
    whole = {copy.storage for copy in planned if isinstance(copy, Copy) and copy.whole}
    return [
        Copy(storage, None)
        for storage in dict.fromkeys(storages)
        if storage not in whole and storage.crc32 is not None
    ]
