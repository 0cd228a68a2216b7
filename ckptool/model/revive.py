"""Nodes of the inert tree -> plain Python values and real torch tensors; nothing is unpickled.

A file is mapped once, privately, and its storages are slices of that map, as
`torch.load(mmap=True)` does it (torch/serialization.py, `_load`): equal storages stay one storage,
writing to a tensor never reaches the file, and bytes are read when they are first used. What
cannot be mapped is copied: deflated records, foreign byte orders, storages at odd offsets.

Names are only ever compared with the tables here. What is in none of them is not revived.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing, suppress
from typing import Any

from ckptool.errors import CkptoolError, Malformed, Unsupported
from ckptool.files.blocks import blocks
from ckptool.files.fileio import Reader, Readers
from ckptool.model import libraries, staging
from ckptool.pickles.names import python3_name
from ckptool.pickles.torch_objects import quantizer
from ckptool.pickles.tree import ByteArray, Dict, Global, LongInteger, Node, Object, OldString, Set
from ckptool.state.checkpoint import items
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.numbers import swap
from ckptool.tensors.tensor import CompositeTensor, Packing, Storage, TensorInfo, needs_swap

_UTILS = "torch._utils"
_PARAMETERS = {
    Global(_UTILS, "_rebuild_parameter"),
    Global(_UTILS, "_rebuild_parameter_with_state"),
    Global("torch.nn.parameter", "Parameter"),
}
_FROM_TYPE = Global("torch._tensor", "_rebuild_from_type_v2")
_WITH_STATE = {_FROM_TYPE, Global(_UTILS, "_rebuild_parameter_with_state")}
_SCHEMES = frozenset(
    "per_tensor_affine per_tensor_symmetric per_channel_affine per_channel_symmetric "
    "per_channel_affine_float_qparams".split()
)
_COMPRESSED = ("sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc")
_UNFINISHED = object()
_KEYS = (str, int, float, bytes, bool, type(None))


class Reviver:
    """Make values of one file's nodes; tensors that share a storage there share it here."""

    def __init__(self, path: str, device: str = "cpu") -> None:
        self._torch: Any = libraries.torch()
        self._path = path
        self._device = self._torch.device(device)
        self._maps: dict[str, Any] = {}
        self._storages: dict[Storage, Any] = {}
        self._made: dict[int, tuple[Node, Any]] = {}

    def stage(self, tensors: Iterable[Node], copies: staging.Copies) -> None:
        """Bring the bytes of tensors to the device at once, where they are in order in a file."""
        plain = {
            part.storage
            for tensor in tensors
            for part in getattr(tensor, "parts", (tensor,))
            if isinstance(part, TensorInfo) and part.storage.nbytes
            if _is_in_order(part.storage, part.dtype)
        }
        self._storages |= staging.load(plain, self._device, copies)

    def __call__(self, node: Node) -> Any:
        """Return the value of a node.

        Raises `Unsupported` for what is neither a tensor nor plain, `Malformed` for what torch
        refuses to build.
        """
        try:
            return self._value(node)
        except CkptoolError:
            raise
        except (RuntimeError, TypeError, ValueError, OverflowError, AttributeError) as error:
            first = str(error).strip().partition("\n")[0]
            raise Malformed(f"torch refuses it: {first}", path=self._path) from error

    def _value(self, node: Node) -> Any:
        if node is None or isinstance(node, bool | int | float | str | bytes):
            return node
        if id(node) not in self._made:
            self._made[id(node)] = (node, _UNFINISHED)
            self._made[id(node)] = (node, self._make(node))
        value = self._made[id(node)][1]
        if value is _UNFINISHED:
            raise Unsupported("a value that holds itself", path=self._path)
        return value

    def _make(self, node: Node) -> Any:
        match node:
            case TensorInfo():
                return self._tensor(node)
            case CompositeTensor():
                return self._composite(node)
            case list():
                return [self._value(item) for item in node]
            case tuple():
                return tuple(self._value(item) for item in node)
            case Dict():
                return self._filled({}, node)
            case Set():
                return (frozenset if node.frozen else set)(map(_hashable, node.items))
            case ByteArray():
                return bytearray(node.data)
            case OldString():
                return node.data
            case LongInteger():
                return int.from_bytes(node.data, "little", signed=True)
            case Global():
                return self._named(node)
            case Object():
                return self._object(node)
        raise Unsupported(f"a {type(node).__name__.lower()} is not a plain value", path=self._path)

    def _filled(self, made: Any, node: Node) -> Any:
        for key, value in items(node) or ():
            made[_hashable(key)] = self._value(value)
        return made

    def _named(self, node: Global) -> Any:
        if node.module == "torch" and (node.name in BY_TORCH_NAME or node.name in _SCHEMES):
            return getattr(self._torch, node.name)
        raise Unsupported(f"{node} is not a plain value", path=self._path)

    def _object(self, node: Object) -> Any:
        plain = [argument for argument in node.args if isinstance(argument, str | int | float)]
        callee = node.callee
        named = ".".join(python3_name(callee)) if isinstance(callee, Global) else ""
        match named, node.args:
            case "collections.OrderedDict", _:
                return self._filled(OrderedDict(), node)
            case "torch.Size", (list() | tuple() as sizes,):
                return self._torch.Size(sizes)
            case "torch.device", _ if len(plain) == len(node.args):
                return self._torch.device(*plain)
            case "_codecs.encode", (str(text), "latin1" | "latin-1"):  # bytes in protocol 2
                return text.encode("latin-1")
            case "builtins.set" | "builtins.frozenset", (list() as inside,):
                return (set if named == "builtins.set" else frozenset)(map(_hashable, inside))
            case "builtins.bytes", ():
                return b""
            case "builtins.bytearray", ():
                return bytearray()
            case "builtins.bytearray", (bytes() | Object() as data,) if _is_bytes(data):
                return bytearray(self._value(data))
            case "builtins.complex", (float(real), float(imaginary)):
                return complex(real, imaginary)
        raise Unsupported(f"a {node.callee} is not a plain value", path=self._path)

    # Tensors.

    def _tensor(self, info: TensorInfo) -> Any:
        origin = info.origin.callee if isinstance(info.origin, Object) else None
        parts = None if origin in _PARAMETERS else quantizer(info)
        if isinstance(parts, tuple):
            tensor = self._quantized(info, parts)
        elif origin in _PARAMETERS and isinstance(info.origin.args[0], TensorInfo):
            inner = self._value(info.origin.args[0])
            tensor = self._torch.nn.Parameter(inner, info.requires_grad)
        else:
            tensor = self._dense(info)
        if info.lazy:
            self._torch._utils.set_tensor_metadata(tensor, dict.fromkeys(info.lazy, True))
        if info.requires_grad and origin not in _PARAMETERS:
            tensor.requires_grad_(True)
        tensor.__dict__.update(self._attributes(info.origin))
        return tensor

    def _dense(self, info: TensorInfo) -> Any:
        empty = self._torch.empty(0, dtype=self._dtype(info.dtype), device=self._device)
        storage = self._storage(info.storage, info.dtype)
        return empty.set_(storage, info.storage_offset, info.shape, info.stride)

    def _quantized(self, info: TensorInfo, parts: tuple[Node, ...]) -> Any:
        quantizer = tuple(self._value(part) for part in parts)
        self._refuse_channels(info, quantizer)
        storage = self._torch.storage.TypedStorage(
            wrap_storage=self._storage(info.storage, info.dtype),
            dtype=self._dtype(info.dtype),
            _internal=True,
        )
        return self._torch._utils._rebuild_qtensor(
            storage, info.storage_offset, info.shape, info.stride, quantizer, False, OrderedDict()
        )

    def _refuse_channels(self, info: TensorInfo, quantizer: tuple[Any, ...]) -> None:
        """Check what torch before 2.13 does not: a scale and a zero point for each channel."""
        if len(quantizer) != 4:
            return
        _, scales, zero_points, axis = quantizer
        counts = {len(scales), len(zero_points)}
        if type(axis) is not int or not 0 <= axis < len(info.shape) or counts != {info.shape[axis]}:
            raise Malformed("a quantizer that does not fit its tensor", path=self._path)

    def _composite(self, node: CompositeTensor) -> Any:
        torch, parts = self._torch, [self._value(part) for part in node.parts]
        if node.origin.callee in _PARAMETERS:
            grad = len(node.origin.args) < 2 or node.origin.args[1] is True
            return torch.nn.Parameter(self._value(node.origin.args[0]), grad)
        if node.layout == "sparse_coo":
            coalesced = node.origin.args[1][3] if len(node.origin.args[1]) > 3 else None
            return torch.sparse_coo_tensor(
                *parts, node.shape, check_invariants=True, is_coalesced=coalesced
            )
        if node.layout in _COMPRESSED:
            return torch.sparse_compressed_tensor(
                *parts, node.shape, layout=getattr(torch, node.layout), check_invariants=True
            )
        if node.layout == "meta":
            dtype = self._dtype(node.dtype)
            return torch.empty_strided(node.shape, node.origin.args[2], dtype=dtype, device="meta")
        raise Unsupported(f"a {node.layout} tensor is not rebuilt", path=self._path)

    def _attributes(self, origin: Node) -> dict[str, Any]:
        """Return the plain ones of the Python attributes that a tensor carries."""
        if not isinstance(origin, Object) or origin.callee not in _WITH_STATE:
            return {}
        state = origin.args[3] if len(origin.args) > 3 else None
        if isinstance(state, tuple) and state:  # (the instance's dict, its slots)
            state = state[0]
        attributes = {}
        for key, value in state.pairs if isinstance(state, Dict) else ():
            with suppress(Unsupported):
                attributes[str(key)] = self._value(value)
        return attributes

    def _dtype(self, dtype: DType) -> Any:
        known = getattr(self._torch, dtype.torch_name or "", None)
        if known is None:
            text = f"torch {self._torch.__version__} has no dtype {dtype.label}"
            raise Unsupported(text, path=self._path)
        return known

    # Storages.

    def _storage(self, storage: Storage, dtype: DType) -> Any:
        if storage not in self._storages:
            made = self._on_cpu(storage, dtype)
            is_cpu = self._device.type == "cpu"
            self._storages[storage] = made if is_cpu else made.to(device=self._device)
        return self._storages[storage]

    def _on_cpu(self, storage: Storage, dtype: DType) -> Any:
        is_meta = self._device.type == "meta"
        if is_meta or not storage.nbytes:
            device = "meta" if is_meta else "cpu"
            return self._torch.UntypedStorage(storage.nbytes, device=device)
        in_place = _is_in_order(storage, dtype) and not Reader(storage.path).file.far
        if in_place and not storage.start % dtype.swap:
            return self._mapped(storage.path)[storage.start : storage.start + storage.nbytes]
        data = memoryview(bytearray(storage.nbytes))
        with closing(Readers()) as readers:
            start = 0
            for block in blocks(TensorInfo(DType.U8, (len(data),), (1,), storage), readers):
                data[start : start + len(block)] = block
                start += len(block)
        if needs_swap(storage, dtype.swap):
            swap(data[: len(data) // dtype.swap * dtype.swap], dtype.swap)
        return self._torch.frombuffer(data, dtype=self._torch.uint8).untyped_storage()

    def _mapped(self, path: str) -> Any:
        if path not in self._maps:
            data = Reader(path).file.mapped()
            self._maps[path] = self._torch.frombuffer(data, dtype=self._torch.uint8)
        return self._maps[path].untyped_storage()


def _is_in_order(storage: Storage, dtype: DType) -> bool:
    """Check whether the bytes of a file are those of memory."""
    return storage.packing is Packing.PLAIN and not needs_swap(storage, dtype.swap)


def _is_bytes(node: Node) -> bool:
    return isinstance(node, bytes) or node.callee == Global("_codecs", "encode")


def _hashable(key: Node) -> Any:
    """Refuse keys that are more than plain values: a file must not choose what is hashed."""
    if isinstance(key, tuple):
        return tuple(_hashable(part) for part in key)
    if not isinstance(key, _KEYS):
        raise Unsupported("a key of a dictionary that is not a plain value")
    return key
