"""What runs of a product without `--all`."""

from __future__ import annotations

from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import left_out


def case(n: int, always: object, **values: Any) -> Any:
    name = f"test[{'-'.join(values.values())}]"
    mark = pytest.mark.product(n, always=always).mark
    return SimpleNamespace(
        name=name,
        nodeid=f"tests/test_x.py::{name}",
        callspec=SimpleNamespace(params=values),
        get_closest_marker=lambda _: mark,
    )


def kept(n: int, always: object = object()) -> list[tuple[str, str]]:
    pairs = product([f"{number}.pth" for number in range(40)], "abcdefghij")
    cases = [case(n, always, name=name, edit=edit) for name, edit in pairs]
    out = left_out(cases)
    return [tuple(each.callspec.params.values()) for each in cases if each.nodeid not in out]


@pytest.mark.parametrize("n", [4, 20, 1000])
def test_every_fixture_and_every_edit_is_in_the_sample(n: int) -> None:
    chosen = kept(n)
    assert len({name for name, _ in chosen}) == 40
    assert len({edit for _, edit in chosen}) == 10
    assert len(chosen) < 400 / n + 50


def test_a_value_can_be_always_in_the_sample() -> None:
    assert len([edit for _, edit in kept(10, "c") if edit == "c"]) == 40


def test_the_sample_is_the_same_each_time() -> None:
    assert kept(6) == kept(6)
    assert len(kept(1)) == 400


def test_what_is_no_product_is_left_alone() -> None:
    plain = SimpleNamespace(nodeid="tests/test_x.py::test_y", get_closest_marker=lambda _: None)
    assert left_out([plain]) == set()
