"""The JSON Schemas of the documents (draft 2020-12), read off their types."""

import inspect
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NotRequired, get_args, get_origin, is_typeddict

from ckptool.documents import editing, looking, models

Schema = dict[str, Any]
DIALECT = "https://json-schema.org/draft/2020-12/schema"
_NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
_WARNINGS = {
    "description": "what is a warning without --json; left out if there is none",
    "type": "array",
    "items": {"type": "string"},
}


def schemas() -> dict[str, Schema]:
    """Return the JSON Schemas of all documents by their names: `keys/1`."""
    kinds = [kind for module in (looking, editing, models) for kind in vars(module).values()]
    named = [kind for kind in kinds if is_typeddict(kind) and "schema" in kind.__annotations__]
    found = {get_args(kind.__annotations__["schema"])[0]: kind for kind in named}
    found["error/1"] = looking.Error
    return {name: _whole(name, found[name]) for name in sorted(found)}


def _whole(name: str, kind: type) -> Schema:
    shared: dict[str, Schema] = {}
    whole = _described(kind, shared)
    whole["properties"]["warnings"] = _WARNINGS
    others = {"$defs": dict(sorted(shared.items()))} if shared else {}
    return {"$schema": DIALECT, "title": name, **whole, **others}


def _described(kind: type, shared: dict[str, Schema]) -> Schema:
    """Describe an object, its field `schema` first."""
    hints: dict[str, Any] = kind.__annotations__
    names = sorted(hints, key=lambda name: name != "schema")
    return {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "type": "object",
        "properties": {name: _typed(hints[name], shared) for name in names},
        "required": [name for name in names if get_origin(hints[name]) is not NotRequired],
    }


def _typed(hint: Any, shared: dict[str, Schema]) -> Schema:
    """Describe a type; those of objects are gathered in `shared`."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return _typed(given[0], shared)
    if origin is Annotated:
        return {"description": given[1], **_typed(given[0], shared)}
    if origin is Literal:
        return {"const": given[0]} if len(given) == 1 else {"enum": list(given)}
    if origin is list:
        return {"type": "array", "items": _typed(given[0], shared)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _typed(given[1], shared)}
    if origin is UnionType:
        return _union([_typed(each, shared) for each in given])
    if is_typeddict(hint):
        if hint.__name__ not in shared:
            shared[hint.__name__] = _described(hint, shared)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {} if hint is Any else {"type": _NAMES[hint]}


def _union(parts: list[Schema]) -> Schema:
    """Describe what is of one of several types."""
    if all(list(part) == ["type"] for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts}
