"""Time the average of several float32 checkpoints against reading them, and hold it to limits.

    python tests/benchmarks/averages.py --size 1GiB --rounds 5
    python tests/benchmarks/averages.py --size 8GiB --rounds 1 --no-baseline
    python tests/benchmarks/averages.py --size 256MiB --files 20

Reading them is judged by what copying them costs, `cat` of all into one file: the average, too,
reads every byte, and it compares checksums and writes and reads back a third. `cat` to /dev/null,
`ckptool check` and `torch.load` of each are shown. The file is that of run.py, and so are rounds
and ratios.
"""

import argparse
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limits import Limit, judge, table_of_readings, table_of_verdicts
from run import GIB, Task, gib, make_big, nbytes_of, positive, run_rounds, with_torch


def tasks(sources: list[Path], *, baseline: bool) -> Iterator[Task]:
    """Yield the average into both containers, and what it is compared with."""
    first, paths = sources[0], list(map(str, sources))
    ckptool = (sys.executable, "-m", "ckptool")
    for suffix in (".pth", ".safetensors"):
        out = first.with_name("out" + suffix)
        command = (*ckptool, "average", "--no-sync", *paths, str(out))
        yield Task(f"average{suffix}", command, first, out)
    if baseline:
        copy, seconds = first.with_name("copy"), first.with_name("seconds")
        script = 'out=$1; shift; cat "$@" > "$out"'
        yield Task("cat", ("cat", *paths), first)
        yield Task("cat into a file", ("sh", "-c", script, "sh", str(copy), *paths), first, copy)
        yield Task("check", (*ckptool, "check", *paths), first)
        yield Task("torch.load", with_torch("load", str(seconds), *paths), first, None, seconds)
        out = first.with_name("out.pth")
        script = with_torch("average", str(seconds), str(out), *paths)
        yield Task("torch average", script, first, out, seconds)


def limits() -> Iterator[Limit]:
    """Yield what is judged: work is without starting torch, ckptool's time is all of it."""
    for name in ("average.pth", "average.safetensors"):
        yield Limit(name, "wall", "x", most=1.5, per="cat into a file")
        yield Limit("torch average", "work", "x", least=1, per=name)
        yield Limit("torch.load", "work", "x", per=name)
        for other in ("cat", "check"):
            yield Limit(name, "wall", "x", per=other)
        yield Limit(name, "peak", "MiB", most=96)


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=nbytes_of, default=GIB, help="of each file")
    parser.add_argument("--files", type=positive, default=3)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--baseline", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as folder:
        sources = [Path(folder) / f"in{number}.pth" for number in range(given.files)]
        make_big(sources[0], given.size, memory=given.size)
        for other in sources[1:]:
            shutil.copyfile(sources[0], other)
        rounds = run_rounds(
            tuple(tasks(sources, baseline=given.baseline)), given.rounds, gib(given.size)
        )
    verdicts = [found for limit in limits() if (found := judge(limit, rounds))]
    print(*table_of_readings(rounds), "", *table_of_verdicts(verdicts), sep="\n")
    return 1 if any(verdict.met is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
