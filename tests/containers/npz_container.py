"""npz: a zip archive of numpy arrays, each a member `<key>.npy`; a plugin for ckptool.

A member is the magic, a version, the length of a header (2 bytes in version 1, else 4), the header
and the data. The header is the text of a Python dict: `descr`, `fortran_order`, `shape`
(numpy/lib/format.py). An array of objects is a pickle, which is refused.
"""

from __future__ import annotations

import ast
from itertools import accumulate
from math import prod
from operator import mul

from ckptool.containers import Container, Traits
from ckptool.errors import Malformed, Unsupported
from ckptool.files import zips
from ckptool.files.fileio import Reader
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.replacing import make_state_dict
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import Packing, Storage, TensorInfo, contiguous_stride

MAGIC = b"\x93NUMPY"
HEADER = 1 << 16  # of a version 1 header no more can be
KINDS = {"b": "bool", "i": "int", "u": "uint", "f": "float", "c": "complex"}


def sniff(head: bytes) -> bool:
    """Check for the first bytes of a zip archive."""
    return head.startswith(b"PK\3\4")


def read(reader: Reader) -> Checkpoint | None:
    """Read the headers; None for an archive with anything else in it."""
    directory = zips.read_directory(reader)
    members = directory.members
    if not members or not all(name.endswith(".npy") for name in members):
        return None
    arrays = {name.removesuffix(".npy"): _array(reader, each) for name, each in members.items()}
    orders = {array.storage.byteorder for array in arrays.values() if array.dtype.swap > 1}
    return Checkpoint(
        reader.path,
        "npz",
        make_state_dict(dict(arrays), None),
        reader.nbytes,
        records={name: _storage(reader, member) for name, member in members.items()},
        unlisted=directory.unlisted,
        byteorder="big" if "big" in orders else "little",
    )


def _array(reader: Reader, member: zips.Member) -> TensorInfo:
    descr, fortran, shape, start = _header(reader, member)
    dtype = _dtype(reader, member, descr)
    if start + prod(shape) * dtype.itemsize != member.nbytes:
        raise Malformed(f"{member.name} has {member.nbytes} bytes", offset=member.start)
    stride = contiguous_stride(shape)
    if fortran:
        stride = tuple(accumulate(shape[:-1], mul, initial=1)) if shape else ()
    storage = _storage(reader, member, dtype, "big" if descr.startswith(">") else "little")
    return TensorInfo(dtype, shape, stride, storage, start // dtype.itemsize)


def _storage(
    reader: Reader, member: zips.Member, dtype: DType | None = None, byteorder: str = "little"
) -> Storage:
    """Describe a whole member, header and all: its checksum covers both."""
    deflated = member.method == zips.DEFLATED
    return Storage(
        reader.file,
        member.name,
        reader.base + member.start,
        member.nbytes,
        dtype if dtype and dtype.storage_class else None,
        byteorder=byteorder,
        crc32=member.crc32,
        packing=Packing.DEFLATED if deflated else Packing.PLAIN,
        packed_nbytes=member.packed_nbytes if deflated else 0,
    )


def _header(reader: Reader, member: zips.Member) -> tuple[str, bool, tuple[int, ...], int]:
    """Return `descr`, `fortran_order`, `shape` and where the data starts."""
    data = _start(reader, member)
    width = 2 if data[6:7] == b"\1" else 4
    start = 8 + width + int.from_bytes(data[8 : 8 + width], "little")
    if not data.startswith(MAGIC) or start > len(data):
        raise Malformed(f"{member.name} is not an array", offset=member.start)
    try:
        match ast.literal_eval(data[8 + width : start].decode("latin-1").strip()):
            case {"descr": str(descr), "fortran_order": bool(fortran), "shape": tuple(shape)}:
                if all(type(size) is int and 0 <= size < 1 << 63 for size in shape):
                    return descr, fortran, shape, start
            case {"descr": list()}:
                raise Unsupported(f"{member.name} is a structured array", offset=member.start)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        pass
    raise Malformed(f"the header of {member.name} is damaged", offset=member.start)


def _start(reader: Reader, member: zips.Member) -> bytes:
    if member.method != zips.DEFLATED:
        return reader.read(member.start, min(HEADER, member.nbytes))
    start = b""
    for block in zips.blocks(reader, member):
        start += block
        if len(start) >= HEADER:
            break
    return start


def _dtype(reader: Reader, member: zips.Member, descr: str) -> DType:
    kind, size = descr[1:2], descr[2:]
    if kind == "O":
        raise Unsupported(f"{member.name} holds objects: a pickle", offset=member.start)
    bits = f"{8 * int(size)}" if size.isdecimal() and kind != "b" else ""
    dtype = BY_TORCH_NAME.get(f"{KINDS.get(kind, '')}{bits}")
    if dtype is None:
        raise Unsupported(f"{member.name} has the dtype {descr}", offset=member.start)
    return dtype


CONTAINER = Container(
    "npz",
    "numpy arrays (.npz)",
    "npz",
    (".npz",),
    (),
    sniff,
    read,
    traits=Traits(around=False, ties=False, module_metadata=False, objects=False),
)
