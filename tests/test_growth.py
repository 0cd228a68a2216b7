"""Time and memory grow with what is in a file, never with what it declares, nor faster.

Time is counted in calls of Python functions and in bytes read, which are the same in every run:
four times the file may cost four times as much, and no more than a few reads of each byte.
"""

from __future__ import annotations

import cProfile
import os
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import costly
import pytest
from conftest import FIXTURES, environment, sampled

from ckptool.cli import main as cli
from ckptool.cli.main import main
from ckptool.files import fileio

BOUND = 150 << 20
HOSTILE = sorted((FIXTURES / "hostile").iterdir())
COMMANDS = tuple(
    line
    for line in (
        ("check", "--finite", "--strict"), ("info",), ("info", "--json"), ("keys", "--all"),
        ("diff", str(FIXTURES / "good" / "plain.pth")),
    )
    if line[0] in [name for names in cli.GROUPS.values() for name in names]
)  # fmt: skip


def torch_file(path: Path, body: bytes, storages: dict[str, bytes] | None = None) -> Path:
    """Write a torch zip around the opcodes of a pickle, protocol 2."""
    with zipfile.ZipFile(path, "w") as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        for key, data in (storages or {}).items():
            made.writestr(f"archive/data/{key}", data)
        made.writestr("archive/version", b"3\n")
    return path


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def dict_of(pairs: list[tuple[bytes, bytes]]) -> bytes:
    return b"}(" + b"".join(key + value for key, value in pairs) + b"u"


CALL = b"cposix\nsystem\nU\x01x\x85R"
TENSOR = b"".join([
    b"ctorch._utils\n_rebuild_tensor_v2\n(", b"(", text("storage"), b"ctorch\nFloatStorage\n",
    text("0"), text("cpu"), b"K\x04tQ", b"K\x00K\x04\x85K\x01\x85\x89}tR",
])  # fmt: skip
FOUR = {"0": struct.pack("<4f", 1, 2, 3, float("nan"))}


def own_tensor(index: int) -> bytes:
    """Return a tensor with a storage of its own."""
    return TENSOR.replace(text("0"), text(str(index)))


def fours(n: int) -> dict[str, bytes]:
    return {str(index): FOUR["0"] for index in range(n)}


def keys(n: int, value: Callable[[int], bytes], name: str = "layer.%d.weight") -> bytes:
    return dict_of([(text(name % index), value(index)) for index in range(n)])


# What a stranger may fill a file with, `n` times.
SHAPES: dict[str, Callable[[int], bytes]] = {
    "tensors": lambda n: keys(n, lambda index: TENSOR),
    "one key, again and again": lambda n: dict_of([(text("w"), TENSOR)] * n),
    "calls": lambda n: keys(n, lambda index: CALL),
    "names": lambda n: keys(n, lambda index: b"cos\nname%d\n" % index),
    "foreign names": lambda n: keys(n, lambda index: b"cmine\nname%d\n" % index),
    "integer keys that collide": lambda n: dict_of(
        [(number(index * (2**61 - 1)), b"N") for index in range(1, n)]
    ),
    "dicts of tensors": lambda n: keys(n, lambda index: dict_of([(text("w"), TENSOR)]), "m%d"),
    "dicts of tensors of their own": lambda n: keys(
        n, lambda index: dict_of([(text("w"), own_tensor(index))]), "m%d"
    ),
    "one dict under many names": lambda n: keys(
        n,
        lambda index: b"h\x01" if index else dict_of([(text("w"), TENSOR)]) + b"q\x01",
        "m%d",
    ),
    "known names": lambda n: keys(
        n, lambda index: dict_of([(text("state_dict"), dict_of([(text("w"), TENSOR)]))]), "m%d"
    ),
    "lists": lambda n: b"](" + (b"](" + TENSOR + b"e") * n + b"e",
    "prefixes": lambda n: keys(n, lambda index: TENSOR, "module._orig_mod.a%d.weight"),
    "one list, through the memo": lambda n: b"](" + b"]q\x01" + b"h\x01" * n + b"e",
}


def cost(command: tuple[str, ...], path: Path) -> tuple[int, int]:
    """Run a command line; give its exit code and the count of function calls."""
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return counted(lambda: main([*command, str(path)]))


def counted(work: Callable[[], int]) -> tuple[int, int]:
    """Do some work; give its result and the count of function calls."""
    profile = cProfile.Profile()  # which counts in C
    result = profile.runcall(work)
    return result, sum(entry.callcount for entry in profile.getstats())


@pytest.mark.product(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_calls_grow_with_the_file(tmp_path: Path, command: tuple[str, ...], shape: str) -> None:
    cost(command, torch_file(tmp_path / "warm.pth", SHAPES[shape](10), fours(10)))
    small = cost(command, torch_file(tmp_path / "small.pth", SHAPES[shape](250), fours(250)))
    large = cost(command, torch_file(tmp_path / "large.pth", SHAPES[shape](1000), fours(1000)))
    assert small[0] == large[0] != 70
    assert large[1] < 4.4 * small[1], (small, large)


@pytest.mark.parametrize("verb", ["convert", "transfer"])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("storages", ["one each", "one"])
@pytest.mark.product(8)
def test_calls_of_writers_grow_with_the_file(
    tmp_path: Path, verb: str, suffix: str, storages: str
) -> None:
    """With one storage for all, each tensor is tied to the first."""

    def written(n: int) -> tuple[int, int]:
        own = storages == "one each"
        body = keys(n, own_tensor if own else lambda index: TENSOR)
        data = fours(n) if own else FOUR
        path = torch_file(tmp_path / f"{n}.pth", body, data)
        out = tmp_path / f"{n}.out{suffix}"
        return cost((verb, "--no-sync", str(path)), out)

    written(10)
    small, large = written(250), written(1000)
    assert small[0] == large[0] == 0
    assert large[1] < 4.6 * small[1], (small, large)


def test_the_count_can_fail() -> None:
    """Work that grows as a square is seen."""

    def square(n: int) -> int:
        return sum(len("") for _ in range(n) for _ in range(n))

    small, large = (counted(lambda n=n: square(n))[1] for n in (50, 200))
    assert large > 4.4 * small


@pytest.mark.parametrize("path", HOSTILE, ids=lambda path: path.name)
def test_every_byte_is_read_a_few_times(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = 0
    before = fileio.Reader.read_into

    def counting(self: fileio.Reader, view: memoryview[int], start: int) -> None:
        nonlocal read
        read += len(view)
        before(self, view, start)

    monkeypatch.setattr(fileio.Reader, "read_into", counting)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        main(["check", "--finite", "--sha256", str(path)])
    inside = [*filter(Path.is_file, path.rglob("*"))] if path.is_dir() else [path]
    nbytes = sum(each.stat().st_size for each in inside)
    # Heads and ends are read in windows, of each file of a broken set as of a file alone.
    assert read <= 10 * nbytes + 4 * 4096 * len(inside)


# In a process that may not have more memory than this: what it would need is refused, not swapped.

LIMITED = """
import io, re, resource, sys
from contextlib import redirect_stderr, redirect_stdout
import ml_dtypes, numpy  # before the measure: OpenBLAS takes 40 MB of addresses for each core
from ckptool.cli.main import main
line, warm_up, *paths = sys.argv[1].split(), *sys.argv[2:]
with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
    main([*line, warm_up])  # modules are no file's doing
with open("/proc/self/status") as status:
    size = 1024 * int(re.search(r"VmSize:\\s+(\\d+) kB", status.read())[1])
resource.setrlimit(resource.RLIMIT_AS, (size + BOUND, size + BOUND))
for path in paths:
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()) as err:
        code = main([*line, path])
    if code in (7, 70) or "Traceback" in err.getvalue() or "MemoryError" in err.getvalue():
        sys.exit(f"{path}: {code}: {err.getvalue()}")
""".replace("BOUND", str(BOUND))


WARM_UP = str(FIXTURES / "good" / "plain.pth")
# glibc reserves 64 MiB of address space for each thread that allocates while another does: how
# many do hangs on the load of the machine, and is no memory.
ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}


def limited(command: tuple[str, ...], paths: list[Path], cwd: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, " ".join(command), WARM_UP, *map(str, paths)],
        cwd=cwd, env=environment(ONE_ARENA), timeout=120, check=False,
        capture_output=True, text=True,
    )  # fmt: skip
    return done.stderr


linux = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@linux
@pytest.mark.parametrize("command", sampled(COMMANDS, 3), ids=" ".join)
def test_hostile_files_need_no_memory(tmp_path: Path, command: tuple[str, ...]) -> None:
    assert limited(command, HOSTILE, tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


# A megabyte that is meant to exhaust.
LARGE: dict[str, bytes] = {
    "a million nested tuples": b")" + b"\x85" * 1_000_000,
    "a million nested tuples as a key": b"}" + b")" + b"\x85" * 1_000_000 + b"Ns",
    "a million nested lists": b"]" * 500_000 + b"a" * 499_999,
    "40 000 colliding keys": SHAPES["integer keys that collide"](40_000),
    "an int of 5 million digits": b"\x8b" + struct.pack("<i", 2_000_000) + b"\x7f" * 2_000_000,
    "a decimal of 5 million digits": b"L" + b"9" * 5_000_000 + b"L\n",
    "a million marks": b"(" * 1_000_000 + b"N",
    "a million memo entries": b"N" + b"".join(b"r" + struct.pack("<I", n) for n in range(200_000)),
    "a million dots": dict_of([(text("." * 1_000_000), TENSOR)]),
    "200 000 names": SHAPES["names"](50_000),
    "long keys, one in another": b"".join(b"}" + text(str(n) * 20_000) for n in range(150))
    + TENSOR
    + b"s" * 150,
}


@pytest.mark.thorough
@linux
def test_what_is_meant_to_exhaust_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    paths = [
        torch_file(folder / f"{name}.pth".replace(" ", "_"), body, FOUR)
        for name, body in LARGE.items()
    ]
    assert limited(("check", "--finite"), paths, tmp_path) == ""
    assert limited(("info",), paths, tmp_path) == ""


@pytest.mark.parametrize("place", ["key", "value", "argument", "set"])
def test_a_tuple_that_holds_another_twice_and_so_on(run: Any, tmp_path: Path, place: str) -> None:
    """Sixty of them are a hundred bytes, and 2^60 tuples when each is written."""
    doubled = b")" + b"2\x86" * 60
    odd = {
        "key": b"}" + doubled + b"K\x01s",
        "value": doubled,
        "argument": b"cfoo.bar\nBaz\n" + doubled + b"\x85R",
        "set": b"c__builtin__\nset\n(]" + doubled + b"atR",
    }[place]
    path = torch_file(tmp_path / "in.pth", dict_of([(text("w"), TENSOR), (text("x"), odd)]), FOUR)
    for line in ("keys --all", "info", "check", "convert --to dcp", "convert --tensors-only"):
        out = [tmp_path / line.replace(" ", "_")] if line.startswith("convert") else []
        assert run(*line.split(), path, *out).code in (0, 3, 5), line


@linux
def test_the_limit_can_fail(tmp_path: Path) -> None:
    needy = LIMITED.replace("code = main([*line, path])", "code = len(b'1' * (300 << 20)) * 0")
    done = subprocess.run(
        [sys.executable, "-c", needy, "check", WARM_UP, "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "MemoryError" in done.stderr


@linux
def test_check_streams(tmp_path: Path) -> None:
    """A deflated storage of 256 MiB, and a terabyte of tensor that nobody asked to read."""
    count = 64 << 20
    body = dict_of([(text("w"), TENSOR.replace(b"K\x04", b"J" + struct.pack("<i", count)))])
    with zipfile.ZipFile(tmp_path / "deflated.pth", "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("archive/data.pkl", b"\x80\x02" + body + b".")
        with made.open("archive/data/0", "w") as record:
            for _ in range(256):
                record.write(bytes(1 << 20))
        made.writestr("archive/version", b"3\n")
    header = b'{"a":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}' % (1 << 40, 1 << 40)
    with (tmp_path / "sparse.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        try:
            file.truncate(8 + len(header) + (1 << 40))
        except OSError:
            pytest.skip("no files of a terabyte here")
    paths = [tmp_path / "deflated.pth", tmp_path / "sparse.safetensors"]
    assert limited(("check", "--finite"), paths, tmp_path) == ""


@pytest.mark.parametrize("name", sampled([*costly.INPUTS], 8))
def test_calls_grow_with_what_is_meant_to_cost(tmp_path: Path, name: str) -> None:
    suffix, writer, _ = costly.INPUTS[name]
    counts = {}
    for n in (10, 500, 2000):
        writer(path := tmp_path / f"{n}{suffix}", n)
        counts[n] = cost(("check",), path)
    assert counts[500][0] == counts[2000][0] != 70
    assert counts[2000][1] < 4.4 * counts[500][1], counts
