"""Values: tensors whose elements are those of others, cut, joined, reshaped or computed.

Every value is a `TensorInfo`, a view of a storage; what differs is where the bytes of the storage
come from. A slice, a permutation and most reshapes of a view are views, a join is a view of a
chunked storage whose chunks are the parts, and a computed value is a view of a storage that makes
its elements when they are read. Kernels work element by element, so that any range of a computed
storage can be read, and every view of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate
from math import prod

from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import (
    Chunk,
    Chunked,
    Computed,
    Packing,
    Storage,
    TensorInfo,
    contiguous_stride,
    is_contiguous,
    needs_swap,
)

Kernel = Callable[..., bytes | memoryview]


def part(value: TensorInfo, dim: int, start: int, stop: int) -> TensorInfo:
    """Return the elements from `start` to `stop` in a dimension, as a view."""
    shape = (*value.shape[:dim], stop - start, *value.shape[dim + 1 :])
    offset = value.storage_offset + start * value.stride[dim]
    return replace(value, shape=shape, storage_offset=offset, origin=None)


def permuted(value: TensorInfo, dims: Sequence[int]) -> TensorInfo:
    """Return the dimensions in another order, as a view."""
    shape, stride = (tuple(sizes[dim] for dim in dims) for sizes in (value.shape, value.stride))
    return replace(value, shape=shape, stride=stride, origin=None)


def shaped(value: TensorInfo, shape: Sequence[int]) -> TensorInfo:
    """Return the elements in row-major order in another shape; a view of contiguous ones."""
    if prod(shape) != value.numel:
        raise ValueError(f"{value.numel} elements in the shape {tuple(shape)}")
    if not is_contiguous(value.shape, value.stride):
        value = _copied(value)
    stride = contiguous_stride(shape)
    return replace(value, shape=tuple(shape), stride=stride, origin=None)


def joined(parts: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Return tensors of one dtype, one after the other in a dimension."""
    first = parts[0]
    if any(value.dtype is not first.dtype for value in parts):
        raise ValueError("tensors of two dtypes cannot be joined")
    plain = [
        _copied(each) if each.lazy or needs_swap(each.storage, each.dtype.swap) else each
        for each in parts
    ]
    *starts, size = accumulate((value.shape[dim] for value in parts), initial=0)
    shape = (*first.shape[:dim], size, *first.shape[dim + 1 :])
    begins = [tuple(start if at == dim else 0 for at in range(len(shape))) for start in starts]
    chunks = tuple(Chunk(*pair) for pair in zip(begins, plain, strict=True))
    chunked = Chunked(shape, first.dtype.itemsize, chunks)
    storage = replace(_storage(parts, shape, first.dtype, Packing.CHUNKED), chunked=chunked)
    # Equal storages are shared: what is compared has to tell two joins apart.
    storage.key = f"joined {id(chunked):x}"
    return TensorInfo(first.dtype, shape, contiguous_stride(shape), storage)


def computed(kernel: Kernel, args: Sequence[TensorInfo], dtype: DType) -> TensorInfo:
    """Return what a kernel makes of the elements of tensors of one shape."""
    shape = args[0].shape
    if any(value.shape != shape for value in args):
        raise ValueError("tensors of several shapes have no elements in common")
    storage = _storage(args, shape, dtype, Packing.COMPUTED)
    storage.computed = Computed(kernel, tuple(args), dtype.itemsize)
    storage.key = f"computed {id(storage.computed):x}"  # storages are told apart by that quickly
    return TensorInfo(dtype, shape, contiguous_stride(shape), storage)


def literal(data: bytes, dtype: DType, shape: Sequence[int], key: str) -> TensorInfo:
    """Return a contiguous tensor of elements that are in memory."""
    given = Computed(lambda start, stop: data[start:stop], (), 1)
    typed = dtype if dtype.storage_class else None
    storage = Storage("", key, 0, len(data), typed, computed=given)
    storage.packing = Packing.COMPUTED
    return TensorInfo(dtype, tuple(shape), contiguous_stride(shape), storage)


Made = dict[tuple[object, ...], Storage]


def elementwise(kernel: Kernel, args: Sequence[TensorInfo], dtype: DType, made: Made) -> TensorInfo:
    """Return what a kernel makes of tensors of one dtype and shape, tied as they are.

    Where all are the same view of their storages, the whole storages are computed, once for all
    views of them: `made` holds those that were.
    """
    first, *others = args
    storages = tuple(value.storage for value in args)
    same = all(value.view[1:] == first.view[1:] for value in others)
    if not same or len({storage.nbytes for storage in storages}) > 1:
        return replace(computed(kernel, args, dtype), requires_grad=first.requires_grad)
    key = (*storages, first.dtype)
    if key not in made:
        shape = (first.storage.nbytes // first.dtype.itemsize,)
        whole = [TensorInfo(first.dtype, shape, (1,), storage) for storage in storages]
        made[key] = computed(kernel, whole, dtype).storage
    return replace(first, dtype=dtype, storage=made[key], origin=None)


def _copied(value: TensorInfo) -> TensorInfo:
    """Return the same elements, contiguous, little-endian and with nothing pending."""
    return computed(memoryview, [value], value.dtype)


def _storage(
    args: Sequence[TensorInfo], shape: tuple[int, ...], dtype: DType, packing: Packing
) -> Storage:
    typed = dtype if dtype.storage_class else None
    like = args[0].storage
    nbytes = dtype.nbytes(prod(shape))
    return Storage(like.path, packing.value, 0, nbytes, typed, like.location, packing=packing)


def arguments(storage: Storage) -> tuple[TensorInfo, ...]:
    """Return the tensors that a storage is made of; none where its bytes are in a file."""
    if storage.computed is not None:
        return storage.computed.args
    return tuple(chunk.source for chunk in storage.chunked.chunks) if storage.chunked else ()


def leaves(value: TensorInfo) -> Iterator[TensorInfo]:
    """Iterate over the views of stored bytes under a value."""
    below = arguments(value.storage)
    if not below:
        yield value
    for each in below:
        yield from leaves(each)


def stored(storage: Storage) -> Iterator[Storage]:
    """Iterate over the storages in files that a computed one is made of, or the storage itself."""
    if storage.computed is None:
        yield storage
        return
    for value in storage.computed.args:
        yield from stored(value.storage)
