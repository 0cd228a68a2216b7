"""Name what a file is when it is no checkpoint that can be read."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection

from ckptool.containers import _pickles, _texts
from ckptool.files import tars, zips
from ckptool.files.fileio import Reader
from ckptool.text import listed, quoted, readable

AGAIN = "get it again from where it came"
_UNPACK = "unpack it, then look inside"
_GARBLED = "a legacy torch file that was saved as text on its way: its bytes are damaged for good"
# First bytes -> what they say, and what helps.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "a gzip archive", "tar -xzf or gunzip it, then look inside"),
    (b"BZh", "a bzip2 archive", _UNPACK),
    (b"\xfd7zXZ\0", "an xz archive", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (b"Rar!", "a RAR archive", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", _UNPACK),
    (b"\x04\x22\x4d\x18", "an lz4 archive", _UNPACK),
    (b"PK\5\6", "an empty zip archive", ""),
    (b"?\2?\nl", _GARBLED, AGAIN),
    (b"\xef\xbf\xbd\2\xef\xbf\xbd\nl", _GARBLED, AGAIN),
    (b"\x89PNG\r\n", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GIF8", "a GIF picture", ""),
    (b"%PDF", "a PDF document", ""),
    (b"RIFF", "a RIFF file (sound, film or picture)", ""),
    (b"ggml", "a GGML file (llama.cpp)", ""),
    (b"ggjt", "a GGML file (llama.cpp)", ""),
    (b"\x93NUMPY", "a numpy array (.npy)", "numpy.load reads it"),
    (b"\x89HDF\r\n", "an HDF5 file (Keras, .h5)", "h5py reads it"),
    (b"SQLite format 3\0", "an SQLite database", ""),
    (b"PAR1", "a Parquet table", ""),
    (b"ARROW1", "an Arrow table", ""),
    (b"MATLAB 5.0", "a MATLAB file (.mat)", "scipy.io.loadmat reads it"),
    (b"\4\0\0\0\1\0\0\0\3\0\0\0V 1", "an object of Lua Torch (.t7)", "torchfile reads it"),
    (b"ftrt", "a TensorRT engine", ""),
    (b"\x7fELF", "a program", ""),
    (b"MZ", "a Windows program", ""),
)
_LEVELDB_END = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"


def describe(reader: Reader, head: bytes) -> tuple[str, str]:
    """Say what a file is, and what helps; both as parts of a sentence."""
    size = readable(reader.nbytes)
    if not head:
        return "empty (0 bytes)", AGAIN
    if not head.strip(b"\0"):
        return f"{size} of zeros", f"its data never arrived; {AGAIN}"
    for what in (_pointer, _gguf, _onnx, _by_end_or_name, _ctranslate):
        found = what(reader, head)
        if found is not None:
            return found
    if head.startswith(b"PK\3\4"):
        return describe_zip(zips.read_directory(reader).members)
    for signature, named, hint in _SIGNATURES:
        if head.startswith(signature):
            return f"{named} ({size})", hint
    if tars.is_tar(head):
        return f"a tar archive ({size})", _UNPACK
    if len(head) > 8 and head[4:8] == b"ftyp":
        return f"a film or picture ({size})", ""
    if len(head) > 8 and head[4:8] == b"TFL3":
        return f"a TensorFlow Lite model ({size})", ""
    return _pickles.describe(reader, head) or _texts.describe(reader, head)


def _pointer(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Recognise a git-LFS pointer, and give the command that fetches what it points to."""
    if not head.startswith(b"version https://git-lfs.github.com/"):
        return None
    said = dict(line.partition(" ")[::2] for line in head.decode("latin-1").splitlines())
    number = said.get("size", "")
    real = f" of {readable(int(number))}" if number.isdecimal() and len(number) < 19 else ""
    what = (
        f"a git-LFS pointer, not the file itself ({readable(reader.nbytes)}); "
        f"the file{real} is on a server"
    )
    path = os.path.abspath(reader.file)
    root = _repository(path)
    if root is None:
        return what, "git lfs pull   in a clone of the repository that it came from"
    inside = os.path.relpath(path, root)
    return what, f"git -C {quoted(root)} lfs pull --include {quoted(inside)}"


def _repository(path: str) -> str | None:
    """Find the git working tree around a file."""
    folder = os.path.dirname(path)
    while not os.path.exists(os.path.join(folder, ".git")):
        folder, before = os.path.dirname(folder), folder
        if folder == before:
            return None
    return folder


_GGUF_NUMBERS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_GGUF_STRING = 8


def _gguf(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Recognise a file of llama.cpp; its first entries say what it holds (ggml/docs/gguf.md)."""
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
            if kind == _GGUF_STRING:
                value, position = _gguf_text(head, position)
                if key in ("general.architecture", "general.name"):
                    facts.append(f"{key} {value[:60]}")
            else:
                position += _GGUF_NUMBERS[kind]
    except (struct.error, KeyError, ValueError):
        pass  # an array, or the end of what was read: the rest is not needed
    about = f", {', '.join(facts)}" if facts else ""
    return f"a GGUF file of llama.cpp ({readable(reader.nbytes)}{about})", "llama.cpp reads it"


def _gguf_text(head: bytes, position: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", head, position)
    end = position + 8 + length
    if end > len(head):
        raise ValueError("beyond what was read")
    return head[position + 8 : end].decode("utf-8", "replace"), end


def _onnx(reader: Reader, head: bytes) -> tuple[str, str] | None:
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


def _by_end_or_name(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Recognise what TensorFlow writes."""
    size, name = readable(reader.nbytes), os.path.basename(reader.path)
    if reader.nbytes > 48 and reader.read(reader.nbytes - 8, 8) == _LEVELDB_END:
        return f"the index of a TensorFlow checkpoint ({size})", "tf.train.load_checkpoint reads it"
    if ".data-0" in name and "-of-0" in name:
        return f"the data of a TensorFlow checkpoint ({size})", "tf.train.load_checkpoint reads it"
    if name == "saved_model.pb":
        return f"a TensorFlow SavedModel ({size})", "tf.saved_model.load reads its folder"
    return None


def _ctranslate(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Recognise CTranslate2: a version, then the name of a spec (python/ctranslate2/specs)."""
    if len(head) < 16:
        return None
    version, length = struct.unpack_from("<IH", head)
    name = head[6 : 5 + length]
    if not 1 <= version <= 100 or length > 100 or not name.endswith(b"Spec"):
        return None
    spec = name.decode("latin-1")
    return f"a CTranslate2 model, {spec} ({readable(reader.nbytes)})", "ctranslate2 reads it"


# Names in a zip archive -> what it is.
_ZIPS: tuple[tuple[str, str, str], ...] = (
    (".dist-info/WHEEL", "a Python package (wheel)", "pip install it"),
    ("META-INF/MANIFEST.MF", "a Java archive", ""),
    ("[Content_Types].xml", "an office document", ""),
    ("model.weights.h5", "a Keras model (.keras)", "keras.models.load_model reads it"),
    ("saved_model.pb", "a TensorFlow SavedModel", _UNPACK),
)


def describe_zip(names: Collection[str]) -> tuple[str, str]:
    """Say what a zip archive is that torch.save did not write, and what helps."""
    for ending, what, hint in _ZIPS:
        if any(name.endswith(ending) for name in names):
            return what, hint
    shown = listed(sorted(names), 6)
    if names and all(name.endswith(".npy") for name in names):
        arrays = listed((name.removesuffix(".npy") for name in names), 6)
        return f"a zip archive of numpy arrays (.npz): {arrays}", "numpy.load reads it"
    return f"a zip archive that torch.save did not write: {shown}", _UNPACK if names else ""
