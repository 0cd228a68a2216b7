"""safetensors: an 8-byte header length, a JSON header, then the data without gaps.

Source: `safetensors/src/tensor.rs`. The reader is stricter than the library where the library is
lenient (repeated keys, space before the header). In the writer's order, by dtype and then name,
entries and data equal those of `safetensors.torch.save_file` byte for byte.

Order, ties and `_metadata` have no place in the format: they are noted in `__metadata__` under
`ckptool`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING, Any

from ckptool.containers import _json
from ckptool.containers._container import Container, Left, Traits, Writer
from ckptool.containers._order import NOTE, noted, restored
from ckptool.errors import LimitExceeded, Malformed, NotRepresentable, Unsupported
from ckptool.files import budget
from ckptool.files.fileio import Reader
from ckptool.pickles.subclasses import class_of, tensors_in
from ckptool.pickles.tree import Node, attribute
from ckptool.state import module_metadata
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.parts import SHARDING_INFO
from ckptool.state.replacing import make_state_dict
from ckptool.tensors.dtype import BY_SAFETENSORS_NAME, DType
from ckptool.tensors.numbers import can_resolve
from ckptool.tensors.tensor import CompositeTensor, Storage, TensorInfo, contiguous_stride
from ckptool.text import length

if TYPE_CHECKING:  # a listing writes nothing
    from ckptool.files.copying import PlannedFile

MAX_HEADER = 100_000_000


def sniff(head: bytes) -> bool:
    """Check for a header length and an opening brace."""
    # Eight bytes of text before a brace are JSON or a template, not the length of a header.
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 56


def read(reader: Reader) -> Checkpoint:
    """Read and check the header; the data stays where it is."""
    size = int.from_bytes(reader.read(0, 8), "little")
    if size > MAX_HEADER:
        raise LimitExceeded(f"a header of {size} bytes", offset=0)
    if 8 + size > reader.nbytes:
        raise Malformed(
            f"the header should have {size} bytes; the file ends before",
            offset=8,
            hint="it is truncated; download or copy it again",
        )
    budget.current().read(size)
    header = _json.load(reader.read(8, size), "the header", 8)
    metadata = _metadata(header.pop("__metadata__", {}))
    budget.current().spend(len(metadata) * budget.NAME)
    for name in {NOTE, SHARDING_INFO} & metadata.keys():
        with suppress(LimitExceeded):  # who parses it finds the same
            _json.count(metadata[name].encode(), name)
    base = reader.base + 8 + size
    budget.current().spend(len(header) * budget.TENSOR)
    entries = {key: _tensor(reader, key, entry, base) for key, entry in header.items()}
    _refuse_gaps(reader, entries.values(), base)
    entries, versions, notes = restored(entries, metadata.pop(NOTE, None))
    state_dict = make_state_dict(dict(entries), versions)
    return Checkpoint(
        reader.path,
        "safetensors",
        module_metadata.with_texts(state_dict, metadata),
        reader.nbytes,
        metadata=metadata,
        notes=notes,
    )


def _metadata(value: Any) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise Malformed("`__metadata__` is not a map of text", offset=8)
    return value


def _tensor(reader: Reader, key: str, entry: Any, base: int) -> TensorInfo:
    match entry:
        case {"dtype": str(name), "shape": list(sizes), "data_offsets": [begin, end]}:
            pass
        case _:
            raise Malformed(f"the entry of {key} is damaged", offset=8)
    dtype = BY_SAFETENSORS_NAME.get(name)
    if dtype is None:
        raise Unsupported(f"{key} has the unknown dtype {name}", offset=8)
    numbers = (*sizes, begin, end)
    if any(length(number) is None for number in numbers):
        raise Malformed(f"the entry of {key} has an impossible number", offset=8)
    if dtype is DType.F4:  # torch counts pairs of four-bit floats in the last dimension
        if not sizes or sizes[-1] % 2:
            raise Malformed(f"{key} ends in half a byte", offset=8)
        sizes[-1] //= 2
    if any(count >= 1 << 64 for count in accumulate(sizes, mul)):  # though a zero may follow
        raise Malformed(f"the shape of {key} has too many elements", offset=8)
    shape, start = tuple(sizes), base + begin
    known = dtype if dtype.storage_class else None
    storage = Storage(reader.file, key, start, end - begin, known)
    info = TensorInfo(dtype, shape, contiguous_stride(shape), storage)
    if end < begin or info.nbytes != end - begin or (info.numel * dtype.bits) % 8:
        raise Malformed(
            f"{key} should have {info.nbytes} bytes and has {end - begin}", offset=start
        )
    return info


def _refuse_gaps(reader: Reader, tensors: Iterable[TensorInfo], base: int) -> None:
    position = base
    for storage in sorted((info.storage for info in tensors), key=lambda s: (s.start, s.nbytes)):
        if storage.start != position:
            what = f"the data of {storage.key} leaves a gap or overlaps"
            raise Malformed(what, offset=storage.start)
        position += storage.nbytes
    nbytes = position - reader.base
    if nbytes != reader.nbytes:
        raise Malformed(
            f"the file should have {nbytes} bytes and has {reader.nbytes}",
            offset=min(nbytes, reader.nbytes),
        )


def left_behind(entries: dict[str, Node], untie: bool) -> Left:
    """Say which entries of a state_dict are tied to others, and which do not fit and why."""
    views: dict[tuple[object, ...], str] = {}
    ties, unfit = {}, {}
    for key, value in entries.items():
        reason = _unfit(key, value)
        if reason:
            unfit[key] = reason
        elif not untie:
            first = views.setdefault(value.view, key)
            if first != key and value.numel:
                ties[key] = first
    return Left(ties, unfit)


def _unfit(key: str, value: Node) -> str:
    if isinstance(value, CompositeTensor):
        kind = class_of(value)
        return f"needs its class, {kind}" if kind else f"a {value.layout} tensor"
    if not isinstance(value, TensorInfo):
        return "holds tensors, and is not one" if any(tensors_in(value)) else "not a tensor"
    if not value.dtype.safetensors_name:
        return f"dtype {value.dtype.torch_name}"
    if value.lazy and not can_resolve(value.dtype, value.lazy):
        return f"a pending operation that torch does not do on {value.dtype.torch_name}"
    if key == "__metadata__":
        return "its name is taken by the format"
    if value.dtype is DType.F4 and not value.shape:
        return "half a byte"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    return ""


def lay_out(checkpoint: Checkpoint, entries: dict[str, Node] | None, untie: bool) -> PlannedFile:
    """Plan a file with these entries; ties are written once and noted.

    Raises `NotRepresentable` with the keys that do not fit.
    """
    from ckptool.files.copying import PlannedFile

    assert entries is not None  # what keeps nothing around a state_dict is planned with one
    left = left_behind(entries, untie)
    if left.unfit:
        raise NotRepresentable(
            f"safetensors cannot hold {len(left.unfit)} of {len(entries)} entries",
            evidence=[f"{key}   {reason}" for key, reason in list(left.unfit.items())[:20]],
            **_advice(entries[key] for key in left.unfit),
        )
    kept = {key: info for key, info in entries.items() if key not in left.ties}
    ordered = sorted(kept.items(), key=lambda item: (item[1].dtype.rank, item[0].encode()))
    metadata = module_metadata.texts(checkpoint.tree)
    held, versions = [key for key, _ in ordered], attribute(checkpoint.tree, "_metadata")
    metadata |= noted(list(entries), left.ties, held, versions)
    places, nbytes = _places(ordered)
    text = _header(ordered, places, metadata)
    base = 8 + len(text)
    from ckptool.files import planner

    jobs = planner.jobs((info, base + places[key]) for key, info in ordered)
    literals = [(0, len(text).to_bytes(8, "little") + text)]
    return PlannedFile("", base + nbytes, literals, jobs)


def _advice(unfit: Iterable[Node]) -> dict[str, str]:
    """Return what helps: never to leave out what holds tensors without naming it."""
    if any(any(tensors_in(value)) for value in unfit):
        return {"hint": "a torch output (OUT.pth) keeps them; --drop leaves out what it names"}
    return {"option": "--tensors-only", "hint": "leaves them out"}


def _places(ordered: list[tuple[str, TensorInfo]]) -> tuple[dict[str, int], int]:
    """Say where in the data each tensor begins, and how much data there is."""
    places, position = {}, 0
    for key, info in ordered:
        places[key] = position
        position += info.nbytes
    return places, position


def _header(
    ordered: list[tuple[str, TensorInfo]], places: dict[str, int], metadata: dict[str, str]
) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    for key, info in ordered:
        shape = list(info.shape)
        if info.dtype is DType.F4:
            shape[-1] *= 2
        header[key] = {
            "dtype": info.dtype.safetensors_name,
            "shape": shape,
            "data_offsets": [places[key], places[key] + info.nbytes],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise NotRepresentable(f"a header of {len(text)} bytes; safetensors allows {MAX_HEADER}")
    return text


CONTAINERS = (
    Container(
        "safetensors",
        "safetensors",
        word="safetensors",
        suffixes=(".safetensors",),
        sniff=sniff,
        read=read,
        writer=Writer(lay_out, ".safetensors", "model", ".safetensors", left_behind),
        traits=Traits(around=False, strides=False, ties=False, objects=False),
        library="safetensors",
    ),
)
