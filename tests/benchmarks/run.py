"""Time ckptool against `cp` and against the same job done with torch, and hold it to its limits.

    python tests/benchmarks/run.py
    python tests/benchmarks/run.py --size 64MiB --rounds 3 --jobs strip,convert
    python tests/benchmarks/run.py --jobs keys,help --startup-rounds 50
    python tests/benchmarks/run.py --jobs '' --memory-at 8GiB

The files are made with torch: a DataParallel training checkpoint (a ResNet-50, 320 tensors, widened
to the size asked for) and two small ones with 320 and 10 000 tensors. Every round runs every task
once, in an order that rotates; a ratio pairs two readings of one round, so that a noisy minute hits
both. Before each timing the last output is deleted, a copy is made and thrown away and the disks
are synced, so that every task starts with a warm input and no dirty pages of another. Without
--no-sync ckptool flushes what it wrote, and is compared with `cp IN OUT && sync OUT`. The limits
are meant for 2 GiB and more: of a small file, starting Python is most of the time.

The torch scripts report two times: `work` is without the import of torch (what the limit is judged
by, against the whole of ckptool's time, start included), `whole` is the process.

`many` lists and strips, without sync, files of 10 000 and 100 000 small tensors, where the cost is
that of each tensor.

`check` reads the big file and is compared with `cp` and `sha256sum`; `diff` compares it with a copy
of itself, as `cmp` does.

Limits are judged by the median; peak memory by the largest reading. The exit status is 0 when all
limits that were measured are met, 1 when one is not, 2 when a task could not be measured.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

from limits import LIMITS, MIB, Reading, Round, judge, table_of_readings, table_of_verdicts
from memory import fetch_large_pages, kept_from_host

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
JOBS = ("strip", "convert", "pipe", "check", "diff", "many", "keys", "help", "plan")
STARTUP_JOBS = {"keys", "help", "plan"}
BIG_JOBS = {"strip", "convert", "pipe", "check", "diff"}
KEY_COUNTS = (320, 10_000)
TENSOR_COUNTS = (10_000, 100_000)  # a mixture of experts has 90 000
GIB = 2**30
SPARE = 512 * MIB
ROOM = 8  # inputs: what they, outputs and copies take, by small and by large blocks
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode cached


@dataclass(frozen=True)
class Task:
    """One command to time; `target` is what it writes, `seconds` the file with its own timing.

    `least` is the part of the source's size that the target must have.
    """

    name: str
    command: tuple[str, ...]
    source: Path | None = None
    target: Path | None = None
    seconds: Path | None = None
    least: float = 0.95


def fail(message: str) -> NoReturn:
    """End the run: it could not be measured."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def say(message: str) -> None:
    """Tell the reader on stderr how far the run is."""
    print(message, file=sys.stderr, flush=True)


# Tasks


def writing_tasks(
    job: str, verb: str, suffix: str, ckptool: tuple[str, ...], source: Path, *, baseline: bool
) -> Iterator[Task]:
    """Yield a job that writes a file: by ckptool without and with sync, and by a torch script."""
    target = source.with_name("out" + suffix)
    command = (*ckptool, verb, str(source), str(target))
    yield Task(f"{job} --no-sync", (*command, "--no-sync"), source, target)
    yield Task(job, command, source, target)
    if baseline:
        seconds = source.with_name("seconds")
        script = (*with_torch(job), str(source), str(target), str(seconds))
        yield Task(f"torch {job}", script, source, target, seconds)


def copying_tasks(source: Path) -> Iterator[Task]:
    """Yield the copies that the jobs are compared with."""
    target = source.with_name("copy.pth")
    paths = (str(source), str(target))
    durable = ("sh", "-c", 'cp "$1" "$2" && sync "$2"', "sh", *paths)
    yield Task("cp", ("cp", *paths), source, target)
    yield Task("cp && sync", durable, source, target)


def big_tasks(
    jobs: tuple[str, ...], ckptool: tuple[str, ...], source: Path, *, baseline: bool
) -> tuple[Task, ...]:
    """Return the tasks that work on the big file."""
    tasks = [*copying_tasks(source)] if baseline else []
    if "strip" in jobs:
        tasks += writing_tasks("strip", "strip-prefix", ".pth", ckptool, source, baseline=baseline)
    if "convert" in jobs:
        tasks += writing_tasks(
            "convert", "convert", ".safetensors", ckptool, source, baseline=baseline
        )
    if "pipe" in jobs:
        for word in ("safetensors", "torch"):
            command = (*ckptool, "convert", "-q", str(source), "-", "--to", word)
            tasks.append(Task(f"pipe {word}", through_a_pipe(*command), source))
    if "check" in jobs:
        tasks += checking_tasks(ckptool, source, baseline=baseline)
    if "diff" in jobs:
        pair = (str(source), str(twin_of(source)))
        tasks += [Task("cmp", ("cmp", *pair), source)] if baseline else []
        tasks.append(Task("diff", (*ckptool, "diff", *pair), source))
    return tuple(tasks)


def through_a_pipe(*command: str) -> tuple[str, ...]:
    """Return a command that sends what another writes through a pipe."""
    return ("sh", "-c", '"$@" | cat > /dev/null', "sh", *command)


def twin_of(source: Path) -> Path:
    """Name the copy that the big file is compared with."""
    return source.with_name("twin.pth")


def checking_tasks(ckptool: tuple[str, ...], source: Path, *, baseline: bool) -> Iterator[Task]:
    """Yield checks of the big file, which read it and write nothing, and what reads it as well."""
    for option in ((), ("--finite",), ("--sha256",)):
        yield Task(" ".join(("check", *option)), (*ckptool, "check", *option, str(source)), source)
    if baseline:
        yield Task("sha256sum", ("sha256sum", str(source)), source)


def startup_tasks(
    jobs: tuple[str, ...], ckptool: tuple[str, ...], folder: Path, *, baseline: bool
) -> tuple[Task, ...]:
    """Return the short tasks, where starting is most of the time."""
    tasks = []
    if baseline:
        tasks.append(Task("import click", (sys.executable, "-c", "import click")))
    if "help" in jobs:
        tasks.append(Task("help", (*ckptool, "--help")))
    if "keys" in jobs:
        for count in KEY_COUNTS:
            file = folder / f"keys{count}.pth"
            make("keys", file, count)
            tasks.append(Task(f"keys {count}", (*ckptool, "keys", str(file))))
    if "plan" in jobs:
        source, target = str(REPOSITORY / "fixtures/good/data_parallel.pth"), str(folder / "o.pth")
        tasks.append(Task("strip -n", (*ckptool, "strip-prefix", "-n", source, target)))
    return tuple(tasks)


def many_tasks(ckptool: tuple[str, ...], folder: Path, *, baseline: bool) -> Iterator[Task]:
    """Yield listing and stripping of files with many small tensors, and a torch script's strip."""
    for count in TENSOR_COUNTS:
        source = folder / f"experts{count}.pth"
        make("experts", source, count)
        yield Task(f"keys of {count}", (*ckptool, "keys", str(source)))
        for task in writing_tasks(
            "strip", "strip-prefix", ".pth", ckptool, source, baseline=baseline
        ):
            if task.name != "strip":
                name = task.name.removesuffix(" --no-sync")
                # Half of such a file is headers, which torch pads more than others do.
                yield replace(task, name=f"{name} of {count}", least=0.75)


def with_torch(*arguments: str) -> tuple[str, ...]:
    """Return the command that does something with torch, in a process of its own."""
    return (sys.executable, str(HERE / "with_torch.py"), *arguments)


def make(what: str, target: Path, amount: int) -> None:
    """Make a file with torch."""
    done = subprocess.run(with_torch(what, str(target), str(amount)), check=False)
    if done.returncode:
        fail(f"torch could not make {target.name}")


def make_big(target: Path, nbytes: int, *, memory: int) -> None:
    """Make the big file where disk and memory are enough for the run.

    On the disk go the file, its twin, and one output.
    """
    free = shutil.disk_usage(target.parent).free
    if free < 3 * nbytes + SPARE:
        fail(f"needs {gib(3 * nbytes + SPARE)} of disk, {gib(free)} free; take --size or --folder")
    available = available_memory()
    if available is not None and available < memory + SPARE:
        fail(f"needs {gib(memory + SPARE)} of memory, {gib(available)} available; take less --size")
    say(f"making a checkpoint of {gib(nbytes)}")
    make("make", target, nbytes)


def gib(nbytes: int) -> str:
    """Show bytes."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB else f"{nbytes / MIB:.0f} MiB"


# Measuring


def measure(task: Task) -> Reading:
    """Run a task once, on a warm input and a quiet disk, and see that it wrote what it should."""
    if task.source:
        settle(task.source)
    with tempfile.NamedTemporaryFile() as stderr:
        meter = (sys.executable, "-I", "-S", str(HERE / "measure.py"), stderr.name, *task.command)
        done = subprocess.run(meter, check=False, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            fail(f"{task.name}: {done.stderr.strip().rpartition(chr(10))[2]}")
        status, *numbers = done.stdout.split()
        if status != "0":
            tail = stderr.read().decode(errors="backslashreplace")[-2000:]
            fail(f"{task.name}: exit status {status}\n{shlex.join(task.command)}\n{tail}")
    wall, user, system, peak = (float(number) for number in numbers)
    work = float(task.seconds.read_text()) if task.seconds else wall
    if task.source and task.target:
        see_written(task.name, task.target, task.least * task.source.stat().st_size)
        task.target.unlink()
    return Reading(wall, work, user, system, int(peak))


def settle(source: Path) -> None:
    """Bring page cache, free memory and disk into the same state, whatever ran before.

    A copy that is thrown away reads the input into the page cache and leaves as much memory free
    that was in use a moment ago: a virtual machine gives idle memory back to its host (memory.py).
    """
    scratch = source.with_name("scratch")
    os.sync()
    shutil.copyfile(source, scratch)
    scratch.unlink()
    os.sync()
    fetch_large_pages()


def see_written(name: str, target: Path, nbytes: float) -> None:
    """Fail where the output is missing or short: the tensors are nearly all of the input."""
    if not target.is_file() or target.stat().st_size < nbytes:
        fail(f"{name}: the output is missing or too short to hold the tensors")


def run_rounds(tasks: tuple[Task, ...], rounds: int, what: str) -> list[Round]:
    """Measure every task once a round, beginning one task later each round.

    The first run of each is not counted: it compiles, and in a virtual machine touches new memory.
    """
    largest = max((task.source.stat().st_size for task in tasks if task.source), default=0)
    with kept_from_host(ROOM * largest):
        say(f"{what}: warming up")
        for task in tasks:
            measure(task)
        readings = []
        for number in range(rounds):
            say(f"{what}: round {number + 1} of {rounds}")
            first = number % len(tasks)
            readings.append({task.name: measure(task) for task in tasks[first:] + tasks[:first]})
    return readings


def run_large(ckptool: tuple[str, ...], folder: Path, nbytes: int) -> list[Round]:
    """Run strip and convert once at another size; only their memory is of interest."""
    source = folder / "large.pth"
    make_big(source, nbytes, memory=nbytes)
    readings = {}
    for task in big_tasks(("strip", "convert"), ckptool, source, baseline=False):
        if not task.name.endswith("--no-sync"):
            say(f"memory at {gib(nbytes)}: {task.name}")
            readings[f"{task.name}, large"] = measure(task)
    source.unlink()
    return [readings]


# The machine


def machine(folder: Path) -> dict[str, str]:
    """Return what the numbers depend on."""
    return {
        "python": platform.python_version(),
        "torch": importlib.metadata.version("torch"),
        "kernel": f"{platform.system()} {platform.release()}",
        "cpu": f"{os.cpu_count()} x {cpu_model()}",
        "file system": file_system(folder),
    }


def cpu_model() -> str:
    """Return the name of the processor."""
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def file_system(folder: Path) -> str:
    """Return the type of the file system that a folder is on: that of the longest mount point."""
    mounts = Path("/proc/mounts")
    lines = mounts.read_text().splitlines() if mounts.exists() else []
    kinds = {Path(mount): kind for _, mount, kind, *_ in map(str.split, lines)}
    above = [parent for parent in (folder, *folder.parents) if parent in kinds]
    return kinds[above[0]] if above else "unknown"


def available_memory() -> int | None:
    """Return the bytes of memory that can be had without swapping, where the system says so."""
    meminfo = Path("/proc/meminfo")
    text = meminfo.read_text() if meminfo.exists() else ""
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return int(found[1]) * 1024 if found else None


# The command line


def parse(arguments: list[str]) -> argparse.Namespace:
    """Read the options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--size", type=nbytes_of, default=2 * GIB, help="of the checkpoint (default 2GiB)")
    add("--rounds", type=positive, default=5, help="of the jobs on the big file (default 5)")
    add("--startup-rounds", type=positive, default=30, help="of keys, help, plan (default 30)")
    add("--jobs", type=jobs_of, default=JOBS, help=f"any of {','.join(JOBS)} (default all)")
    add("--folder", type=Path, default=tempfile.gettempdir(), help="to work in (default temporary)")
    add("--ckptool", metavar="CMD", help="command to time (default: python -m ckptool, from here)")
    add("--memory-at", type=nbytes_of, metavar="SIZE", help="also read the memory at this size")
    add("--json", type=Path, metavar="FILE", help="write every reading to this file")
    add(
        "--baseline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run and compare with cp, torch and `import click` too (default yes)",
    )
    return parser.parse_args(arguments)


def nbytes_of(text: str) -> int:
    """Read a size such as 64MiB or 1.5GiB."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(MiB|GiB)", text)
    nbytes = int(float(found[1]) * {"MiB": MIB, "GiB": GIB}[found[2]]) if found else 0
    if nbytes < MIB:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 64MiB or 2GiB")
    return nbytes


def positive(text: str) -> int:
    """Read a count of rounds."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return int(text)


def jobs_of(text: str) -> tuple[str, ...]:
    """Read a list of jobs; it may be empty."""
    jobs = tuple(job for job in text.split(",") if job)
    unknown = [job for job in jobs if job not in JOBS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no job {unknown[0]!r}; there are {','.join(JOBS)}")
    return jobs


def run(options: argparse.Namespace, folder: Path) -> list[Round]:
    """Make the files and measure everything asked for."""
    ckptool: tuple[str, ...] = (sys.executable, "-m", "ckptool")
    if options.ckptool:
        program, *rest = shlex.split(options.ckptool)
        ckptool = (shutil.which(program) or program, *rest)
    rounds = []
    if STARTUP_JOBS & set(options.jobs):
        tasks = startup_tasks(options.jobs, ckptool, folder, baseline=options.baseline)
        rounds += run_rounds(tasks, options.startup_rounds, "startup")
    if "many" in options.jobs:
        tasks = tuple(many_tasks(ckptool, folder, baseline=options.baseline))
        rounds += run_rounds(tasks, options.rounds, "many tensors")
    if BIG_JOBS & set(options.jobs):
        source = folder / "in.pth"
        # safetensors' save_file may copy what torch.load has read
        make_big(source, options.size, memory=options.size * (2 if options.baseline else 1))
        if "diff" in options.jobs:
            shutil.copyfile(source, twin_of(source))
        tasks = big_tasks(options.jobs, ckptool, source, baseline=options.baseline)
        rounds += run_rounds(tasks, options.rounds, gib(options.size))
        source.unlink()
        twin_of(source).unlink(missing_ok=True)
    if options.memory_at:
        rounds += run_large(ckptool, folder, options.memory_at)
    return rounds


def main(arguments: list[str]) -> int:
    """Measure, show, and return the exit status."""
    options = parse(arguments)
    if not options.folder.is_dir():
        fail(f"{options.folder} is not a folder")
    about = machine(options.folder.resolve())
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="ckptool-bench-", dir=options.folder) as folder:
        rounds = run(options, Path(folder).resolve())
    verdicts = [verdict for limit in LIMITS if (verdict := judge(limit, rounds))]
    print("", *table_of_readings(rounds), "", *table_of_verdicts(verdicts), sep="\n")
    if options.json:
        document = {
            "schema": "benchmark/1",
            "machine": about,
            "size": options.size,
            "memory_at": options.memory_at,
            "rounds": [{name: asdict(r) for name, r in readings.items()} for readings in rounds],
            "verdicts": [asdict(verdict) for verdict in verdicts],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if any(verdict.met is False for verdict in verdicts) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
