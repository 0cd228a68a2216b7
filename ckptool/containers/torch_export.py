"""Programs of torch.export (`.pt2`, torch 2.8 and newer): their weights, as data.

A zip archive whose `data/weights/*_weights_config.json` names for each key a record of raw bytes
and says dtype, sizes, strides and offset (torch/export/pt2_archive/_package.py; dtypes are numbers
of `ScalarType` in torch/_export/serde/schema.py). The graph under `models/`, the sample inputs and
the compiled code are not read. Never written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptool.containers import _json
from ckptool.containers._container import Container
from ckptool.containers._records import Records, read_records
from ckptool.containers.torch_zip import sniff
from ckptool.errors import Malformed, Unsupported
from ckptool.files.fileio import Reader
from ckptool.pickles.torch_objects import StorageId
from ckptool.pickles.tree import Node
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.replacing import make_state_dict
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import TensorInfo, problem
from ckptool.text import length

_OLD_DTYPES = (
    "uint8 int8 int16 int32 int64 float16 float32 float64 complex32 complex64 complex128 bool "
    "bfloat16"
)
_NEW_DTYPES = (
    "uint16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu uint32 uint64"
)
_DTYPES = {**dict(enumerate(_OLD_DTYPES.split(), 1)), **dict(enumerate(_NEW_DTYPES.split(), 28))}
_STRIDED = 7
_CONFIG = re.compile(r"(data/(?:weights|constants)/)[^/]+_config\.json")
_KNOWN = ("archive_format", "archive_version", "byteorder", ".data/version")
_NOTE = "a program of torch.export: its graph and its sample inputs are not read"


def read(reader: Reader) -> Checkpoint | None:
    """Read the tables of weights; None for any other archive."""
    records = read_records(reader, "archive_format")
    configs = [name for name in records.members if _CONFIG.fullmatch(name)] if records else []
    if records is None or not configs:
        return None
    byteorder = records.byteorder()
    entries: dict[str, Node] = {}
    left = []
    for name in configs:
        for key, row in _rows(records, name):
            if row.get("use_pickle"):  # of classes that wrap tensors: a torch file of its own
                left.append(key)
            elif key in entries:
                raise Malformed(f"{name}: {key} appears twice")
            elif "tensor_meta" in row:
                entries[key] = _tensor(records, name, row, byteorder)
    return Checkpoint(
        reader.path,
        "torch-export",
        make_state_dict(entries, None),
        reader.nbytes,
        byteorder=byteorder,
        unread=records.unread((*_KNOWN, *configs)),
        records=records.described(),
        unlisted=records.unlisted,
        notes=(_NOTE, *(f"not read, as it is pickled: {key}" for key in left)),
    )


def _rows(records: Records, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    rows = _json.load(records.small(name), name).get("config")
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise Malformed(f"{name} has no table of weights")
    yield from rows.items()


def _tensor(records: Records, name: str, row: dict[str, Any], byteorder: str) -> TensorInfo:
    """Make the view of a record that a row describes."""
    said = row["tensor_meta"]
    record = f"{name.rpartition('/')[0]}/{row.get('path_name')}"
    member = records.members.get(record)
    if member is None or not isinstance(said, dict):
        raise Malformed(f"{name}: there is no record {record}")
    number = said.get("dtype")
    dtype = BY_TORCH_NAME.get(_DTYPES.get(number, "")) if type(number) is int else None
    if dtype is None or said.get("layout") != _STRIDED:
        raise Unsupported(f"{name}: dtype {number!r}, layout {said.get('layout')!r}"[:100])
    storage = records.storage(_storage_id(record, dtype, said, member.nbytes), record, byteorder)
    shape, stride = (tuple(map(_integer, _list(said, each))) for each in ("sizes", "strides"))
    start = _integer(said.get("storage_offset"))
    info = TensorInfo(dtype, shape, stride, storage, start)
    if wrong := problem(info):
        raise Malformed(f"{name}: a tensor in {record} {wrong}")
    return info


def _storage_id(record: str, dtype: DType, said: dict[str, Any], nbytes: int) -> StorageId:
    """Say what a record is: bytes, so that several dtypes may view it."""
    device = said.get("device")
    kind = device.get("type") if isinstance(device, dict) else None
    whole = nbytes % dtype.itemsize == 0 and bool(dtype.storage_class)
    typed = dtype if whole else None
    count = nbytes // dtype.itemsize if whole else nbytes
    return StorageId(record, typed, kind if isinstance(kind, str) else "cpu", count)


def _list(said: dict[str, Any], name: str) -> list[Any]:
    value = said.get(name)
    if not isinstance(value, list):
        raise Malformed(f"a tensor without {name}")
    return value


def _integer(value: Any) -> int:
    number = length(value.get("as_int")) if isinstance(value, dict) else None
    if number is None:
        raise Malformed("a size of a tensor is not a number, or negative")
    return number


CONTAINERS = (
    Container("torch-export", "torch.export", suffixes=(".pt2",), sniff=sniff, read=read),
)
