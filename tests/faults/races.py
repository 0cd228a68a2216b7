"""Kills, races of two writers, and inputs that are replaced: `python tests/faults/races.py`.

Each run is a fork of this process and its moment is random: `--runs N` of each kind, from the seed
`--seed`. After each, the output is old or new and whole, as torch and safetensors read it, what
was said is true, and what ckptool says of the place leads to what is there. Exit code 1 says that
one was not.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

TARGETS = {
    "file": ("out.pth", ""),
    "set": ("set", "--max-shard-size 40KB"),
    "set among files of others": ("others", "--max-shard-size 40KB"),
    "folder": ("dcp", "--to dcp"),
}
TEMPORARY = re.compile(r"\.(.{1,40})\.[0-9a-f]{12}\.tmp")
OLD, ONE, TWO = 1.0, 2.0, 3.0  # what all tensors of a checkpoint hold


@dataclass
class Run:
    """A command line that ended: its code (or minus a signal), and what it said."""

    code: int
    out: str
    err: str


@dataclass
class Count:
    """What came out, and what was wrong."""

    seen: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Job:
    """A command line in a fork of this process."""

    def __init__(self, folder: Path, line: str, swap: bool = True, last: int = 0) -> None:
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed once it has ended)
        self._printed = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.pid = os.fork()
        if not self.pid:
            self._be(folder, line, swap, last)

    def _be(self, folder: Path, line: str, swap: bool, last: int) -> None:
        code = 70
        try:
            from ckptool.cli import main as cli
            from ckptool.files import publish

            os.chdir(folder)
            os.dup2(self._printed.fileno(), 1)
            os.dup2(self._said.fileno(), 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            if not swap:
                publish.swap = _no_swap  # type: ignore[assignment]
            if last:
                _die_at(last)
            code = cli.main(line.split())
            sys.stdout.flush()
        finally:
            os._exit(code)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> Run:
        _, status = os.waitpid(self.pid, 0)
        texts = []
        for file in (self._printed, self._said):
            file.seek(0)
            texts.append(file.read())
            file.close()
        return Run(os.waitstatus_to_exitcode(status), *texts)


def _no_swap(one: str, other: str) -> None:
    import errno

    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _die_at(last: int) -> None:
    """Kill this process at the n-th change of a name."""
    calls = itertools.count(1)

    def dying(real: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **more: object) -> object:
            if next(calls) == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **more)

        return call

    for name in ("link", "rename", "replace", "unlink", "mkdir", "rmdir"):
        setattr(os, name, dying(getattr(os, name)))


def run(folder: Path, line: str) -> Run:
    """Run a command line to its end."""
    return Job(folder, line).wait()


# What is there.


def save(path: Path, value: float, count: int = 12) -> None:
    """Write a checkpoint whose tensors all hold one value."""
    torch.save({f"layers.{n}.weight": torch.full((64, 100), value) for n in range(count)}, path)


def value_at(place: Path) -> float | str | None:
    """Return the value of a checkpoint as other libraries read it; None for none, else why not."""
    try:
        if place.suffix == ".pth":
            state = torch.load(place, weights_only=True) if place.exists() else {}
        elif (place / ".metadata").exists():
            state = _distributed(place)
        else:
            state = _shards(place)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    values = {float(value) for tensor in state.values() for value in tensor.unique()}
    return values.pop() if len(values) == 1 else f"values {values}" if values else None


def _distributed(place: Path) -> dict[str, torch.Tensor]:
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.TemporaryDirectory() as folder:
        dcp_to_torch_save(place, f"{folder}/x.pth")
        return torch.load(f"{folder}/x.pth", weights_only=True)  # type: ignore[no-any-return]


def _shards(place: Path) -> dict[str, torch.Tensor]:
    import json

    index = place / "model.safetensors.index.json"
    if not index.exists():
        return {}
    where = json.loads(index.read_text())["weight_map"]
    state: dict[str, torch.Tensor] = {}
    for name in sorted(set(where.values())):
        state |= load_file(place / name)
    assert state.keys() == where.keys()
    return state


def lay_out(here: Path, kind: str) -> Path:
    """Make the inputs and an old output; return the output."""
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    name, option = TARGETS[kind]
    for path, value in (("old.pth", OLD), ("one.pth", ONE), ("two.pth", TWO)):
        save(here / path, value, 12 if value < TWO else 14)
    done = run(here, f"convert -q old.pth {name} {option}")
    assert done.code == 0, done
    if kind == "set among files of others":
        (here / name / "config.json").write_text("theirs")
        (here / name / "link").symlink_to("config.json")
    return here / name


def temporary_in(here: Path) -> list[Path]:
    """List what is temporary, beside the outputs and in them."""
    return [path for path in here.glob("**/.*.tmp") if TEMPORARY.fullmatch(path.name)]


def complaints(place: Path, allowed: tuple[float, ...], killed: bool) -> Iterator[str]:
    """Say what is wrong with a place, and with what ckptool says of it."""
    here, value = place.parent, value_at(place)
    said = run(here, f"info {place.name}")
    if not killed and (left := temporary_in(here)):
        yield f"left behind: {left}"
    if value in allowed:
        if said.code:
            yield f"info of a whole checkpoint: {said.err}"
        if run(here, f"check {place.name}").code:
            yield "check of a whole checkpoint"
    elif value is not None or not killed:
        yield f"the output is neither: {value}"
    else:
        hint = next((line for line in said.err.splitlines() if line.startswith("hint: ")), "")
        old = hint.rpartition(" ")[2]
        if said.code != 3 or value_at(here / old) != OLD:
            yield f"no output, and info says: {said.err}"
    if place.name == "others":
        theirs = place / "config.json"
        if (
            not theirs.exists()
            or theirs.read_text() != "theirs"
            or not (place / "link").is_symlink()
        ):
            yield "files of others are gone"


# Kinds of runs.


def kill(here: Path, dice: random.Random, count: Count) -> None:
    """Kill a replacement at a random moment; then replace again."""
    kind, swap = dice.choice([*TARGETS]), dice.random() < 0.5
    place = lay_out(here, kind)
    name, option = TARGETS[kind]
    line = f"convert -q --force one.pth {name} {option}"
    started = time.monotonic()
    assert Job(here, line, swap).wait().code == 0
    whole = time.monotonic() - started
    place = lay_out(here, kind)
    if dice.random() < 0.5:
        job = Job(here, line, swap)
        time.sleep(dice.random() * whole)
        job.kill()
    else:  # moves are over too soon to be met by chance
        job = Job(here, line, swap, last=dice.randint(1, 20))
    done = job.wait()
    count.seen["killed" if done.code < 0 else "too late"] += 1
    count.seen[{OLD: "then the old", ONE: "then the new"}.get(value_at(place), "then aside")] += 1
    found = list(complaints(place, (OLD, ONE), killed=True))
    again = run(here, line)
    if again.code or value_at(place) != ONE:
        found.append(f"the next run: {again.err}")
    count.wrong += [f"kill, {kind}, exchange {swap}: {each}" for each in found]


def race(here: Path, dice: random.Random, count: Count) -> None:
    """Let two write to one output, with --force and without."""
    kind, force = dice.choice([*TARGETS]), dice.choice([["--force"], []])
    place = lay_out(here, kind)
    if not force:
        shutil.rmtree(place) if place.is_dir() else place.unlink()
    name, option = TARGETS[kind]
    words = " ".join(["convert", "-q", *force])
    swap = dice.random() < 0.7
    jobs = []
    for source in dice.sample(["one.pth", "two.pth"], 2):
        jobs.append(Job(here, f"{words} {source} {name} {option}", swap))
        time.sleep(dice.random() * 0.01)
    ended = [job.wait() for job in jobs]
    codes = sorted(each.code for each in ended)
    count.seen[f"exit codes {codes}"] += 1
    found = (
        []
        if kind.startswith("set among") and not force
        else list(complaints(place, (ONE, TWO), killed=False))
    )
    if codes not in ([0, 0], [0, 5]) or (codes == [0, 0] and not force):
        found.append(f"exit codes {codes}: {[each.err for each in ended]}")
    for each in ended:
        first = each.err.partition("\n")[0]
        if each.code == 5 and not re.search(
            "exists|already|not empty|by someone else|other", first
        ):
            found.append(f"the loser is told: {first}")
        if not each.code and each.err:
            found.append(f"the winner is told: {each.err}")
    count.wrong += [f"race, {kind}, {words}, exchange {swap}: {each}" for each in found]


READERS = ("check --finite {s}", "keys {s}", "diff {s} {s}", "convert -q {s} read.pth")


def replaced(here: Path, dice: random.Random, count: Count) -> None:
    """Replace an input all the time, by renames, while it is read."""
    kind = dice.choice([*TARGETS])
    place = lay_out(here, kind)
    name, option = TARGETS[kind]
    with replacing(here, name, option):
        for line in READERS:
            time.sleep(dice.random() * 0.02)
            done = run(here, line.format(s=name))
            count.seen[f"{line.split()[0]} {done.code}"] += 1
            wrong = []
            if done.code not in ((0, 1) if "diff" in line else (0,)):
                wrong.append(f"exit code {done.code}: {done.out} {done.err}")
            if "convert" in line and value_at(here / "read.pth") not in (OLD, ONE, TWO):
                wrong.append(f"what was written: {value_at(here / 'read.pth')}")
            count.wrong += [f"replaced, {kind}, {line}: {each}" for each in wrong]
    count.wrong += [f"replaced, {kind}: {e}" for e in complaints(place, (OLD, ONE, TWO), False)]


@contextmanager
def replacing(here: Path, name: str, option: str) -> Iterator[None]:
    """Replace a place again and again by another checkpoint, until the block ends."""
    job, stop = os.fork(), here / "stop"
    if not job:
        from ckptool.cli import main as cli

        os.chdir(here)
        code = turn = 0
        while not stop.exists() and not code:
            turn += 1
            source = ("one.pth", "two.pth")[turn % 2]
            code = cli.main(f"convert -q --force {source} {name} {option}".split())
        os._exit(code)
    try:
        yield
    finally:
        stop.touch()
        assert os.waitpid(job, 0)[1] == 0


KINDS: dict[str, Callable[[Path, random.Random, Count], None]] = {
    "kill": kill,
    "race": race,
    "replaced": replaced,
}


def main() -> int:
    """Run all kinds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=60, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS], action="append", help="only these")
    given = parser.parse_args()
    warm_up()
    wrong = []
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # where a flush takes no time
    with tempfile.TemporaryDirectory(dir=memory) as name:
        for kind in given.kind or KINDS:
            started, count = time.monotonic(), Count()
            for number in range(given.runs):
                KINDS[kind](Path(name) / "run", random.Random(f"{given.seed} {number}"), count)
            took = time.monotonic() - started
            seen = ", ".join(f"{what}: {n}" for what, n in sorted(count.seen.items()))
            print(
                f"{kind}: {given.runs} runs in {took:.0f} s, {len(count.wrong)} wrong ({seen})",
                flush=True,
            )
            wrong += count.wrong
    print("\n".join(wrong) or "0 wrong")
    return 1 if wrong else 0


def warm_up() -> None:
    """Import what the forks would, each on its own."""
    with tempfile.TemporaryDirectory() as name:
        from ckptool.cli import main as cli

        here = Path(name)
        save(here / "a.pth", OLD)
        for line in ("convert -q {0}/a.pth {0}/b.pth", "convert -q {0}/a.pth {0}/d --to dcp",
                     "convert -q {0}/a.pth {0}/s --max-shard-size 40KB"):  # fmt: skip
            assert cli.main(line.format(here).split()) == 0
        for path in ("b.pth", "d", "s"):
            assert value_at(here / path) == OLD
        import ckptool.cli.check
        import ckptool.cli.diff
        import ckptool.cli.info
        import ckptool.cli.keys
        import ckptool.cli.report_check
        import ckptool.cli.report_info  # noqa: F401


if __name__ == "__main__":
    sys.exit(main())
