"""The contract of a container as a test: for those of ckptool and those that plugins bring."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ckptool.containers import HEAD, Container, Writer
from ckptool.errors import CkptoolError, NotRepresentable
from ckptool.files import copying, publish
from ckptool.files.fileio import Reader
from ckptool.state import checkpoint as places, walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors.tensor import TensorInfo, problem
from ckptool.verbs import compare
from ckptool.verbs.compare_sides import Asked

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

MAX_CUTS = 1000  # lengths to which a sample is cut
FOREIGN_HEADS = (b"", b"\0" * HEAD, b"\xff" * HEAD, b"a text\n" * 512)
# What no reader does: look a name up, run code, start a program, reach for the network.
NEVER = frozenset(
    "pickle.find_class exec marshal.loads os.system os.exec os.fork os.posix_spawn "
    "subprocess.Popen ctypes.dlopen socket.connect".split()
)


def check_container(
    container: Container, samples: Iterable[str | Path], others: Iterable[str | Path] = ()
) -> None:
    """Check a container against sound files of its own, and of `others`; raises AssertionError.

    It recognises its samples alone; their tensors fit their storages, and these the files; a
    sample that was cut anywhere raises a `CkptoolError` at worst; nothing that a file names is
    looked up; what a writer writes is read back equal.
    """
    for head in FOREIGN_HEADS:
        assert not container.sniff(head), f"it takes {head[:8]!r}... for its own"
    for path in map(str, others):
        assert _read(container, path) is None, f"it reads {path}"
    for path in map(str, samples):
        checkpoint = _read(container, path)
        assert checkpoint is not None, f"it does not recognise {path}"
        assert checkpoint.container == container.name, f"it calls {path} {checkpoint.container}"
        _check_tensors(checkpoint)
        with _watched() as events:
            _read(container, path)
        assert not events, f"reading {path} causes {sorted(events)}"
        _check_cuts(container, path)
        if container.writer is not None:
            _check_writer(container, container.writer, checkpoint)


def _read(container: Container, path: str) -> Checkpoint | None:
    with Reader(path) as reader:
        recognised = container.sniff(reader.read(0, min(HEAD, reader.nbytes)))
        return container.read(reader) if recognised else None


def _check_tensors(checkpoint: Checkpoint) -> None:
    for path, tensor in walk.tensors(checkpoint.tree):
        if isinstance(tensor, TensorInfo):
            wrong = problem(tensor)
            assert not wrong, f"{walk.dotted(path)} {wrong}"
            storage = tensor.storage
            packed = storage.packed_nbytes or storage.nbytes
            inside = storage.chunked or storage.start + packed <= os.path.getsize(storage.path)
            assert inside, f"the storage of {walk.dotted(path)} ends outside {storage.path}"


def _check_cuts(container: Container, path: str) -> None:
    with Reader(path) as reader:
        for nbytes in range(0, reader.nbytes, max(1, reader.nbytes // MAX_CUTS)):
            cut = reader.part(0, nbytes, path)
            try:
                if container.sniff(cut.read(0, min(HEAD, nbytes))):
                    container.read(cut)
            except CkptoolError:
                pass


def _check_writer(container: Container, writer: Writer, checkpoint: Checkpoint) -> None:
    around = container.traits.around
    state = places.find_or_none(checkpoint) if around else places.state_dict_at(checkpoint, ())
    try:
        layout = writer.lay_out(checkpoint, state.entries if state else None, False)
    except NotRepresentable:
        return
    with TemporaryDirectory() as folder:
        target = os.path.join(folder, f"written{writer.default_suffix}")
        place = publish.refuse_target(target, (), force=False, sync=False)
        publish.publish(place, publish.Output((layout,)), lambda nbytes: None, lambda *_: None)
        written = _read(container, target)
        assert written is not None, f"it does not recognise what it wrote of {checkpoint.path}"
        asked = Asked(every=around)
        difference = compare.compared(checkpoint, written, asked, copying.no_progress)
        assert difference.equal, f"{checkpoint.path} is not read back as it was written"


@contextmanager
def _watched() -> Iterator[set[str]]:
    """Collect what Python is made to do meanwhile; an audit hook cannot be taken away again."""
    events: set[str] = set()
    active = True

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if active and event in NEVER:
            events.add(event)

    sys.addaudithook(hook)
    try:
        yield events
    finally:
        active = False
