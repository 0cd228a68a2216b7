"""Time `convert --distributed` with 1, 2 and 4 ranks of this machine against one process.

    python tests/benchmarks/ranks.py --size 1GiB --rounds 3
    python tests/benchmarks/ranks.py --size 8GiB --rounds 1 --ranks 8 --no-sync

The file is that of run.py, written as shards of an eighth of it. Printed are the medians of the
wall time, that of the work (from when the last rank has imported torch until the last has ended,
against the whole of the one process), its ratio to the one process in the same round, and the
largest peak memory of a process: torch takes most of it. The last line compares the bytes.
"""

import argparse
import filecmp
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from run import GIB, HERE, make_big, nbytes_of, positive

ALONE = 0  # one process, without torch


def as_rank(times: str, arguments: list[str]) -> int:
    """Run ckptool, and leave behind when it began to work and when it ended."""
    import torch.distributed  # noqa: F401

    from ckptool.cli.main import main

    start = time.time()
    code = main(arguments)
    Path(times).write_text(f"{start!r} {time.time()!r}")
    return code


def start_ranks(size: int, folder: Path, arguments: list[str]) -> int:
    """Start so many ranks as a launcher does; return the first exit status that is not 0."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--as-rank", str(folder / f"times{rank}"), *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(size)
    ]
    return next(filter(None, [each.wait() for each in ranks]), 0)


def measured(size: int, source: Path, out: Path, options: list[str]) -> tuple[float, float, int]:
    """Convert; return the seconds of all and of the work, and the peak bytes of a process."""
    shutil.rmtree(out, ignore_errors=True)
    subprocess.run(["sync"], check=True)
    folder = source.parent
    line = ["convert", "-q", str(source), str(out), *options]
    if size == ALONE:
        command = [sys.executable, "-m", "ckptool", *line]
    else:
        command = [sys.executable, __file__, "--start", str(size), str(folder)]
        command += [*line, "--distributed"]
    watch = [sys.executable, "-I", "-S", str(HERE / "measure.py"), str(folder / "stderr")]
    done = subprocess.run([*watch, *command], capture_output=True, text=True, check=True)
    status, wall, _, _, peak = done.stdout.split()
    if status != "0":
        sys.exit(f"{' '.join(command)}: {(folder / 'stderr').read_text()}")
    if size == ALONE:
        return float(wall), float(wall), int(peak)
    times = [(folder / f"times{rank}").read_text().split() for rank in range(size)]
    starts, ends = zip(*(map(float, each) for each in times), strict=True)
    return float(wall), max(ends) - max(starts), int(peak)


def same(one: Path, other: Path) -> bool:
    """Compare two folders byte for byte."""
    names = sorted(os.listdir(one))
    equal = filecmp.cmpfiles(one, other, names, shallow=False)[0]
    return names == sorted(os.listdir(other)) == equal


def main() -> int:
    """Print a line for each number of ranks."""
    if sys.argv[1:2] == ["--as-rank"]:
        return as_rank(sys.argv[2], sys.argv[3:])
    if sys.argv[1:2] == ["--start"]:
        return start_ranks(int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=nbytes_of, default=GIB)
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--ranks", default="1,2,4", help="how many, separated by commas")
    parser.add_argument("--no-sync", action="store_true")
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    options = ["--max-shard-size", str(given.size // 8), *["--no-sync"] * given.no_sync]
    sizes = [ALONE, *map(int, given.ranks.split(","))]
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as made:
        source, alone = Path(made) / "in.pth", Path(made) / "alone"
        make_big(source, given.size, memory=given.size)
        found = {size: [] for size in sizes}
        equal = True
        for _ in range(given.rounds):
            for size in sizes:
                out = alone if size == ALONE else Path(made) / "out"
                found[size].append(measured(size, source, out, options))
                equal = equal and (size == ALONE or same(alone, out))
        print("ranks     wall s   work s   x one process   peak MiB")
        for size, rounds in found.items():
            wall, work, peak = zip(*rounds, strict=True)
            ratios = [each[1] / one[1] for each, one in zip(rounds, found[ALONE], strict=True)]
            name = "none" if size == ALONE else str(size)
            print(
                f"{name:5}   {statistics.median(wall):8.2f} {statistics.median(work):8.2f}"
                f"   {statistics.median(ratios):13.2f}   {max(peak) / 2**20:8.0f}"
            )
        print("the bytes are the same" if equal else "the bytes DIFFER")
    return 0 if equal else 1


if __name__ == "__main__":
    sys.exit(main())
