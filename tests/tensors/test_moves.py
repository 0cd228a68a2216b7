"""The constructors of values against torch: every dimension, stride, dtype and packing."""

from __future__ import annotations

import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise, permutations
from math import prod
from pathlib import Path
from threading import get_ident
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from safetensors.torch import load_file

import ckptool
from ckptool.errors import Malformed
from ckptool.files import blocks as files_blocks, copying, gathering, jobs as files_jobs, planner
from ckptool.files.blocks import blocks
from ckptool.files.copying import run_jobs
from ckptool.files.fileio import Reader, Readers
from ckptool.files.jobs import Copy
from ckptool.state.edits import Change, Edit, Entries
from ckptool.tensors import numbers, values
from ckptool.tensors.casting import Rounding
from ckptool.tensors.dtype import BY_TORCH_NAME, DType
from ckptool.tensors.tensor import (
    Chunk,
    Chunked,
    Packing,
    Storage,
    TensorInfo,
    contiguous_stride,
)

judge = pytest.importorskip("judge")

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]
PACKINGS = ("plain", "big-endian", "deflated", "chunked")


def of_torch(dtype: torch.dtype) -> DType:
    return BY_TORCH_NAME[str(dtype).removeprefix("torch.")]


def raw(tensor: torch.Tensor) -> bytes:
    """Return the elements in order, what is pending done."""
    made = tensor.resolve_conj().resolve_neg().contiguous().clone()
    return bytes(judge.storage_bytes(made.untyped_storage()))


@dataclass
class Pair:
    """A value and the tensor of torch that it has to be."""

    value: TensorInfo
    tensor: torch.Tensor

    def both(self, of_value: Callable[..., TensorInfo], of_tensor: Callable[..., Any]) -> Pair:
        return Pair(of_value(self.value), of_tensor(self.tensor))


def stored(tensor: torch.Tensor, packing: str, path: Path) -> Pair:
    """Write the storage of a tensor as a file would have it; return what a reader makes of it."""
    dtype, data = of_torch(tensor.dtype), bytes(judge.storage_bytes(tensor.untyped_storage()))
    checksum = zlib.crc32(data)
    storage = Storage(str(path), "0", 0, len(data), dtype, crc32=checksum)
    pending = {"conj": tensor.is_conj(), "neg": tensor.is_neg()}
    lazy = frozenset(name for name, is_pending in pending.items() if is_pending)
    if packing == "big-endian":
        turned = bytearray(data)
        if dtype.swap > 1:
            numbers.swap(turned, dtype.swap)
        data = bytes(turned)
        storage = replace(storage, byteorder="big", crc32=zlib.crc32(data))
    elif packing == "deflated":
        squeezed = zlib.compressobj(wbits=-15)
        data = squeezed.compress(data) + squeezed.flush()
        storage = replace(storage, packing=Packing.DEFLATED, packed_nbytes=len(data))
    path.write_bytes(data)
    info = TensorInfo(
        dtype,
        tuple(tensor.shape),
        tuple(tensor.stride()),
        storage,
        tensor.storage_offset(),
        lazy=lazy,
    )
    if packing == "chunked":  # what it is a view of is stored in two chunks
        count = len(data) // dtype.itemsize
        flat = TensorInfo(dtype, (count,), (1,), storage)
        cut = count // 3
        chunks = [
            Chunk((at,), replace(flat, shape=(size,), storage_offset=at))
            for at, size in ((cut, count - cut), (0, cut))
            if size
        ]
        chunked = Chunked((count,), dtype.itemsize, tuple(chunks))
        whole = Storage(
            str(path), "all", 0, len(data), dtype, packing=Packing.CHUNKED, chunked=chunked
        )
        info = replace(info, storage=whole)
    return Pair(info, tensor)


def read(value: TensorInfo) -> bytes:
    readers = Readers()
    limit = max(100, value.nbytes // 16)
    data = b"".join(map(bytes, blocks(value, readers, limit)))
    readers.close()
    return data


def written(value: TensorInfo, path: Path) -> bytes:
    """Return what the copy engine writes of a value."""
    with path.open("w+b") as file:
        run_jobs(planner.jobs([(value, 3)]), file.fileno(), lambda nbytes: None)
    return path.read_bytes()[3:]


def assert_is(pair: Pair, path: Path) -> None:
    """Check a value, and its own copy, in every way that its elements are asked for."""
    wanted = raw(pair.tensor) if pair.tensor.numel() else b""
    assert pair.value.shape == tuple(pair.tensor.shape)
    assert read(pair.value) == wanted
    alone = values.own(pair.value)
    assert alone.shape == pair.value.shape
    assert alone.nbytes == alone.storage.nbytes
    assert read(alone) == wanted
    for each in (pair.value, alone):
        assert written(each, path) == wanted
    if wanted and alone.storage.byteorder == "little":
        with path.open("w+b") as file:  # as a torch file is written
            run_jobs([Copy(alone.storage, 0)], file.fileno(), lambda nbytes: None)
        assert path.read_bytes() == wanted


def base(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    size = 1
    for each in shape:
        size *= each
    made = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        made %= 2
    return made.view(dtype).reshape(shape)


def views(dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Yield views of every kind, of two dimensions at least for most."""
    whole = base((4, 6, 5), dtype)
    yield whole
    yield whole.permute(2, 0, 1)
    yield whole[1:3, ::2]
    yield whole[:, 2:3].transpose(0, 1)
    yield base((6, 4), dtype)
    yield base((6, 4), dtype).t()
    yield base((4, 1, 6), dtype).expand(4, 3, 6)
    yield base((3, 0, 2), dtype)
    yield base((1, 4, 1), dtype)
    yield base((8,), dtype)[5]
    if dtype.is_complex:
        yield whole.conj()
        yield whole.permute(1, 0, 2).conj().imag
    elif dtype.is_floating_point and dtype.itemsize > 1:
        yield torch._neg_view(whole.nan_to_num().transpose(0, 2))  # torch changes NaN of halves


CASES = [
    pytest.param(number, dtype, packing, id=f"{str(dtype)[6:]}-{packing}-{number}")
    for dtype in DTYPES
    for packing in PACKINGS
    for number, _ in enumerate(views(dtype))
]


def shapes_of(count: int) -> list[tuple[int, ...]]:
    if not count:
        return [(0,), (2, 0), (0, 1, 4)]
    halves = [(count // size, size) for size in (2, 3, 4) if count % size == 0]
    return [(count,), (1, count), (count, 1, 1), *halves, *((1, *each, 1) for each in halves)]


@pytest.mark.product(20)
@pytest.mark.parametrize(("number", "dtype", "packing"), CASES)
def test_each_constructor_makes_what_torch_makes(
    number: int, dtype: torch.dtype, packing: str, tmp_path: Path
) -> None:
    pair = stored(list(views(dtype))[number], packing, tmp_path / "in")
    value, tensor = pair.value, pair.tensor
    made = [pair]
    for dim, size in enumerate(value.shape):
        for start, stop in {(0, size), (0, size // 2), (size // 3, size), (size, size)}:
            made.append(
                Pair(values.part(value, dim, start, stop), tensor.narrow(dim, start, stop - start))
            )
        ranges = [(size // 2, size), (0, size // 2), (0, 0), (size // 3, size // 2)]
        slices = [tensor.narrow(dim, start, stop - start) for start, stop in ranges]
        made.append(Pair(values.taken(value, dim, ranges), torch.cat(slices, dim)))
        made.append(Pair(values.joined([value, value], dim), torch.cat([tensor, tensor], dim)))
    for dim in range(len(value.shape) + 1):
        made.append(Pair(values.stacked([value] * 3, dim), torch.stack([tensor] * 3, dim)))
    for order in permutations(range(len(value.shape))):
        made.append(Pair(values.permuted(value, order), tensor.permute(order)))
    for shape in shapes_of(tensor.numel()):
        made.append(Pair(values.shaped(value, shape), tensor.reshape(shape)))
    for each in made:
        assert_is(each, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8], ids=str)
def test_what_is_a_view_for_torch_is_one_here(dtype: torch.dtype, tmp_path: Path) -> None:
    for tensor in views(dtype):
        pair = stored(tensor, "plain", tmp_path / "in")
        for shape in shapes_of(tensor.numel()):
            made = values.shaped(pair.value, shape)
            try:
                wanted = tensor.view(shape)
            except RuntimeError:
                assert made.storage.packing is Packing.CHUNKED
                continue
            assert made.storage is pair.value.storage
            if tensor.numel():
                kept = [at for at, size in enumerate(shape) if size > 1]
                assert [made.stride[at] for at in kept] == [wanted.stride(at) for at in kept]
            if wanted.is_contiguous():
                assert all(isinstance(job, Copy) for job in planner.jobs([(made, 0)]))


# Compositions.


def _split(draw: st.DrawFn, pair: Pair) -> list[Pair]:
    dim = draw(st.integers(0, pair.tensor.dim() - 1))
    size = pair.tensor.shape[dim]
    cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
    bounds = list(pairwise(cuts)) or [(0, size)]
    return [
        Pair(values.part(pair.value, dim, a, b), pair.tensor.narrow(dim, a, b - a))
        for a, b in bounds
    ]


def _fused(draw: st.DrawFn, pair: Pair) -> Pair:
    dim = draw(st.integers(0, pair.tensor.dim() - 1))
    size = pair.tensor.shape[dim]
    at = draw(st.integers(0, size))
    bounds = draw(st.permutations([(0, at), (at, size)]))
    ranges = list(bounds)[: draw(st.integers(1, 2))]
    slices = [pair.tensor.narrow(dim, a, b - a) for a, b in ranges]
    return Pair(values.taken(pair.value, dim, ranges), torch.cat(slices, dim))


def _permuted(draw: st.DrawFn, pair: Pair) -> Pair:
    order = draw(st.permutations(range(pair.tensor.dim())))
    return Pair(values.permuted(pair.value, order), pair.tensor.permute(order))


def _shaped(draw: st.DrawFn, pair: Pair) -> Pair:
    left, shape = pair.tensor.numel(), []
    while left > 1 and len(shape) < 3:
        shape.append(draw(st.sampled_from([n for n in range(1, left + 1) if left % n == 0])))
        left //= shape[-1]
    shape.append(left)
    if draw(st.booleans()):
        shape.insert(draw(st.integers(0, len(shape))), 1)
    return Pair(values.shaped(pair.value, shape), pair.tensor.reshape(shape))


def _own(draw: st.DrawFn, pair: Pair) -> Pair:
    return Pair(values.own(pair.value), pair.tensor)


def _doubled(draw: st.DrawFn, pair: Pair) -> Pair:
    if pair.tensor.numel() > 200:
        return pair
    dim = draw(st.integers(0, pair.tensor.dim()))
    if dim < pair.tensor.dim() and draw(st.booleans()):
        return Pair(
            values.joined([pair.value, pair.value], dim),
            torch.cat([pair.tensor, pair.tensor], dim),
        )
    return Pair(
        values.stacked([pair.value, pair.value], dim), torch.stack([pair.tensor, pair.tensor], dim)
    )


def _cast(draw: st.DrawFn, pair: Pair) -> Pair:
    if pair.tensor.dtype is not torch.bfloat16:
        return pair
    kernel = Rounding(DType.BF16, DType.F32)
    made: values.Made = {}
    return Pair(values.elementwise(kernel, [pair.value], DType.F32, made), pair.tensor.float())


MOVES = [_fused, _permuted, _shaped, _own, _doubled, _cast]


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    deadline=None,
    max_examples=150,
)
@given(data=st.data())
def test_moves_of_moves_are_those_of_torch(data: st.DataObject, tmp_path: Path) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(DTYPES))
    tensors = [tensor for tensor in views(dtype) if tensor.dim()]
    pair = stored(draw(st.sampled_from(tensors)), draw(st.sampled_from(PACKINGS)), tmp_path / "in")
    for _ in range(draw(st.integers(1, 6))):
        move = draw(st.sampled_from(MOVES))
        pair = move(draw, pair)
        if draw(st.booleans()) and pair.tensor.numel():
            parts = _split(draw, pair)
            dim = next(
                (
                    at
                    for at in range(pair.tensor.dim())
                    if len({p.tensor.shape[at] for p in parts}) > 1
                ),
                None,
            )
            if dim is not None:
                pair = Pair(
                    values.joined([each.value for each in parts], dim),
                    torch.cat([each.tensor for each in parts], dim),
                )
    assert_is(pair, tmp_path / "out")


# What folds.


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    return stored(base((12, 10), torch.float32), "plain", tmp_path / "in")


def test_what_was_split_and_is_fused_again_is_the_view_that_it_was(pair: Pair) -> None:
    for dim, size in enumerate(pair.value.shape):
        thirds = [values.part(pair.value, dim, *cut) for cut in ((0, 3), (3, 4), (4, size))]
        assert values.joined(thirds, dim).view == pair.value.view
        rows = [values.part(pair.value, dim, at, at + 1) for at in range(size)]
        shape = tuple(n for at, n in enumerate(pair.value.shape) if at != dim)
        unstacked = [values.shaped(row, shape) for row in rows]
        assert values.stacked(unstacked, dim).view == pair.value.view


def test_what_was_fused_and_is_split_again_is_the_parts(tmp_path: Path) -> None:
    parts = [
        stored(base((n, 10), torch.float32), "plain", tmp_path / str(n)).value for n in (3, 4, 5)
    ]
    for turned in (False, True):
        given = [values.permuted(part, (1, 0)) for part in parts] if turned else parts
        fused = values.joined(given, int(turned))
        back = [
            values.part(fused, int(turned), start, stop)
            for start, stop in ((0, 3), (3, 7), (7, 12))
        ]
        assert [each.view for each in back] == [each.view for each in given]
    halves = values.part(values.joined(parts, 0), 0, 1, 5)
    assert [storage.path[-1] for storage in stored_under(halves)] == ["3", "4"]


def stored_under(value: TensorInfo) -> list[Storage]:
    return [leaf.storage for leaf in values.leaves(value)]


def rope(value: TensorInfo, heads: int) -> TensorInfo:
    rows, *rest = value.shape
    apart = values.shaped(value, (heads, rows // heads // 2, 2, *rest))
    return values.shaped(values.permuted(apart, (0, 2, 1, 3)), value.shape)


def back_from_rope(value: TensorInfo, heads: int) -> TensorInfo:
    rows, *rest = value.shape
    apart = values.shaped(value, (heads, 2, rows // heads // 2, *rest))
    return values.shaped(values.permuted(apart, (0, 2, 1, 3)), value.shape)


def test_a_copy_of_a_copy_is_one(pair: Pair) -> None:
    made = rope(pair.value, 3)
    turned = values.own(values.permuted(made, (1, 0)))
    for each in (made, turned, values.own(values.part(turned, 0, 2, 5))):
        (chunk,) = each.storage.chunked.chunks if each.storage.chunked else ()
        assert chunk.source.storage is pair.value.storage
    assert back_from_rope(made, 3).view == pair.value.view
    again = values.shaped(values.permuted(turned, (1, 0)), pair.value.shape)
    assert again.storage.chunked
    assert again.storage.chunked.chunks[0].source.storage is pair.value.storage


def test_any_part_of_a_copy_is_made_of_what_was_copied(pair: Pair) -> None:
    """Where steps in the copy are steps in what was copied, and else of the copy."""
    flat = Pair(
        values.shaped(values.permuted(pair.value, (1, 0)), (120,)), pair.tensor.t().reshape(120)
    )
    direct = 0
    for start in range(30):
        for rows, columns in ((1, 5), (2, 6), (2, 12), (3, 8), (4, 3)):
            area = flat.tensor[start : start + rows * columns].view(rows, columns)
            part = values.part(flat.value, 0, start, start + rows * columns)
            for wanted, dims in ((area, (0, 1)), (area.t(), (1, 0))):
                turned = values.permuted(values.shaped(part, area.shape), dims)
                for value in (values.own(turned), values.own(values.part(turned, 1, 0, 1))):
                    assert read(value) == raw(wanted[:, : value.shape[1]])
                    chunks = value.storage.chunked.chunks if value.storage.chunked else ()
                    direct += all(each.source.storage is pair.value.storage for each in chunks)
    assert 200 < direct < 600


def test_a_view_with_something_pending_does_not_go_on_where_another_ends(pair: Pair) -> None:
    one, other = (values.part(pair.value, 0, *cut) for cut in ((0, 4), (4, 12)))
    negative = replace(one, lazy=frozenset(["neg"]))
    wanted = torch.cat([-pair.tensor[:4], pair.tensor[4:]])
    assert read(values.joined([negative, other], 0)) == raw(wanted)
    assert values.joined([negative, replace(other, lazy=negative.lazy)], 0).lazy


def test_own_takes_no_more_than_it_holds(pair: Pair, tmp_path: Path) -> None:
    assert values.own(pair.value) is pair.value
    rows = values.own(values.part(pair.value, 0, 4, 6))
    assert (rows.storage.start, rows.storage.nbytes) == (160, 80)
    assert rows.storage.packing is Packing.PLAIN
    column = values.own(values.part(pair.value, 1, 4, 6))
    assert column.storage.nbytes == 12 * 2 * 4
    nothing = values.own(values.part(pair.value, 0, 4, 4))
    assert (nothing.shape, nothing.storage.nbytes) == ((0, 10), 0)


def test_the_checksum_of_what_was_cut_is_compared(pair: Pair) -> None:
    path = Path(pair.value.storage.path)
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    for each in (
        values.own(values.part(pair.value, 0, 4, 6)),
        values.own(values.permuted(pair.value, (1, 0))),
        values.stacked([values.part(pair.value, 0, 4, 6)] * 2, 0),
    ):
        jobs = [job for job in planner.jobs([(each, 0)]) if job.target is None]
        with pytest.raises(Malformed, match="checksum"):
            run_jobs(jobs, None, lambda nbytes: None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note how many bytes are read, each time."""
    sizes: list[int] = []
    before = Reader.read_into

    def counting(self: Reader, view: memoryview, start: int) -> None:
        sizes.append(len(view))
        before(self, view, start)

    monkeypatch.setattr(Reader, "read_into", counting)
    return sizes


def halves(value: TensorInfo) -> list[TensorInfo]:
    return [values.own(values.part(value, 0, *cut)) for cut in ((0, 6), (6, 12))]


MADE: dict[str, Callable[[TensorInfo], list[TensorInfo]]] = {
    "split": halves,
    "fused the other way round": lambda value: [values.joined(halves(value)[::-1], 0)],
    "stacked": lambda value: [values.stacked(halves(value)[::-1], 1)],
    "transposed": lambda value: [values.own(values.permuted(value, (1, 0)))],
    "rope": lambda value: [rope(value, 3)],
    "part by part": lambda value: [values.part(value, 0, row, row + 1) for row in range(12)],
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "damaged"])
def test_what_is_read_in_parts_is_checked_without_another_reading(
    make: Callable[[TensorInfo], list[TensorInfo]],
    sound: bool,
    pair: Pair,
    tmp_path: Path,
    asked: list[int],
) -> None:
    path = Path(pair.value.storage.path)
    if not sound:
        path.write_bytes(b"\1" + path.read_bytes()[1:])
    made = make(pair.value)
    starts = accumulate([value.nbytes for value in made], initial=0)
    jobs = planner.jobs(zip(made, starts, strict=False))
    assert [job for job in jobs if job.target is None]
    with (tmp_path / "out").open("w+b") as file:
        if sound:
            done = run_jobs(jobs, file.fileno(), lambda nbytes: None)
            assert [each.nbytes for each in done] == [job.nbytes for job in jobs]
        else:
            with pytest.raises(Malformed, match="do not match their checksum"):
                run_jobs(jobs, file.fileno(), lambda nbytes: None)
    assert sum(asked) == pair.value.nbytes


def made_into(folder: Path, make: Callable[[Entries], dict[str, Any]]) -> None:
    """Write the tensors that a function makes of those of `in.pth` to `out.pth`."""

    def change(entries: Entries) -> Change:
        return Change([(tuple(entries), key, value) for key, value in make(entries).items()])

    steps = [Edit("make", change=change)]
    ckptool.convert(folder / "in.pth", folder / "out.pth", steps=steps, force=True)


def test_joins_are_told_apart_and_nothing_of_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({str(n): torch.full((3,), n) for n in range(4)}, tmp_path / "in.pth")

    def pairs(found: Any) -> dict[str, Any]:
        one, other = (values.joined([found[a], found[b]], 0) for a, b in ("02", "13"))
        return {"one": one, "other": other, "again": one}

    written = []
    for number in range(3):
        kept = [bytearray(number * 1000) for _ in range(number)]  # other addresses
        made_into(tmp_path, pairs)
        written.append((tmp_path / "out.pth").read_bytes())
        assert len(kept) == number
    assert len(set(written)) == 1
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert state["one"].tolist() == [0, 0, 0, 2, 2, 2]
    assert state["other"].tolist() == [1, 1, 1, 3, 3, 3]
    assert state["again"].data_ptr() == state["one"].data_ptr()


# What is refused.


def described(dtype: DType, *shape: int) -> TensorInfo:
    count = dtype.nbytes(prod(shape))
    return TensorInfo(dtype, shape, contiguous_stride(shape), Storage("file", "0", 0, count))


@pytest.mark.parametrize("dtype", [DType.QI8, DType.QU4X2, DType.F6_E3M2], ids=str)
def test_elements_that_cannot_be_moved_are_refused(dtype: DType) -> None:
    value = described(dtype, 4, 8)
    for move in (
        lambda: values.part(value, 0, 0, 2),
        lambda: values.permuted(value, (1, 0)),
        lambda: values.joined([value, value], 0),
        lambda: values.stacked([value, value], 0),
        lambda: values.taken(value, 1, [(0, 2), (4, 6)]),
        lambda: values.shaped(value, (8, 4)),
    ):
        with pytest.raises(ValueError, match="cannot be moved"):
            move()
    assert values.part(value, 0, 0, 4) is value
    assert values.permuted(value, (0, 1)) is value
    assert values.own(value) is value


def test_pairs_of_small_floats_stay_in_the_last_dimension() -> None:
    value = described(DType.F4, 4, 6, 8)
    for move in (
        lambda: values.part(value, 2, 0, 4),
        lambda: values.permuted(value, (0, 2, 1)),
        lambda: values.joined([value, value], 2),
        lambda: values.stacked([value, value], 3),
        lambda: values.shaped(value, (24, 4, 2)),
    ):
        with pytest.raises(ValueError, match="along the last dimension"):
            move()
    assert values.permuted(value, (1, 0, 2)).shape == (6, 4, 8)
    assert values.joined([value, value], 0).shape == (8, 6, 8)
    assert values.shaped(value, (24, 8)).shape == (24, 8)


def test_what_does_not_fit_is_refused(pair: Pair) -> None:
    value = pair.value
    half = replace(value, dtype=DType.I32)
    for move, reason in (
        (lambda: values.part(value, 0, 3, 13), "no 3:13 in a dimension of 12"),
        (lambda: values.permuted(value, (0, 0)), "not an order of 2 dimensions"),
        (lambda: values.shaped(value, (12, 9)), "do not fit the shape"),
        (lambda: values.shaped(value, (-12, -10)), "do not fit the shape"),
        (lambda: values.joined([value, half], 0), "two dtypes"),
        (lambda: values.joined([value, values.part(value, 0, 0, 3)], 1), "several shapes"),
        (lambda: values.stacked([value, values.part(value, 0, 0, 3)], 0), "several shapes"),
    ):
        with pytest.raises(ValueError, match=reason):
            move()


def test_requires_grad_stays_and_other_attributes_go(pair: Pair) -> None:
    value = replace(pair.value, requires_grad=True, origin=object())
    plain = replace(value, requires_grad=False)
    for made in (
        values.part(value, 0, 1, 3),
        values.permuted(value, (1, 0)),
        values.shaped(value, (120,)),
        values.own(values.permuted(value, (1, 0))),
        values.shaped(values.permuted(value, (1, 0)), (120,)),
        values.joined([plain, value], 0),
        values.stacked([value, value], 0),
    ):
        assert made.requires_grad
        assert made.origin is None


def test_a_parameter_that_was_moved_is_one_again_where_its_origin_is_put_back(
    tmp_path: Path,
) -> None:
    weight = torch.nn.Parameter(base((4, 6), torch.float32))
    torch.save({"w": weight}, tmp_path / "in.pth")

    def turned(entries: Any) -> dict[str, Any]:
        value = entries["w"]
        moved = values.own(values.permuted(value, (1, 0)))
        return {"plain": moved, "weight": replace(moved, origin=value.origin)}

    made_into(tmp_path, turned)
    state = torch.load(tmp_path / "out.pth", weights_only=True)
    assert [type(each) for each in state.values()] == [torch.Tensor, torch.nn.Parameter]
    for each in state.values():
        assert each.is_contiguous()
        assert each.requires_grad
        assert judge.storage_bytes(each.data.untyped_storage()) == raw(weight.detach().t())


# Large tensors, in many tasks: the sizes are made small instead.


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gathering.Ahead.__init__, "__defaults__", (5000, None, None))
    monkeypatch.setattr(files_blocks.grain, "__defaults__", (40_000,))
    for module, name, size in (
        (files_blocks, "READ", 4096),
        (files_blocks, "MADE", 8192),
        (gathering, "READ", 4096),
        (gathering, "LEAST", 512),
        (gathering, "NEAR", 256),
        (files_blocks, "LONG", 512),
        (copying, "CHUNK", 2048),
        (copying, "MADE", 8192),
        (files_jobs, "CHUNK", 2048),
        (files_jobs, "SMALL", 256),
        (files_jobs, "TASK", 8192),
    ):
        monkeypatch.setattr(module, name, size)


LARGE: dict[str, Callable[[Pair], Pair]] = {
    "transposed": lambda pair: pair.both(
        lambda value: values.permuted(value, (1, 0)), lambda tensor: tensor.t()
    ),
    "rope": lambda pair: pair.both(
        lambda value: rope(value, 6),
        lambda tensor: tensor.view(6, 10, 2, -1).transpose(1, 2).reshape(tensor.shape),
    ),
    "transposed and joined": lambda pair: pair.both(
        lambda value: values.joined([values.permuted(value, (1, 0))] * 3, 1),
        lambda tensor: torch.cat([tensor.t()] * 3, 1),
    ),
    "transposed and stacked": lambda pair: pair.both(
        lambda value: values.stacked([values.permuted(value, (1, 0))] * 3, 0),
        lambda tensor: torch.stack([tensor.t()] * 3),
    ),
    "rows joined": lambda pair: pair.both(
        lambda value: values.taken(value, 0, [(50, 120), (0, 49)]),
        lambda tensor: torch.cat([tensor[50:], tensor[:49]]),
    ),
    "joined and cast": lambda pair: pair.both(
        lambda value: values.elementwise(
            Rounding(value.dtype, DType.F64), [values.joined([value] * 3, 0)], DType.F64, {}
        ),
        lambda tensor: torch.cat([tensor] * 3).double(),
    ),
    "columns joined": lambda pair: pair.both(
        lambda value: values.taken(value, 1, [(7, 20), (0, 5)]),
        lambda tensor: torch.cat([tensor[:, 7:20], tensor[:, :5]], 1),
    ),
    "a few columns": lambda pair: pair.both(
        lambda value: values.part(value, 1, 3, 5), lambda tensor: tensor[:, 3:5]
    ),
    "overlapping": lambda pair: pair.both(
        lambda value: values.own(replace(value, shape=(900, 300), stride=(1, 2))),
        lambda tensor: tensor.as_strided((900, 300), (1, 2)),
    ),
    "in three dimensions": lambda pair: pair.both(
        lambda value: values.permuted(
            values.shaped(value, (12, 10, -(-value.numel // 120))), (2, 0, 1)
        ),
        lambda tensor: tensor.view(12, 10, -1).permute(2, 0, 1),
    ),
    "cast and transposed": lambda pair: pair.both(
        lambda value: values.permuted(
            values.elementwise(Rounding(value.dtype, DType.F64), [value], DType.F64, {}), (1, 0)
        ),
        lambda tensor: tensor.double().t(),
    ),
}


@pytest.mark.product(3)
@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("make", LARGE.values(), ids=LARGE.keys())
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("columns", [24, 256])
def test_large_tensors_are_moved_in_tasks(
    make: Callable[[Pair], Pair], packing: str, columns: int, tmp_path: Path
) -> None:
    assert_is(
        make(stored(base((120, columns), torch.float32), packing, tmp_path / "in")),
        tmp_path / "out",
    )


def turned(path: Path, columns: int = 256) -> Pair:
    """Return a matrix that two threads transpose together, in `columns` / 83 bands."""
    made = stored(base((120, columns), torch.float32), "plain", path)
    return made.both(
        lambda value: values.own(values.permuted(value, (1, 0))), lambda tensor: tensor.t()
    )


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("columns", [83, 256])
@pytest.mark.parametrize("sound", [True, False], ids=["sound", "damaged"])
def test_what_is_turned_is_checked_without_another_reading(
    columns: int, sound: bool, tmp_path: Path, asked: list[int]
) -> None:
    path = tmp_path / "in"
    pair = turned(path, columns)
    jobs = planner.jobs([(pair.value, 0)])
    with (tmp_path / "out").open("w+b") as file:
        run_jobs(jobs[:1], file.fileno(), lambda nbytes: None)  # without the check
        to_turn = sum(asked)
        asked.clear()
        assert [job for job in jobs if job.target is None]
        if sound:
            run_jobs(jobs, file.fileno(), lambda nbytes: None)
            assert (tmp_path / "out").read_bytes() == raw(pair.tensor)
        else:
            path.write_bytes(path.read_bytes()[:-1] + b"\1")
            with pytest.raises(Malformed, match="do not match their checksum"):
                run_jobs(jobs, file.fileno(), lambda nbytes: None)
    assert pair.value.nbytes <= sum(asked) == to_turn


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("slow", ["the caller", "its helper"])
def test_nothing_is_turned_before_all_of_it_is_read(
    slow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, load = get_ident(), gathering.Portion.load

    def slowly(self: gathering.Portion, source: Any) -> None:
        if (get_ident() == caller) is (slow == "the caller"):
            time.sleep(0.001)
        load(self, source)

    monkeypatch.setattr(gathering.Portion, "load", slowly)
    pair = turned(tmp_path / "in")
    assert written(pair.value, tmp_path / "out") == raw(pair.tensor)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("failing", ["the caller", "its helper"])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_no_thread_waits_for_one_that_failed(
    failing: str, error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, load = get_ident(), gathering.Portion.load

    def fails(self: gathering.Portion, source: Any) -> None:
        if (get_ident() == caller) is (failing == "the caller"):
            raise error("of this one")
        time.sleep(0.001)  # the other has its turn too
        load(self, source)

    monkeypatch.setattr(gathering.Portion, "load", fails)
    with pytest.raises(error, match="of this one"):
        written(turned(tmp_path / "in").value, tmp_path / "out")


@pytest.mark.usefixtures("small_blocks")
def test_memory_that_is_short_for_what_is_turned_ends_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(nbytes: int) -> memoryview:
        raise MemoryError

    pair = turned(tmp_path / "in")
    monkeypatch.setattr(numbers, "allocated", short)
    with pytest.raises(MemoryError):
        written(pair.value, tmp_path / "out")


@pytest.mark.parametrize("target", ["out.safetensors", "out.pth", "-"])
def test_large_matrices_are_transposed_as_torch_does(target: str, tmp_path: Path) -> None:
    """With the sizes that users meet: one matrix in one band, one in two, one for a thread."""
    shapes = {"large": (2999, 2001), "larger": (3001, 3003), "small": (500, 900)}
    tensors = {name: base(shape, torch.int32) for name, shape in shapes.items()}
    torch.save(tensors, tmp_path / "in.pth")
    (tmp_path / "turn.toml").write_text("recipe = 1\n[[step]]\ntranspose = {keys = '*'}\n")
    command = [
        sys.executable,
        "-m",
        "ckptool",
        "convert",
        "--recipe",
        "turn.toml",
        "in.pth",
        target,
    ]
    with (tmp_path / "piped.pth").open("wb") as file:
        subprocess.run(command, cwd=tmp_path, stdout=file, check=True)
    made = tmp_path / ("piped.pth" if target == "-" else target)
    state = load_file(made) if made.suffix == ".safetensors" else torch.load(made)
    assert {*state} == {*tensors}
    for name, tensor in tensors.items():
        assert torch.equal(state[name], tensor.t())
