"""Sparse tensors that `check` calls ok are those that torch's own checks take."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch

import ckptool
from ckptool.verbs.checked import Status

pytestmark = pytest.mark.filterwarnings("ignore")
LAYOUTS = {
    "csr": torch.sparse_csr,
    "csc": torch.sparse_csc,
    "bsr": torch.sparse_bsr,
    "bsc": torch.sparse_bsc,
}


def dense(*shape: int) -> torch.Tensor:
    return torch.eye(shape[-2], shape[-1]).expand(shape) * torch.arange(1.0, shape[-1] + 1)


def compressed(layout: str, source: torch.Tensor, **more: Any) -> torch.Tensor:
    block = (2, 3) if layout.startswith("bs") else None
    return source.to_sparse(layout=LAYOUTS[layout], blocksize=block, **more)


@cache
def sound() -> dict[str, torch.Tensor]:
    """Return tensors of all layouts, with batches, dense dimensions, and without elements."""
    made = {
        "coo": dense(4, 6).to_sparse(),
        "coo of three": dense(2, 4, 6).to_sparse(),
        "coo, hybrid": dense(2, 4, 6).to_sparse(2),
        "coo, all dense": torch.sparse_coo_tensor(
            torch.zeros(0, 1, dtype=torch.long), torch.ones(1, 3), (3,)
        ),
        "coo without elements": torch.sparse_coo_tensor(size=(3, 0)),
        "coo of a long row": torch.sparse_coo_tensor(
            torch.arange(200_000)[None], torch.ones(200_000)
        ),
        "csr of int32": torch.sparse_csr_tensor(
            torch.tensor([0, 1, 2], dtype=torch.int32),
            torch.tensor([2, 0], dtype=torch.int32),
            torch.ones(2),
            (2, 3),
        ),
        "csr of no rows": torch.zeros(0, 3).to_sparse_csr(),
        "csr of long ends": torch.eye(2).repeat(35_000, 1).to_sparse_csr(),
        "nested": torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 1)]),
        "nested of vectors": torch.nested.nested_tensor([torch.ones(2), torch.ones(0)]),
    }
    for name in LAYOUTS:
        made[name] = compressed(name, dense(4, 6))
        made[f"{name}, batches"] = compressed(name, dense(5, 2, 4, 6))
        made[f"{name} without elements"] = compressed(name, torch.zeros(4, 6))
        made[f"{name}, hybrid"] = compressed(name, torch.ones(4, 6, 5), dense_dim=1)
    return made


def check(path: Path, tensor: torch.Tensor, *, legacy: bool = False) -> Status:
    torch.save({"w": tensor, "b": torch.ones(2)}, path, _use_new_zipfile_serialization=not legacy)
    return ckptool.check(path).status


@pytest.mark.parametrize("legacy", [False, True])
def test_sound_tensors_of_all_layouts_are_ok(tmp_path: Path, legacy: bool) -> None:
    for name, tensor in sound().items():
        assert check(tmp_path / "w.pth", tensor, legacy=legacy) is Status.OK, name


def parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Return the indices of a sparse tensor: they may be written to."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices()]
    if tensor.layout in (torch.sparse_csr, torch.sparse_bsr):
        return [tensor.crow_indices(), tensor.col_indices()]
    return [tensor.ccol_indices(), tensor.row_indices()]


def rules_of_torch(tensor: torch.Tensor) -> str:
    """Return what torch's checks say against a tensor."""
    try:
        if tensor.layout is torch.sparse_coo:
            torch._validate_sparse_coo_tensor_args(
                tensor._indices(), tensor._values(), tensor.shape
            )
        else:
            torch._validate_sparse_compressed_tensor_args(
                *parts(tensor), tensor.values(), tensor.shape, tensor.layout
            )
    except RuntimeError as error:
        return f"{error}"
    return ""


NAMES = [
    name
    for name in sound()
    if "nested" not in name
    and "without" not in name
    and "no rows" not in name
    and "all dense" not in name
]


@pytest.mark.parametrize("name", NAMES)
def test_one_index_that_is_another(tmp_path: Path, name: str) -> None:
    random = Random(name)
    refused = 0
    for value in (-1, 10**9, -(10**6), 0, 1, 2, 3, 4, 5, 6):
        tensor = sound()[name].clone()
        indices = random.choice([part for part in parts(tensor) if part.numel()])
        indices.view(-1)[random.randrange(indices.numel())] = value
        wrong = rules_of_torch(tensor)
        refused += bool(wrong)
        status = check(tmp_path / "w.pth", tensor)
        if "distinct" not in wrong:  # of which nothing is written elsewhere
            assert status is (Status.DAMAGED if wrong else Status.OK), (value, wrong)
    assert refused


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    """A shape that the indices never had, as only a pickle can say it."""
    for name, tensor in sound().items():
        if tensor.is_sparse and 4 in tensor.shape:
            path = tmp_path / "w.pth"
            torch.save({"w": tensor}, path, _use_new_zipfile_serialization=False)
            data = path.read_bytes()
            at = data.index(b"K\4K\6")
            path.write_bytes(data[:at] + b"K\2" + data[at + 2 :])
            assert ckptool.check(path).status is Status.DAMAGED, name


@pytest.mark.parametrize("part", ["sizes", "strides", "offsets"])
@pytest.mark.parametrize("value", [-1, 9, 1 << 62])
def test_nested_tensors_that_leave_their_buffer(tmp_path: Path, part: str, value: int) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 1)])
    buffer = nested.values()
    facts = {
        "sizes": nested._nested_tensor_size(),
        "strides": nested._nested_tensor_strides(),
        "offsets": nested._nested_tensor_storage_offsets(),
    }
    facts[part].view(-1)[0] = value

    class Made:
        def __reduce_ex__(self, protocol: int) -> Any:
            return torch._utils._rebuild_nested_tensor, (buffer, *facts.values())

    torch.save({"w": Made(), "b": torch.ones(2)}, tmp_path / "w.pth")
    assert ckptool.check(tmp_path / "w.pth").status is Status.DAMAGED
