"""Plan how tensors get where a writer wants them: contiguous, little-endian, nothing pending."""

from __future__ import annotations

from collections.abc import Iterable

from ckptool.files import checksums
from ckptool.files.jobs import Copy
from ckptool.tensors import values
from ckptool.tensors.tensor import Storage, TensorInfo


def jobs(tensors: Iterable[tuple[TensorInfo, int]]) -> list[Copy]:
    """Plan tensors, each with its place in the output; every storage is checked once."""
    pairs = list(tensors)
    planned = [job(info, target) for info, target in pairs if info.nbytes]
    return [*planned, *checks(planned, (info.storage for info, _ in pairs))]


def job(info: TensorInfo, target: int) -> Copy:
    """Copy the elements, as they are where they are in order already."""
    plain = values.in_order(info)
    return Copy(plain.storage, target, plain.start, plain.nbytes)


def checks(planned: Iterable[Copy], storages: Iterable[Storage]) -> list[Copy]:
    """Read what has a recorded checksum under storages; what is copied whole is read by that.

    A run leaves out those of which its other jobs have read all.
    """
    done = {each.storage for each in planned if each.whole and each.storage.crc32 is not None}
    under = (
        each for storage in storages if storage not in done for each in checksums.recorded(storage)
    )
    return [Copy(each, None) for each in dict.fromkeys(under) if each not in done]
