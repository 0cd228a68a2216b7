"""Whether the indices of sparse and nested tensors stay inside: torch.load does not look.

It takes any, and what then computes with them writes elsewhere in memory (CVE-2025-62164 of vLLM).
The rules are torch's own, `_validate_sparse_coo_tensor_args` and
`_validate_sparse_compressed_tensor_args` (aten/src/ATen/native/sparse).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import field, replace

from ckptool.files.blocks import blocks
from ckptool.files.fileio import Readers
from ckptool.records import dataclass
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors import numbers
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import CompositeTensor, TensorInfo, without_repeats
from ckptool.verbs.finite import BLOCK, MAX_REPEATS, SMALL

_BY_ROWS, _BY_COLUMNS = ("sparse_csr", "sparse_bsr"), ("sparse_csc", "sparse_bsc")
_IN_BLOCKS = ("sparse_bsr", "sparse_bsc")


def outside(checkpoint: Checkpoint) -> list[str]:
    """Return the paths of tensors whose indices lead out of them."""
    made = [
        (path, tensor)
        for path, tensor in walk.named(checkpoint.tree)
        if isinstance(tensor, CompositeTensor) and tensor.parts
    ]
    if not made:
        return []
    numbers.load()
    storages = {part.storage for _, tensor in made for part in tensor.parts}
    room = MAX_REPEATS * max(SMALL, sum(storage.nbytes for storage in storages))
    with closing(Readers()) as readers:
        looking = _Looking(readers, room)
        return [path for path, tensor in made if not looking.is_sound(tensor)]


@dataclass(slots=True)
class _Looking:
    """Reads indices; what overlaps so often that there is no `room` is not sound."""

    readers: Readers
    room: int
    known: dict[tuple[object, ...], bool] = field(default_factory=dict)

    def is_sound(self, tensor: CompositeTensor) -> bool:
        """Check the indices of one tensor; of a layout that is not known there are none."""
        known = (tensor.layout, tensor.shape, *(part.view for part in tensor.parts))
        if known not in self.known:
            match tensor.layout, tensor.parts:
                case "sparse_coo", (indices, values):
                    self.known[known] = self._coo(tensor.shape, indices, values)
                case layout, (ends, plain, values) if layout in (*_BY_ROWS, *_BY_COLUMNS):
                    self.known[known] = self._compressed(tensor, ends, plain, values)
                case "nested", (buffer, sizes, strides, offsets):
                    self.known[known] = self._nested(buffer, sizes, strides, offsets)
                case _:
                    self.known[known] = True
        return self.known[known]

    def _blocks(self, info: TensorInfo, limit: int = BLOCK) -> Iterator[memoryview]:
        self.room -= info.nbytes
        return blocks(info, self.readers, limit)

    def _is_within(self, info: TensorInfo, end: int) -> bool:
        """Check that indices are from 0 on and before `end`."""
        once, _ = without_repeats(info)
        return once.nbytes <= self.room and all(
            numbers.are_within(block, info.dtype, end) for block in self._blocks(once)
        )

    def _coo(self, shape: tuple[int, ...], indices: TensorInfo, values: TensorInfo) -> bool:
        """Check one row of indices for each of the first dimensions."""
        if indices.dtype is not DType.I64 or len(indices.shape) != 2:
            return False
        dimensions, count = indices.shape
        if dimensions > len(shape) or values.shape != (count, *shape[dimensions:]):
            return False
        step, *stride = indices.stride
        rows = (
            replace(
                indices,
                shape=(count,),
                stride=tuple(stride),
                storage_offset=indices.storage_offset + row * step,
            )
            for row in range(dimensions)
        )
        return all(map(self._is_within, rows, shape))

    def _compressed(
        self, tensor: CompositeTensor, ends: TensorInfo, plain: TensorInfo, values: TensorInfo
    ) -> bool:
        """Check where each row (or column) ends, and the columns (or rows) in them.

        All may have dimensions of a batch before theirs; values have those of a block and of dense
        ones behind.
        """
        if ends.dtype is not plain.dtype or ends.dtype not in (DType.I32, DType.I64):
            return False
        batch, count = plain.shape[:-1], plain.shape[-1:]
        inner = values.shape[len(batch) + 1 :]
        split = tensor.layout in _IN_BLOCKS
        block, dense = (inner[:2], inner[2:]) if split else ((1, 1), inner)
        rows, columns = tensor.shape[len(batch) : len(batch) + 2] or (0, 0)
        if not count or len(block) != 2 or 0 in block or rows % block[0] or columns % block[1]:
            return False
        sizes = [rows // block[0], columns // block[1]]
        outer, across = sizes if tensor.layout in _BY_ROWS else sizes[::-1]
        return (
            values.shape[: len(batch) + 1] == plain.shape
            and tensor.shape == (*batch, rows, columns, *dense)
            and ends.shape == (*batch, outer + 1)
            and self._is_within(plain, across)
            and self._ascends(ends, outer + 1, count[0], across)
        )

    def _ascends(self, ends: TensorInfo, width: int, count: int, most: int) -> bool:
        """Check that each row of ends goes from 0 to `count` in steps of at most `most`."""
        repeated = [*(step == 0 for step in ends.stride[:-1]), False]
        once, _ = without_repeats(ends, repeated)
        if once.nbytes > self.room:
            return False
        place, last = 0, 0
        for block in self._blocks(once):
            found = numbers.ascends(block, ends.dtype, (place, last), width, count, most)
            if found is None:
                return False
            place, last = found
        return True

    def _nested(
        self, buffer: TensorInfo, sizes: TensorInfo, strides: TensorInfo, offsets: TensorInfo
    ) -> bool:
        """Check that each tensor of a nested one lies in its buffer."""
        parts = (sizes, strides, offsets)
        count, rank = (*sizes.shape, 0)[:2]
        if (
            any(part.dtype is not DType.I64 for part in parts)
            or len(buffer.shape) != 1
            or strides.shape != sizes.shape
            or offsets.shape != (count,)
            or sum(part.nbytes for part in parts) > self.room
        ):
            return False
        if not rank:
            return self._is_within(offsets, buffer.numel)
        rows = max(1, BLOCK // (8 * rank))
        read = [
            self._blocks(part, 8 * rows * (rank if part is not offsets else 1)) for part in parts
        ]
        return all(
            numbers.lie_within(one, step, start, buffer.numel)
            for one, step, start in zip(*read, strict=True)
        )
