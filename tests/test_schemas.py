"""The JSON Schemas of the documents: what is printed is valid against them, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from ckptool.documents.schemas import schemas

DOCUMENTS = Path(__file__).parent / "verbs" / "documents"
SCHEMAS = schemas()


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
    return jsonschema.Draft202012Validator(closed(SCHEMAS[name]))


def validate(document: dict[str, Any], name: str = "") -> None:
    """Check a document against its schema, and of several files each against its own."""
    validator(name or document["schema"]).validate(document)
    for each in document["files"] if document.get("schema") == "many/1" else ():
        if "schema" in each:
            validate(each)
        else:
            validate({field: each[field] for field in each if field != "file"}, "error/1")


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_schemas(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])
    assert SCHEMAS[name]["description"].isascii()


@pytest.mark.parametrize("name", ["keys/1", "check/1", "error/1"])
def test_a_document_that_is_not_is_refused(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    for wrong in ({}, {"schema": "other/1"}, {"schema": name, "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            validator(name).validate(wrong)


@pytest.mark.parametrize(
    ("recorded", "wrong"),
    [
        ("keys", {"schema": "info/1"}),
        ("keys", {"file": None}),
        ("keys", {"count": "4"}),
        ("keys", {"at": [0]}),
        ("keys", {"part": {"kind": "a rank"}}),
        ("keys_layouts", {"tensors": [{"key": "a", "dtype": "F32", "shape": [2]}]}),
        ("info", {"devices": {"cpu": "1"}}),
        ("match", {"fused": [{"whole": "a", "parts": ["b"], "step": "join"}]}),
    ],
)
def test_a_field_of_another_type_is_refused(recorded: str, wrong: dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    document = json.loads((DOCUMENTS / f"{recorded}.json").read_text(encoding="utf-8"))
    validate(document)
    with pytest.raises(jsonschema.ValidationError):
        validator(document["schema"]).validate({**document, **wrong})


def test_help_lists_and_shows_them(run: Callable[..., Any]) -> None:
    listed = run("help", "json")
    assert listed.code == 0
    for name in SCHEMAS:
        page = f"json/{name.replace('/', '-')}"
        assert f"  {page} " in listed.out
        shown = run("help", page)
        assert (shown.code, json.loads(shown.out)) == (0, SCHEMAS[name])
    wrong = run("help", "json/keys")
    assert (wrong.code, wrong.err.splitlines()[-1]) == (2, "hint: ckptool help json/keys-1")
