"""Classes inside classes, which protocol 2 names by a call of getattr: ShardedTensor's alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from conftest import FIXTURES

from ckptool import containers
from ckptool.pickles import safety
from ckptool.pickles.names import Level

sys.path.append(str(FIXTURES))
from containers import torch_zip  # type: ignore[attr-defined]
from opcodes import (
    build,
    call,
    dict_,
    integer,
    list_,
    name,
    new,
    pickled,
    text,
    tuple_,
)

GETATTR = name("__builtin__", "getattr")
HOLDER = name("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
NESTED = call(GETATTR, HOLDER, text("ProcessGroupState"))
STATE = dict_([(text("global_rank"), integer(0))])
FINE = build(new(NESTED), STATE)
ODD = {
    "called": call(NESTED, integer(1)),
    "arguments": new(NESTED, text("x")),
    "text in the state": build(new(NESTED), dict_([(text("a"), text("x"))])),
    "a name in the state": build(new(NESTED), dict_([(text("a"), GETATTR)])),
    "state of the class": build(NESTED, STATE),
    "twice a state": build(FINE, STATE),
    "another attribute": new(call(GETATTR, HOLDER, text("__reduce__"))),
    "another class": new(call(GETATTR, name("torch", "Tensor"), text("ProcessGroupState"))),
    "getattr itself": GETATTR,
    "in a list": list_(tuple_(GETATTR)),
    "given to a call": call(name("collections", "OrderedDict"), list_(GETATTR)),
    "given to another": call(name("functools", "partial"), GETATTR),
    "of what it gives": call(GETATTR, NESTED, text("__init__")),
}


def level(path: Path, *values: bytes) -> Level:
    pairs = [(text(str(number)), value) for number, value in enumerate(values)]
    path.write_bytes(torch_zip(pickled(dict_(pairs)), {}))
    return safety.judge_file(containers.read(path)).level


def test_the_state_of_a_group_is_inert(tmp_path: Path) -> None:
    assert level(tmp_path / "a.pth", FINE, FINE) is Level.FOREIGN
    assert level(tmp_path / "b.pth", FINE, call(name("os", "system"), text("x"))) is Level.DANGEROUS


@pytest.mark.parametrize("case", ODD)
def test_any_other_use_of_getattr_is_dangerous(tmp_path: Path, case: str) -> None:
    assert level(tmp_path / "a.pth", ODD[case]) is Level.DANGEROUS
    assert level(tmp_path / "b.pth", FINE, ODD[case]) is Level.DANGEROUS
    assert level(tmp_path / "c.pth", ODD[case], FINE) is Level.DANGEROUS
