"""Random checkpoints cast to every dtype: values, strides, ties, counts, as torch has them."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("hypothesis")
pytest.importorskip("safetensors.torch")

import numpy as np
import torch
from hypothesis import given, strategies as st
from test_casts import rounded
from test_properties import folder, is_wrapped, original, rewrite, saved, state_of

from ckptool import edits
from ckptool.tensors.counts import Losses
from ckptool.tensors.dtype import DType

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
TARGETS = {
    "BF16": torch.bfloat16,
    "fp16": torch.float16,
    "float32": torch.float32,
    "f64": torch.float64,
    "f8_e5m2": torch.float8_e5m2,
}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def cast(tensor: Any, dtype: Any) -> Any:
    """Cast with torch, or with exact arithmetic where torch rounds twice."""
    tensor = tensor.detach()
    if not tensor.is_floating_point():
        return tensor
    if tensor.dtype is not torch.float64 or dtype.itemsize > 2:
        return tensor.to(dtype)
    target = next(each for each in DType if str(dtype) == f"torch.{each.torch_name}")
    flat = tensor.contiguous().reshape(-1).numpy()
    made = np.ascontiguousarray(rounded(flat, target)).view(f"u{dtype.itemsize}")
    return torch.from_numpy(made.view("u1")).view(dtype).reshape(tensor.shape)


def same(got: Any, wanted: Any) -> bool:
    """Check for the same numbers, bit for bit but for those of a NaN."""
    if got.dtype != wanted.dtype or got.shape != wanted.shape:
        return False
    if not got.numel():
        return True
    plain = torch.contiguous_format  # of a single element, `contiguous` keeps any stride
    one, other = (each.detach().clone(memory_format=plain).reshape(-1) for each in (got, wanted))
    if not wanted.is_floating_point():
        return one.view(torch.uint8).tolist() == other.view(torch.uint8).tolist()
    nan = other.double().isnan()
    equal = one.view(BITS[got.itemsize]) == other.view(BITS[got.itemsize])
    return bool((one.double().isnan() == nan).all() and (equal | nan).all())


def views(state: Any) -> dict[str, tuple[Any, ...]]:
    """Return which view of which storage each tensor is."""
    return {
        key: (each.untyped_storage().data_ptr(), each.storage_offset(), each.stride(), each.shape)
        for key, each in state.items()
        if each.numel()
    }


def partition(state: Any) -> set[frozenset[str]]:
    """Return which tensors share their storages."""
    at: dict[int, set[str]] = {}
    for key, view in views(state).items():
        at.setdefault(view[0], set()).add(key)
    return set(map(frozenset, at.values()))


@given(saved(), st.sampled_from([*TARGETS]))
def test_random_checkpoints_are_cast_as_torch_does(
    given_: tuple[Any, dict[str, Any]], word: str
) -> None:
    tree, how = given_
    with folder() as at:
        torch.save(tree, at / "in.pth", **how)
        step = edits.cast(word, overflow="inf")
        done = rewrite(at / "in.pth", at / "out.pth", step)
        before, after = original(at / "in.pth", how), torch.load(at / "out.pth")
        if is_wrapped(before):
            assert list(after) == list(before)
        old, new = state_of(before), state_of(after)
        wanted = {key: cast(value, TARGETS[word]) for key, value in old.items()}
        assert list(new) == list(old)
        for key, value in new.items():
            assert same(value, wanted[key]), key
            assert type(value) is type(old[key])
            assert value.requires_grad == old[key].requires_grad
            assert value.stride() == old[key].stride()
        assert partition(new) == partition(old)
        also = rewrite(at / "in.pth", at / "again.pth", step)
        assert (at / "out.pth").read_bytes() == (at / "again.pth").read_bytes()
        assert also.casts == done.casts
        assert done.casts[0].total == losses(old, wanted, TARGETS[word])


def losses(old: Any, wanted: Any, dtype: Any) -> Losses:
    """Count with torch what became another kind of number; tied tensors once."""
    seen: set[tuple[Any, ...]] = set()
    total = Losses()
    for key, view in views(old).items():
        value = old[key].detach()
        if view in seen or not value.is_floating_point() or value.dtype is dtype:
            continue
        seen.add(view)
        one, other = value.double(), wanted[key].double()
        tiny, least = torch.finfo(dtype).tiny, torch.finfo(value.dtype).tiny
        small = (other != 0) & (other.abs() < tiny) & (one.abs() >= least)
        total += Losses(
            int((other.isinf() & one.isfinite()).sum()),
            int(((other == 0) & (one != 0)).sum()),
            int(small.sum()),
        )
    return total
