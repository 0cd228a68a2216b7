"""What other readers take a file for: a pickle from its first byte, a tar, a zip from its end.

`pickle.load` starts with any byte, `torch.load` tries a tar before all but a zip, and zips are
found from their end (`torch.jit.load`, `zipfile`). What is one thing to ckptool and another to
them is not sound, whatever it says.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import closing

from ckptool.files import tars, zips
from ckptool.files.fileio import Reader, Readers
from ckptool.pickles.tree import Global, Object
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Packing
from ckptool.text import listed

_WINDOW, _WIDEST = 1 << 12, 8 << 20  # of a line that goes on, the latter
_MAX_STEPS = 10_000  # arguments that are passed over: what starts as a pickle by chance has few
_MAX_NAME = 1 << 16  # bytes of a name that could be one of a module
_UNCLEAR = Global("", "")
_READ = ("data.pkl", "constants.pkl")  # the pickles of a checkpoint itself

Pickles = tuple[dict[Global, int], list[Object]]  # what they name, and call

# Opcodes that name nothing: without an argument, with one of fixed size, or with a line
# (CPython's pickletools.py). What they do to the stack is not followed: unpicklers may go further
# than ckptool's would.
_FIXED = (
    rb"(?:[]()}0-2NRa-bdelostu\x81\x85-\x89\x8f-\x92\x94\x97\x98]|[Kqh\x80].|M..|[Jrj].{4}|G.{8}|"
    rb"[IFLgp][-+.\w \t]*\n)*+"
)
_TEXTS = {b"U": 1, b"X": 4, b"T": 4, b"\x8c": 1, b"\x8d": 8}  # the sizes of their lengths
_LENGTHS = {**_TEXTS, b"C": 1, b"B": 4, b"\x8e": 8, b"\x96": 8, b"\x8a": 1, b"\x8b": 4}


def others(
    reader: Reader, head: bytes, known: Collection[str]
) -> tuple[dict[Global, int], list[str]]:
    """Return what a file names to readers of pickles, and what else it is than is `known`."""
    named: dict[Global, int] = {}
    flaws: list[str] = []
    if "pickle" not in known:
        named, flaws = pickles_from(reader, 0, "its bytes are a pickle as well")
    if "tar" not in known and tars.is_tar(head):
        flaws.append("its bytes are a tar archive as well, which torch.load tries first")
    if "zip" not in known and not head.startswith(b"PK\3\4") and zips.at_end(reader):
        flaws.append("its end is a zip archive as well")
    return named, flaws


def pickles_from(reader: Reader, start: int, what: str) -> tuple[dict[Global, int], list[str]]:
    """Return what pickles name from a byte on, and a flaw that says `what` they are."""
    found = list(_names(reader.part(start, reader.nbytes - start, reader.path)))
    named = {name: start + offset for name, offset in found if name != _UNCLEAR}
    which = f", which names {listed(map(str, named), 4)}" if named else ""
    return named, [what + which] if found else []


def unread(reader: Reader, checkpoint: Checkpoint) -> Pickles:
    """Return what the pickles in a zip archive name and call that are no part of its checkpoint.

    Some are torch's own (`traced_inputs.pkl` of TorchScript, samples of torch.export); some are
    torch files themselves.
    """
    named: dict[Global, int] = {}
    calls: list[Object] = []
    unread = set(checkpoint.unread)
    with closing(Readers()) as readers:
        for name, storage in checkpoint.records.items():
            is_more = name.endswith(".pkl") and name not in _READ
            if not storage.nbytes or not (name in unread or is_more):
                continue
            if storage.packing is Packing.DEFLATED:
                part = readers.unpacked(storage)
            else:
                part = reader.part(storage.start - reader.base, storage.nbytes, reader.path)
            for each in _pickles_in(part):
                head = each.read(0, min(_WINDOW, each.nbytes))
                from ckptool.containers import _pickles

                more, called = _pickles.pickled(each, head)
                named |= more
                calls += called
    return named, calls


def _pickles_in(reader: Reader) -> Iterator[Reader]:
    """Iterate over what may be a pickle: a record, or those of the torch zip that it is."""
    yield reader
    if reader.nbytes > 4 and reader.read(0, 4) == b"PK\3\4":
        for name, member in zips.read_directory(reader).members.items():
            if name.endswith(".pkl"):
                yield zips.part(reader, member)


def _names(reader: Reader) -> Iterator[tuple[Global, int]]:
    """Iterate over what pickles from the first byte on name, whatever else they do; over offsets.

    A name that cannot be followed is `_UNCLEAR`. STOP is followed by the next pickle, in which
    there may be persistent ids, as torch reads its legacy files.
    """
    position, stopped = 0, False
    texts: list[str] = []
    for _ in range(_MAX_STEPS):
        data = reader.read(position, min(_WINDOW, reader.nbytes - position))
        code, end = data[:1], re.match(_FIXED, data, re.DOTALL).end()  # type: ignore[union-attr]
        if not end and code in _LENGTHS:
            start = 1 + _LENGTHS[code]
            length = int.from_bytes(data[1:start], "little", signed=code in (b"T", b"\x8b"))
            end = start + length if len(data) >= start and length >= 0 else 0
            if code in _TEXTS:
                texts = [*texts[-1:], data[start:end].decode("utf-8", "replace")]
        elif not end and code in (b"S", b"V", b"P"):
            stops = (code == b"P" and not stopped) or (code == b"S" and data[1:2] not in b"'\"")
            end = 0 if stops else _line(reader, position)
            texts = [*texts[-1:], ""]
        elif not end and code in (b"c", b"i"):
            middle = _line(reader, position, _MAX_NAME)
            end = _line(reader, position + middle, _MAX_NAME) if middle else 0
            if not end or middle + end > _MAX_NAME:
                return
            try:
                module, name = reader.read(position + 1, middle + end - 2).decode().split("\n")
            except ValueError:
                return
            yield Global(module, name), position
            end += middle
        elif code == b"\x93" and texts:
            yield Global(texts[0], texts[-1]) if len(texts) > 1 else _UNCLEAR, position
            end = 1
        elif code == b"." or (stopped and code == b"Q"):
            end, stopped = 1, True
        elif code == b"\x95" and int.from_bytes(data[1:9], "little") <= reader.nbytes:
            break  # what it frames is read in several ways
        position += end
        if not end or position > reader.nbytes:
            return
    yield _UNCLEAR, position


def _line(reader: Reader, start: int, most: int | None = None) -> int:
    """Return how many bytes from `start` a line has; 0 where it does not end, or after `most`."""
    position, window = start, _WINDOW
    stop = reader.nbytes if most is None else min(reader.nbytes, start + most)
    while position < stop:
        data = reader.read(position, min(window, stop - position))
        if b"\n" in data:
            return position - start + data.index(b"\n") + 1
        position, window = position + window, min(2 * window, _WIDEST)
    return 0
