"""What several documents have."""

from typing import Annotated as A, TypedDict

DTypeName = A[str, "dtype by safetensors' name (F32, BF16, F8_E4M3), or torch's if it has none"]
Shape = A[list[int], "sizes of the dimensions, [] of a scalar"]
At = A[list[str], "steps from the top of the file to the state_dict, [] for the top itself"]
NoAt = A[list[str] | None, "steps to the state_dict, [] for the top; null if none was chosen"]
Key = A[str, "key in the state_dict"]
Container = A[str, "torch-zip, torch-legacy, safetensors, dcp ..."]
KeyMap = A[list[list[str | None]], "[old key, new key] of every entry read; null: not written"]


class Total(TypedDict):
    """Tensors, elements and bytes."""

    count: A[int, "number of tensors"]
    elements: A[int, "number of elements"]
    nbytes: A[int, "bytes of the elements"]


class Part(TypedDict):
    """A part of a checkpoint of several files."""

    kind: A[str, "kind of checkpoint"]
    where: A[str, "where the other values are"]
    rank: A[int | None, "number of the part, from 0; null if nothing says it"]
    world: A[int | None, "number of parts; null if nothing says it"]


MaybePart = A[Part | None, "null unless the file is one of several parts of a checkpoint"]


class Losses(TypedDict):
    """Values that a cast turns into another kind of number."""

    overflow: A[int, "finite values that become infinite"]
    zero: A[int, "values that become zero"]
    subnormal: A[int, "values that become subnormal"]


class KeyLosses(Losses):
    """Losses of a tensor."""

    key: Key


class Cast(TypedDict):
    """A cast of the floating-point tensors."""

    to: DTypeName
    overflow: A[str, "what --overflow asked for"]
    tensors: A[int, "number of tensors cast"]
    kept: A[dict[str, int], "number of tensors not cast, by dtype"]
    quantized: A[int, "number of quantized tensors not cast"]
    scales: A[int, "number of scales of quantized tensors not cast"]
    total: A[Losses | None, "tied tensors count once; null if no value was read"]
    losses: A[list[KeyLosses], "tensors that lose something"]
    not_counted: A[list[str], "keys of views that overlap too often to be counted"]
