"""The panel: no file may be `ok` in which a consumer looks up a name that `check` does not report.

    python tests/fuzz/panel.py                         (every fixture, and 1 000 mutations)
    python tests/fuzz/panel.py --mutations 20000 --seed 7
    python tests/fuzz/panel.py FILE ...                (what each consumer does with these)

The consumers are `torch.load` both ways, `pickle.load` with the unpickler in C and the one in
Python, `tarfile`, `zipfile` (with the pickles in it) and safetensors. They live in a process of
their own, in which nothing runs: any name becomes an inert class, so that they go on and look up
more, and an audit hook ends whatever would import, run or write.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import ckptool
from ckptool import containers

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
PATIENCE = 60.0  # seconds for one file, and to start
MEMORY = 24 << 30  # address space of the consumers, most of which is never touched
MOST_FILES = 12  # of a folder
# Records of a distributed checkpoint, of whose index ckptool reads numbers and reports the rest.
INERT = {
    f"torch.distributed.{module}.metadata.{name}"
    for module, names in {
        "checkpoint": "Metadata MetadataIndex TensorStorageMetadata TensorProperties StorageMeta "
        "ChunkStorageMetadata BytesStorageMetadata _MEM_FORMAT_ENCODING",
        "_shard.sharded_tensor": "TensorProperties MEM_FORMAT_ENCODING",
    }.items()
    for name in names.split()
} | {"torch.distributed.checkpoint.filesystem._StorageInfo"}
# Audit events that no load of tensors causes.
RUNS = tuple(
    "pickle.find_class os.system os.exec os.spawn os.posix_spawn os.fork os.link os.symlink "
    "subprocess pty socket ctypes.dlopen webbrowser".split()
)


# The consumers.


class Inert:
    """What a name becomes that must not be looked up: it takes anything, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Make one of any arguments."""
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Return the same."""
        return self

    __setstate__ = append = extend = add = __setitem__ = __call__


class Guard:
    """What consumers looked up, and what would have run; the hook that keeps it from running."""

    def __init__(self, place: str) -> None:
        self.place = place
        self.names: set[str] = set()
        self.ran: list[str] = []
        self.safe: dict[str, Any] = {}  # what torch.load(weights_only=True) takes, by name
        self.tops: set[str] = set()

    def look_up(self, module: str, name: str) -> Any:
        """Note a name, and return what does nothing in its place, but for storages of torch."""
        self.names.add(f"{module}.{name}")
        return self.safe.get(f"{module}.{name}", Inert) if name.endswith("Storage") else Inert

    def hook(self, event: str, args: tuple[Any, ...]) -> None:
        """Refuse what a load of tensors does not do; the audit hook."""
        if not self.tops or not self._is_odd(event, args):
            return
        self.ran.append(f"{event} {args!r:.200}")
        raise RuntimeError(f"the panel lets nothing run: {event}")

    def _is_odd(self, event: str, args: tuple[Any, ...]) -> bool:
        if event == "import":
            return args[0].partition(".")[0] not in self.tops
        if event == "open":
            path, _, flags = args
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and not str(path).startswith((self.place, os.devnull))
        if event == "exec":
            return str(args[0].co_filename) == "<string>"
        return event.startswith(RUNS)


def consume() -> int:
    """Say on stdout, for each path on stdin, what the consumers make of it."""
    answers, questions = os.fdopen(os.dup(1), "w", buffering=1), os.fdopen(os.dup(0))
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    guard = Guard(tempfile.gettempdir())
    panel = consumers(guard)
    answers.write("{}\n")
    for line in questions:
        path, said = json.loads(line), {}
        for who, use in panel.items():
            guard.names, guard.ran = set(), []
            try:
                use(path)
                end = ""
            except BaseException as error:
                end = f"{type(error).__name__}: {error}"[:200]
            said[who] = {
                "end": end,
                "names": sorted(guard.names - guard.safe.keys()),
                "ran": guard.ran,
            }
        answers.write(json.dumps(said) + "\n")
    return 0


def consumers(guard: Guard) -> dict[str, Callable[[str], Any]]:
    """Return who reads a file, by name; loads all that they need, and sets the guard."""
    import io
    import pickle
    import tarfile
    import warnings
    import zipfile
    from types import SimpleNamespace

    import torch
    from safetensors import safe_open
    from torch._weights_only_unpickler import _get_allowed_globals

    warnings.simplefilter("ignore")

    def unpickler(kind: Any) -> Any:
        class Watched(kind):  # type: ignore[misc]
            def find_class(self, module: str, name: str) -> Any:
                return guard.look_up(module, name)

            def get_extension(self, code: int) -> None:
                raise ValueError(f"an unregistered extension: {code}")

        return Watched

    def persistent(_: Any) -> Any:
        return Inert()

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("a TorchScript archive, which torch.jit.load reads without pickle")

    in_c, in_python = unpickler(pickle.Unpickler), unpickler(pickle._Unpickler)  # type: ignore[attr-defined]
    torch.jit.load = refuse

    def load(path: str, kind: Any) -> None:
        with open(path, "rb") as file:
            kind(file).load()

    def torch_load(path: str, kind: Any) -> None:
        module = SimpleNamespace(
            __name__="pickle", Unpickler=kind, load=lambda file, **how: kind(file, **how).load()
        )
        torch.load(path, "cpu", pickle_module=module, weights_only=False)

    def read_zip(path: str) -> None:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(".pkl") and archive.getinfo(name).file_size < 1 << 24:
                    reader = in_c(io.BytesIO(archive.read(name)))
                    reader.persistent_load = persistent
                    with contextlib.suppress(Exception):
                        reader.load()

    def read_tar(path: str) -> None:
        with tarfile.open(path, "r:") as archive:
            archive.getnames()

    def read_safetensors(path: str) -> None:
        with safe_open(path, "pt") as file:
            file.keys()

    panel: dict[str, Callable[[str], Any]] = {
        "weights_only=True": lambda path: torch.load(path, "cpu", weights_only=True),
        "weights_only=False": lambda path: torch_load(path, in_c),
        "weights_only=False, in Python": lambda path: torch_load(path, in_python),
        "pickle in C": lambda path: load(path, in_c),
        "pickle in Python": lambda path: load(path, in_python),
        "zipfile": read_zip,
        "tarfile": read_tar,
        "safetensors": read_safetensors,
    }
    repr(torch.ones(2))  # as messages of errors do
    for path in sorted((HERE.parents[1] / "fixtures/good").glob("*.*"))[::3]:  # what loads late
        for use in panel.values():
            with contextlib.suppress(Exception):
                use(str(path))
    guard.safe = dict(_get_allowed_globals())
    guard.tops = {name.partition(".")[0] for name in sys.modules}
    sys.addaudithook(guard.hook)
    return panel


class Panel:
    """The process of the consumers, started again where a file ended it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.died: list[str] = []

    def ask(self, path: Path) -> dict[str, dict[str, Any]]:
        """Return what each consumer made of a file; nothing where they did not live through it."""
        if self._process is None:
            command = [sys.executable, str(HERE / "panel.py"), "--consumers"]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True, env=environment,
            )  # fmt: skip
            self._answer()
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(str(path)) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if answer is None:
            self.died.append(str(path))
            self.close()
        return answer or {}

    def _answer(self) -> dict[str, Any] | None:
        assert self._process is not None
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], PATIENCE)
        line = self._process.stdout.readline() if ready else ""
        return json.loads(line) if line else None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


# What is compared.


def complaints(path: Path, panel: Panel) -> Iterator[str]:
    """Say what is wrong with what `check` says of a file, or of those in a folder."""
    if path.is_dir():
        for each in [each for each in sorted(path.rglob("*")) if each.is_file()][:MOST_FILES]:
            yield from complaints(each, panel)
        return
    status = ckptool.check(path).status.value
    for who, said in panel.ask(path).items():
        if status == "ok":
            yield from (f"{path.name}: {who} would run {what}" for what in said["ran"])
            checkpoint = containers.read(path, alone=True)
            reported = {f"{name.module}.{name.name}" for name in checkpoint.globals}
            for name in said["names"]:
                # As torch.load does; classes of a TorchScript archive are in no module of Python.
                mapped = name.replace("torch.tensor.", "torch._tensor.")
                if not {name, mapped} & (reported | INERT) and not name.startswith("__torch__."):
                    yield f"{path.name}: {who} looks up {name!r}, and check says ok"
            yield from _other_than(path, who, said["end"], checkpoint.container)


def _other_than(path: Path, who: str, end: str, container: str) -> Iterator[str]:
    """Say what a file is to a consumer and not to `check`, or the other way round."""
    if who == "safetensors" and container == "safetensors" and end:
        yield f"{path.name}: check says ok, safetensors {end}"
    if who == "tarfile" and not end and container != "torch-tar":
        yield f"{path.name}: check says ok, and tarfile opens it ({container})"


# Mutations that make two readers of one file disagree, beside those of the fuzzer.


def twisted(random: Random, data: bytes) -> bytes:
    """Put a frame around some opcodes, a pickle into a safetensors, a tar or a zip around it."""
    import containers as writers
    import mutate

    match random.choice(("frame", "frame", "number", "tar", "zip", "records")):
        case "frame" | "records" if data.startswith(b"PK"):
            members = mutate.members_of(data)
            at = next(i for i, each in enumerate(members) if each.name.endswith(".pkl"))
            content = framed(random, members[at].data)
            members[at] = writers.Member(members[at].name, content)
            return writers.zip_bytes(members)
        case "frame" | "records":
            return framed(random, data)
        case "number":  # the first byte an opcode, what follows it an argument
            return bytes([random.randrange(256), random.randrange(64)]) + data[2:]
        case "tar":
            head = bytearray(data[:512].ljust(512, b"\0"))
            head[148:156] = b" " * 8
            return bytes(head[:148]) + b"%06o\0 " % sum(head) + bytes(head[156:]) + data[512:]
        case _:
            return data + writers.zip_bytes([writers.Member("a/data.pkl", b"cos\nsystem\n.")])


def framed(random: Random, data: bytes) -> bytes:
    """Put one FRAME before an opcode, that ends with another one, or in one."""
    import mutate

    operations = mutate.operations(data)
    start = sum(map(len, operations[: random.randrange(1, len(operations))]))
    rest = operations[:: random.choice((1, -1))]
    size = sum(map(len, rest[: random.randrange(len(rest))])) + random.choice((0, 0, 1, -1, 3))
    size = min(max(size, 0), len(data) - start)
    return data[:start] + b"\x95" + size.to_bytes(8, "little") + data[start:]


def drawn(count: int, seed: int) -> Iterator[tuple[str, Callable[[Path], Path]]]:
    """Iterate over mutated fixtures: their names, and what writes each into a folder."""
    import cases

    names = cases.fixtures()
    for number in range(count):
        case = cases.draw(names, seed, number)

        def write(place: Path, case: Any = case) -> Path:
            path: Path = cases.make(case, place)
            random = Random(f"panel:{case}")
            if path.is_file() and random.random() < 0.3:
                with contextlib.suppress(Exception):
                    path.write_bytes(twisted(random, path.read_bytes()))
            return path

        yield str(case), write


def fixtures() -> list[Path]:
    """List every fixture, good, hostile and of frameworks."""
    folder = HERE.parents[1] / "fixtures"
    return sorted(
        path for kind in ("good", "hostile", "frameworks") for path in (folder / kind).iterdir()
    )


def run(paths: Sequence[Path], mutations: int, seed: int) -> tuple[int, list[str], Panel]:
    """Ask the panel about files and mutations; return how many, the complaints, and the panel."""
    panel, found, count = Panel(), [], 0
    try:
        for path in paths:
            found += [f"{path.name}: {what}" for what in complaints(path, panel)]
            count += 1
        for name, write in drawn(mutations, seed):
            with tempfile.TemporaryDirectory() as place:
                path = write(Path(place))
                found += [f"{name}: {what}" for what in complaints(path, panel)]
                count += 1
    finally:
        panel.close()
    return count, found, panel


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--mutations", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--consumers", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.consumers:
        return consume()
    started = time.monotonic()
    if given.files:
        asked = Panel()
        for path in given.files:
            for who, said in asked.ask(path).items():
                print(f"{path}: {who}: {said['end'] or 'loads'} {said['names']} {said['ran']}")
        asked.close()
    mutations = 0 if given.files else given.mutations
    count, found, panel = run(given.files or fixtures(), mutations, given.seed)
    print(*found, sep="\n")
    minutes = (time.monotonic() - started) / 60
    print(
        f"{count} files in {minutes:.1f} minutes, {len(panel.died)} of which the consumers did not "
        f"survive; {len(found)} complaints"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
