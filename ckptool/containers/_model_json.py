"""TorchScript archives of torch 1.0 to 1.2: modules and tensors are in `model.json`.

The message `torch.ModelDef` (caffe2/proto/torch.proto of those years) as protobuf's JSON: numbers
of 64 bits are text, names are in camel case, and what is missing has its default. `tensors` are
strided views of the records that they name; `mainModule` holds modules in modules, each with
parameters (buffers among them) that count into `tensors`. torch's own loader took parameters,
buffers and submodules in the order of the file (torch/csrc/jit/import.cpp, `loadTensorTable` and
`convertModule`). Attributes count into the tuple of `attributes.pkl`, where a tensor is a call on
its place in `tensors` (torch/csrc/jit/pickler.cpp, `pushTensor`; in torch 1.1 by BUILD); those of
the type Tensor are buffers to torch 1.2.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import field
from typing import Any, TypeVar

from ckptool.containers import _json
from ckptool.containers._records import Budget, Records, budget
from ckptool.errors import Malformed, Unsupported
from ckptool.files import budget as costs
from ckptool.pickles.pickle_reader import Pickle, Vocabulary
from ckptool.pickles.torch_objects import StorageId, quantized_call
from ckptool.pickles.tree import Global, Node, Object
from ckptool.records import dataclass
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.replacing import make_state_dict
from ckptool.state.walk import dotted
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Storage, TensorInfo, problem
from ckptool.text import length

_DTYPES = {
    ("FLOAT", 1): DType.F32,
    ("INT32", 2): DType.I32,
    ("BYTE", 3): DType.U8,
    ("BOOL", 5): DType.BOOL,
    ("UINT8", 6): DType.U8,
    ("INT8", 7): DType.I8,
    ("INT16", 9): DType.I16,
    ("INT64", 10): DType.I64,
    ("FLOAT16", 12): DType.F16,
    ("DOUBLE", 13): DType.F64,
}
_BY_NAME = {key: dtype for keys, dtype in _DTYPES.items() for key in keys}
_QUANTIZED = {DType.I8: DType.QI8, DType.U8: DType.QU8, DType.I32: DType.QI32}
_CAPITAL = re.compile(r"(?<!^)([A-Z])")
_ATTRIBUTES = "attributes.pkl"
_READ = ("model.json", "version")
_NO_VALUE = "-1"  # of an attribute that the code of the module restores

T = TypeVar("T")


def read(records: Records) -> tuple[Checkpoint, list[str], int]:
    """Read the tables of an archive; the storages stay where they are.

    Return also the names of tensors in other attributes, and the count of those without a name.
    """
    model = _json.load(records.small("model.json"), "model.json")
    tensors = _Tensors(records).read(_field(model, "tensors", []))
    main: Any = _field(model, "mainModule", {})
    attributes = _attributes(records, tensors)
    modules = _Modules(tensors, attributes.tree, budget(records.members["model.json"].nbytes))
    entries: dict[str, Node] = {}
    for key, tensor in modules.walk(main, ""):
        if key in entries:
            raise Malformed(f"model.json: two parameters are {key}")
        entries[key] = tensor
    taken = set(map(id, entries.values()))
    left = {
        dotted((modules.named.get(index, _ATTRIBUTES), *path)): id(tensor)
        for (index, *path), tensor in walk.tensors(attributes.tree)
        if id(tensor) not in taken
    }
    fixed = len({*map(id, tensors)} - taken - {*left.values()})
    name = _field(main, "name", "")
    checkpoint = Checkpoint(
        records.reader.path,
        "torchscript",
        make_state_dict(entries, None),
        records.reader.nbytes,
        globals=attributes.globals,
        calls=attributes.calls,
        pickle_name="attributes.pkl",
        generation="torch 1.0 to 1.2",
        unread=records.unread(_READ),
        records=records.described(),
        unlisted=records.unlisted,
        program=f"TorchScript module {name}".rstrip(),
    )
    return checkpoint, list(left), fixed


class _Table(Vocabulary):
    """Resolve the calls that stand for tensors."""

    def __init__(self, tensors: list[TensorInfo]) -> None:
        self._tensors = tensors

    def called(self, node: Object) -> Node:
        """Turn `build_tensor_from_id(7)` into the tensor."""
        match node:
            case Object(Global(name="build_tensor_from_id"), (index,)):
                return _counted(self._tensors, index, _ATTRIBUTES)
        return node

    def built(self, node: Node, state: Node) -> Node | None:
        """Turn a `TensorID` with the state 7 into the tensor."""
        match node:
            case Object(Global(name="TensorID")):
                return _counted(self._tensors, state, _ATTRIBUTES)
        return super().built(node, state)


def _attributes(records: Records, tensors: list[TensorInfo]) -> Pickle:
    if _ATTRIBUTES not in records.members:
        return Pickle((), 0, 0, {}, [])
    parsed = records.load(_ATTRIBUTES, _Table(tensors))
    if not isinstance(parsed.tree, tuple | list):
        raise Malformed(f"{_ATTRIBUTES} holds no tuple of values")
    return parsed


def _counted(values: Sequence[T], index: Any, name: str) -> T:
    """Return the value that is counted into a table."""
    number = _number(index)
    if number >= len(values):
        raise Malformed(f"model.json: {name} is number {number} of {len(values)}")
    return values[number]


def _value(message: Any, name: str, default: Any) -> Any:
    """Read a field of a message by its name in JSON or, as protobuf allows, in the definition."""
    if not isinstance(message, dict):
        raise Malformed("model.json: a message that is not an object")
    plain = _CAPITAL.sub(lambda capital: f"_{capital[1].lower()}", name)
    value = message.get(name, message.get(plain))
    return default if value is None else value


def _field(message: Any, name: str, default: T) -> T:
    """Read a field of the same type as its default."""
    value = _value(message, name, default)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    if type(value) is not type(default):
        raise Malformed(f"model.json: {name} is not what it should be")
    return value


def _number(value: Any) -> int:
    """Read a size, offset or index, which protobuf writes as text where it may have 64 bits."""
    number = length(value, 10 if isinstance(value, str) else 0)
    if number is None:
        raise Malformed("model.json: a size, offset or index is not a number, or negative")
    return number


@dataclass(frozen=True, slots=True)
class _Modules:
    """A walk over modules; `named` are their attributes by place in the tuple of values."""

    tensors: list[TensorInfo]
    attributes: Node
    names: Budget
    named: dict[str, str] = field(default_factory=dict)

    def walk(self, module: Any, path: str) -> Iterator[tuple[str, TensorInfo]]:
        """Yield keys with their tensors: parameters, buffers, attributes, those of submodules."""
        parameters: list[Any] = _field(module, "parameters", [])
        for is_buffer in (False, True):
            for row in parameters:
                if _field(row, "isBuffer", False) is is_buffer:
                    key = self._key(row, path)
                    yield key, _counted(self.tensors, _value(row, "tensorId", 0), key)
        known = {_field(row, "name", "") for row in parameters}
        attributes: list[Any] = _field(module, "attributes", [])
        for row in attributes:
            index = str(_value(row, "id", 0))
            if _field(row, "name", "") in known or index == _NO_VALUE:  # buffers are listed twice
                continue
            key = self.named[index] = self._key(row, path)
            value = _counted(self.attributes, index, key)
            if isinstance(value, TensorInfo) and _field(row, "type", "Tensor") == "Tensor":
                yield key, value
        submodules: list[Any] = _field(module, "submodules", [])
        for submodule in submodules:
            yield from self.walk(submodule, f"{path}{_field(submodule, 'name', '')}.")

    def _key(self, row: Any, path: str) -> str:
        key = path + _field(row, "name", "")
        self.names.spend(key)
        return key


class _Tensors:
    """The table of tensors; those that name one record share it."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._storages: dict[str, Storage] = {}

    def read(self, table: list[Any]) -> list[TensorInfo]:
        """Read every row."""
        costs.current().spend(len(table) * (costs.TENSOR + costs.CALL))
        return [self._tensor(row) for row in table]

    def _tensor(self, row: Any) -> TensorInfo:
        kind = _value(row, "dataType", 0)
        dtype = _BY_NAME.get(kind) if isinstance(kind, str | int) else None
        if dtype is None:
            raise Unsupported(f"model.json: the data type {kind!r}"[:80])
        quantized = _field(row, "isQuantized", False)
        if quantized and dtype not in _QUANTIZED:
            raise Malformed("model.json: a quantized tensor of floats")
        dtype = _QUANTIZED[dtype] if quantized else dtype
        shape = tuple(map(_number, _field(row, "dims", [])))
        stride = tuple(map(_number, _field(row, "strides", [])))
        place = self._storage(row, dtype), _number(_value(row, "offset", 0))
        origin = None
        if quantized:
            scale, stated = _field(row, "scale", 0.0), str(_value(row, "zeroPoint", 0))
            zero_point = _number(stated.removeprefix("-")) * (-1 if stated.startswith("-") else 1)
            origin = quantized_call(place, shape, stride, scale, zero_point)
        info = TensorInfo(dtype, shape, stride, *place, origin=origin)
        wrong = problem(info)
        if wrong:
            raise Malformed(f"model.json: a tensor in {info.storage.key} {wrong}")
        return info

    def _storage(self, row: Any, dtype: DType) -> Storage:
        key = _field(_field(row, "data", {}), "key", "")
        known = self._storages.get(key)
        if known is None:
            member = self._records.members.get(key)
            count = member.nbytes // dtype.itemsize if member else 0
            if member is not None and member.nbytes % dtype.itemsize:
                raise Malformed(f"{key} is not a whole number of elements", offset=member.start)
            storage_id = StorageId(key, dtype, _field(row, "device", "cpu") or "cpu", count)
            known = self._storages[key] = self._records.storage(storage_id, key, "little")
        if known.dtype is not dtype:
            raise Malformed(f"storage {key} is described in two ways")
        return known
