"""Name what a pickle is that torch.save did not write: its outermost value, and who made it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod

from ckptool.errors import CkptoolError, FormatError, Malformed, TooCostly
from ckptool.files import budget, tables
from ckptool.files.fileio import Reader
from ckptool.pickles import pickle_reader, safety
from ckptool.pickles.names import Level
from ckptool.pickles.pickle_reader import Ended, Vocabulary
from ckptool.pickles.subclasses import sizes_of
from ckptool.pickles.tree import Dict, Global, Node, Object, attribute
from ckptool.state import naming
from ckptool.state.checkpoint import named_items
from ckptool.text import listed, readable

SHORTEST = 16
JOBLIB_ARRAY = Global("joblib.numpy_pickle", "NumpyArrayWrapper")
_NDARRAY = Global("numpy", "ndarray")
_RECONSTRUCT = Global("numpy.core.multiarray", "_reconstruct")
MAX_READ = 64 << 20
MAX_DESCRIBED = 8 << 20  # bytes of a pickle that are read to describe it


@budget.brief()
def describe(reader: Reader, head: bytes) -> tuple[str, str] | None:
    """Return what a pickle holds, and what helps; None for any other file."""
    if not is_pickle(head):
        return None
    size = readable(reader.nbytes)
    nbytes = min(reader.nbytes, MAX_DESCRIBED)
    budget.current().read(nbytes)
    data = reader.read(0, nbytes)
    by = "joblib" if b"joblib.numpy_pickle" in head else ""
    what = f"a plain pickle{' of joblib' if by else ''} ({size})"
    what += ", with numpy arrays in it" if by else " that torch.save did not write"
    try:
        parsed = pickle_reader.load(data, 0, _Joblib(data))
    except FormatError as error:
        return what + _danger(error.named, error.calls), ""
    danger = _danger(parsed.globals, parsed.calls)
    if is_paddle(parsed.tree):
        what = f"a state_dict of PaddlePaddle ({size}), a plain pickle"
    hint = "paddle.load reads it" if is_paddle(parsed.tree) else _hint(parsed.globals)
    hint = "" if danger else hint
    return f"{what}: {_content(parsed.tree)}{danger}", hint


def _danger(named: Mapping[Global, int], calls: Iterable[Object]) -> str:
    verdict = safety.judge(named, calls)
    if verdict.level is not Level.DANGEROUS:
        return ""
    dangerous = listed(map(str, verdict.dangerous), 4)
    return f"; it would run code when loaded: {dangerous or 'what a call returned'}"


class _Joblib(Vocabulary):
    """Pass over the arrays between the opcodes."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def inline(self, node: Node, position: int) -> tuple[Node, int]:
        """Read an array of numpy that joblib wrote behind its description."""
        return inline_array(node, self.data, position)


def inline_array(node: Node, data: bytes, position: int) -> tuple[Node, int]:
    """Read what joblib writes of a numpy array behind its description, and return where it ends.

    Padding that its first byte counts, then the elements (joblib/numpy_pickle.py, `write_array`).
    Any other node is returned as it is; raises `Malformed` where no size is known: Python objects
    are another pickle, and what joblib would not write it may read otherwise.
    """
    if not isinstance(node, Object) or node.callee != JOBLIB_ARRAY:
        return node, position
    shape, dtype = attribute(node, "shape"), attribute(node, "dtype")
    itemsize = _itemsize(dtype)
    sizes = sizes_of(shape)
    match node:
        case Object(args=(), how="newobj", steps=[("build", Dict())]) if sizes is not None:
            pass
        case _:
            itemsize = 0
    if not itemsize:
        raise Malformed("an array of joblib whose size is not known", offset=position)
    if attribute(node, "numpy_array_alignment_bytes") is not None:
        position += 1 + data[position]
    end = position + prod(sizes or ()) * itemsize
    if end > len(data):
        raise Ended("an array of joblib extends beyond the end", offset=position)
    fortran = attribute(node, "order") == "F"
    state = (1, shape, dtype, fortran, data[position:end])
    return Object(_RECONSTRUCT, (_NDARRAY, (0,), b"b"), steps=[("build", state)]), end


def _itemsize(dtype: Node) -> int:
    """Return the bytes of an element of a numpy array, 0 where that is not known.

    The state may have another size, and fields, which may be Python objects (numpy's
    descriptor.c, `arraydescr_setstate`).
    """
    match dtype:
        case Object(Global("numpy", "dtype"), (str(kind), *_), steps=steps):
            found = re.fullmatch(r"[<>|=]?([?biufcSUmM])(\d{1,4})", kind, re.ASCII)
            size = int(found[2]) * (4 if found[1] == "U" else 1) if found else 0
            match steps:
                case []:
                    return size
                case [("build", (3 | 4, str(), None, None, None, int(stated), *_))]:
                    return size if stated in (-1, size) else 0
    return 0


def pickled(reader: Reader, head: bytes) -> tuple[dict[Global, int], list[Object]]:
    """Return what a file that starts as a pickle names and calls, up to where it stops being one.

    Of any other file the head alone is read.
    """
    nbytes = min(reader.nbytes, MAX_READ) if is_pickle(head) else len(head)
    budget.current().read(nbytes)
    data = reader.read(0, nbytes)
    try:
        parsed = pickle_reader.load(data, 0, _Joblib(data))
    except TooCostly:
        raise
    except FormatError as error:
        return error.named, error.calls
    return parsed.globals, parsed.calls


def is_pickle(head: bytes) -> bool:
    """Check for the start of a pickle, and not by chance as a few letters of a text are one."""
    try:
        pickle_reader.load(head, 0, _Joblib(head))
    except Ended as error:
        protocol = head[:1] == b"\x80" and len(head) > 1
        return protocol or (error.offset or 0) > SHORTEST
    except CkptoolError:
        return False
    return True


def _content(tree: Node) -> str:
    """Describe a value by the names of what is in it, or else by their kinds."""
    what = naming.what(tree)
    names = [name for name, _ in named_items(tree)]
    if names:
        return f"{what}, {listed(names, 6)}"
    if isinstance(tree, list | tuple) and tree:
        return f"{what}, {listed(dict.fromkeys(map(_kind, tree[:1000])), 4)}"
    return what


def _kind(node: Node) -> str:
    """Name the kind of a value, without the value."""
    if isinstance(node, Object):
        return naming.what(node)
    return type(node).__name__.lower().replace("nonetype", "None")


def is_paddle(tree: Node) -> bool:
    """Check for the note that PaddlePaddle keeps in a state_dict (paddle/framework/io.py)."""
    return any(name == "StructuredToParameterName@@" for name, _ in named_items(tree))


def _hint(named: Iterable[Global]) -> str:
    tops = {name.module.partition(".")[0] for name in named}
    known = tables.read(__file__, "formats.txt")["libraries of pickles"]
    library = next((library for top, library in known if top in tops), "")
    return f"{library} reads it" if library else ""
