"""Time casts of a float32 checkpoint against `cp` and a torch script, and hold them to limits.

    python tests/benchmarks/casts.py --size 1GiB --rounds 5
    python tests/benchmarks/casts.py --size 8GiB --rounds 1 --no-baseline

All tasks run on one core. The file is that of run.py, and so are rounds and ratios. Casts to bf16
have limits: half of the bytes that `cp` reads in a second, faster than torch's work, 96 MiB.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limits import Limit, judge, table_of_readings, table_of_verdicts
from run import GIB, Task, gib, make_big, nbytes_of, positive, run_rounds, with_torch

DTYPES = ("bfloat16", "float16", "float8_e5m2")
PARTS = {"bfloat16": 0.5, "float16": 0.5, "float8_e5m2": 0.25}  # of the bytes, that are written


def tasks(source: Path, dtypes: list[str], *, baseline: bool) -> Iterator[Task]:
    """Yield the copy, and casts into both containers by ckptool and by a torch script."""
    if baseline:
        copy = source.with_name("copy.pth")
        yield Task("cp", ("cp", str(source), str(copy)), source, copy)
    for dtype in dtypes:
        cast = ("convert", "--no-sync", "--dtype", dtype, "--overflow", "inf")
        for suffix in (".pth", ".safetensors"):
            out = source.with_name("out" + suffix)
            command = (sys.executable, "-m", "ckptool", *cast, str(source), str(out))
            yield Task(f"{dtype}{suffix}", command, source, out, None, PARTS[dtype] * 0.95)
        if baseline:
            out, seconds = source.with_name("out.pth"), source.with_name("seconds")
            script = with_torch("cast", str(source), str(out), str(seconds), dtype)
            yield Task(f"torch {dtype}", script, source, out, seconds, PARTS[dtype] * 0.95)


def limits(dtypes: list[str]) -> Iterator[Limit]:
    """Yield what is judged; all but bf16 is only shown."""
    for dtype in dtypes:
        bound = dtype == "bfloat16"
        for name in (f"{dtype}.pth", f"{dtype}.safetensors"):
            yield Limit(name, "wall", "x", most=2 if bound else None, per="cp")
            yield Limit(name, "peak", "MiB", most=96)
            yield Limit(f"torch {dtype}", "work", "x", least=1 if bound else None, per=name)


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=nbytes_of, default=GIB)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--dtype", choices=DTYPES, action="append")
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    dtypes = given.dtype or ["bfloat16"]
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as folder:
        source = Path(folder) / "in.pth"
        make_big(source, given.size, memory=given.size)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        todo = tuple(tasks(source, dtypes, baseline=given.baseline))
        rounds = run_rounds(todo, given.rounds, gib(given.size))
    verdicts = [found for limit in limits(dtypes) if (found := judge(limit, rounds))]
    print(*table_of_readings(rounds), "", *table_of_verdicts(verdicts), sep="\n")
    return 1 if any(verdict.met is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
