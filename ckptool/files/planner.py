"""Plan how tensors get where a writer wants them: contiguous, little-endian, nothing pending."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from functools import partial

from ckptool.files.blocks import blocks
from ckptool.files.copying import Compute, Copy, Job
from ckptool.tensors import values
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
    """Read the storages that have a recorded checksum and are not copied whole.

    Of a computed storage, those are the storages that it is made of.
    """
    whole = {copy.storage for copy in planned if isinstance(copy, Copy) and copy.whole}
    unchecked = (each for storage in storages for each in _unchecked(storage, whole))
    return [Copy(storage, None) for storage in dict.fromkeys(unchecked)]


def _unchecked(storage: Storage, whole: Collection[Storage]) -> Iterator[Storage]:
    """Iterate over the recorded checksums under a storage that no copy compares."""
    if storage.crc32 is not None and storage not in whole:
        yield storage
    if storage.whole is not None:
        yield from _unchecked(storage.whole, whole)
    for value in values.arguments(storage):
        # The copy of a chunked storage compares those of the stored chunks that it reads whole.
        read_whole = storage.chunked is not None and storage in whole and _is_whole(value)
        if not read_whole or values.arguments(value.storage):
            yield from _unchecked(value.storage, whole)


def _is_whole(value: TensorInfo) -> bool:
    return value.nbytes == value.storage.nbytes and is_contiguous(value.shape, value.stride)
