"""Chunked storages: which bytes of which piece are where in the whole tensor.

The whole is contiguous and each chunk a box of it, as in distributed checkpoints
(torch/distributed/checkpoint/metadata.py, `ChunkStorageMetadata`). In the order of elements a
range of the whole meets each chunk in one range of the chunk's own elements: what is read one
after another in the whole is read one after another in every chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, product
from math import prod
from operator import itemgetter

from ckptool.errors import LimitExceeded
from ckptool.records import dataclass
from ckptool.tensors.tensor import Chunk, Chunked, contiguous_stride


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements of a chunk, `count` from `first`, that a range of the whole needs."""

    index: int
    chunk: Chunk
    first: int
    count: int


def pieces(chunked: Chunked, first: int, count: int) -> Iterator[Piece]:
    """Yield what the elements of the whole, `count` from `first`, need of each chunk."""
    row = prod(chunked.shape[1:])
    for index, chunk in enumerate(chunked.chunks):
        if chunk.offsets:  # most chunks of many are passed by their first dimension
            top = chunk.offsets[0] * row
            if top >= first + count or top + chunk.source.shape[0] * row <= first:
                continue
        begin = _elements_before(chunked, chunk, first)
        end = _elements_before(chunked, chunk, first + count)
        if end > begin:
            yield Piece(index, chunk, begin, end - begin)


def _elements_before(chunked: Chunked, chunk: Chunk, index: int) -> int:
    """Count the elements of a chunk that are before an element of the whole."""
    sizes = chunk.source.shape
    if not sizes:
        return min(index, 1)
    inner, count = prod(sizes), 0
    steps = contiguous_stride(chunked.shape)
    for offset, size, step in zip(chunk.offsets, sizes, steps, strict=True):
        inner //= size
        here, index = divmod(index, step)
        if here < offset:
            return count
        if here >= offset + size:
            return count + inner * size
        count += (here - offset) * inner
    return count


MAX_CUT = 6  # dimensions that a tensor is cut along; each doubles the corners of a box

Box = tuple[tuple[int, ...], tuple[int, ...]]  # where it begins in each dimension, its sizes


def tiling_problem(shape: tuple[int, ...], boxes: Sequence[Box]) -> str:
    """Return why boxes do not cover a tensor exactly, an empty string where they do.

    The corners of a box, signed, are the mixed derivative of the function that is one in it: those
    of all boxes sum to those of the whole where they tile it, and only there. The boxes are in the
    tensor. Raises `LimitExceeded` for a tensor cut along many dimensions.
    """
    whole = (tuple(0 for _ in shape), shape)
    if 0 in shape:
        return ""
    cut = [
        dimension
        for dimension, size in enumerate(shape)
        if any((begins[dimension], sizes[dimension]) != (0, size) for begins, sizes in boxes)
    ]
    if len(cut) > MAX_CUT:
        raise LimitExceeded(f"a tensor cut along {len(cut)} dimensions")
    corners = [*_corners(whole, cut, -1)]
    for box in boxes:
        corners += _corners(box, cut, 1)
    corners.sort()
    sums = [sum(sign for _, sign in same) for _, same in groupby(corners, key=itemgetter(0))]
    if not any(sums):
        return ""
    held, total = sum(prod(sizes) for _, sizes in boxes), prod(shape)
    if held == total:
        return "overlap, and leave a gap elsewhere"
    return f"{'overlap' if held > total else 'leave a gap'}: they hold {held} of {total} elements"


def _corners(box: Box, cut: Sequence[int], sign: int) -> Iterator[tuple[tuple[int, ...], int]]:
    begins, sizes = box
    for ends in product((0, 1), repeat=len(cut)):
        point = tuple(
            begins[dimension] + end * sizes[dimension]
            for dimension, end in zip(cut, ends, strict=True)
        )
        yield point, sign if sum(ends) % 2 == 0 else -sign
