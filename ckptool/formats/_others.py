"""Name what a file is when it is no checkpoint that can be read."""

from __future__ import annotations

from ckptool import pickle_reader
from ckptool.errors import CkptoolError, FormatError
from ckptool.fileio import Reader
from ckptool.pickle_reader import Ended
from ckptool.text import readable
from ckptool.tree import Global, Object

SHORTEST_PICKLE = 16
MAX_PICKLE = 64 << 20
_TORCH_HINT = "this version of ckptool does not read it"
# First bytes -> what they say, and what helps.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (
        b"version https://git-lfs.github.com/",
        "a git-LFS pointer, not the file itself",
        "git lfs pull   in the repository that it came from",
    ),
    (b"\x1f\x8b", "a gzip archive", "tar -xzf or gunzip it, then look inside"),
    (b"BZh", "a bzip2 archive", "unpack it, then look inside"),
    (b"\xfd7zXZ\0", "an xz archive", "unpack it, then look inside"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, then look inside"),
    (b"Rar!", "a RAR archive", "unpack it, then look inside"),
    (b"\x28\xb5\x2f\xfd", "a zstd archive", "unpack it, then look inside"),
    (b"PK\5\6", "an empty zip archive", ""),
    (b"\x89PNG\r\n", "a PNG picture", ""),
    (b"\xff\xd8\xff", "a JPEG picture", ""),
    (b"GIF8", "a GIF picture", ""),
    (b"%PDF", "a PDF document", ""),
    (b"GGUF", "a GGUF file (llama.cpp)", ""),
    (b"ggml", "a GGML file (llama.cpp)", ""),
    (b"\x93NUMPY", "a numpy array (.npy)", ""),
    (b"\x89HDF\r\n", "an HDF5 file (Keras, .h5)", ""),
    (b"\x7fELF", "a program", ""),
    (b"MZ", "a Windows program", ""),
)


def describe(reader: Reader, head: bytes) -> tuple[str, str]:
    """Say what a file is, and what helps; both as parts of a sentence."""
    size = readable(reader.nbytes)
    if not head:
        return "empty (0 bytes)", "get it again from where it came"
    if not head.strip(b"\0"):
        return f"{size} of zeros", "its data never arrived; get it again from where it came"
    for signature, what, hint in _SIGNATURES:
        if head.startswith(signature):
            return f"{what} ({size})", hint
    if head[257:262] == b"ustar":
        return f"a tar archive ({size}), perhaps of torch 0.1", _TORCH_HINT
    if len(head) > 8 and head[4:8] == b"ftyp":
        return f"a film or picture ({size})", ""
    if head[:1] == b"\x08" and b"pytorch" in head[:256]:
        return f"an ONNX model ({size})", ""
    if _is_pickle(head):
        return f"a plain pickle ({size}) that torch.save did not write", _TORCH_HINT
    return _text(head, size)


def pickled(reader: Reader, head: bytes) -> tuple[dict[Global, int], list[Object]]:
    """Give what a file names and calls that starts as a pickle, up to where it stops being one."""
    data = reader.read(0, min(reader.nbytes, MAX_PICKLE)) if _is_pickle(head) else head
    try:
        parsed = pickle_reader.load(data)
    except FormatError as error:
        return error.named, error.calls
    return parsed.globals, parsed.calls


def _is_pickle(head: bytes) -> bool:
    """Tell whether a file starts as a pickle, and not by chance as a few letters of a text do."""
    try:
        pickle_reader.load(head)
    except Ended as error:
        protocol = head[:1] == b"\x80" and len(head) > 1
        return protocol or (error.offset or 0) > SHORTEST_PICKLE
    except CkptoolError:
        return False
    return True


def _text(head: bytes, size: str) -> tuple[str, str]:
    try:
        text = head.decode("utf-8")
    except UnicodeDecodeError as error:
        if error.start < len(head) - 4 or error.reason != "unexpected end of data":
            return f"not a checkpoint: {size} of unknown bytes", ""
        text = head[: error.start].decode("utf-8")
    start = text.lstrip("\ufeff \t\r\n").lower()
    if start.startswith(("<!doctype html", "<html", "<head")) or "<html" in start[:512]:
        return (
            f"an HTML page ({size}); a server sends this when a link is wrong or needs a login",
            "",
        )
    if start.startswith(("<?xml", "<")):
        return f"an XML or HTML page ({size})", ""
    if start.startswith(("{", "[")):
        return f"a JSON text ({size})", ""
    if any(ord(character) < 32 and character not in "\t\r\n\f" for character in text):
        return f"not a checkpoint: {size} of unknown bytes", ""
    if len(text) < 4096 and "\n" not in text.strip() and "/" in text:
        return f"a line of text ({size}) that looks like the path of a symbolic link", ""
    return f"a text ({size})", ""
