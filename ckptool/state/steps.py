"""The table of the steps of recipes: what makes the edit of each, and what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ckptool.records import dataclass
from ckptool.state import edits
from ckptool.state.edits import Edit
from ckptool.state.rearranging import (
    cut,
    in_order,
    interleave,
    permute,
    reshape,
    rope,
    squeeze,
    transpose,
    unsqueeze,
)
from ckptool.state.regrouping import copy, fuse, split, stack, tie, unstack
from ckptool.state.renaming import Renaming, Rule

Given = dict[str, Any]  # the fields of a step, as Python names them


@dataclass(frozen=True, slots=True)
class Step:
    """A step of recipes: what makes its edit, and how it is turned round.

    `back` returns the name and the fields of the step that undoes it, or why there is none. The
    fields are the parameters of `make`; with `alone` its value is that field, without a table.
    """

    name: str
    make: Callable[..., Edit]
    back: Callable[[Given], tuple[str, Given] | str]
    alone: str = ""


def _never(reason: str) -> Callable[[Given], str]:
    return lambda given: reason


def _to(name: str) -> Callable[[Given], tuple[str, Given]]:
    """Return what undoes a step by one that takes its names the other way round."""
    return lambda given: (name, {**given, "from_": given["to"], "to": given["from_"]})


def _same(name: str) -> Callable[[Given], tuple[str, Given]]:
    return lambda given: (name, given)


def _rename_back(given: Given) -> tuple[str, Given] | str:
    rules = [Rule(*pair) for pair in given["rules"]]
    for number, rule in enumerate(rules, 1):
        if rule.no_way_back:
            return f"rule {number}, `{rule}`: {rule.no_way_back}"
    turned = [(rule.new, rule.old) for rule in rules]
    return "rename", {**given, "rules": turned, "back": Renaming(rules)}


def _strip_back(given: Given) -> tuple[str, Given] | str:
    if given["prefix"] == edits.AUTO:
        return "`auto` does not say which prefix was there"
    return "add", {"prefix": given["prefix"]}


def _permute_back(given: Given) -> tuple[str, Given]:
    dims = in_order(given["dims"])
    return "permute", {**given, "dims": [dims.index(at) for at in range(len(dims))]}


def _reshape_back(given: Given) -> tuple[str, Given] | str:
    if given.get("was") is None:
        return "without `was` the shape before is not known"
    return "reshape", {**given, "shape": given["was"], "was": given["shape"]}


def _rope_back(given: Given) -> tuple[str, Given]:
    other = {"half": "interleaved", "interleaved": "half"}
    return "rope", {**given, "to": other.get(given["to"], given["to"])}


def _interleave_back(given: Given) -> tuple[str, Given]:
    return "interleave", {**given, "heads": given["parts"], "parts": given["heads"]}


def _undone(name: str) -> Callable[[Given], tuple[str, Given]]:
    """Return what undoes a step by the step itself."""
    return lambda given: (name, {**given, "back": True})


def _strip(prefix: str, optional: bool = False) -> Edit:
    if prefix == edits.AUTO:
        return edits.strip_wrappers(required=not optional)
    return edits.strip_prefix(prefix, required=not optional)


def _add(prefix: str, optional: bool = False) -> Edit:
    return edits.add_prefix(prefix)


STEPS = {
    step.name: step
    for step in (
        Step("rename", edits.renames, _rename_back, alone="rules"),
        Step("drop", edits.drop, _never("what it drops cannot be restored"), alone="patterns"),
        Step("keep", edits.keep, _never("what it drops cannot be restored"), alone="patterns"),
        Step("strip", _strip, _strip_back, alone="prefix"),
        Step("add", _add, lambda given: ("strip", given), alone="prefix"),
        Step("split", split, _to("fuse")),
        Step("fuse", fuse, _to("split")),
        Step("stack", stack, _to("unstack")),
        Step("unstack", unstack, _to("stack")),
        Step("transpose", transpose, _same("transpose")),
        Step("permute", permute, _permute_back),
        Step("reshape", reshape, _reshape_back),
        Step("squeeze", squeeze, _same("unsqueeze")),
        Step("unsqueeze", unsqueeze, _same("squeeze")),
        Step("slice", cut, _never("the rows that it leaves out cannot be restored")),
        Step("rope", rope, _rope_back),
        Step("interleave", interleave, _interleave_back),
        Step("cast", edits.cast, _never("rounding cannot be undone")),
        Step("copy", copy, _undone("copy")),
        Step("tie", tie, _undone("tie")),
    )
}
