"""Plain pickles of tensors: what `pickle.dump` and `joblib.dump` write, and StyleGAN's snapshots.

A dict with dicts of numpy arrays counts (Detectron's model zoo), as it does in a torch file.

A storage is a call of `torch.storage._load_from_bytes` on the bytes of a whole torch file, in the
legacy container (torch/storage.py, `__reduce__`): each is read as such where it is, or, where
protocol 2 or less has the bytes as text, from a temporary file. Read only: what is written is a
torch zip.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

from ckptool.containers import torch_legacy, torch_zip
from ckptool.containers._container import Container, Traits
from ckptool.containers._pickles import JOBLIB_ARRAY, inline_array, is_paddle, is_pickle
from ckptool.containers._readings import pickles_from
from ckptool.errors import FormatError, LimitExceeded, Malformed
from ckptool.files import budget
from ckptool.files.fileio import CHUNK, Reader
from ckptool.files.spool import Spool
from ckptool.pickles import pickle_reader
from ckptool.pickles.safety import names_in
from ckptool.pickles.subclasses import bytes_of
from ckptool.pickles.torch_objects import StorageId, TorchVocabulary
from ckptool.pickles.tree import Dict, Global, Node, Object
from ckptool.state.candidates import candidates
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import Storage
from ckptool.text import readable

MAX_READ = 512 << 20  # such a file is read into memory
_ARRAYS = b"multiarray", b"_frombuffer"  # in what numpy pickles: module; function, of protocol 5
_LOAD = Global("torch.storage", "_load_from_bytes")
_BETWEEN = 16  # bytes at most from the end of its argument to a call: MEMOIZE, TUPLE1 ...


def read(reader: Reader) -> Checkpoint | None:
    """Read the pickle and the torch files in it; None for one without."""
    if not _mentions(reader, _LOAD.name.encode(), *_ARRAYS):
        return None
    if reader.nbytes > MAX_READ:
        raise LimitExceeded(f"a plain pickle of more than {readable(MAX_READ)}")
    budget.current().read(reader.nbytes)
    data = reader.read(0, reader.nbytes)
    known = _Embedded(reader, data)
    try:
        parsed = pickle_reader.load(data, 0, known)
    except FormatError as error:
        error.calls = known.left(error.calls)
        error.named = known.followed(error.named, error.calls, None)
        raise
    with pickle_reader.remembered([parsed]):
        if not known.files and not _has_state_dict(parsed.tree):
            return None
    calls = known.left(parsed.calls)
    named = known.followed(parsed.globals, calls, parsed.tree)
    behind, flaws = pickles_from(reader, parsed.end, "another pickle follows its own")
    if known.arrays:
        more, called = _without_arrays(reader, data, known.first)
        behind |= more
        calls += called
    return Checkpoint(
        reader.path,
        "plain-pickle",
        parsed.tree,
        reader.nbytes,
        globals=behind | named,
        calls=calls,
        pickle_name="the pickle",
        generation="pickle.dump or joblib, not torch.save",
        protocol=parsed.protocol,
        unlisted=reader.nbytes - parsed.end,
        flaws=tuple(flaws),
        held=tuple(known.spools),
    )


def _without_arrays(
    reader: Reader, data: bytes, first: int
) -> tuple[dict[Global, int], list[Object]]:
    """Return what `pickle.load` names and calls, which takes arrays of joblib for opcodes.

    Nothing where it ends at the `first`, as nearly always: the length of padding is no opcode.
    """
    known = _Embedded(reader, data, arrays=False)
    with budget.brief():
        try:
            parsed = pickle_reader.load(data, 0, known)
        except FormatError as error:
            if error.offset is not None and error.offset <= first:
                return {}, []
            named, calls = error.named, known.left(error.calls)
            return known.followed(named, calls, None), calls
    calls = known.left(parsed.calls)
    return known.followed(parsed.globals, calls, parsed.tree), calls


def _mentions(reader: Reader, *names: bytes) -> bool:
    """Search a file for names, a part at a time."""
    step = CHUNK - max(map(len, names))
    parts = (
        reader.read(start, min(CHUNK, reader.nbytes - start))
        for start in range(0, reader.nbytes, step)
    )
    return any(name in part for part in parts for name in names)


def _has_state_dict(tree: Node) -> bool:
    """Check whether arrays of numpy alone make a state_dict; those of other libraries have not."""
    return type(tree) is Dict and not is_paddle(tree) and bool(candidates(tree))


class _Embedded(TorchVocabulary):
    """Read the torch files that are arguments of calls, and joblib's arrays."""

    def __init__(self, reader: Reader, data: bytes, *, arrays: bool = True) -> None:
        super().__init__(_no_storage)
        self.reader, self.data = reader, data
        self.reads_arrays, self.first = arrays, 0
        self.files = 0
        self.globals: dict[Global, int] = {}
        self.calls: list[Object] = []
        self.arrays: list[Object] = []
        self.spools: list[Spool] = []

    def left(self, calls: list[Object]) -> list[Object]:
        """Return the calls of the file and of those in it, without those that were arrays."""
        arrays = set(map(id, self.arrays))
        return [*(call for call in calls if id(call) not in arrays), *self.calls]

    def followed(
        self, named: dict[Global, int], calls: list[Object], tree: Node
    ) -> dict[Global, int]:
        """Return the names of the file and of those in it, a function that was read marked."""
        found = named | self.globals
        left = names_in([tree, *calls])
        for each in (_LOAD, JOBLIB_ARRAY):
            if each in found and each not in left:
                found[replace(each, followed=True)] = found.pop(each)
        return found

    def called(self, node: Object) -> Node:
        """Turn a call into the bytes, the storage or the tensor that it stands for."""
        match node.callee, node.args:
            case Global("_codecs", "encode"), (str(text), "latin1" | "latin-1"):
                return text.encode("latin-1")
            case Global("torch.storage", "_load_from_bytes"), (argument,):
                content = bytes_of(argument)
                return node if content is None else self._file(content, node)
        return super().called(node)

    def _file(self, content: bytes, node: Object) -> Node:
        """Read a torch file that an argument is; a call of anything else stays one."""
        container = next(
            (each for each in (torch_legacy, torch_zip) if each.sniff(content[: 1 << 12])), None
        )
        if container is None:
            return node
        try:
            with ExitStack() as stack:
                inner = container.read(self._part(content, node.offset, stack))
        except FormatError as error:
            self.globals |= error.named
            self.calls += error.calls
            raise Malformed(f"a torch file in it: {error.message}", offset=node.offset) from error
        if inner is None:
            return node
        self.files += 1
        self.globals |= dict.fromkeys(inner.globals, node.offset)
        self.calls += inner.calls
        return inner.tree

    def _part(self, content: bytes, offset: int, stack: ExitStack) -> Reader:
        """Return a reader of bytes where they are in the file, or else of a copy."""
        before = max(0, offset - len(content) - _BETWEEN)
        start = self.data.find(content, before, offset)
        if start >= 0:
            return self.reader.part(start, len(content), self.reader.path)
        spool = Spool([content])
        self.spools.append(spool)
        return stack.enter_context(Reader(spool.path)).part(0, len(content), self.reader.path)

    def inline(self, node: Node, position: int) -> tuple[Node, int]:
        """Read an array of numpy that joblib wrote behind its description."""
        if not self.reads_arrays:
            return node, position
        array, end = inline_array(node, self.data, position)
        if array is not node:
            self.first = self.first or position
            self.arrays.append(node)
        return array, end


def _no_storage(storage: StorageId) -> Storage:
    raise Malformed(f"a persistent id in a plain pickle: {storage.key}")


CONTAINERS = (
    Container(
        "plain-pickle",
        "plain pickle",
        suffixes=(".joblib",),
        sniff=is_pickle,
        read=read,
        traits=Traits(read_as=("pickle", "zip")),  # it may hold torch zips
    ),
)
