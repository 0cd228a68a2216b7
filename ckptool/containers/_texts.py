"""Name what a text is that stands where a checkpoint was expected: a page, an index, a script."""

from __future__ import annotations

import json
import os
import re
from typing import Any

from ckptool.files.fileio import Reader
from ckptool.text import listed, quoted, readable

MAX_JSON = 16 << 20
SHORT = 200  # bytes of a text that is shown whole
# Weights that stand beside a configuration.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
# Names in a JSON object -> what it is.
_OBJECTS: tuple[tuple[str, str], ...] = (
    ("weight_map", "the index of a sharded checkpoint"),
    ("architectures", "the configuration of a transformers model"),
    ("model_type", "the configuration of a transformers model"),
    ("_diffusers_version", "the configuration of a diffusers model"),
    ("peft_type", "the configuration of a PEFT adapter"),
    ("log_history", "the state of transformers' Trainer"),
    ("sharded_backend", "the marker of a distributed checkpoint of Megatron"),
    ("added_tokens", "a tokenizer"),
    ("tokenizer_class", "the configuration of a tokenizer"),
    ("nbformat", "a Jupyter notebook"),
)


def describe(reader: Reader, head: bytes) -> tuple[str, str]:
    """Say what a text is, and what helps; what is no text is named so."""
    size = readable(reader.nbytes)
    unknown = (f"not a checkpoint: {size} of unknown bytes", "")
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or error.reason != "unexpected end of data":
            return unknown
        text = head[: error.start].decode("utf-8")
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<head")) or "<html" in start[:512]:
        title = _between(text, "title")
        titled = f"; its title: {title}" if title else ""
        what = f"an HTML page ({size}); a server sends this when a link is wrong or needs a login"
        return what + titled, "get it again, with the link to the file itself"
    if start.startswith("<"):
        code = _between(text, "code")
        said = f" that says `{code}`: a server's answer" if code else ""
        return f"an XML or HTML page ({size}){said}", ""
    if start.startswith(("{", "[")):
        return _json(reader, size)
    if any(ord(character) < 32 and character not in "\t\r\n\f" for character in text):
        return unknown
    return _plain(reader, text, size)


def _between(text: str, tag: str) -> str:
    """Give what stands between the first tags of a name."""
    found = re.search(rf"<{tag}[^<>]{{0,200}}>([^<]{{1,300}})", text, re.IGNORECASE)
    return " ".join(found[1].split())[:80] if found else ""


def _json(reader: Reader, size: str) -> tuple[str, str]:
    what = f"a JSON text ({size})"
    try:
        text = reader.read(0, min(reader.nbytes, MAX_JSON)).decode("utf-8")  # no other is guessed
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return what, ""
    if not isinstance(found, dict) or not found:
        return what, ""
    hint = _beside(reader.path)
    for name, said in _OBJECTS:
        if name in found:
            return f"{what}, {said}", hint
    return f"{what} with {listed(found, 6)}", hint


def _beside(path: str) -> str:
    """Name the weights that stand in the same folder."""
    folder = os.path.dirname(path)
    for name in _WEIGHTS:
        there = os.path.join(folder, name)
        if os.path.isfile(there) and there != path:
            return f"ckptool info {quoted(there)}   are the weights beside it"
    return ""


def _plain(reader: Reader, text: str, size: str) -> tuple[str, str]:
    whole = text.strip()
    if whole.startswith("model_checkpoint_path:"):
        return f"the note of a TensorFlow checkpoint ({size})", ""
    if whole.startswith("#!") or re.search(r"^(import|from) \w+|^def \w+\(", text, re.MULTILINE):
        return f"a text ({size}), a script", ""
    if len(text) < 4096 and "\n" not in whole and "/" in whole and " " not in whole:
        what = f"a line of text ({size}) that looks like the path of a symbolic link"
        return f"{what}: {whole[:SHORT]}", "get the file that it names"
    if reader.nbytes <= SHORT:
        return f"a text ({size}): {whole!r}", ""
    return f"a text ({size})", ""
