"""The documents of `--json` as types: mypy holds to them what makes a document.

The JSON Schemas in `manual/json` are written from them by `python tests/test_schemas.py`; nothing
imports them at run time. A text behind a type describes a field; `None` is null.
"""
