"""What a benchmark has to meet, whether it does, and the two tables that show it."""

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

MIB = 2**20


@dataclass(frozen=True)
class Reading:
    """What one run took: seconds, and bytes of memory at the peak; `work` leaves imports out."""

    wall: float
    work: float
    user: float
    system: float
    peak: int


Round = dict[str, Reading]


@dataclass(frozen=True)
class Limit:
    """A quantity of a task, alone or per the wall time of another, and what bounds it, if so."""

    task: str
    quantity: str
    unit: str
    most: float | None = None
    least: float | None = None
    per: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A limit with what was measured, in the limit's unit; `met` is None where nothing bounds."""

    limit: Limit
    judged: float
    lowest: float
    highest: float
    met: bool | None


UNITS = {"ms": 1e3, "MiB": 1 / MIB, "x": 1.0}


def job_limits(job: str) -> tuple[Limit, ...]:
    """Return the limits of a job that writes: near `cp`, far from torch, small."""
    return (
        Limit(f"{job} --no-sync", "wall", "x", most=0.95, per="cp"),
        Limit(job, "wall", "x", most=0.8, per="cp && sync"),
        Limit(f"torch {job}", "work", "x", least=3, per=f"{job} --no-sync"),
        Limit(f"torch {job}", "whole", "x", per=f"{job} --no-sync"),
        Limit(f"{job} --no-sync", "peak", "MiB", most=64),
        Limit(job, "peak", "MiB", most=64),
        Limit(f"{job}, large", "peak", "MiB", most=64),
    )


def many_limits(count: int, ms: float | None, mib: float) -> tuple[Limit, ...]:
    """Return the limits of a file with many small tensors."""
    return (
        Limit(f"strip of {count}", "wall", "ms", most=ms),
        Limit(f"torch strip of {count}", "whole", "x", per=f"strip of {count}"),
        Limit(f"strip of {count}", "peak", "MiB", most=mib),
        Limit(f"keys of {count}", "peak", "MiB", most=mib),
    )


LIMITS = (
    Limit("help", "wall", "x", most=1.3, per="import click"),
    Limit("keys 320", "wall", "x", most=2, per="import click"),
    Limit("strip -n", "wall", "x", most=2.5, per="import click"),
    Limit("help", "wall", "ms", most=80),
    Limit("keys 320", "wall", "ms", most=100),
    Limit("keys 10000", "wall", "ms", most=350),
    Limit("help", "peak", "MiB", most=64),
    Limit("keys 320", "peak", "MiB", most=64),
    Limit("keys 10000", "peak", "MiB", most=64),
    *many_limits(10_000, None, 64),
    *many_limits(100_000, 4000, 250),
    *job_limits("strip"),
    *job_limits("convert"),
    Limit("pipe safetensors", "wall", "x", most=1, per="cp"),
    Limit("pipe torch", "wall", "x", most=1.5, per="cp"),  # its input is read twice
    Limit("pipe safetensors", "peak", "MiB", most=64),
    Limit("pipe torch", "peak", "MiB", most=64),
    Limit("check", "wall", "x", most=0.6, per="cp"),
    Limit("check", "wall", "x", most=0.5, per="sha256sum"),
    Limit("check --finite", "wall", "x", most=1, per="sha256sum"),
    Limit("check --sha256", "wall", "x", most=1.5, per="sha256sum"),
    Limit("check", "peak", "MiB", most=64),
    Limit("check --finite", "peak", "MiB", most=64),
    Limit("diff", "wall", "x", most=1, per="cmp"),
    Limit("diff", "wall", "x", per="cp"),
    Limit("diff", "peak", "MiB", most=64),
)


MOVES = {"rename": 1.25, "split": 1.25, "fuse": 1.25, "stack": 1.25, "transpose": 2, "rope": 2}


def move_limits(job: str, pair: str) -> tuple[Limit, ...]:
    """Return the limits of a recipe, from one container to another."""
    task = f"{job} {pair}"
    return (
        Limit(task, "wall", "x", most=MOVES[job], per=f"cp {pair.partition('-')[0]}"),
        Limit(task, "peak", "MiB", most=96),
    )


def judge(limit: Limit, rounds: list[Round]) -> Verdict | None:
    """Compare a limit with the rounds that measured it; None where none did."""
    names = {limit.task, limit.per or limit.task}
    values = [value_of(limit, readings) for readings in rounds if names <= readings.keys()]
    if not values:
        return None
    judged = max(values) if limit.quantity == "peak" else median(values)
    met = None
    if limit.most is not None:
        met = judged <= limit.most
    elif limit.least is not None:
        met = judged >= limit.least
    return Verdict(limit, judged, min(values), max(values), met)


def value_of(limit: Limit, readings: Round) -> float:
    """Return what a round says of a limit, in its unit."""
    reading = readings[limit.task]
    value = {"wall": reading.wall, "whole": reading.wall, "work": reading.work}.get(
        limit.quantity, reading.peak
    )
    if limit.per:
        value /= readings[limit.per].wall
    return value * UNITS[limit.unit]


def table_of_readings(rounds: list[Round]) -> Iterator[str]:
    """Yield a line per task: the whole process, its CPU time and its largest memory."""
    yield f"{'TASK':<36}{'MEDIAN':>11}{'BEST':>11}{'WORK':>11}{'CPU':>11}{'PEAK':>12}{'RUNS':>6}"
    for name in dict.fromkeys(name for readings in rounds for name in readings):
        of_task = [readings[name] for readings in rounds if name in readings]
        wall = [reading.wall for reading in of_task]
        work = median(reading.work for reading in of_task)
        cpu = median(reading.user + reading.system for reading in of_task)
        peak = max(reading.peak for reading in of_task) / MIB
        yield (
            f"{name:<36}{seconds(median(wall)):>11}{seconds(min(wall)):>11}{seconds(work):>11}"
            f"{seconds(cpu):>11}{peak:>8.1f} MiB{len(of_task):>6}"
        )


def table_of_verdicts(verdicts: list[Verdict]) -> Iterator[str]:
    """Yield a line per limit: the median (of memory the largest), the extremes, the bound."""
    yield f"{'LIMIT':<48}{'JUDGED':>11}{'MIN':>11}{'MAX':>11}{'BOUND':>13}"
    for verdict in verdicts:
        limit = verdict.limit
        name = limit.task + ("" if limit.quantity == "wall" else f" ({limit.quantity})")
        name += f" / {limit.per}" if limit.per else ""
        numbers = (verdict.judged, verdict.lowest, verdict.highest)
        shown = "".join(f"{number:>11}" for number in (amount(n, limit.unit) for n in numbers))
        mark = {True: "  pass", False: "  FAIL", None: ""}[verdict.met]
        yield f"{name:<48}{shown}{bound(limit):>13}{mark}".rstrip()


def bound(limit: Limit) -> str:
    """Show what bounds a limit."""
    if limit.most is not None:
        return f"<= {limit.most:g} {limit.unit}"
    return f">= {limit.least:g} {limit.unit}" if limit.least is not None else ""


def amount(value: float, unit: str) -> str:
    """Show a value in the unit it is already in."""
    return f"{value:.2f} x" if unit == "x" else f"{value:.1f} {unit}"


def seconds(value: float) -> str:
    """Show seconds, short ones in milliseconds."""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
