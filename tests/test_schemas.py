"""The JSON Schemas of the package: they are the types, and what is printed is valid against them.

`python tests/test_schemas.py` writes them anew.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

import pytest

from ckptool.cli import help as manual
from ckptool.documents import editing, looking, models

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS = Path(__file__).parent / "verbs" / "documents"
NAMES = {str: "string", int: "integer", float: "number", bool: "boolean", NoneType: "null"}
WARNINGS = {
    "description": "what is a warning without --json; left out if there is none",
    "type": "array",
    "items": {"type": "string"},
}


def documents() -> dict[str, type]:
    """Return the types of documents by their names."""
    found: dict[str, type] = {"error/1": looking.Error}
    for module in (looking, editing, models):
        for kind in vars(module).values():
            if is_typeddict(kind) and "schema" in kind.__annotations__:
                found[get_args(get_type_hints(kind)["schema"])[0]] = kind
    return found


def schema(name: str, kind: type) -> dict[str, Any]:
    """Write the JSON Schema of a document."""
    shared: dict[str, dict[str, Any]] = {}
    whole = described(kind, shared)
    whole["properties"]["warnings"] = WARNINGS
    others = {"$defs": dict(sorted(shared.items()))} if shared else {}
    return {"$schema": DIALECT, "title": name, **whole, **others}


def described(kind: type, shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe an object, its field `schema` first."""
    hints = get_type_hints(kind, include_extras=True)
    names = sorted(hints, key=lambda name: name != "schema")
    return {
        "description": inspect.cleandoc(kind.__doc__ or ""),
        "type": "object",
        "properties": {name: typed(hints[name], shared) for name in names},
        "required": [name for name in names if get_origin(hints[name]) is not NotRequired],
    }


def typed(hint: Any, shared: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Describe a type; those of objects are gathered in `shared`."""
    origin, given = get_origin(hint), get_args(hint)
    if origin is NotRequired:
        return typed(given[0], shared)
    if origin is Annotated:
        return {"description": given[1], **typed(given[0], shared)}
    if origin is Literal:
        return {"const": given[0]} if len(given) == 1 else {"enum": list(given)}
    if origin is list:
        return {"type": "array", "items": typed(given[0], shared)}
    if origin is dict:
        return {"type": "object", "additionalProperties": typed(given[1], shared)}
    if origin is UnionType:
        return union([typed(each, shared) for each in given])
    if is_typeddict(hint):
        if hint.__name__ not in shared:
            shared[hint.__name__] = {}
            shared[hint.__name__] = described(hint, shared)
        return {"$ref": f"#/$defs/{hint.__name__}"}
    return {} if hint is Any else {"type": NAMES[hint]}


def union(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Describe what is of one of several types."""
    if all(list(part) == ["type"] for part in parts):
        return {"type": [part["type"] for part in parts]}
    return {"anyOf": parts}


def closed(node: Any) -> Any:
    """Return a schema that allows no field which it does not have."""
    if isinstance(node, list):
        return [closed(each) for each in node]
    if not isinstance(node, dict):
        return node
    fields = {name: closed(each) for name, each in node.items()}
    return {**fields, "additionalProperties": False} if "properties" in node else fields


@cache
def validator(name: str) -> Any:
    """Return what checks a document of a name, and that it has no other fields."""
    jsonschema = pytest.importorskip("jsonschema")
    return jsonschema.Draft202012Validator(closed(json.loads(manual.page(file_name(name)))))


def validate(document: dict[str, Any], name: str = "") -> None:
    """Check a document against its schema, and of several files each against its own."""
    validator(name or document["schema"]).validate(document)
    for each in document["files"] if document.get("schema") == "many/1" else ():
        if "schema" in each:
            validate(each)
        else:
            validate({field: each[field] for field in each if field != "file"}, "error/1")


def file_name(name: str) -> str:
    return f"json/{name.replace('/', '-')}"


def text(name: str) -> str:
    return json.dumps(schema(name, documents()[name]), indent=2) + "\n"


@pytest.mark.parametrize("name", documents())
def test_the_schemas_are_the_types(name: str) -> None:
    written = manual.page(file_name(name))
    assert written == text(name), "python tests/test_schemas.py writes them anew"
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(json.loads(written))
    assert json.loads(written)["description"].isascii()


def test_there_are_no_others() -> None:
    assert sorted(manual.schemas()) == sorted(file_name(name) for name in documents())


def objects(node: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects that a schema describes."""
    if isinstance(node, dict):
        if "properties" in node:
            yield node
        for each in node.values():
            yield from objects(each)


@pytest.mark.parametrize("path", sorted(DOCUMENTS.glob("*.json")), ids=lambda path: path.stem)
def test_the_recorded_documents_are_valid(path: Path) -> None:
    document = json.loads(path.read_text(encoding="utf-8"))
    for run in document.get("runs", ()):  # what another machine measures is masked
        run["seconds_reference"] = run["seconds_candidate"] = []
        for numbers in (run, *run["differences"]):
            numbers.update(dict.fromkeys(numbers.keys() & MASKED, 1))
    validate(document)


MASKED = {"max_abs_diff", "max_abs", "max_ulp", "ulp"}


@pytest.mark.parametrize("name", ["keys/1", "check/1", "error/1"])
def test_a_document_that_is_not_is_refused(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for wrong in ({}, {"schema": "other/1"}, {"schema": name, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate(wrong)


def test_help_lists_and_shows_them(run: Callable[..., Any]) -> None:
    listed = run("help", "json")
    assert listed.code == 0
    for name in documents():
        assert f"  {file_name(name)} " in listed.out
        shown = run("help", file_name(name))
        assert (shown.code, json.loads(shown.out)["title"]) == (0, name)
    wrong = run("help", "json/keys")
    assert (wrong.code, wrong.err.splitlines()[-1]) == (2, "hint: ckptool help json/keys-1")


def main() -> None:
    """Write the schemas into the package."""
    folder = Path(manual.FOLDER, "json")
    folder.mkdir(exist_ok=True)
    for name in documents():
        Path(manual.FOLDER, f"{file_name(name)}.json").write_text(text(name), encoding="utf-8")


if __name__ == "__main__":
    main()
