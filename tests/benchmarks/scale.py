"""Measure what `convert` takes against bytes, tensors, shards and ranks: the tables of scale.md.

    python tests/benchmarks/scale.py
    python tests/benchmarks/scale.py --sizes 1,8,64 --tensors 100,10000,100000 --ranks 1,2,4

Inputs are sparse safetensors files of float32 zeros: reading them costs memory bandwidth, no disk.
Outputs would not fit on many disks, so a piece of an output that was written, and read back by
ckptool, is given back to the file system by a hole, which is zeros too; nothing is flushed. So the
seconds are those of ckptool and of the page cache, and a disk that is slower adds to them. CPU is
that of all threads and ranks.
"""

import argparse
import ctypes
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from run import GIB, HERE, MIB, positive

PIECE = 256 * MIB  # that is given back at once
PUNCH_HOLE, KEEP_SIZE = 2, 1  # linux/falloc.h


class Cell(NamedTuple):
    """One conversion: of so many GiB in so many tensors, into so many shards, by so many ranks."""

    gib: int
    tensors: int
    shards: int = 1
    ranks: int = 0
    suffix: str = ".safetensors"


def make(path: Path, nbytes: int, count: int) -> None:
    """Write a sparse file of zeros with so many tensors of one size."""
    each = nbytes // count // 4 * 4
    entries = {
        f"model.layers.{number}.weight": {
            "dtype": "F32",
            "shape": [each // 4],
            "data_offsets": [number * each, (number + 1) * each],
        }
        for number in range(count)
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + count * each)


def give_back() -> None:
    """Let the engine punch holes behind what it has written, and ask for no space before."""
    from ckptool.files import copying, publish

    libc = ctypes.CDLL(None, use_errno=True)
    real, written = copying.write_at, {}

    def write_at(target: int, data: memoryview, position: int) -> None:
        real(target, data, position)
        file, piece = os.fstat(target).st_ino, position // PIECE  # shards reuse descriptors
        written[file, piece] = written.get((file, piece), 0) + len(data)
        if written[file, piece] == PIECE:
            start, length = ctypes.c_long(piece * PIECE), ctypes.c_long(PIECE)
            libc.fallocate(target, PUNCH_HOLE | KEEP_SIZE, start, length)

    copying.write_at = write_at
    publish.free_space = lambda target: None
    del os.posix_fallocate


def run(cell: Cell, source: Path) -> tuple[float, float, int]:
    """Convert; return wall and CPU seconds, and the largest peak bytes of a process."""
    out = source.with_name("out" if cell.shards > 1 else f"out{cell.suffix}")
    line = ["convert", "-q", "--no-sync", str(source), str(out)]
    line += ["--max-shard-size", str(cell.gib * GIB // cell.shards)] if cell.shards > 1 else []
    line += ["--distributed"] if cell.ranks else []
    watch = [sys.executable, "-I", "-S", str(HERE / "measure.py"), str(source.with_name("stderr"))]
    command = [sys.executable, __file__, "--cell", str(cell.ranks), *line]
    done = subprocess.run([*watch, *command], capture_output=True, text=True, check=True)
    status, wall, user, system, peak = done.stdout.split()
    if status != "0":
        sys.exit(f"{' '.join(command)}: {source.with_name('stderr').read_text()}")
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    return float(wall), float(user) + float(system), int(peak)


def run_cell(ranks: int, line: list[str]) -> int:
    """Run a command line here, or as so many ranks of this machine."""
    if not ranks:
        from ckptool.cli.main import main

        give_back()
        return main(line)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, "--cell", "0", *line],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    return next(filter(None, [each.wait() for each in started]), 0)


def cells(given: argparse.Namespace) -> dict[str, list[Cell]]:
    """Return the cells of each table."""
    least = given.sizes[0]
    middle = given.sizes[len(given.sizes) // 2]
    return {
        "bytes": [Cell(gib, 1000) for gib in given.sizes],
        "tensors": [
            Cell(least, count, suffix=suffix)
            for count in given.tensors
            for suffix in (".safetensors", ".pth")
        ],
        "shards": [Cell(middle, 10_000, count) for count in given.shards],
        "ranks": [Cell(middle, 1000, 8, count) for count in (0, *given.ranks)],
    }


def numbers(text: str) -> list[int]:
    """Read numbers separated by commas."""
    return [int(each) for each in text.split(",")]


def main() -> int:
    """Print a table for each thing that grows."""
    if sys.argv[1:2] == ["--cell"]:
        return run_cell(int(sys.argv[2]), sys.argv[3:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=numbers, default=[1, 8, 64], help="in GiB")
    parser.add_argument("--tensors", type=numbers, default=[100, 10_000, 100_000])
    parser.add_argument("--shards", type=numbers, default=[1, 10, 1000])
    parser.add_argument("--ranks", type=numbers, default=[1, 2, 4])
    parser.add_argument("--rounds", type=positive, default=1, help="the fastest counts")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as made:
        source = Path(made) / "in.safetensors"
        for name, wanted in cells(given).items():
            print(
                f"\n{name}: GiB  tensors  to            shards  ranks    wall s   CPU s  peak MiB"
            )
            for cell in wanted:
                make(source, cell.gib * GIB, cell.tensors)
                rounds = [run(cell, source) for _ in range(given.rounds)]
                wall, cpu, peak = min(rounds)
                print(
                    f"{cell.gib:{len(name) + 5}}  {cell.tensors:7}  {cell.suffix:12}  "
                    f"{cell.shards:6}  {cell.ranks or '-':>5}  {wall:8.2f}  {cpu:6.2f}"
                    f"  {peak / MIB:8.0f}",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    sys.exit(main())
