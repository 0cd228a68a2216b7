"""Values: tensors whose elements are those of others, cut, joined, reshaped or computed.

Every value is a `TensorInfo`, a view of a storage; what differs is where the bytes of the storage
come from. A slice, a permutation and most reshapes of a view are views, a join is a view of a
chunked storage whose chunks are the parts, and a computed value is a view of a storage that makes
its elements when they are read. Kernels work element by element, so that any range of a computed
storage can be read, and every view of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from operator import add, mul

from ckptool.tensors.dtype import PACKED, DType
from ckptool.tensors.numbers import can_resolve
from ckptool.tensors.tensor import (
    Chunk,
    Chunked,
    Computed,
    Packing,
    Storage,
    TensorInfo,
    coalesced,
    contiguous_stride,
    is_contiguous,
    needs_swap,
    span,
    view_stride,
)

Kernel = Callable[..., None]
Box = tuple[tuple[int, ...], TensorInfo]  # where it begins in each dimension, what fills it


def part(value: TensorInfo, dim: int, start: int, stop: int) -> TensorInfo:
    """Return the elements from `start` to `stop` in a dimension: a view, of a join of its parts."""
    size = value.shape[dim]
    if (start, stop) == (0, size):
        return value
    if not 0 <= start <= stop <= size:
        raise ValueError(f"there is no {start}:{stop} in a dimension of {size}")
    _refuse_packed(value, dim)
    shape = _with(value.shape, dim, stop - start)
    chunks = []
    for chunk in _chunks(value):
        begin = chunk.offsets[dim]
        first, last = max(start - begin, 0), min(stop - begin, chunk.source.shape[dim])
        if first < last:
            offsets = _with(chunk.offsets, dim, max(begin - start, 0))
            chunks.append(Chunk(offsets, part(chunk.source, dim, first, last)))
    if chunks:
        return _assembled(shape, chunks, value)
    offset = value.storage_offset + start * value.stride[dim]
    return replace(value, shape=shape, storage_offset=offset, origin=None)


def permuted(value: TensorInfo, dims: Sequence[int]) -> TensorInfo:
    """Return the dimensions in another order: a view, of a join one of views."""
    if sorted(dims) != [*range(len(value.shape))]:
        raise ValueError(f"{tuple(dims)} is not an order of {len(value.shape)} dimensions")
    moved = [dim for at, dim in enumerate(dims) if at != dim]
    if not moved:
        return value
    _refuse_packed(value, *moved)
    shape, stride = (tuple(sizes[dim] for dim in dims) for sizes in (value.shape, value.stride))
    if chunks := _chunks(value):
        turned = [
            Chunk(tuple(each.offsets[dim] for dim in dims), permuted(each.source, dims))
            for each in chunks
        ]
        return _assembled(shape, turned, value)
    return replace(value, shape=shape, stride=stride, origin=None)


def shaped(value: TensorInfo, shape: Sequence[int]) -> TensorInfo:
    """Return the elements in row-major order in another shape.

    A view where torch's `Tensor.view` gives one, of the value or of what it is a copy of; else a
    contiguous copy.
    """
    shape = tuple(shape)
    if shape == value.shape:
        return value
    if prod(shape) != value.numel or min(shape, default=0) < 0:
        raise ValueError(f"{value.numel} elements do not fit the shape {shape}")
    if shape[-1:] != value.shape[-1:] or not is_contiguous(value.shape, value.stride):
        _refuse_packed(value, len(value.shape) - 1)
    for each in (_beneath(value), value):
        stride = view_stride(each.shape, each.stride, shape) if each else None
        if each and stride is not None:
            return replace(each, shape=shape, stride=stride, origin=None)
    copy = _copied(value, value.storage.byteorder)
    return replace(copy, shape=shape, stride=contiguous_stride(shape))


def joined(parts: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Return tensors of one dtype, one after the other in a dimension.

    Those that follow each other in their storage, as they do after a split, are a view of it.
    """
    first = parts[0]
    if any(value.dtype is not first.dtype for value in parts):
        raise ValueError("tensors of two dtypes cannot be joined")
    if any(_with(value.shape, dim, 0) != _with(first.shape, dim, 0) for value in parts):
        raise ValueError("tensors of several shapes cannot be joined")
    if len(parts) == 1:
        return first
    _refuse_packed(first, dim)
    shape = _with(first.shape, dim, sum(value.shape[dim] for value in parts))
    grad = any(value.requires_grad for value in parts)
    boxes, position = [], 0
    for value in _merged([value for value in parts if value.numel], dim):
        boxes.append((_with((0,) * len(shape), dim, position), value))
        position += value.shape[dim]
    return _filled(shape, boxes, replace(first, requires_grad=grad))


def of_boxes(shape: tuple[int, ...], boxes: Sequence[Box]) -> TensorInfo:
    """Return the tensor that others fill, each from a place in it on; they cover it exactly."""
    like = boxes[0][1]
    _refuse_packed(like, *range(len(shape)))
    return _filled(shape, boxes, like)


def stacked(parts: Sequence[TensorInfo], dim: int) -> TensorInfo:
    """Return tensors of one dtype and shape, one after the other in a new dimension."""
    shape = parts[0].shape
    if any(value.shape != shape for value in parts):
        raise ValueError("tensors of several shapes cannot be stacked")
    if dim == len(shape):
        _refuse_packed(parts[0], dim - 1)
    shape = (*shape[:dim], 1, *shape[dim:])
    return joined([shaped(value, shape) for value in parts], dim)


def taken(value: TensorInfo, dim: int, ranges: Sequence[tuple[int, int]]) -> TensorInfo:
    """Return the elements of several ranges of a dimension, in the order given."""
    parts = [part(value, dim, *each) for each in ranges]
    return joined(parts, dim) if parts else part(value, dim, 0, 0)


def in_order(value: TensorInfo) -> TensorInfo:
    """Return the same elements, contiguous, little-endian and with nothing pending."""
    swapped = needs_swap(value.storage, value.dtype.swap)
    if is_contiguous(value.shape, value.stride) and not value.lazy and not swapped:
        return value
    return _copied(value, "little")


def in_byteorder(value: TensorInfo, byteorder: str) -> TensorInfo:
    """Return the same elements in a byte order: a torch file has one for all tensors."""
    return value if value.storage.byteorder == byteorder else _copied(value, byteorder)


def own(value: TensorInfo) -> TensorInfo:
    """Return the same elements, contiguous, in a storage that holds nothing else.

    The value itself where its storage is that already, a byte range of a plain storage where they
    are in order there, else a copy, which has nothing pending. Only a copy loses the `origin`.
    """
    if is_contiguous(value.shape, value.stride) and not value.lazy:
        if value.nbytes == value.storage.nbytes:
            return value
        if value.storage.packing is Packing.PLAIN:
            return cut(value, value.storage.key)
    if value.dtype.quantized:
        raise ValueError(f"{value.dtype.label} is read with a quantizer: it cannot be copied")
    return _copied(value, value.storage.byteorder)


def cut(value: TensorInfo, key: str) -> TensorInfo:
    """Return the same view with a storage of its own, no larger than what it reaches.

    A storage that is not plain stays whole.
    """
    storage = replace(value.storage, key=key)
    if storage.packing is not Packing.PLAIN:
        return replace(value, storage=storage)
    start, nbytes = value.start, value.dtype.nbytes(span(value.shape, value.stride))
    if (start, nbytes) != (0, storage.nbytes):
        whole = value.storage.whole or value.storage
        storage = replace(
            storage, start=storage.start + start, nbytes=nbytes, crc32=None, whole=whole
        )
    return replace(value, storage=storage, storage_offset=0)


def _with(sizes: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    """Return sizes with another one in a dimension."""
    return (*sizes[:dim], size, *sizes[dim + 1 :])


def _refuse_packed(value: TensorInfo, *dims: int) -> None:
    """Raise `ValueError` for elements that mean something only where they are."""
    dtype = value.dtype
    if dtype.quantized:
        raise ValueError(f"{dtype.label} is read with a quantizer: its elements cannot be moved")
    if dtype.bits < 8:
        raise ValueError(f"{dtype.label} has elements that share a byte: they cannot be moved")
    if dtype in PACKED and len(value.shape) - 1 in dims:
        raise ValueError(
            f"{dtype.label} packs numbers along the last dimension: it cannot be rearranged"
        )


def _merged(parts: Iterable[TensorInfo], dim: int) -> list[TensorInfo]:
    """Join the views that follow each other in a dimension of the same storage."""
    merged: list[TensorInfo] = []
    for value in parts:
        grown = _followed(merged[-1], value, dim) if merged else None
        if grown is None:
            merged.append(value)
        else:
            merged[-1] = grown
    return merged


def _followed(one: TensorInfo, other: TensorInfo, dim: int) -> TensorInfo | None:
    """Return a view and the one that follows it as one view, None where it does not."""
    distance = other.storage_offset - one.storage_offset
    size, step = one.shape[dim], one.stride[dim]
    if size == 1:
        step = other.stride[dim] if other.shape[dim] > 1 else distance
    strides = [
        each.stride[at]
        for each in (one, other)
        for at, length in enumerate(each.shape)
        if length > 1 and at != dim
    ]
    half = len(strides) // 2
    follows = distance == size * step > 0 and strides[:half] == strides[half:]
    follows &= other.shape[dim] == 1 or other.stride[dim] == step
    if not follows or one.storage != other.storage or one.lazy != other.lazy:
        return None
    shape = _with(one.shape, dim, size + other.shape[dim])
    return replace(one, shape=shape, stride=_with(one.stride, dim, step), origin=None)


def _chunks(value: TensorInfo) -> tuple[Chunk, ...]:
    """Return the parts of a join; none where a value is anything but the whole of one."""
    chunked = value.storage.chunked
    whole = chunked is not None and value.shape == chunked.shape and not value.lazy
    if chunked is None or not whole or not is_contiguous(value.shape, value.stride):
        return ()
    return chunked.chunks if value.nbytes == value.storage.nbytes else ()


def _filled(shape: tuple[int, ...], boxes: Iterable[Box], like: TensorInfo) -> TensorInfo:
    """Return a tensor that others fill, themselves joins or not."""
    chunks = []
    for begins, value in boxes:
        chunks += [
            Chunk(tuple(map(add, begins, each.offsets)), each.source) for each in _chunks(value)
        ] or [Chunk(begins, value)]
    return _assembled(shape, chunks, like)


def _assembled(shape: tuple[int, ...], chunks: Sequence[Chunk], like: TensorInfo) -> TensorInfo:
    """Return a tensor that chunks fill; the source of the only one, where it is one.

    It has the byte order of its chunks where they have one.
    """
    if len(chunks) == 1:
        return replace(chunks[0].source, requires_grad=like.requires_grad, origin=None)
    orders = {each.source.storage.byteorder for each in chunks} or {like.storage.byteorder}
    return _chunked(shape, chunks, like, orders.pop() if len(orders) == 1 else "little")


def _chunked(
    shape: tuple[int, ...], chunks: Sequence[Chunk], like: TensorInfo, byteorder: str
) -> TensorInfo:
    """Return a contiguous tensor of chunks, with nothing pending."""
    storage = _storage([like], shape, like.dtype, Packing.CHUNKED)
    storage.byteorder = byteorder
    storage.chunked = Chunked(shape, like.dtype.itemsize, tuple(chunks))
    storage.key = f"chunked {id(storage.chunked):x}"  # storages are told apart by that quickly
    stride = contiguous_stride(shape)
    return TensorInfo(like.dtype, shape, stride, storage, requires_grad=like.requires_grad)


def _copied(value: TensorInfo, byteorder: str) -> TensorInfo:
    """Return the same elements, contiguous and with nothing pending, in a storage of their own."""
    if value.lazy and not can_resolve(value.dtype, value.lazy):
        raise ValueError(f"a pending operation that torch does not do on {value.dtype.label}")
    made = _recomputed(value) if value.storage.byteorder == byteorder else None
    if made is None:
        source = _beneath(value) or value
        chunks = [Chunk((0,) * len(source.shape), source)] if value.nbytes else []
        made = _chunked(source.shape, chunks, value, byteorder)
    return replace(made, shape=value.shape, stride=contiguous_stride(value.shape))


def _recomputed(value: TensorInfo) -> TensorInfo | None:
    """Return a view of computed elements as made from the same views of what they are made of."""
    below = value.storage.computed
    if below is None or value.lazy or not below.args:
        return None
    if any(not is_contiguous(each.shape, each.stride) for each in below.args):
        return None
    args = [
        replace(
            each,
            shape=value.shape,
            stride=value.stride,
            storage_offset=each.storage_offset + value.storage_offset,
        )
        for each in below.args
    ]
    made = computed(below.kernel, args, value.dtype)
    made.storage.byteorder = value.storage.byteorder
    return replace(made, requires_grad=value.requires_grad)


def _beneath(value: TensorInfo) -> TensorInfo | None:
    """Return the elements of a view of a copy as a view of what was copied, in the same order.

    It has as many dimensions as that takes. A step in the copy is a step in one dimension of what
    was copied, or such a one after the other; and no two of them may carry into a third.
    """
    chunks = value.storage.chunked.chunks if value.storage.chunked else ()
    if len(chunks) != 1 or value.lazy or not value.numel:
        return None
    source = chunks[0].source
    sizes, steps = coalesced(source.shape, source.stride)
    units = contiguous_stride(sizes)
    highest = [value.storage_offset // unit % size for unit, size in zip(units, sizes, strict=True)]
    offset = source.storage_offset + sum(map(mul, highest, steps))
    shape: list[int] = []
    stride: list[int] = []
    for size, step in zip(reversed(value.shape), reversed(value.stride), strict=True):
        while size > 1:
            at = next((at for at, unit in enumerate(units) if unit <= step), None)
            if step and (at is None or step % units[at]):
                return None
            count, far, taken = size, 0, 0
            if step and at is not None:
                far = step // units[at]
                count = min(size, sizes[at] // far)
                if count < size and (sizes[at] % far or size % count):
                    return None
                highest[at] += (count - 1) * far
                taken, step = far * steps[at], units[at] * sizes[at]
            shape.append(count)
            stride.append(taken)
            size //= count
    if any(index >= size for index, size in zip(highest, sizes, strict=True)):
        return None
    return replace(
        source,
        shape=tuple(reversed(shape)),
        stride=tuple(reversed(stride)),
        storage_offset=offset,
        requires_grad=value.requires_grad,
        origin=None,
    )


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

    def fill(out: memoryview, start: int) -> None:
        out[:] = data[start : start + len(out)]

    typed = dtype if dtype.storage_class else None
    storage = Storage("", key, 0, len(data), typed, computed=Computed(fill, (), 1))
    storage.packing = Packing.COMPUTED
    return TensorInfo(dtype, tuple(shape), contiguous_stride(shape), storage)


Made = dict[tuple[object, ...], Storage]


def elementwise(kernel: Kernel, args: Sequence[TensorInfo], dtype: DType, made: Made) -> TensorInfo:
    """Return what a kernel makes of tensors of one shape, tied where all of them are.

    Where they are laid out alike in storages of as many elements, the whole storages are computed,
    once for all views of them: `made` holds those that were.
    """
    first = args[0]
    wholes = [_whole(value) for value in args]
    laid = [
        (each.shape, value.shape, value.stride, value.storage_offset, value.lazy)
        for each, value in zip(wholes, args, strict=True)
    ]
    shape, stride, start, lazy = first.shape, first.stride, first.storage_offset, first.lazy
    if laid.count(laid[0]) == len(laid):
        args = wholes
    else:
        stride, start, lazy = contiguous_stride(shape), 0, frozenset()
    key = (dtype, *(value.view for value in args))
    storage = made.get(key)
    if storage is None:
        storage = made[key] = computed(kernel, args, dtype).storage
    return TensorInfo(dtype, shape, stride, storage, start, first.requires_grad, lazy)


def _whole(value: TensorInfo) -> TensorInfo:
    """Return all elements of the storage of a value, with nothing pending."""
    shape = (value.storage.nbytes // value.dtype.itemsize,)
    return TensorInfo(value.dtype, shape, (1,), value.storage)


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


def stored(storage: Storage) -> Iterable[Storage]:
    """Iterate over the storages in files that a storage is made of, or the storage itself."""
    if storage.computed is None and storage.chunked is None:
        return (storage,)
    return (each for value in arguments(storage) for each in stored(value.storage))


def has_numbers(storage: Storage) -> bool:
    """Return whether elements of a storage are computed or gathered, as numpy does it."""
    if storage.computed is None and storage.chunked is None:
        return False
    below = arguments(storage)
    odd = any(each.lazy or not is_contiguous(each.shape, each.stride) for each in below)
    return odd or storage.computed is not None or any(has_numbers(each.storage) for each in below)
