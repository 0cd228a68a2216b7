"""The one table of dtypes: bits, safetensors name, torch name and torch storage class.

Order and names of the safetensors column: `safetensors/src/tensor.rs` (`enum Dtype`, which the
library sorts by, largest alignment first). Storage classes: `torch/storage.py`
(`_dtype_to_storage_type_map`); a dtype without one is saved as an `UntypedStorage` beside the
dtype itself (`_new_dtypes` there).
"""

from __future__ import annotations

from collections.abc import Collection
from enum import Enum


class DType(Enum):
    """One element type: `(bits, safetensors name, torch name, storage class, swap width)`.

    `bits` are those of one element as torch counts them; `swap` is the width in bytes of what a
    byte order applies to (a complex number is two floats). Members are in the order in which
    safetensors writes tensors.
    """

    U64 = (64, "U64", "uint64", "", 8)
    I64 = (64, "I64", "int64", "LongStorage", 8)
    F64 = (64, "F64", "float64", "DoubleStorage", 8)
    C64 = (64, "C64", "complex64", "ComplexFloatStorage", 4)
    F32 = (32, "F32", "float32", "FloatStorage", 4)
    U32 = (32, "U32", "uint32", "", 4)
    I32 = (32, "I32", "int32", "IntStorage", 4)
    BF16 = (16, "BF16", "bfloat16", "BFloat16Storage", 2)
    F16 = (16, "F16", "float16", "HalfStorage", 2)
    U16 = (16, "U16", "uint16", "", 2)
    I16 = (16, "I16", "int16", "ShortStorage", 2)
    F8_E5M2FNUZ = (8, "F8_E5M2FNUZ", "float8_e5m2fnuz", "", 1)
    F8_E4M3FNUZ = (8, "F8_E4M3FNUZ", "float8_e4m3fnuz", "", 1)
    F8_E8M0 = (8, "F8_E8M0", "float8_e8m0fnu", "", 1)
    F8_E4M3 = (8, "F8_E4M3", "float8_e4m3fn", "", 1)
    F8_E5M2 = (8, "F8_E5M2", "float8_e5m2", "", 1)
    I8 = (8, "I8", "int8", "CharStorage", 1)
    U8 = (8, "U8", "uint8", "ByteStorage", 1)
    F6_E3M2 = (6, "F6_E3M2", "", "", 1)
    F6_E2M3 = (6, "F6_E2M3", "", "", 1)
    # torch packs two four-bit floats into one element and counts the pairs; safetensors counts
    # the floats, so that its last dimension is twice torch's.
    F4 = (8, "F4", "float4_e2m1fn_x2", "", 1)
    BOOL = (8, "BOOL", "bool", "BoolStorage", 1)

    C128 = (128, "", "complex128", "ComplexDoubleStorage", 8)
    C32 = (32, "", "complex32", "", 2)
    BC32 = (32, "", "bcomplex32", "", 2)
    QI8 = (8, "", "qint8", "QInt8Storage", 1)
    QU8 = (8, "", "quint8", "QUInt8Storage", 1)
    QI32 = (32, "", "qint32", "QInt32Storage", 4)
    # Packed by torch without saying so in the shape: two and four elements share a byte.
    QU4X2 = (4, "", "quint4x2", "QUInt4x2Storage", 1)
    QU2X4 = (2, "", "quint2x4", "QUInt2x4Storage", 1)
    BITS8 = (8, "", "bits8", "", 1)
    BITS16 = (16, "", "bits16", "", 2)
    BITS1X8 = (8, "", "bits1x8", "", 1)
    BITS2X4 = (8, "", "bits2x4", "", 1)
    BITS4X2 = (8, "", "bits4x2", "", 1)

    bits: int
    safetensors_name: str
    torch_name: str
    storage_class: str
    swap: int
    rank: int
    itemsize: int  # the bytes of one unit of a torch storage of this dtype

    def __init__(self, bits: int, safetensors: str, torch: str, storage: str, swap: int) -> None:
        self.bits = bits
        self.itemsize = max(1, bits // 8)
        self.safetensors_name = safetensors
        self.torch_name = torch
        self.storage_class = storage
        self.swap = swap
        self.rank = len(type(self).__members__)

    __hash__ = object.__hash__  # of members, as `==` is; that of Enum is a function of Python

    @property
    def label(self) -> str:
        """Name it as reports do: safetensors' name, torch's where safetensors has none."""
        return self.safetensors_name or self.torch_name

    @property
    def quantized(self) -> bool:
        """Return whether the numbers mean nothing without a scale beside them."""
        return self.torch_name.startswith(("qint", "quint"))

    def nbytes(self, count: int) -> int:
        """Return the bytes that `count` elements take, a final part of a byte counted whole."""
        return (count * self.bits + 7) // 8


BY_SAFETENSORS_NAME = {dtype.safetensors_name: dtype for dtype in DType if dtype.safetensors_name}
BY_TORCH_NAME = {dtype.torch_name: dtype for dtype in DType if dtype.torch_name}
BY_STORAGE_CLASS = {dtype.storage_class: dtype for dtype in DType if dtype.storage_class}
# An element holds several numbers, of which torch does not speak in the shape.
PACKED = (DType.F4, DType.BITS1X8, DType.BITS2X4, DType.BITS4X2)


def _words(dtype: DType) -> set[str]:
    """Return what a dtype is called, but for `float` that is written `f` or `fp`."""
    return {dtype.safetensors_name.lower(), _short(dtype.torch_name)}


def _short(word: str) -> str:
    """Write a word as safetensors does: `bf16` for bfloat16, `f8_e4m3fn` for float8_e4m3fn."""
    return word.lower().removeprefix("torch.").replace("float", "f").replace("fp", "f")


_ALIASES = {"f": "f32", "half": "f16", "double": "f64", "long": "i64", "int": "i32", "short": "i16"}
_BY_WORD = {word: dtype for dtype in DType for word in _words(dtype) if word}


def named(word: str) -> DType | None:
    """Return the dtype of a name of torch or safetensors, or a short one: `bfloat16`, `fp16`."""
    short = _short(word)
    return _BY_WORD.get(_ALIASES.get(short, short))


def suggestion(word: str, known: Collection[DType]) -> str:
    """Return the closest of the dtypes that a word may mean, and all of them."""
    from difflib import get_close_matches

    words = {each: dtype.label.lower() for dtype in known for each in _words(dtype)}
    close = get_close_matches(_short(word), words, n=1)
    listed = ", ".join(dtype.label.lower() for dtype in known)
    return (
        f"did you mean `{words[close[0]]}`? known are {listed}" if close else f"known are {listed}"
    )
