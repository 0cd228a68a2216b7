"""Time recipes of many rules on many keys against the same conversion without one.

    python tests/benchmarks/rules.py --rounds 7

10 000 small tensors. A recipe of 100 rules in one step may take 0.2 s more, by the
median of the rounds; 10 000 rules, and 100 steps of one rule, are only shown.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from limits import Round, table_of_readings
from run import Task, make, positive, run_rounds

KEYS = 10_000
MOST = 0.2  # seconds, of 100 rules
PLAIN = "no recipe"


def rules(count: int) -> list[tuple[str, str]]:
    """Return templates of which the first hundred take a hundredth of the keys each."""
    return [(f"layers.{{i}}.experts.{at}.{{p}}", f"h.{{i}}.e{at}.{{p}}") for at in range(count)]


def recipe(path: Path, steps: list[list[tuple[str, str]]]) -> Path:
    """Write a recipe of rename steps."""
    lines = [f"[[step]]\noptional = true\nrename = {[*map(list, step)]}" for step in steps]
    path.write_text("\n".join(["recipe = 1", *lines, ""]), encoding="utf-8")
    return path


def tasks(folder: Path, source: Path) -> Iterator[Task]:
    """Yield the conversion without a recipe, and with several."""
    target = folder / "out.pth"
    command = (sys.executable, "-m", "ckptool", "convert", "--no-sync", str(source), str(target))
    yield Task(PLAIN, command, source, target, least=0)
    for name, steps in {
        "100 rules": [rules(100)],
        "10000 rules": [rules(10_000)],
        "100 steps": [[rule] for rule in rules(100)],
    }.items():
        path = recipe(folder / f"{name}.toml", steps)
        yield Task(name, (*command, "--recipe", str(path)), source, target, least=0)


def more(name: str, rounds: list[Round]) -> list[float]:
    """Return how many seconds more a task took than the plain one, in each round."""
    return [each[name].wall - each[PLAIN].wall for each in rounds]


def main() -> int:
    """Measure, show, and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument("--folder", type=Path, default=tempfile.gettempdir())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=given.folder) as name:
        source = Path(name) / "in.pth"
        make("experts", source, KEYS)
        todo = tuple(tasks(Path(name), source))
        rounds = run_rounds(todo, given.rounds, f"{KEYS} keys")
    print(*table_of_readings(rounds), "", sep="\n")
    for task in todo[1:]:
        taken = more(task.name, rounds)
        print(f"{task.name:<22}{median(taken):>8.2f} s more ({min(taken):.2f} to {max(taken):.2f})")
    return 0 if median(more("100 rules", rounds)) <= MOST else 1


if __name__ == "__main__":
    sys.exit(main())
