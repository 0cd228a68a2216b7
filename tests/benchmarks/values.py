"""Time what reads all values, `keys --stats` and `diff` of files that differ, against torch.

    python tests/benchmarks/values.py --size 1GiB --rounds 5
    python tests/benchmarks/values.py --size 8GiB --rounds 1 --no-baseline

The file is that of run.py, float32, and so are rounds and ratios; the other files hold 1.001 times
its floats, and its floats in bfloat16. Statistics are to come at 1 GB of a file in a second, and
all in 96 MiB. The torch scripts compute in double precision, a tensor after the other.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limits import Limit, judge, table_of_readings, table_of_verdicts
from run import GIB, Task, fail, gib, make_big, nbytes_of, positive, run_rounds, with_torch

CKPTOOL = (sys.executable, "-m", "ckptool")
DIFFERENT = ("sh", "-c", '"$@" || test $? = 1', "sh")  # the exit status of `diff`


def make_others(source: Path) -> tuple[Path, Path]:
    """Write a file whose every float differs a little, and one of another dtype."""
    moved, rounded = source.with_name("moved.pth"), source.with_name("rounded.pth")
    weights = ("average", "--weights", "0.5,0.501", str(source), str(source), str(moved))
    for command in (weights, ("convert", "--dtype", "bf16", str(source), str(rounded))):
        if subprocess.run((*CKPTOOL, *command, "--no-sync", "-q"), check=False).returncode:
            fail(f"no {command[0]} of {source.name}")
    return moved, rounded


def tasks(source: Path, *, baseline: bool) -> Iterator[Task]:
    """Yield what reads values, and the scripts that do the same."""
    moved, rounded = make_others(source)
    yield Task("keys --stats", (*CKPTOOL, "keys", "--stats", str(source)), source)
    yield Task("keys --stats bf16", (*CKPTOOL, "keys", "--stats", str(rounded)), source)
    keys = ("--at", "state_dict", "--left-at", "state_dict", "--right-at", ".")
    for name, other, more in (("far", moved, keys[2:]), ("rounded", rounded, keys[:2])):
        command = (*CKPTOOL, "diff", *more, str(source), str(other))
        yield Task(f"diff {name}", (*DIFFERENT, *command), source)
    if baseline:
        seconds = source.with_name("seconds")
        script = with_torch("statistics", str(seconds), str(source))
        yield Task("torch statistics", script, source, None, seconds)
        script = with_torch("distance", str(seconds), str(source), str(moved))
        yield Task("torch distance", script, source, None, seconds)


def limits(nbytes: int) -> Iterator[Limit]:
    """Yield what is judged: work is without starting torch, ckptool's time is all of it."""
    yield Limit("keys --stats", "wall", "ms", most=nbytes / 1e6)
    yield Limit("keys --stats bf16", "wall", "ms", most=nbytes / 2 / 1e6)
    yield Limit("torch statistics", "work", "x", least=1, per="keys --stats")
    yield Limit("torch distance", "work", "x", least=1, per="diff far")
    for name in ("keys --stats", "keys --stats bf16", "diff far", "diff rounded"):
        yield Limit(name, "peak", "MiB", most=96)
    for name in ("diff far", "diff rounded"):
        yield Limit(name, "wall", "ms")


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=nbytes_of, default=GIB)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as folder:
        source = Path(folder) / "in.pth"
        make_big(source, given.size, memory=2 * given.size)
        todo = tuple(tasks(source, baseline=given.baseline))
        rounds = run_rounds(todo, given.rounds, gib(given.size))
    verdicts = [found for limit in limits(given.size) if (found := judge(limit, rounds))]
    print(*table_of_readings(rounds), "", *table_of_verdicts(verdicts), sep="\n")
    return 1 if any(verdict.met is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
