"""What a recipe says of a step, checked: the fields are the parameters of what makes the edit."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from ckptool.errors import BadRecipe
from ckptool.state.steps import Given, Step
from ckptool.text import did_you_mean, listed

MAX_SHOWN = 80  # characters of a value in an error


def refuse_unknown(table: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    """Raise `BadRecipe` for a name that a table does not take."""
    for name in table:
        if name not in known:
            hint = did_you_mean(name, known) or f"known are {listed(known, 30)}"
            raise BadRecipe(f"`{name}` is unknown", hint=hint).within(where)


def fields_of(step: Step, value: Any) -> Given:
    """Check the fields of a step, by the parameters of what makes it."""
    if not isinstance(value, dict):
        raise BadRecipe(f"{written(value)}: it takes a table", hint=f"{step.name} = {{...}}")
    signature = inspect.signature(step.make)
    known = {
        name.rstrip("_"): each
        for name, each in signature.parameters.items()
        if name not in ("optional", "back")
    }
    if not step.alone:
        refuse_unknown(value, tuple(known), "")
    given = {}
    for name, parameter in known.items():
        if name in value:
            said = step.name if step.alone else name
            given[parameter.name] = _field(said, value[name], parameter.annotation)
        elif parameter.default is parameter.empty:
            raise BadRecipe(f"`{name}` is missing")
    return given


def _field(name: str, value: Any, kind: str) -> Any:
    """Return a field as its parameter takes it; raises `BadRecipe` for another type."""
    test, what = _KINDS[kind]
    if kind == "Pairs" and isinstance(value, list):
        for number, each in enumerate(value, 1):
            if not _is_pair(each):
                raise BadRecipe(
                    f"{written(each)} is not a pair of OLD and NEW", hint="['fc', 'head']"
                ).within(f"rule {number}")
    if not test(value):
        raise BadRecipe(f"{name} = {written(value)}: it must be {what}")
    _refuse_files(value)
    return value


def written(value: Any) -> str:
    """Write a value as TOML does, and the beginning of a long one."""
    known = isinstance(value, str | int | list | dict) and not isinstance(value, bool)
    text = repr(value) if known else str(value)
    text = text.lower() if isinstance(value, bool) else text
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_text(value: Any) -> bool:
    """Check that a value is a text."""
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    """Check that a value is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def _list_of(test: Callable[[Any], bool], value: Any, least: int = 1) -> bool:
    return isinstance(value, list) and len(value) >= least and all(map(test, value))


def _is_pair(value: Any) -> bool:
    return _list_of(is_text, value) and len(value) == 2


_ONE_OR_MORE = (lambda value: is_text(value) or _list_of(is_text, value), "one or more texts")
_NUMBERS = (partial(_list_of, is_number, least=0), "a list of whole numbers")
# By the annotation of a parameter, as it is written: to evaluate it would run it as code.
_KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "str": (is_text, "a text"),
    "int": (is_number, "a whole number"),
    "Sequence[str]": (partial(_list_of, is_text), "a list of one or more texts"),
    "Sequence[int]": _NUMBERS,
    "Sequence[int] | None": _NUMBERS,
    "Patterns": _ONE_OR_MORE,
    "str | Iterable[str]": _ONE_OR_MORE,
    "Pairs": (partial(_list_of, _is_pair), "pairs of OLD and NEW: [['fc', 'head'], ...]"),
}


def _refuse_files(value: Any) -> None:
    """Raise `BadRecipe` for `@FILE`, which options take: a recipe opens no other file."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and text.startswith("@"):
            raise BadRecipe(f"`{text}`: a recipe names no files of patterns")
