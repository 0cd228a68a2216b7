"""What the source text in a TorchScript archive declares of its classes; read by lines, never run.

torch prints each class as `class Name(Module):` with its lists `__parameters__` and `__buffers__`,
then a line for each attribute and its type, then its methods
(torch/csrc/jit/serialization/python_print.cpp; read back in import_source.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from ckptool.records import dataclass

_CLASS = re.compile(r"^class (\w+)(?:\(([\w.]*)\))?:", re.MULTILINE)
_CODE = re.compile(r"^(?:  )?(?:def|@)", re.MULTILINE)
_LIST = re.compile(r"^  __(parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)
_ATTRIBUTE = re.compile(
    r'^  (?:(\w+) : |__annotations__\["((?:[^"\\\n]|\\.)*)"\] = )(.+)$', re.MULTILINE
)
# Possessive, so that a text without its closing quote is passed over once and not again and again.
_TEXT = re.compile(r'"((?:[^"\\\n]|\\.)*+)("?)')
_ESCAPE = re.compile(r"\\([0-7]{1,3}|.)")
_LETTERS = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}


@dataclass(frozen=True, slots=True)
class ScriptClass:
    """One class: `types` are its attributes; `own_state` says that its code restores it."""

    is_module: bool
    parameters: frozenset[str]
    buffers: frozenset[str]
    types: Mapping[str, str]
    own_state: bool


def parse(text: str) -> dict[str, ScriptClass]:
    """Return the classes of one source file by name; the first of a name counts."""
    heads = list(_CLASS.finditer(text))
    ends = [*(head.start() for head in heads[1:]), len(text)]
    classes: dict[str, ScriptClass] = {}
    for head, end in zip(heads, ends, strict=False):
        classes.setdefault(head[1], _class(head[2] or "", text[head.end() : end]))
    return classes


def _class(base: str, body: str) -> ScriptClass:
    code = _CODE.search(body)
    declared = body[: code.start()] if code else body
    lists = {kind: frozenset(_texts(row)) for kind, row in _LIST.findall(declared)}
    types = {
        plain or _unescaped(subscript): kind
        for plain, subscript, kind in _ATTRIBUTE.findall(declared)
    }
    return ScriptClass(
        base.endswith("Module"),
        lists.get("parameters", frozenset()),
        lists.get("buffers", frozenset()),
        types,
        own_state="\n  def __setstate__(" in body,
    )


def _texts(row: str) -> list[str]:
    return [_unescaped(text) for text, closed in _TEXT.findall(row) if closed]


def _unescaped(text: str) -> str:
    """Read the escapes that torch prints in a string (printQuotedString in string_literal.h)."""
    return _ESCAPE.sub(lambda escape: _character(escape[1]), text)


def _character(escape: str) -> str:
    if escape[0] in "01234567":
        return chr(int(escape, 8) & 0xFF)
    return _LETTERS.get(escape, escape)
