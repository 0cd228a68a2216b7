"""Chunked storages: every range of the whole is what numpy says, from any cut into boxes."""

from __future__ import annotations

import zlib
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from ckptool.errors import LimitExceeded, Malformed
from ckptool.files.blocks import fill
from ckptool.files.copying import run_jobs
from ckptool.files.fileio import Readers
from ckptool.files.jobs import Copy
from ckptool.tensors.chunks import tiling_problem
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Chunk, Chunked, Packing, Storage, TensorInfo

SHAPES = st.lists(st.integers(1, 7), max_size=4).map(tuple)
DTYPES = {DType.U8: np.uint8, DType.I16: np.int16, DType.F32: np.float32}


def cuts(draw: st.DrawFn, size: int) -> list[tuple[int, int]]:
    """Cut a dimension into consecutive ranges."""
    at = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
    return list(pairwise(at))


@st.composite
def pieces(draw: st.DrawFn) -> tuple[DType, np.ndarray, list[tuple[tuple[int, ...], np.ndarray]]]:
    shape = draw(SHAPES)
    dtype = draw(st.sampled_from(list(DTYPES)))
    count = int(np.prod(shape))
    whole = np.arange(1, count + 1).astype(DTYPES[dtype]).reshape(shape)
    boxes = [
        (tuple(begin for begin, _ in box), whole[tuple(slice(*ends) for ends in box)])
        for box in product(*(cuts(draw, size) for size in shape))
    ]
    return dtype, whole, draw(st.permutations(boxes))


def chunked_storage(
    path: Path, dtype: DType, whole: np.ndarray, boxes: list, turned: bool
) -> Storage:
    """Write the boxes one after another, rows or columns first, and describe them."""
    chunks, data = [], b""
    for offsets, box in boxes:
        raw = box.tobytes("F" if turned else "C")
        stored = Storage(str(path), str(len(chunks)), len(data), len(raw), crc32=zlib.crc32(raw))
        order = np.empty(box.shape, box.dtype, order="F" if turned else "C")
        stride = tuple(step // box.itemsize for step in order.strides)
        chunks.append(Chunk(offsets, TensorInfo(dtype, box.shape, stride, stored)))
        data += raw
    path.write_bytes(data)
    return Storage(
        str(path.parent),
        "whole",
        0,
        whole.nbytes,
        packing=Packing.CHUNKED,
        chunked=Chunked(whole.shape, whole.itemsize, tuple(chunks)),
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(given_pieces=pieces(), turned=st.booleans(), data=st.data())
def test_any_range_is_assembled(
    tmp_path: Path, given_pieces: tuple, turned: bool, data: st.DataObject
) -> None:
    dtype, whole, boxes = given_pieces
    storage = chunked_storage(tmp_path / "chunks", dtype, whole, boxes, turned)
    first = data.draw(st.integers(0, whole.size))
    count = data.draw(st.integers(0, whole.size - first))
    found = bytearray(count * whole.itemsize)
    readers = Readers()
    fill(memoryview(found), storage, first * whole.itemsize, readers)
    readers.close()
    assert found == whole.tobytes()[first * whole.itemsize :][: len(found)]


@pytest.mark.parametrize("axis", [0, 1])
def test_a_copy_checks_every_chunk(tmp_path: Path, axis: int) -> None:
    whole = np.arange(1 << 18, dtype=np.float32).reshape(512, 512)
    halves = np.split(whole, 2, axis=axis)
    boxes = [((256 * number, 0)[:: -1 if axis else 1], half) for number, half in enumerate(halves)]
    storage = chunked_storage(tmp_path / "chunks", DType.F32, whole, boxes, turned=False)
    target = (tmp_path / "out").open("w+b")
    with target:
        done = run_jobs([Copy(storage, 0)], target.fileno(), lambda nbytes: None)
    assert (tmp_path / "out").read_bytes() == whole.tobytes()
    assert done == [(zlib.crc32(whole.tobytes()), whole.nbytes)]
    raw = bytearray((tmp_path / "chunks").read_bytes())
    raw[700_000] ^= 1
    (tmp_path / "chunks").write_bytes(raw)
    with pytest.raises(Malformed, match="storage 1 do not match"):
        run_jobs([Copy(storage, None)], None, lambda nbytes: None)


# Do boxes tile a tensor?


def counts(shape: tuple[int, ...], boxes: list) -> np.ndarray:
    """Count how many boxes hold each element."""
    held = np.zeros(shape, int)
    for begins, sizes in boxes:
        held[tuple(slice(b, b + s) for b, s in zip(begins, sizes, strict=True))] += 1
    return held


@given(st.data())
def test_a_cut_tiles_and_no_other_set_of_boxes_does(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), max_size=3).map(tuple))
    boxes = [
        (tuple(begin for begin, _ in box), tuple(end - begin for begin, end in box))
        for box in product(*(cuts(data.draw, size) for size in shape))
    ]
    assert tiling_problem(shape, boxes) == ""
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(boxes) - 1))
        begins = tuple(data.draw(st.integers(0, size)) for size in shape)
        sizes = tuple(
            data.draw(st.integers(0, size - begin))
            for size, begin in zip(shape, begins, strict=True)
        )
        boxes[at] = (begins, sizes)
    assert (tiling_problem(shape, boxes) == "") == bool((counts(shape, boxes) == 1).all())


def test_boxes_around_a_middle_tile() -> None:
    """No straight cut goes through these five."""
    boxes = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    assert tiling_problem((3, 3), boxes) == ""
    assert "leave a gap: they hold 8 of 9" in tiling_problem((3, 3), boxes[:-1])


def test_a_tensor_cut_along_many_dimensions_is_refused() -> None:
    """Each dimension doubles the corners of a box."""
    shape = (2,) * 20
    with pytest.raises(LimitExceeded):
        tiling_problem(shape, [((0,) * 20, (1,) * 20)])
