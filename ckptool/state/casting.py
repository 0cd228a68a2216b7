"""The cast of a state_dict to another dtype: which tensors, and what stays as it is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import field

from ckptool.errors import EditError
from ckptool.pickles.subclasses import class_of
from ckptool.pickles.torch_objects import attributes, is_parameter
from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.state import walk
from ckptool.state.quantized import quantized
from ckptool.tensors import dtype as dtypes, numbers, values
from ckptool.tensors.casting import Rounding
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import TENSORS, CompositeTensor, TensorInfo, ties

OVERFLOW = ("refuse", "inf", "clamp")


@dataclass(slots=True)
class Casting:
    """What a cast made of a state_dict: `tensors` are pairs of before and after, by key.

    `kept` counts the others by dtype, but for `quantized` ones and their `scales`. `where` is the
    step of a recipe, `remade` are keys of tensors that later steps made others of.
    """

    target: DType
    overflow: str
    where: str = ""
    tensors: dict[str, tuple[TensorInfo, TensorInfo]] = field(default_factory=dict)
    kept: Counter[str] = field(default_factory=Counter)
    quantized: int = 0
    scales: int = 0
    stripped: list[str] = field(default_factory=list)  # of attributes that Python keeps on them
    remade: set[str] = field(default_factory=set)


def target(word: str, overflow: str = OVERFLOW[0]) -> DType:
    """Return the dtype that a word means; raises `EditError` for what no cast makes."""
    found = dtypes.named(word)
    if found not in numbers.CASTS:
        raise EditError(
            f"`{word}` is not a dtype of floats", hint=dtypes.suggestion(word, numbers.CASTS)
        )
    if overflow not in OVERFLOW:
        raise EditError(f"overflow is not one of {', '.join(OVERFLOW)}: `{overflow}`")
    if overflow == "inf" and found is DType.F8_E4M3:
        hint = f"clamp makes what is beyond {numbers.largest(found):g} that"
        raise EditError("overflow `inf`: F8_E4M3 has no infinity", hint=hint)
    return found


def cast(entries: Mapping[str, Node], to: DType, chosen: Collection[str], overflow: str) -> Casting:
    """Round the floats among the `chosen` entries, tied tensors and shared storages once.

    Quantized tensors with their scales stay as they are, and what is of a class of its own.
    Raises `EditError` for a tied tensor of which one name alone is chosen.
    """
    firsts = ties(entries)
    _refuse_half_ties(entries, chosen, firsts)
    done = Casting(to, overflow)
    weights, scales = ({firsts.get(key, key) for key in keys} for keys in quantized(entries))
    made: values.Made = {}
    known: dict[int, TensorInfo] = {}  # one tensor under two keys stays one
    for key, value in entries.items():
        first = firsts.get(key, key)
        if first in weights or first in scales:
            done.quantized += first in weights
            done.scales += first in scales
        elif key in chosen and _is_float(value) and value.dtype is not to:
            if id(value) not in known:
                order = value.storage.byteorder  # a torch file has one for all
                kernel = Rounding(value.dtype, to, overflow == "clamp", order)
                rounded = values.elementwise(kernel, [value], to, made)
                rounded.storage.byteorder = order
                rounded.origin = value.origin if is_parameter(value) else None
                known[id(value)] = rounded
            if attributes(value) is not None and not is_parameter(value):
                done.stripped.append(key)
            done.tensors[key] = (value, known[id(value)])
        elif isinstance(value, TENSORS):
            layout = f"{value.layout} " if isinstance(value, CompositeTensor) else ""
            done.kept[class_of(value) or layout + value.dtype.label] += 1
        else:  # what a module keeps as its extra state, a list
            inside = (each.dtype.label for _, each in walk.tensors(value))
            done.kept.update(f"{label} inside other entries" for label in inside)
    return done


def _is_float(value: Node) -> bool:
    return isinstance(value, TensorInfo) and value.dtype in numbers.ROUNDED and not class_of(value)


def _refuse_half_ties(
    entries: Mapping[str, Node], chosen: Collection[str], firsts: Mapping[str, str]
) -> None:
    for key, first in firsts.items():
        if (key in chosen) != (first in chosen) and _is_float(entries[key]):
            inside, outside = (key, first) if key in chosen else (first, key)
            raise EditError(
                f"{inside} and {outside} are one tensor, and only the first would be cast",
                hint="name both, or neither",
            )
