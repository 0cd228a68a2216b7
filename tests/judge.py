"""What torch itself makes of a file, and every way in which two of its answers can differ.

The judge knows nothing of ckptool. Bytes are compared, never values: `torch.equal` says that NaN
differs from itself and that 0.0 equals -0.0.
"""

from __future__ import annotations

import functools
import pickle
import re
import struct
import warnings
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType, SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
import torch

try:
    from torch.utils.serialization import config
except ImportError:  # torch 2.6 knows no calculated offsets
    config = None

VERSION = tuple(int(part) for part in torch.__version__.split(".")[:2])
# Fixtures that hold dtypes which older torch lacks.
DTYPES = {
    "every_dtype.pth": "float8_e8m0fnu",
    "every_dtype.safetensors": "float8_e8m0fnu",
    "odd_dtypes.pth": "float4_e2m1fn_x2",
    "sub_byte.safetensors": "float4_e2m1fn_x2",
}
# Distributed checkpoints without planner_data, which torch 2.6 cannot convert
# (torch/distributed/checkpoint/default_planner.py, `_EmptyStateDictLoadPlanner`).
UNPLANNED = ("dcp_flat", "dcp_torch_2_0")


def unread(name: str) -> str:
    """Return why the torch that is installed cannot read a good fixture, or nothing."""
    if not hasattr(torch, DTYPES.get(name, "float32")):
        return f"torch {torch.__version__} has no {DTYPES[name]}"
    if VERSION < (2, 7) and name in UNPLANNED:
        return f"torch {torch.__version__} needs planner_data"
    return ""


def skip_unread(name: str) -> None:
    """Skip a test of a good fixture that the torch that is installed cannot read."""
    if reason := unread(name):
        pytest.skip(reason)


STORAGES = (torch.UntypedStorage, torch.TypedStorage)
# Pairs that were compared, kept alive: the id of a dead object is soon another's.
Seen = dict[tuple[int, int], tuple[Any, Any]]
NAMED = (type, FunctionType, BuiltinFunctionType, ModuleType)


def load(
    path: Path | str,
    mmap: bool = False,
    calculated_offsets: bool = False,
    weights_only: bool = True,
    map_location: str | None = "cpu",
    **more: Any,
) -> Any:
    """Load a file with torch.

    `calculated_offsets` matters under `mmap` only, where it is the strictest reading there is, and
    needs torch 2.7.
    Files of protocol 0 need `pickle_module=text_ids` and `weights_only=False`.
    """
    how = {"mmap": mmap, "weights_only": weights_only, "map_location": map_location}
    setting: Any = nullcontext()
    if config is not None:
        setting = mock.patch.object(config.load, "calculate_storage_offsets", calculated_offsets)
    with warnings.catch_warnings(), setting:
        warnings.simplefilter("ignore")
        loaded = torch.load(path, **how, **more)
    if Path(path).suffix == ".tar" and isinstance(loaded, dict):
        # A tensor without dimensions is empty in torch 0.1; today's torch gives it an element, of
        # memory that nobody set (serialization.py, `legacy_load`).
        loaded.pop("empty", None)
    return loaded


@dataclass(frozen=True)
class Strictness:
    """What counts as a difference beside dtypes, shapes, bytes and plain values."""

    containers: bool
    order: bool
    metadata: bool
    stride: bool
    storage: bool
    sharing: bool
    identity: bool
    attributes: bool


def same(
    left: Any,
    right: Any,
    *,
    containers: bool = True,
    order: bool = True,
    metadata: bool = True,
    stride: bool = True,
    storage: bool = True,
    sharing: bool = True,
    identity: bool = True,
    attributes: bool = True,
) -> list[str]:
    """Return the differences between two loaded trees, a line each, as `path: what`.

    Switched off, an option forgives: `containers` the class of a dict, `order` that of its keys,
    `metadata` the `_metadata` of a state_dict, `stride` strides, `storage` the offset in a storage
    and its size, `sharing` which tensors share memory, `identity` which paths lead to one object,
    `attributes` Parameter or not, requires_grad, and Python attributes of tensors.
    """
    strict = Strictness(containers, order, metadata, stride, storage, sharing, identity, attributes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(differences(left, right, "", strict, {}))
        if not found and sharing:
            found += partition_differences("memory", regions(left), regions(right))
            found += position_differences(left, right)
        if not found and identity:
            found += partition_differences("identity", objects(left), objects(right))
    return found


# Trees.


def differences(left: Any, right: Any, path: str, strict: Strictness, seen: Seen) -> Iterator[str]:
    """Compare two values of any kind."""
    if (id(left), id(right)) in seen:
        return
    if is_node(left) and is_node(right):
        seen[id(left), id(right)] = (left, right)
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        yield from tensor_differences(left, right, path, strict, seen)
    elif isinstance(left, dict) and isinstance(right, dict):
        yield from dict_differences(left, right, path, strict, seen)
    elif type(left) is not type(right):
        yield f"{path}: {kind(left)} against {kind(right)}"
    elif isinstance(left, (list, tuple, deque)):
        yield from sequence_differences(left, right, path, strict, seen)
    elif has_state(left):
        yield from dict_differences(vars(left), vars(right), path, strict, seen)
    elif not equal(left, right):
        yield f"{path}: {left!r:.60} against {right!r:.60}"


def dict_differences(
    left: dict[Any, Any],
    right: dict[Any, Any],
    path: str,
    strict: Strictness,
    seen: Seen,
) -> Iterator[str]:
    """Compare keys, their order, values, and what hangs on the dicts as attributes."""
    if strict.containers and type(left) is not type(right):
        yield f"{path}: {kind(left)} against {kind(right)}"
    ours, theirs = list(map(typed, left)), list(map(typed, right))
    if set(ours) != set(theirs):
        only = set(ours) ^ set(theirs)
        yield f"{path}: keys on one side only: {sorted(repr(key) for _, key in only)}"
    elif strict.order and ours != theirs:
        yield f"{path}: key order {ours} against {theirs}"
    if strict.containers and isinstance(left, defaultdict) and isinstance(right, defaultdict):
        yield from differences(
            left.default_factory, right.default_factory, f"{path}()", strict, seen
        )
    common = set(theirs)
    for key, value in left.items():
        if typed(key) in common:
            yield from differences(value, right[key], join(path, key), strict, seen)
    yield from state_differences(left, right, path, strict, seen)


def state_differences(
    left: Any, right: Any, path: str, strict: Strictness, seen: Seen
) -> Iterator[str]:
    """Compare the attributes of two dicts or tensors; `_metadata` is one."""
    states = [dict(getattr(value, "__dict__", {})) for value in (left, right)]
    if not strict.metadata:
        for state in states:
            state.pop("_metadata", None)
    if any(states):
        yield from differences(*states, f"{path}.__dict__", strict, seen)


def sequence_differences(
    left: Any, right: Any, path: str, strict: Strictness, seen: Seen
) -> Iterator[str]:
    """Compare two lists, tuples or deques."""
    if len(left) != len(right):
        yield f"{path}: {len(left)} items against {len(right)}"
    if isinstance(left, deque) and left.maxlen != right.maxlen:
        yield f"{path}: maxlen {left.maxlen} against {right.maxlen}"
    for index, (one, other) in enumerate(zip(left, right, strict=False)):
        yield from differences(one, other, join(path, index), strict, seen)


def equal(left: Any, right: Any) -> bool:
    """Compare two leaves of one type: floats and arrays by their bits."""
    match left:
        case float():
            return struct.pack("<d", left) == struct.pack("<d", right)
        case complex():
            return equal(left.real, right.real) and equal(left.imag, right.imag)
        case np.ndarray() | np.generic():
            return array_facts(left) == array_facts(right)
        case functools.partial():
            parts = [(one.func, one.args, one.keywords) for one in (left, right)]
            return bool(parts[0] == parts[1])
        case torch.UntypedStorage():
            return storage_bytes(left) == storage_bytes(right)
        case weakref.ref():  # those of an LSTM to its own weights
            return same(left(), right()) == []
        case torch.TypedStorage():
            return left.dtype == right.dtype and equal(left.untyped(), right.untyped())
        case _:
            return bool(left == right)


def array_facts(array: Any) -> tuple[Any, ...]:
    """Return what two equal numpy arrays or scalars have in common."""
    content = array.tolist() if array.dtype.hasobject else array.tobytes()
    return array.dtype, array.shape, content


def has_state(value: Any) -> bool:
    """Tell whether a value is what its attributes are (a Namespace, a module)."""
    without = isinstance(value, (*NAMED, *STORAGES, functools.partial))
    return hasattr(value, "__dict__") and not without


def is_node(value: Any) -> bool:
    """Tell whether a value has an identity that a file can keep."""
    if isinstance(value, (torch.Tensor, dict, list, set, bytearray, deque, *STORAGES)):
        return True
    return has_state(value)


def kind(value: Any) -> str:
    """Return the name of a value's class."""
    return type(value).__qualname__


def typed(key: Any) -> tuple[type, Any]:
    """Return a key with its class, for 1 and True are equal."""
    return type(key), key


def join(path: str, step: Any) -> str:
    """Return the dotted path of something inside something."""
    return f"{path}.{step}" if path else str(step)


# Tensors.


def tensor_differences(
    left: torch.Tensor,
    right: torch.Tensor,
    path: str,
    strict: Strictness,
    seen: Seen,
) -> Iterator[str]:
    """Compare two tensors."""
    ours, theirs = tensor_facts(left, strict), tensor_facts(right, strict)
    for name in ours | theirs:
        if ours.get(name) != theirs.get(name):
            yield f"{path}: {name} {ours.get(name)} against {theirs.get(name)}"
    if strict.attributes:
        yield from state_differences(left, right, path, strict, seen)
    if left.dtype == right.dtype and left.shape == right.shape and left.layout == right.layout:
        yield from content_differences(left, right, path, strict, seen)


def tensor_facts(tensor: torch.Tensor, strict: Strictness) -> dict[str, Any]:
    """Return what there is to know about a tensor beside its bytes."""
    facts: dict[str, Any] = {
        "dtype": tensor.dtype,
        "shape": tuple(tensor.shape),
        "layout": tensor.layout,
        "device": tensor.device,
        "conj": tensor.is_conj(),
        "neg": tensor.is_neg(),
        "quantized": tensor.is_quantized,
    }
    if strict.attributes:
        facts |= {"class": kind(tensor), "requires_grad": tensor.requires_grad}
    if is_dense(tensor) and strict.stride:
        facts["stride"] = tensor.stride()
    if is_dense(tensor) and strict.storage:
        facts["storage_offset"] = tensor.storage_offset()
        facts["storage_nbytes"] = tensor.untyped_storage().nbytes()
    return facts


def content_differences(
    left: torch.Tensor,
    right: torch.Tensor,
    path: str,
    strict: Strictness,
    seen: Seen,
) -> Iterator[str]:
    """Compare the bytes of two tensors, or the tensors that they are made of."""
    if left.device.type == "meta":
        return
    if not is_dense(left):
        yield from differences(components(left), components(right), path, strict, seen)
        return
    if left.is_quantized and right.is_quantized:
        yield from differences(quantizer(left), quantizer(right), f"{path}.q", strict, seen)
    if not equal_bytes(left.detach(), right.detach()):
        yield f"{path}: bytes"


def is_dense(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor is a strided view of one storage."""
    return tensor.layout is torch.strided


def components(tensor: torch.Tensor) -> dict[str, Any]:
    """Return the dense tensors inside a sparse one."""
    if tensor.layout is torch.sparse_coo:
        parts = {"indices": tensor._indices(), "values": tensor._values()}
        return {**parts, "coalesced": tensor.is_coalesced()}
    rows = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    names = ("crow_indices", "col_indices") if rows else ("ccol_indices", "row_indices")
    return {name: getattr(tensor, name)() for name in (*names, "values")}


def quantizer(tensor: torch.Tensor) -> dict[str, Any]:
    """Return how the integers of a quantized tensor are to be read."""
    if tensor.qscheme() is torch.per_tensor_affine:
        return {"scale": tensor.q_scale(), "zero_point": tensor.q_zero_point()}
    return {
        "scheme": tensor.qscheme(),
        "scales": tensor.q_per_channel_scales(),
        "zero_points": tensor.q_per_channel_zero_points(),
        "axis": tensor.q_per_channel_axis(),
    }


def equal_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Compare elements as bytes, whatever the strides; axes expanded on both sides count once."""
    axes = list(zip(left.stride(), right.stride(), strict=True))
    wanted = tuple(slice(0, 1) if pair == (0, 0) else slice(None) for pair in axes)
    return np.array_equal(elements(left)[wanted], elements(right)[wanted])


def elements(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return the bytes of every element, in one more axis; no dtype is too odd for this."""
    size = tensor.element_size()
    raw = np.frombuffer(storage_bytes(tensor.untyped_storage()), np.uint8)
    strides = [size * step for step in tensor.stride()]
    start = raw[size * tensor.storage_offset() :]
    return np.lib.stride_tricks.as_strided(
        start, (*tensor.shape, size), (*strides, 1), writeable=False
    )


def storage_bytes(storage: torch.UntypedStorage) -> bytes:
    """Return the bytes of a storage."""
    flat = torch.empty(0, dtype=torch.uint8)
    flat.set_(storage)
    return flat.numpy().tobytes()


# What leads where.


def tensors(tree: Any) -> dict[str, torch.Tensor]:
    """Return every tensor of a tree by its dotted path, in order."""
    found: dict[str, torch.Tensor] = {}
    taken: Counter[str] = Counter()
    for path, value in walk(tree):
        if isinstance(value, torch.Tensor):
            taken[path] += 1
            # `a.b` may be a key, and a path: the second gets a number
            found[path if taken[path] == 1 else f"{path}#{taken[path]}"] = value
    return found


def walk(value: Any, path: str = "", above: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield a value and everything in it, by path; a cycle ends where it closes."""
    if is_node(value) and id(value) in above:
        yield path, value
        return
    yield path, value
    for step, child in children(value):
        yield from walk(child, join(path, step), (*above, id(value)))


def children(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield what a value holds, and the step that leads to it."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    if has_state(value):
        yield from vars(value).items()


def objects(tree: Any) -> dict[str, int]:
    """Return the object at every path that leads to one."""
    return {path: id(value) for path, value in walk(tree) if is_node(value)}


def regions(tree: Any) -> dict[str, int]:
    """Return for every dense tensor where the memory begins that it shares with others."""
    dense = stored(tree)
    spans = merged(span(tensor) for tensor in dense.values())
    starts = {path: span(tensor)[0] for path, tensor in dense.items()}
    return {
        path: next(begin for begin, end in spans if begin <= start < end)
        for path, start in starts.items()
    }


def positions(tree: Any) -> dict[str, int]:
    """Return how many bytes every dense tensor starts after the first that shares its memory."""
    found, first = regions(tree), {}
    addresses = {path: address(tensor) for path, tensor in stored(tree).items()}
    for path, region in found.items():
        first[region] = min(first.get(region, addresses[path]), addresses[path])
    return {path: addresses[path] - first[region] for path, region in found.items()}


def stored(tree: Any) -> dict[str, torch.Tensor]:
    """Return the tensors that are views of some bytes in memory."""
    return {
        path: tensor
        for path, tensor in tensors(tree).items()
        if is_dense(tensor) and tensor.device.type == "cpu" and tensor.untyped_storage().nbytes()
    }


def address(tensor: torch.Tensor) -> int:
    """Return where the first element lies (`data_ptr` of an empty view is 0)."""
    return span(tensor)[0] + tensor.storage_offset() * tensor.element_size()


def span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's storage."""
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


def merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join the spans that overlap: legacy storages may be views of each other."""
    result: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if result and begin < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((begin, end))
    return result


def partition_differences(what: str, left: dict[str, int], right: dict[str, int]) -> list[str]:
    """Compare which paths belong together; addresses themselves mean nothing."""
    both = left.keys() & right.keys()
    ours, theirs = groups(left, both), groups(right, both)
    return [f"{what}: {sorted(group)} together on one side only" for group in ours ^ theirs]


def groups(labels: dict[str, int], paths: Iterable[str]) -> set[frozenset[str]]:
    """Return the sets of paths that have one label."""
    found: dict[int, set[str]] = {}
    for path in paths:
        found.setdefault(labels[path], set()).add(path)
    return {frozenset(group) for group in found.values()}


def position_differences(left: Any, right: Any) -> list[str]:
    """Compare where tensors lie in the memory that they share."""
    ours, theirs = positions(left), positions(right)
    return [
        f"{path}: at byte {ours[path]} of what it shares, against {theirs[path]}"
        for path in ours
        if path in theirs and ours[path] != theirs[path]
    ]


# Protocol 0 writes a persistent id as text: the `str` of the tuple that torch meant.

TEXT_ID = re.compile(
    r"\('storage', <class 'torch\.(?P<kind>\w+)'>, '(?P<key>\w+)', '(?P<location>[^']*)',"
    r" (?P<numel>\d+)(?P<view>, None)?\)"
)


class TextIds(pickle._Unpickler):  # type: ignore[name-defined]
    """An unpickler that reads the text persistent ids of protocol 0, as torch does not."""

    def load_persid(self) -> None:
        """Turn one line into the tuple that its writer had."""
        found = TEXT_ID.fullmatch(self.readline()[:-1].decode())
        assert found, "no persistent id of torch"
        kind = torch.serialization.StorageType(found["kind"])
        view = (None,) if found["view"] else ()
        parts = ("storage", kind, found["key"], found["location"], int(found["numel"]), *view)
        self.append(self.persistent_load(parts))

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.PERSID[0]: load_persid}  # type: ignore[attr-defined]


text_ids = SimpleNamespace(__name__="pickle", Unpickler=TextIds, load=pickle.load)
