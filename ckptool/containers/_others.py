"""Name what a file is when it is no checkpoint that can be read, and what helps.

Descriptions and hints are parts of a sentence: `model.pt is ...`.
"""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Collection
from typing import Any

from ckptool.containers import _json as json_text, _pickles
from ckptool.errors import LimitExceeded
from ckptool.files import budget, paths, tables, tars, zips
from ckptool.files.fileio import Reader
from ckptool.text import argument, listed, quoted, readable

Description = tuple[str, str]  # what a file is, and what helps

MAX_JSON = 16 << 20
SHORT = 200  # bytes of a text that is shown whole
_AGAIN = "download or copy it again"
_UNPACK = "unpack it, then look inside"
_TENSORFLOW = "tf.train.load_checkpoint reads it"
# What torch.save writes last, or before all else (caffe2/serialize/inline_container.cc): without
# a pickle, it failed.
_LEFT_BY_A_FAILURE = frozenset(
    "byteorder version serialization_id .format_version .storage_alignment".split()
)
# What transformers, diffusers and peft call weights.
STEMS = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_WEIGHTS = [
    f"{stem}{suffix}{index}"
    for stem in STEMS
    for suffix in (".safetensors", ".bin")
    for index in ("", ".index.json")
]


def table(section: str) -> list[list[str]]:
    """Return the rows of a section of the table of formats."""
    return tables.read(__file__, "formats.txt")[section]


def describe(reader: Reader, head: bytes) -> Description:
    """Return what a file is, and what helps."""
    size = readable(reader.nbytes)
    if not head:
        return "empty (0 bytes)", _AGAIN
    if not head.strip(b"\0"):
        return f"{size} of zeros", f"its data never arrived; {_AGAIN}"
    for recognise in (_pointer, _gguf, _onnx, _tensorflow, _ctranslate, _protobuf, _mnn):
        description = recognise(reader, head)
        if description is not None:
            return description
    if head.startswith(b"PK\3\4"):
        return _zip(zips.read_directory(reader).members)
    for signature, name, *hint in table("first bytes"):
        if re.match(signature.encode(), head, re.DOTALL):
            return f"{name} ({size})", "".join(hint)
    if tars.is_tar(head):
        return f"a tar archive ({size})", _UNPACK
    return _pickles.describe(reader, head) or _text(reader, head)


def _pointer(reader: Reader, head: bytes) -> Description | None:
    """Recognise a git-LFS pointer, and return the command that fetches what it points to."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return None
    size = re.search(rb"^size (\d{1,18})\r?$", head, re.MULTILINE)
    real = f" of {readable(int(size[1]))}" if size else ""
    what = (
        f"a git-LFS pointer, not the file itself ({readable(reader.nbytes)}); "
        f"the file{real} is on a server"
    )
    path = os.path.abspath(reader.file)
    root = None if paths.is_url(reader.file) else _repository(path)
    if root is None:
        return what, "git lfs pull   in a clone of the repository that it came from"
    inside = os.path.relpath(path, root)
    return what, f"git -C {quoted(root)} lfs pull --include {quoted(inside)}"


def _repository(path: str) -> str | None:
    """Return the git working tree around a file."""
    folder = os.path.dirname(path)
    while not os.path.exists(os.path.join(folder, ".git")):
        folder, before = os.path.dirname(folder), folder
        if folder == before:
            return None
    return folder


# Bytes of a number by its type; the type of a text (ggml/docs/gguf.md, `gguf_metadata_value_type`).
_GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_TEXT = 8


def _gguf(reader: Reader, head: bytes) -> Description | None:
    """Recognise a file of llama.cpp, and read the first entries of its metadata."""
    if not head.startswith(b"GGUF"):
        return None
    facts: list[str] = []
    try:
        version, tensors, entries = struct.unpack_from("<IQQ", head, 4)
        facts.append(f"version {version}, {tensors} tensors")
        position = 24
        for _ in range(min(entries, 64)):
            key, position = _gguf_text(head, position)
            (kind,) = struct.unpack_from("<I", head, position)
            position += 4
            if kind == _GGUF_TEXT:
                value, position = _gguf_text(head, position)
                if key in ("general.architecture", "general.name"):
                    facts.append(f"{key} {value[:60]}")
            else:
                position += _GGUF_NUMBERS[kind]
    except (struct.error, KeyError):
        pass  # an array, or the end of what was read: the rest is not needed
    about = f", {', '.join(facts)}" if facts else ""
    return f"a GGUF file of llama.cpp ({readable(reader.nbytes)}{about})", "llama.cpp reads it"


def _gguf_text(head: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, position)
    (data,) = struct.unpack_from(f"{length}s", head, position + 8)
    return data.decode("utf-8", "replace"), position + 8 + length


def _onnx(reader: Reader, head: bytes) -> Description | None:
    """Recognise ONNX: protobuf fields `ir_version`, `producer_name`, `producer_version`."""
    if len(head) < 4 or head[0] != 0x08 or head[1] > 20 or head[2] != 0x12:
        return None
    name = head[4 : 4 + head[3]]
    if not name or not name.isascii() or not name.decode().replace("-", "").isprintable():
        return None
    rest = head[4 + len(name) :]
    version = rest[2 : 2 + rest[1]] if rest[:1] == b"\x1a" and len(rest) > 1 else b""
    by = " ".join(part.decode("latin-1") for part in (name, version) if part)
    return f"an ONNX model by {by} ({readable(reader.nbytes)})", "onnx.load reads it"


def _tensorflow(reader: Reader, head: bytes) -> Description | None:
    """Recognise what TensorFlow writes by its name, or by the end of a LevelDB table."""
    size, name = readable(reader.nbytes), paths.name_of(reader.path)
    end = reader.read(reader.nbytes - 8, 8) if reader.nbytes > 48 else b""
    if end == b"\x57\xfb\x80\x8b\x24\x75\x47\xdb":
        return f"the index of a TensorFlow checkpoint ({size})", _TENSORFLOW
    if ".data-0" in name and "-of-0" in name:
        return f"the data of a TensorFlow checkpoint ({size})", _TENSORFLOW
    if name == "saved_model.pb":
        return f"a TensorFlow SavedModel ({size})", "tf.saved_model.load reads its folder"
    return None


def _ctranslate(reader: Reader, head: bytes) -> Description | None:
    """Recognise CTranslate2: a version, then the name of a spec (python/ctranslate2/specs)."""
    if len(head) < 16:
        return None
    version, length = struct.unpack_from("<IH", head)
    name = head[6 : 5 + length]
    if not 1 <= version <= 100 or length > 100 or not name.endswith(b"Spec"):
        return None
    spec = name.decode("latin-1")
    return f"a CTranslate2 model, {spec} ({readable(reader.nbytes)})", "ctranslate2 reads it"


# The first field of a message and what is in it: a node of a graph with its name and operation, or
# a network's name and its layers (tensorflow/core/framework/graph.proto, caffe.proto).
_NODE = re.compile(rb"\x0a[^\0]{1,2}\x0a.{1,200}?\x12.[A-Z][A-Za-z0-9_]{2,}", re.DOTALL)
_CAFFE = re.compile(rb"\x0a.{1,80}?(?:\xa2\x06|\x12).{1,3}\x0a.[\w./-]+\x12.[A-Z]\w+", re.DOTALL)


def _protobuf(reader: Reader, head: bytes) -> Description | None:
    """Recognise a frozen graph of TensorFlow or a network of Caffe."""
    size = readable(reader.nbytes)
    if _NODE.match(head[:512]):
        return f"a frozen TensorFlow graph ({size})", "tf.compat.v1.import_graph_def takes it"
    if reader.path.endswith(".caffemodel") or _CAFFE.match(head[:512]):
        return f"a network of Caffe ({size})", "cv2.dnn.readNetFromCaffe reads it"
    return None


def _mnn(reader: Reader, head: bytes) -> Description | None:
    """Recognise MNN: a flatbuffer without a mark, by its name."""
    if not reader.path.endswith(".mnn"):
        return None
    return f"a model of MNN ({readable(reader.nbytes)})", "MNN reads it"


def _zip(names: Collection[str]) -> Description:
    if names and all(name.rpartition("/")[2] in _LEFT_BY_A_FAILURE for name in names):
        return "an unfinished torch.save: there is no data.pkl in it", "save it again"
    for ending, what, *hint in table("names in a zip"):
        if any(name.endswith(ending) for name in names):
            return what, "".join(hint)
    if names and all(name.endswith(".npy") for name in names):
        arrays = listed((name.removesuffix(".npy") for name in names), 6)
        return f"a zip archive of numpy arrays (.npz): {arrays}", "numpy.load reads it"
    shown = listed(sorted(names), 6)
    return f"a zip archive that torch.save did not write: {shown}", _UNPACK if names else ""


# Texts.


def _text(reader: Reader, head: bytes) -> Description:
    """Return what a text is, and what helps; other bytes are unknown."""
    size = readable(reader.nbytes)
    unknown = (f"not a checkpoint: {size} of unknown bytes", "")
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or error.reason != "unexpected end of data":
            return unknown
        text = head[: error.start].decode("utf-8")
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith("<") or "<html" in start[:512]:
        return _page(text, start, size)
    if start.startswith(("{", "[")):
        return _json(reader, size)
    if re.search(r"[^\t\r\n\f -\U0010ffff]", text):
        return unknown
    return _plain(reader, text, size)


def _page(text: str, start: str, size: str) -> Description:
    if start.startswith(("<!doctype html", "<html", "<head")) or "<html" in start[:512]:
        title = _between(text, "title")
        titled = f"; its title: {title}" if title else ""
        what = f"an HTML page ({size}); a server sends this when a link is wrong or needs a login"
        return what + titled, "get it again, with the link to the file itself"
    code = _between(text, "code")
    answer = f" that says `{code}`: a server's answer" if code else ""
    return f"an XML or HTML page ({size}){answer}", ""


def _between(text: str, tag: str) -> str:
    """Return the text between the first tags of a name."""
    match = re.search(rf"<{tag}[^<>]{{0,200}}>([^<]{{1,300}})", text, re.IGNORECASE)
    return " ".join(match[1].split())[:80] if match else ""


def _json(reader: Reader, size: str) -> Description:
    what = f"a JSON text ({size})"
    try:
        data = reader.read(0, min(reader.nbytes, MAX_JSON))
        budget.current().read(len(data))
        json_text.count(data, "a JSON text")
        value: Any = json.loads(data.decode("utf-8"))  # no other is guessed
    except (ValueError, RecursionError, LimitExceeded):
        return what, ""
    if not isinstance(value, dict) or not value:
        return what, ""
    kind = next((f", {known}" for key, known in table("keys of JSON") if key in value), None)
    return what + (kind or f" with {listed(value, 6)}"), _weights_beside(reader.path)


def _weights_beside(path: str) -> str:
    """Return the command for the weights in the same folder."""
    for name in _WEIGHTS if paths.can_list(path) else ():
        file = paths.join(paths.folder_of(path), name)
        if paths.is_file(file) and file != path:
            return f"ckptool info {argument(file)}   are the weights next to it"
    return ""


def _plain(reader: Reader, text: str, size: str) -> Description:
    whole = text.strip()
    if whole.startswith("model_checkpoint_path:"):
        return f"the note of a TensorFlow checkpoint ({size})", ""
    if whole.startswith("#!") or re.search(r"^(import|from) \w+|^def \w+\(", text, re.MULTILINE):
        return f"a text file ({size}), probably a script", ""
    if len(text) < 4096 and "\n" not in whole and "/" in whole and " " not in whole:
        what = f"a line of text ({size}) that looks like the path of a symbolic link"
        return f"{what}: {whole[:SHORT]}", "get the file that it names"
    if reader.nbytes <= SHORT:
        return f"a text file ({size}): {whole!r}", ""
    return f"a text file ({size})", ""
