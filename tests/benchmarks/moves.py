"""Time recipes that move tensors against `cp`, and hold them to their limits.

    python tests/benchmarks/moves.py
    python tests/benchmarks/moves.py --size 1GiB --matrix 256x1024 --rounds 5 --jobs stack,rope
    python tests/benchmarks/moves.py --size 8GiB --rounds 1 --pairs pth-safetensors

Every job reads and writes a torch file and a safetensors file, without sync, and moves all tensors
of it: square or other float32 matrices, four to a layer. Rounds, ratios and limits are those of
run.py; the exit status too.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from limits import MOVES, judge, move_limits, table_of_readings, table_of_verdicts
from run import GIB, Task, fail, gib, machine, nbytes_of, positive, run_rounds, say, with_torch

CKPTOOL = (sys.executable, "-m", "ckptool", "convert", "--no-sync")
PAIRS = ("pth-pth", "pth-safetensors", "safetensors-pth", "safetensors-safetensors")
EACH = [f"layers.{{i}}.{number}.weight" for number in range(4)]
STEPS = {
    "rename": "rename = [['layers.{i}.{e}.weight', 'blocks.{i}.linear{e}.weight']]",
    "split": "split = {from = 'layers.{i}.{e}.weight', to = ['{i}.{e}.q', '{i}.{e}.k']}",
    "fuse": f"fuse = {{from = {EACH}, to = 'layers.{{i}}.weight'}}",
    "stack": "stack = {from = 'layers.{i}.{e}.weight', to = 'layers.{i}.weight'}",
    "transpose": "transpose = {keys = '*'}",
    "rope": "rope = {keys = '*', heads = 32, to = 'half'}",
}


def make(folder: Path, nbytes: int, matrix: str) -> None:
    """Make a file with torch, and the other from it."""
    source = folder / "in.pth"
    for command in (
        with_torch("matrices", str(source), str(nbytes), *matrix.split("x")),
        (*CKPTOOL, str(source), str(folder / "in.safetensors")),
    ):
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            fail(f"{folder}: the files could not be made")


def tasks(folder: Path, jobs: tuple[str, ...], pairs: tuple[str, ...]) -> Iterator[Task]:
    """Yield the copies of both files, and each job for each pair of containers."""
    for suffix in dict.fromkeys(pair.partition("-")[0] for pair in pairs):
        source, copy = folder / f"in.{suffix}", folder / f"copy.{suffix}"
        yield Task(f"cp {suffix}", ("cp", str(source), str(copy)), source, copy)
    for job in jobs:
        recipe = folder / f"{job}.toml"
        recipe.write_text(f"recipe = 1\n[[step]]\n{STEPS[job]}\n")
        for pair in pairs:
            before, _, after = pair.partition("-")
            source, target = folder / f"in.{before}", folder / f"out.{after}"
            command = (*CKPTOOL, "--recipe", str(recipe), str(source), str(target))
            yield Task(f"{job} {pair}", command, source, target)


def some_of(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    """Read a list of names."""
    names = tuple(text.split(","))
    if not set(names) <= {*known}:
        raise argparse.ArgumentTypeError(f"{text!r}: there are {','.join(known)}")
    return names


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=nbytes_of, default=GIB, help="of each file (default 1GiB)")
    add("--matrix", default="4096x2048", help="rows and columns (default 4096x2048: 32 MiB)")
    add("--rounds", type=positive, default=5, help="(default 5)")
    add("--jobs", type=lambda text: some_of((*STEPS,), text), default=(*STEPS,), help="(all)")
    add("--pairs", type=lambda text: some_of(PAIRS, text), default=PAIRS, help="(all)")
    add("--folder", type=Path, default=tempfile.gettempdir(), help="to work in (temporary)")
    given = parser.parse_args()
    about = machine(given.folder.resolve())
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as made:
        folder = Path(made).resolve()
        say(f"making two files of {gib(given.size)}")
        make(folder, given.size, given.matrix)
        rounds = run_rounds((*tasks(folder, given.jobs, given.pairs),), given.rounds, "moves")
    limits = [limit for job in MOVES for pair in PAIRS for limit in move_limits(job, pair)]
    verdicts = [verdict for limit in limits if (verdict := judge(limit, rounds))]
    print("", *table_of_readings(rounds), "", *table_of_verdicts(verdicts), sep="\n")
    return 1 if any(verdict.met is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main())
