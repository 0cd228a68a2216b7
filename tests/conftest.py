"""What several test files use: the fixtures, the command line in and out of this process.

Products (fixtures x edits x containers, every byte of a file) are sampled, the same way each time;
`--all` runs them whole, or more of them where whole ones take minutes.
"""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count, takewhile
from math import prod
from pathlib import Path
from typing import Any

import pytest

WORKERS = 2  # more would fit, but for the memory that some tests limit
os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads of torch spin while they wait for a core
FIXTURES = Path(__file__).parent.parent / "fixtures"
# What changes how ckptool talks; tests that want it say so.
TALK = (
    "NO_COLOR",
    "CKPTOOL_DEBUG",
    "PYTHONIOENCODING",
    "PYTHONUTF8",
    "LC_ALL",
    "COLUMNS",
    "PYTHONUNBUFFERED",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all", action="store_true", help="run products whole, not a sample of them")


def pytest_configure(config: pytest.Config) -> None:
    global _everything
    _everything = config.getoption("--all")


_everything = False


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite on two processes where pytest-xdist is installed, but for `-n 0`."""
    if "PYTEST_XDIST_WORKER" in os.environ:  # one of the two: it must not start others
        return
    options, whole = config.option, config.args_source is config.ArgsSource.TESTPATHS
    if whole and not options.usepdb and getattr(options, "numprocesses", 0) is None:
        options.numprocesses, options.dist = WORKERS, "worksteal"


def step(n: int, more: int = 1) -> int:
    """Return the step of a sample of one case in n; with `--all` every one, or one in `more`."""
    return more if _everything else n


def sampled(cases: Sequence[Any], n: int, more: int = 1) -> Sequence[Any]:
    """Return one case in n, the first included; with `--all` every one, or one in `more`."""
    return cases[:: step(n, more)]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Begin with what would keep one process alone at the end; leave out most of each product."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    out = left_out(items, whole=_everything)
    if not _everything:
        out |= {item.nodeid for item in items if item.get_closest_marker("thorough")}
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in out])
    items[:] = [item for item in items if item.nodeid not in out]


def pytest_collection_finish() -> None:
    """Let no search for garbage look at what stays to the end: the tests, torch and their like."""
    gc.freeze()


def left_out(items: Iterable[Any], *, whole: bool = False) -> set[str]:
    """Return the cases of products that are not in the sample.

    In it is one case in n (of a `whole` product one in `more`), chosen by its name, and any that
    has the value `always` or a value that no case before it has: each fixture, each edit and each
    container is in some case.
    """
    products = [item for item in items if item.get_closest_marker("product")]
    values = {
        item.nodeid: {
            (item.nodeid.partition("[")[0], name, repr(value))
            for name, value in item.callspec.params.items()
        }
        for item in products
    }
    chosen = {item.nodeid for item in products if in_sample(item, whole)}
    seen = {value for nodeid in chosen for value in values[nodeid]}
    for nodeid, own in values.items():
        if nodeid not in chosen and not own <= seen:
            chosen.add(nodeid)
            seen |= own
    return values.keys() - chosen


def in_sample(item: Any, whole: bool) -> bool:
    """Return whether its name, or one of its values, chooses a case of a product."""
    mark = item.get_closest_marker("product")
    name = item.name.replace(str(FIXTURES), "")
    always = mark.kwargs.get("always", mark)
    n = mark.kwargs.get("more", 1) if whole else mark.args[0]
    return zlib.crc32(name.encode()) % n == 0 or always in item.callspec.params.values()


@dataclass(frozen=True)
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Read stdout as one JSON document."""
        document: dict[str, Any] = json.loads(self.out)
        return document


@pytest.fixture(scope="session")
def good() -> Path:
    return FIXTURES / "good"


@pytest.fixture(scope="session")
def hostile() -> Path:
    return FIXTURES / "hostile"


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder as pytest does, without the link to the latest, which takes longer than it."""
    name = re.sub(r"\W", "_", request.node.name)[:30]
    return tmp_path_factory.mktemp(f"{name}{next(_folders)}", numbered=False)


_folders = count()


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Outcome]]:
    """Run a command line in this process."""
    from ckptool.cli.main import main

    for name in TALK:
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)

    def run_here(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return valid(arguments, Outcome(code, *capsys.readouterr()))

    yield run_here
    signal.signal(signal.SIGTERM, before)
    gc.enable()


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., Outcome]:
    """Run a command line in a process of its own, in `tmp_path`."""

    def run_there(
        *arguments: object,
        env: Mapping[str, str] | None = None,
        program: Sequence[str] = ("-m", "ckptool"),
        encoding: str = "utf-8",
        **more: Any,
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, *program, *map(os.fspath, map(_argument, arguments))],
            env=environment(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            cwd=tmp_path,
            **more,
        )
        out, err = (text.decode(encoding) for text in (done.stdout, done.stderr))
        return valid(arguments, Outcome(done.returncode, out, err))

    return run_there


def valid(arguments: Sequence[object], outcome: Outcome) -> Outcome:
    """Check what a command printed with --json: each stream has one valid document, or nothing."""
    options = [*takewhile(lambda each: each != "--", arguments)]
    if "--json" in options and "--help" not in options and find_spec("jsonschema"):
        from test_schemas import validate

        if outcome.out:
            validate(outcome.document)
        if outcome.err:
            error = json.loads(outcome.err)
            validate(error, "error/1")
            assert error["exit"] == outcome.code
    return outcome


def _argument(value: object) -> str | bytes:
    return value if isinstance(value, bytes) else str(value)


def environment(changes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Give this process's environment without what changes how ckptool talks."""
    plain = {name: value for name, value in os.environ.items() if name not in TALK}
    return {**plain, **(changes or {})}


@pytest.fixture(scope="session")
def make_safetensors() -> Callable[..., Path]:
    """Write a safetensors file of float32 tensors with the shapes given; a sparse file of zeros."""

    def make(path: Path, shapes: Mapping[str, Sequence[int]], fill: bytes = b"") -> Path:
        header, position = {}, 0
        for key, shape in shapes.items():
            nbytes = 4 * prod(shape)
            offsets = [position, position + nbytes]
            header[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": offsets}
            position += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.write((fill * (position // len(fill) + 1))[:position] if fill else b"")
            file.truncate(8 + len(text) + position)
        return path

    return make


def write_anew(path: Path, content: bytes) -> None:
    """Write a file that is not there, or no more: ext4 flushes one that is cut short (its mount
    option `auto_da_alloc`), which takes a disk that has other work a second."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def listing(folder: Path) -> dict[str, bytes | None]:
    """Give every name under a folder with its bytes, None for what is no regular file."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }
