"""Tensors in the guise of other objects: subclasses that hold tensors, arrays of numpy, XLA's.

A wrapper subclass (`torch.Tensor._make_wrapper_subclass`) has a dtype and a shape and no bytes: its
`__dict__` or slots hold the tensors that it is made of (torch/_tensor.py, `_reduce_ex_internal`).
DTensor and ShardedTensor hold what one rank has of a tensor (`holdings`). An array of numpy has its
bytes in the pickle (numpy/_core/src/multiarray/methods.c, `array_reduce`); tensors of devices
without storages are pickled as arrays, before torch 2.6, or as CPU tensors.
"""

from __future__ import annotations

import struct
from array import array as memory
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod

# What computes is imported by functions: a listing of plain tensors needs none of it.
from ckptool.errors import Malformed
from ckptool.pickles.holdings import (
    FROM_TYPE as FROM_TYPE,
    call_of,
    holding,
    sizes_of as sizes_of,
)
from ckptool.pickles.tree import ByteArray, Global, Node, Object, OldString, children
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import (
    AnyTensor,
    CompositeTensor,
    TensorInfo,
    contiguous_stride,
)

UTILS = "torch._utils"
NDARRAY = Global("numpy", "ndarray")
_ORDINARY = ("Tensor", "Parameter")
_DEVICE_REBUILDS = (
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_xla_tensor",
)


def _size(node: Node) -> tuple[int, ...]:
    """Read the size of a tensor; raises `Malformed`."""
    found = sizes_of(node)
    if found is None:
        raise Malformed("the size of a tensor is not a tuple of numbers, or negative")
    return found


def dtype_of(node: Node) -> DType | None:
    """Return the dtype that a name of torch means, None for any other node."""
    if isinstance(node, Global) and node.module == "torch":
        return BY_TORCH_NAME.get(node.name)
    return None


# What torch._utils rebuilds, by the name of the function.


def _layout(node: Node) -> str:
    if isinstance(node, Object) and node.args and isinstance(node.args[0], str):
        return node.args[0].removeprefix("torch.")
    return node.name if isinstance(node, Global) else "sparse"


def _sparse(node: Object) -> CompositeTensor | None:
    match node.args:
        case (layout, tuple() as data):
            parts = tuple(part for part in data if isinstance(part, TensorInfo))
            sizes = [size for part in data if (size := sizes_of(part)) is not None]
            if len(parts) >= 2 and not sizes:
                raise Malformed(
                    "the size of a sparse tensor is not a tuple of numbers, or negative"
                )
            if len(parts) >= 2:
                values = parts[1] if len(data) <= 4 and len(parts) == 2 else parts[2]
                return CompositeTensor(_layout(layout), values.dtype, sizes[0], parts, node)
    return None


def _nested(node: Object) -> CompositeTensor | None:
    parts = tuple(part for part in node.args if isinstance(part, TensorInfo))
    if not parts:
        return None
    return CompositeTensor("nested", parts[0].dtype, parts[0].shape, parts, node)


def _meta(node: Object) -> CompositeTensor | None:
    match node.args:
        case (named, size, *_):
            dtype = dtype_of(named)
            if dtype is not None:
                return CompositeTensor("meta", dtype, _size(size), (), node)
    return None


def _of_device(node: Object) -> TensorInfo | None:
    """Read a tensor of a device without storages (XLA): its elements, dtype and device."""
    from ckptool.tensors import numbers, values
    from ckptool.tensors.casting import Rounding

    match node.args:
        case (data, named, str(device), grad, *_):
            dtype = dtype_of(named)
            info = data if isinstance(data, TensorInfo) else array(data) or _listed(data, dtype)
            if info is not None and info is not data:
                info = replace(info, storage=replace(info.storage, location=device))
            if info is not None and dtype is not None and info.dtype is not dtype:
                floats = info.dtype in numbers.ROUNDED and dtype in numbers.CASTS
                kernel = Rounding(info.dtype, dtype)
                info = values.computed(kernel, [info], dtype) if floats else None
            if info is not None and dtype is not None:
                return replace(info, requires_grad=grad is True, origin=node)
    return None


def on_device(node: Object, device: str) -> Object:
    """Return the call of a tensor of a device without storages with another device."""
    match node:
        case Object(callee=Global(name=name), args=(data, dtype, str(), *rest)) if (
            name in _DEVICE_REBUILDS
        ):
            return replace(node, args=(data, dtype, device, *rest))
    return node


REBUILDS: dict[str, Callable[[Object], AnyTensor | None]] = {
    "_rebuild_sparse_tensor": _sparse,
    "_rebuild_nested_tensor": _nested,
    "_rebuild_meta_tensor_no_storage": _meta,
    **dict.fromkeys(_DEVICE_REBUILDS, _of_device),
}


# Subclasses: (function, type, its arguments, state).


def subclass(node: Object) -> AnyTensor | None:
    """Read a tensor of a class that holds tensors; the tensor inside where that is all of it."""
    function, kind, args, state = node.args
    if not isinstance(kind, Global):
        return None
    held = holding(node)
    whole = held.whole if held else None
    if whole is not None and whole.dtype is dtype_of(args[1]):
        return replace(whole, requires_grad=args[-1] is True, origin=node)
    inside = [piece.tensor for piece in held.pieces] if held else [*tensors_in((args, state))]
    parts = tuple({part.view: part for part in inside}.values())
    if function == Global(UTILS, "_rebuild_wrapper_subclass") and len(args) > 2:
        dtype, shape = dtype_of(args[1]), _size(args[2])
    elif parts:  # jagged: torch/nested/_internal/nested_tensor.py, `_rebuild_njt`
        dtype, shape = parts[0].dtype, parts[0].shape
    else:
        return None
    return CompositeTensor(kind.name, dtype, shape, parts, node) if dtype else None


def tensors_in(node: Node) -> Iterator[TensorInfo]:
    """Yield the tensors in a node, those that composite ones are made of too."""
    seen: set[int] = set()
    stack = [node]
    while stack:
        here = stack.pop()
        if isinstance(here, TensorInfo):
            yield here
        elif isinstance(here, CompositeTensor):
            yield from here.parts
        elif not isinstance(here, str | int | float | bytes | Global) and id(here) not in seen:
            seen.add(id(here))
            stack += reversed([*children(here)])


def within(origin: Object) -> TensorInfo | None:
    """Return the tensor in a call whose elements those of the result are; None where none is."""
    held = holding(origin)
    inside = held.whole if held else origin.args[0] if origin.args else None
    return inside if isinstance(inside, TensorInfo) else None


def class_of(tensor: AnyTensor) -> str:
    """Name the class of a tensor that is neither a Tensor nor a Parameter; empty for these."""
    origin = call_of(tensor)
    if not isinstance(origin, Object):
        return ""
    if is_array(origin):
        return "numpy.ndarray"
    kind = origin.args[1] if origin.callee == FROM_TYPE and len(origin.args) > 1 else None
    return str(kind) if isinstance(kind, Global) and kind.name not in _ORDINARY else ""


# Arrays and numbers of numpy.

_MAKERS = ("numpy.core", "numpy._core")
_NUMPY = "b1   f2  f4  f8  i1 i2  i4  i8  u1 u2  u4  u8  c8  c16"
_DTYPES = "BOOL F16 F32 F64 I8 I16 I32 I64 U8 U16 U32 U64 C64 C128"
_KINDS = {kind: DType[own] for kind, own in zip(_NUMPY.split(), _DTYPES.split(), strict=True)}
_LETTERS = dict(zip(_KINDS.values(), "?efdbhiqBHIQ", strict=False))  # of `struct`


def is_array(node: Node) -> bool:
    """Check for an array of numpy, whatever it holds; protocol 5 has a function for the plain."""
    made = _made_by(node, "_reconstruct") and node.args[:1] == (NDARRAY,)
    return made or _made_by(node, "_frombuffer")


def _made_by(node: Node, name: str) -> bool:
    made = isinstance(node, Object) and isinstance(node.callee, Global)
    return made and node.callee.name == name and node.callee.module.startswith(_MAKERS)


def array(node: Node) -> TensorInfo | None:
    """Read an array of numpy as a tensor, None for anything else and what no tensor holds."""
    if not is_array(node):
        return None
    from ckptool.tensors import values

    match node.args if node.state is None else node.state:
        case (_, shape, kind, fortran, data) | (data, kind, shape, "F" | "C" as fortran):
            sizes, found, raw = sizes_of(shape), _dtype(kind), bytes_of(data)
        case _:
            return None
    if sizes is None or found is None or raw is None:
        return None
    dtype, order = found
    if dtype.nbytes(prod(sizes)) != len(raw):
        return None
    stride = contiguous_stride(sizes)
    if fortran in (True, "F"):
        stride = contiguous_stride(sizes[::-1])[::-1]
    if order == "big":
        raw = _swapped(raw, dtype.swap)
    info = values.literal(raw, dtype, sizes, f"array {node.offset}")
    return replace(info, stride=stride, origin=node)


def as_tensor(value: Node) -> Node:
    """Return an array of numpy as a tensor, anything else as it is."""
    return array(value) or value if type(value) is Object else value


def as_pickled(value: Node) -> Node:
    """Return the array of numpy that a tensor was read from, anything else as it is."""
    origin = value.origin if type(value) is TensorInfo else None
    return origin if origin is not None and is_array(origin) else value


def number(node: Node) -> bool | int | float | None:
    """Read a number of numpy, None for anything else."""
    match node.args if _made_by(node, "scalar") else ():
        case (kind, data):
            found, raw = _dtype(kind), bytes_of(data)
            letter = _LETTERS.get(found[0], "") if found else ""
            if found and raw and letter and struct.calcsize(letter) == len(raw):
                value: bool | int | float = struct.unpack(_ENDS[found[1]] + letter, raw)[0]
                return value
    return None


_ENDS = {"little": "<", "big": ">"}


def _dtype(node: Node) -> tuple[DType, str] | None:
    """Read a numpy.dtype: its kind, and which end of a number comes first."""
    if not isinstance(node, Object) or node.callee != Global("numpy", "dtype") or not node.args:
        return None
    kind, state = node.args[0], node.state
    end = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
    if isinstance(kind, Global):  # of ml_dtypes
        dtype = BY_TORCH_NAME.get(kind.name)
    else:
        dtype = _KINDS.get(kind) if isinstance(kind, str) else None
    return (dtype, "big" if end == ">" else "little") if dtype else None


def bytes_of(node: Node) -> bytes | None:
    """Read bytes, which protocol 2 writes as text that is encoded, and Python 2 as a string."""
    match node:
        case bytes():
            return node
        case OldString() | ByteArray():
            return node.data
        case Object(callee=Global(name="bytes"), args=()):
            return b""
        case Object(callee=Global(module="_codecs", name="encode"), args=(str(text), *_)):
            encoding = "latin-1"
        case str(text):
            encoding = "utf-8"
        case _:
            return None
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        return None


def _swapped(raw: bytes, width: int) -> bytes:
    """Turn the bytes of each number around."""
    numbers = memory({1: "B", 2: "H", 4: "I", 8: "Q"}[width], raw)
    numbers.byteswap()
    return numbers.tobytes()


def _listed(node: Node, dtype: DType | None) -> TensorInfo | None:
    """Read lists of numbers within each other, as torch before 1.8 pickled tensors of XLA."""
    shape, flat = [], [node]
    while flat and all(isinstance(each, list) for each in flat):
        shape.append(len(flat[0]))
        if any(len(each) != shape[-1] for each in flat):
            return None
        flat = [inner for each in flat for inner in each]
    if dtype is None or not all(isinstance(each, int | float) for each in flat):
        return None
    from ckptool.tensors import values

    held = dtype if _LETTERS.get(dtype) else DType.F32
    try:
        raw = struct.pack(f"<{len(flat)}{_LETTERS[held]}", *flat)
    except struct.error:
        return None
    return values.literal(raw, held, tuple(shape), f"list {id(node)}")
