"""Whether ranks hold the same bytes: by recorded checksums, else as they are read."""

from __future__ import annotations

from itertools import zip_longest

from ckptool.files.blocks import blocks, equal
from ckptool.files.fileio import Readers
from ckptool.pickles.tree import Node
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import CompositeTensor, TensorInfo


def agree(one: Node, other: Node, readers: Readers) -> bool:
    """Check two tensors for the same bytes, dtype and shape."""
    if isinstance(one, TensorInfo) and isinstance(other, TensorInfo):
        if (one.dtype, one.shape, one.lazy) != (other.dtype, other.shape, other.lazy):
            return False
        known = _recorded(one)
        return (known is not None and known == _recorded(other)) or _equal(one, other, readers)
    parts = [each.parts if isinstance(each, CompositeTensor) else () for each in (one, other)]
    if len(parts[0]) != len(parts[1]) or not parts[0]:
        return False
    return all(agree(a, b, readers) for a, b in zip(*parts, strict=True))


def _equal(one: TensorInfo, other: TensorInfo, readers: Readers) -> bool:
    """Compare bytes; of elements that are there many times, the storages."""
    if any(each.nbytes > each.storage.nbytes for each in (one, other)):
        if (one.stride, one.storage_offset) != (other.stride, other.storage_offset):
            return False
        one, other = _storage(one), _storage(other)
    pairs = zip_longest(blocks(one, readers), blocks(other, readers))
    return all(a is not None and b is not None and equal(a, b) for a, b in pairs)


def _recorded(tensor: TensorInfo) -> tuple[object, ...] | None:
    """Return what tells the bytes of a view from others, None where no checksum is recorded."""
    storage = tensor.storage
    if storage.crc32 is None:
        return None
    place = (tensor.stride, tensor.storage_offset, storage.byteorder)
    return (storage.crc32, storage.nbytes, *place)


def _storage(tensor: TensorInfo) -> TensorInfo:
    return TensorInfo(DType.U8, (tensor.storage.nbytes,), (1,), tensor.storage)
