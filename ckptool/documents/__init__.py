"""The documents of `--json` as types: mypy holds to them what makes a document.

Their JSON Schemas, which `ckptool help json/keys-1` prints, are read off them; nothing else loads
them. A text behind a type describes a field; `None` is null.
"""
