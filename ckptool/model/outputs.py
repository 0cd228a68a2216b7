"""Outputs of a model, of any nesting, and how two of them differ: bytes first, then in numbers.

`torch.equal` says that NaN differs from itself and that 0.0 equals -0.0; bytes do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from zlib_ng.zlib_ng import crc32

from ckptool.errors import BadInput
from ckptool.model import libraries
from ckptool.records import dataclass

MAX_DEPTH = 50
_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_LARGEST = (1 << 63) - 1

Leaf = tuple[str, Any]  # its path in the output, and a tensor on the CPU or a plain value


@dataclass(frozen=True, slots=True)
class Difference:
    """How far two tensors are apart: the numbers leave NaNs out, `nan` counts NaNs that differ.

    `ulp` counts the floats that lie between two; None for what is not a float.
    """

    path: str
    what: str
    max_abs: float | None = None
    ulp: int | None = None
    nan: int = 0
    beyond: bool = True


def leaves(output: Any, path: str = "", depth: int = 0, *, copy: bool = True) -> Iterator[Leaf]:
    """Yield the tensors and plain values of an output with their paths, tensors on the CPU.

    A copy stays as it is whatever the model does next. Raises `BadInput` for an object that is no
    known kind of output.
    """
    if depth > MAX_DEPTH:
        raise BadInput(f"the model's output is nested more than {MAX_DEPTH} deep")
    if isinstance(output, libraries.torch().Tensor):
        yield path, _plain(output, copy)
    elif isinstance(output, _PLAIN):
        yield path, output
    else:
        for step, value in _members(output):
            yield from leaves(value, path + step, depth + 1, copy=copy)


def _members(output: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(output, Mapping):
        yield from ((f"[{key!r}]", value) for key, value in output.items())
    elif isinstance(output, tuple) and hasattr(output, "_fields"):
        names: Sequence[str] = output._fields
        yield from ((f".{name}", getattr(output, name)) for name in names)
    elif isinstance(output, list | tuple):
        yield from ((f"[{index}]", value) for index, value in enumerate(output))
    elif is_dataclass(output) and not isinstance(output, type):
        yield from ((f".{field.name}", getattr(output, field.name)) for field in fields(output))
    elif hasattr(output, "__dict__") and not callable(output):
        yield from ((f".{name}", value) for name, value in vars(output).items())
    else:
        raise BadInput(f"the model gives a {type(output).__name__}, which cannot be compared")


def _plain(tensor: Any, copy: bool) -> Any:
    """Return a tensor's values as an ordinary strided tensor in memory."""
    tensor = tensor.detach()
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    if tensor.layout is not libraries.torch().strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().to("cpu", copy=copy)


def digest(output: Any) -> bytes:
    """Return a checksum of 96 bits: equal ones mean equal structure, dtypes, shapes and bytes.

    Half of it is a CRC, which sees every flipped bit, half a sum: of both, outputs of all modules
    of a model take a fraction of the time that a hash would.
    """
    import numpy

    checksum = total = 0
    for path, value in leaves(output, copy=False):
        if isinstance(value, _PLAIN):
            checksum = crc32(f"{path}\0{type(value).__name__}\0{value!r}\0".encode(), checksum)
        else:
            head = f"{path}\0{value.dtype}\0{tuple(value.shape)}\0"
            data = as_bytes(value).numpy()
            checksum = crc32(data, crc32(head.encode(), checksum))
            total += int(data[: data.size // 8 * 8].view(numpy.int64).sum())
    return checksum.to_bytes(4, "little") + (total % 2**64).to_bytes(8, "little")


def as_bytes(tensor: Any) -> Any:
    """Return the bytes of a tensor on the CPU, in order, as a flat tensor of uint8."""
    flat = tensor.contiguous().reshape(-1)
    uint8 = libraries.torch().uint8
    return flat.view(uint8) if flat.numel() else flat.new_empty(0, dtype=uint8)


def same_bytes(left: Any, right: Any) -> bool:
    """Check whether two tensors have equal dtypes, shapes and bytes."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return bool(libraries.torch().equal(as_bytes(left), as_bytes(right)))


def differences(
    reference: Sequence[Leaf], candidate: Sequence[Leaf], atol: float = 0.0, rtol: float = 0.0
) -> list[Difference]:
    """List what differs in its bytes; what is within the tolerance is not `beyond` it."""
    left, right = dict(reference), dict(candidate)
    apart = []
    for path in left | right:
        if path not in left or path not in right:
            side = "reference" if path in left else "candidate"
            apart.append(Difference(path, f"only in the {side}'s output"))
        else:
            apart += _difference(path, left[path], right[path], atol, rtol)
    return apart


def _difference(path: str, left: Any, right: Any, atol: float, rtol: float) -> list[Difference]:
    tensor = libraries.torch().Tensor
    if not isinstance(left, tensor) or not isinstance(right, tensor):
        return [] if _same_plain(left, right) else [Difference(path, f"{left!r} against {right!r}")]
    if left.dtype != right.dtype:
        return [Difference(path, f"dtype {left.dtype} against {right.dtype}")]
    if left.shape != right.shape:
        return [Difference(path, f"shape {list(left.shape)} against {list(right.shape)}")]
    if same_bytes(left, right):
        return []
    within = bool(atol or rtol) and _close(left, right, atol, rtol)
    return [replace(measure(path, left, right), beyond=not within)]


def _same_plain(left: Any, right: Any) -> bool:
    if type(left) is not type(right):
        return False
    both_nan = isinstance(left, float) and math.isnan(left) and math.isnan(right)
    return bool(left == right) or both_nan


def _close(left: Any, right: Any, atol: float, rtol: float) -> bool:
    if not (left.is_floating_point() or left.is_complex()):
        left, right = left.double(), right.double()
    return bool(libraries.torch().isclose(right, left, rtol=rtol, atol=atol, equal_nan=True).all())


def measure(path: str, left: Any, right: Any) -> Difference:
    """Return how far two tensors of one dtype and shape are apart."""
    torch = libraries.torch()
    if left.is_complex():
        left, right = torch.view_as_real(left), torch.view_as_real(right)
    changed = _changed(left, right)
    what = f"{int(changed.sum())} of {left.numel()} values differ"
    if not left.is_floating_point():
        gap = (left.double() - right.double()).abs()
        return Difference(path, what, float(gap.max()) if gap.numel() else None)
    nan = left.isnan() | right.isnan()
    known = ~nan
    gap = (left[known].double() - right[known].double()).abs()
    gap = gap.nan_to_num(nan=0.0, posinf=math.inf)  # inf - inf
    return Difference(
        path,
        what,
        float(gap.max()) if gap.numel() else None,
        _ulp(left[known], right[known]),
        int((changed & nan).sum()),
    )


def _changed(left: Any, right: Any) -> Any:
    """Mark the elements whose bytes differ."""
    width = left.element_size()
    return (as_bytes(left) != as_bytes(right)).view(-1, width).any(1).view(left.shape)


def _ulp(left: Any, right: Any) -> int | None:
    """Count the floats between two, at most: their bits, read as numbers that keep their order."""
    torch = libraries.torch()
    width = left.element_size()
    if width == 1 or not left.numel():
        return None
    integer = getattr(torch, f"int{8 * width}")
    one, other = (_ordered(side.contiguous().view(integer)) for side in (left, right))
    gap = one - other  # may only overflow for float64, where the signs differ
    over = ((one < 0) != (other < 0)) & ((gap < 0) == (other < 0))
    return int(torch.where(over, torch.full_like(gap, _LARGEST), gap.abs()).max())


def _ordered(bits: Any) -> Any:
    lowest = libraries.torch().iinfo(bits.dtype).min
    wide = bits.long()
    return libraries.torch().where(wide < 0, lowest - wide, wide)


def scores(output: Sequence[Leaf]) -> Any:
    """Return the first output that looks like scores of classes, `[batch, classes]`, else None."""
    for _, value in output:
        if isinstance(value, libraries.torch().Tensor) and value.is_floating_point():
            return value if value.dim() == 2 and value.shape[1] > 1 else None
    return None


def indifference(one: Sequence[Leaf], other: Sequence[Leaf]) -> str:
    """Return why outputs for two inputs say nothing: `nan`, `constant`, `independent`, or nothing.

    Values are compared, not bytes: a zero may have either sign. NaN says nothing.
    """
    pairs = [(value, dict(other).get(path)) for path, value in one]
    if any(_vary(*pair) for pair in pairs):
        return ""
    known = [_known(value) for value, _ in pairs if isinstance(value, libraries.torch().Tensor)]
    if known and all(not value.numel() for value in known):
        return "nan"
    return "constant" if all(bool((value == value[:1]).all()) for value in known) else "independent"


def _vary(one: Any, other: Any) -> bool:
    tensor = libraries.torch().Tensor
    if not isinstance(one, tensor) or not isinstance(other, tensor):
        return not _same_plain(one, other)
    if one.dim() and other.dim() and one.shape[1:] == other.shape[1:]:  # a last batch is smaller
        least = min(len(one), len(other))
        one, other = one[:least], other[:least]
    if one.shape != other.shape:
        return True
    return bool(((one != other) & ((one == one) | (other == other))).any())


def _known(tensor: Any) -> Any:
    """Return the values of a tensor that are numbers."""
    return tensor[tensor == tensor]
