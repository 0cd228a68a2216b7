"""One case of fuzzing: a damaged fixture, command lines over it, and what must hold of every run.

A case is named `FIXTURE[+PARTNER]@SEED.NUMBER`; the name says all there is to know of it, so that
a list of names is a corpus. The fixture `grown` is no file: see `grow.py`. What must hold is what
is promised of any input: nothing is executed or opened elsewhere, one clear error, nothing left
behind, bounded time and memory, and on success an output that reads back.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import grow
import mutate
from watch import Event, Watch

from ckptool import containers as formats
from ckptool.cli import main as cli
from ckptool.errors import Bug
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.text import visible

FIXTURES = Path(__file__).parents[2] / "fixtures"
SKIPPED = {"download", "verify"}  # the network, and models: other tests have them
SLOW = 2.0  # seconds of processor time for one command
LARGE = 200 << 20  # bytes, beyond what the process had before
CODES = {0, 1, 2, 3, 4, 5}
LINES_PER_CASE = 4
GROWN = 0.3  # share of the cases that start from no fixture
# Exit codes at which these commands still put data on stdout: their answer is the data.
ANSWERS = {"check": {1, 3, 4}, "diff": {1}, "info": {4}, "recipe": {1}}

# {s} the damaged file, {g} a good one, {p} and {t} outputs; `old` outputs exist beforehand.
LINES: dict[str, tuple[str, ...]] = {
    "keys": (
        "{s}", "--all {s}", "--all --json {s}", "--tree {s}", "--json {s}", "--at . {s}",
        "--names --sort name {s}", "--at state_dict {s}", "--select *.weight {s}",
    ),
    "strip-prefix": (
        "{s} {p}", "--prefix auto {s} {p}", "--anywhere {s} {p}", "--prefix features {s} {t}",
        "--in-place {s}", "--force --every {s} {p}", "--json --tensors-only --untie {s} {p}",
    ),
    "add-prefix": ("{s} {p}", "--in-place {s}", "--untie {s} {p}", "--force {s} {p}", "-n {s} {t}"),
    "unwrap": ("{s} {p}", "{s} {t}", "--at state_dict {s} {p}", "--json --tensors-only {s} {p}"),
    "transfer": (
        "{s} {p}", "{s} {t}", "{s} {p} --drop *.bias", "{s} {p} --like {g}", "{g} {p} --like {s}",
        "--in-place {s}", "{s} {t} --keep *.weight --json --tensors-only",
        "{s} {p} --like {g} --min-match 0 --untie", "-n {s} {p} --rename features=f",
    ),
    "convert": (
        "{s} {p}", "{s} {t}", "--tensors-only {s} {p}", "--tensors-only {s} {t}", "-n {s} {p}",
        "--untie {s} {p}", "--untie {s} {t}", "--tensors-only --untie {s} {t}", "--force {s} {p}",
        "--unwrap --strip-prefix auto {s} {t}", "--in-place {s}", "-n --json {s} {t}",
        "--drop *.bias --add-prefix model {s} {p}", "--rename features=f.g --json {s} {p}",
        "--to safetensors --tensors-only {s} {p}", "--at state_dict {s} {t}",
        "--dtype bf16 {s} {t}", "--dtype f16 --overflow clamp {s} {p}", "--rename *=m.* {s} {p}",
        "--recipe lightning-to-plain {s} {p}", "--recipe lightning-to-plain --reverse {s} {t}",
    ),
    "recipe": (
        "lightning-to-plain --from {s}", "lightning-to-plain --reverse --from {s} --like {g}",
        "--json lightning-to-plain --from {g} --like {s}",
    ),
    "average": (
        "{s} {s} {p}", "{s} {s} {t}", "{g} {s} {t}", "--weights 2,-1 {s} {s} {p}",
        "-n --json {s} {g} {t}",
    ),
    "info": ("{s}", "--json {s}"),
    "check": (
        "{s}", "--json {s}", "--strict {s}", "--sha256 {s}", "--finite {s}", "{s} {g}",
        "--as f16 {s}",
    ),
    "diff": ("{s} {s}", "{s} {g}", "--json {g} {s}", "--structure {s} {g}", "--atol 1 {g} {s}"),
}  # fmt: skip
COPIES = {("convert", "{s} {p}"), ("convert", "{s} {t}"), ("convert", "--untie {s} {p}")}
OTHERS = ("{s}", "{s} {p}")  # for a command that has no row yet

# Audit events of a sound run; of all others the file would be the cause.
KINDS = set(
    "open os.link os.remove os.rename os.truncate os.listdir os.scandir os.walk os.mkdir "
    "os.rmdir os.chmod tempfile.mkstemp tempfile.mkdtemp fcntl.flock fcntl.fcntl mmap.__new__ "
    "_thread.start_new_thread _thread.start_joinable_thread builtins.id array.__new__ "
    "object.__getattr__ object.__setattr__ sys._getframe signal.pthread_kill time.sleep".split()
)
PATHS = (
    "open",
    "os.link",
    "os.remove",
    "os.rename",
    "os.listdir",
    "os.scandir",
    "os.walk",
    "os.mkdir",
)
SAID = re.compile(r"""(?:error\[|^  "error": ")([a-z-]+)""", re.MULTILINE)  # as text, or JSON


@dataclass(frozen=True)
class Case:
    """A fixture, another to splice it with, and the numbers that decide the rest."""

    fixture: str
    partner: str
    seed: int
    number: int

    def __str__(self) -> str:
        partner = f"+{self.partner}" if self.partner != self.fixture else ""
        return f"{self.fixture}{partner}@{self.seed}.{self.number}"

    @property
    def random(self) -> Random:
        return Random(f"{self.fixture}:{self.seed}:{self.number}")


def parsed(name: str) -> Case:
    """Read the name of a case."""
    place, _, numbers = name.strip().rpartition("@")
    fixture, _, partner = place.partition("+")
    seed, number = numbers.split(".")
    return Case(fixture, partner or fixture, int(seed), int(number))


def fixtures(containers: Sequence[str] = ()) -> list[str]:
    """List what may be damaged: files and folders, good ones first."""
    found = []
    for kind in ("good", "hostile"):
        for path in sorted((FIXTURES / kind).iterdir()):
            inside = (
                path if path.is_file() else next(p for p in sorted(path.rglob("*")) if p.is_file())
            )
            small = path.is_dir() or path.stat().st_size < 200_000
            if small and (not containers or mutate.kind_of(inside.read_bytes()) in containers):
                found.append(f"{kind}/{path.name}")
    return found


def draw(names: Sequence[str], seed: int, number: int) -> Case:
    """Choose the fixture of a case: a good one, a hostile one now and then, or one to grow."""
    random = Random(f"{seed}:{number}")
    if random.random() < GROWN:
        return Case("grown", "grown", seed, number)
    good = [name for name in names if name.startswith("good/")] or names
    fixture = random.choice(names if random.random() < 0.2 else good)
    return Case(fixture, random.choice(good), seed, number)


def make(case: Case, place: Path) -> Path:
    """Write the damaged file or folder of a case; give its path."""
    random = case.random
    if case.fixture == "grown":
        data = grow.grown(random)
        target = place / ("in.safetensors" if data[8:9] == b"{" else "in.pth")
        target.write_bytes(mutate.mutated(random, data, data) if random.random() < 0.3 else data)
        return target
    source = FIXTURES / case.fixture
    partner = _bytes_of(FIXTURES / case.partner, random)
    target = place / f"in{source.suffix}"
    if source.is_file():
        target.write_bytes(mutate.mutated(random, source.read_bytes(), partner))
        return target
    shutil.copytree(source, target)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    one, other = random.choice(files), random.choice(files)
    match random.choice(("change",) * 6 + ("remove", "copy", "rename")):
        case "change":
            one.write_bytes(mutate.mutated(random, one.read_bytes(), partner))
        case "remove":
            one.unlink()
        case "copy" if one != other:
            shutil.copy(one, other)
        case _:
            one.rename(one.with_name(f"x{one.name}"))
    return target


def _bytes_of(path: Path, random: Random) -> bytes:
    return random.choice(_files(path)).read_bytes()


def _files(path: Path) -> list[Path]:
    """List the files in a folder, or the one file."""
    return sorted(p for p in (path, *path.rglob("*")) if p.is_file())


def command_lines(case: Case, commands: Sequence[str] = ()) -> list[tuple[str, str]]:
    """Choose (command, arguments) for a case: always what lists all, then some others."""
    random = Random(f"lines:{case}")
    offered = [name for names in cli.GROUPS.values() for name in names if name not in SKIPPED]
    chosen = [name for name in offered if not commands or name in commands]
    lines = [(name, line) for name in chosen for line in LINES.get(name, OTHERS)]
    first = [("keys", "--all --json {s}")] if "keys" in chosen else []
    by_command = [(name := random.choice(chosen), random.choice(LINES.get(name, OTHERS)))]
    return first + by_command + random.sample(lines, min(LINES_PER_CASE - 1, len(lines)))


@dataclass
class Run:
    """What one command line came to."""

    line: tuple[str, str]
    code: int | None
    out: str
    err: str
    events: list[Event]
    seconds: float
    grown: int
    trace: str = ""

    @property
    def signature(self) -> str:
        """Say which kind of outcome it is: command, exit code, words of the error."""
        first = next((line for line in self.err.splitlines() if SAID.search(line)), "")
        words = re.findall(r"\b[a-z-]{4,}\b", re.sub(r"`[^`]*`|'.*'|\S*[/._]\S*", "", first))
        return f"{self.line[0]} {self.code} {' '.join(words[:7])}"


@dataclass
class Report:
    """What a case showed: complaints, and which kinds of outcome its runs had."""

    case: Case
    complaints: list[tuple[str, str, str]] = field(default_factory=list)  # line, what, trace
    signatures: list[str] = field(default_factory=list)
    runs: int = 0
    written: int = 0


class Bench:
    """A place to run cases in, in this process."""

    def __init__(self, place: Path, good: Path = FIXTURES / "good/plain.pth") -> None:
        self.place = place
        self.good = good
        self.watch = Watch()
        self.allowed = tuple(
            os.path.realpath(each)
            # Plugins are looked up in all of sys.path.
            for each in (place, FIXTURES, sys.prefix, sys.base_prefix, tempfile.gettempdir(),
                         Path(formats.__file__).parents[1], os.devnull, *filter(None, sys.path))
        )  # fmt: skip
        self.caught: list[BaseException] = []
        cli._trace = lambda error, debug: self.caught.append(error)  # type: ignore[assignment]
        warm_up()

    def run_case(
        self, case: Case, commands: Sequence[str] = (), tell: Any = lambda line: None
    ) -> Report:
        """Run a case; `tell` hears of every command line before it runs."""
        report = Report(case)
        with self._folder() as folder:
            source = make(case, folder)
            for line in command_lines(case, commands):
                tell(" ".join(line))
                self._run_line(report, folder, source, line)
        return report

    def _run_line(self, report: Report, folder: Path, source: Path, line: tuple[str, str]) -> None:
        places = {"s": source.name, "g": str(self.good), "p": "out.pth", "t": "out.safetensors"}
        arguments = [line[0], *line[1].format(**places).split()]
        if "--in-place" in arguments:  # on a copy
            copy = folder / f"copy{source.suffix}"
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy)
            arguments = [copy.name if each == source.name else each for each in arguments]
        if "--force" in arguments:
            (folder / "out.pth").write_bytes(b"old")
        before = snapshot(folder)
        with contextlib.chdir(folder):
            run = self.run(line, arguments)
        found = list(dict.fromkeys(complaints_of(run, self.allowed, str(folder))))
        found += left_complaints(folder, before, run, arguments)
        if run.code == 0 and line in COPIES:
            found += list(self._copy_complaints(source, folder, line))
        report.runs += 1
        report.signatures.append(run.signature)
        report.written += bool(run.code == 0 and snapshot(folder).keys() != before.keys())
        report.complaints += [(" ".join(arguments), what, run.trace) for what in found]
        for path in folder.iterdir():
            if path.name != source.name:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _copy_complaints(self, source: Path, folder: Path, line: tuple[str, str]) -> Iterator[str]:
        """Compare a copy with what it was made of."""
        target = "out.pth" if "{p}" in line[1] else "out.safetensors"
        with contextlib.chdir(folder):
            run = self.run(("diff", ""), ["diff", source.name, target])
        yield from complaints_of(run, self.allowed, str(folder))
        if run.code != 0 and target == "out.pth":
            yield f"diff of a copy ends with {run.code}: {(run.out + run.err)[:300]}"

    def run(self, line: tuple[str, str], arguments: list[str]) -> Run:
        """Run a command line in this process, watched and measured."""
        self.caught.clear()
        out, err = io.StringIO(), io.StringIO()
        code: int | None = None
        trace = ""
        base = _reset_peak()
        start = time.process_time()
        silent = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
        with silent[0], silent[1], self.watch.events() as events:
            try:
                code = cli.main(arguments)
            except BaseException:
                trace = traceback.format_exc()
        seconds = time.process_time() - start
        if code == Bug.exit_code and self.caught:
            trace = "".join(traceback.format_exception(self.caught[-1]))
        grown = _peak() - base
        return Run(line, code, out.getvalue(), err.getvalue(), events, seconds, grown, trace)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[Path]:
        folder = self.place / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def warm_up() -> None:
    """Import what ckptool imports late, so that any import later is the file's doing."""
    import difflib
    import importlib
    import importlib.util

    for names in cli.GROUPS.values():
        for name in names:
            importlib.import_module(f"ckptool.cli.{name.replace('-', '_')}")
    package = Path(formats.__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        if "model" not in path.parts or path.stem in ("zoo", "libraries", "__init__"):
            importlib.import_module(name.removesuffix(".__init__").removesuffix(".__main__"))
    for name in ("numpy", "ml_dtypes"):  # what computes values loads them
        importlib.import_module(name)
    for codec in ("unicode_escape", "raw_unicode_escape", "cp437", "latin-1", "utf-16", "ascii"):
        b"a".decode(codec, "replace")
        "a".encode(codec)
    difflib.get_close_matches("a", ["ab"])
    traceback.format_exc()


def snapshot(folder: Path) -> dict[str, tuple[int, bytes | None]]:
    """Give modification time and bytes of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def complaints_of(run: Run, allowed: tuple[str, ...], folder: str) -> Iterator[str]:
    """Say what is wrong with what a run said and did, files aside."""
    if run.code is None:
        yield f"an exception left main: {run.trace.strip().splitlines()[-1]}"
        return
    if run.code not in CODES:
        yield f"exit code {run.code}: {run.err.strip()[:300]}"
    if "Traceback" in run.err or "Traceback" in run.out:
        yield "a traceback"
    answered = run.code in ANSWERS.get(run.line[0], ())
    if run.code and run.out and not answered:
        yield f"data on stdout at exit code {run.code}"
    slugs = SAID.findall(run.err)
    if run.code and len(slugs) != 1 and not answered:
        yield f"{len(slugs)} errors at exit code {run.code}: {slugs}"
    if not run.code and slugs:
        yield f"an error at exit code 0: {slugs}"
    for stream in (run.out, run.err):
        shown = stream.replace("\n", "").replace("\t", "")
        if visible(shown) != shown and "--json" not in run.line[1]:
            yield f"characters that a terminal obeys: {ascii(shown)[:200]}"
    if not run.code and "--json" in run.line[1]:
        try:
            if "schema" not in json.loads(run.out):
                yield "a document without a schema"
        except ValueError:
            yield "no JSON document"
    yield from event_complaints(run.events, allowed, folder)
    if run.seconds > SLOW:
        yield f"slow: {run.seconds:.1f} s"
    if run.grown > LARGE:
        yield f"large: {run.grown >> 20} MiB"


def event_complaints(
    events: Sequence[Event], allowed: tuple[str, ...], folder: str
) -> Iterator[str]:
    """Say which audit events no sound run causes."""
    for event, arguments in events:
        if event not in KINDS:
            yield f"audit event {event} {[repr(each)[:80] for each in arguments]}"
        elif event == "mmap.__new__" and arguments[0] not in (-1, "-1"):  # memory alone, no file
            yield f"audit event {event} of a file"
        elif event in PATHS:
            for each in arguments[: 2 if event in ("os.link", "os.rename") else 1]:
                if isinstance(each, str | bytes):
                    path = os.path.realpath(os.path.join(folder, os.fsdecode(each)))
                    if not path.startswith(allowed):
                        yield f"audit event {event} {path}"


def left_complaints(
    folder: Path, before: dict[str, Any], run: Run, arguments: list[str]
) -> Iterator[str]:
    """Say what a run left behind or changed that it should not have; read what it wrote."""
    after = snapshot(folder)
    in_place = [each for each in arguments if "--in-place" in arguments and each.startswith("copy")]
    outputs = {"out.pth", "out.safetensors"} & set(arguments) | set(in_place)
    dry = "-n" in arguments
    for name in before.keys() | after.keys():
        mine = run.code == 0 and not dry and name.partition("/")[0] in outputs
        if before.get(name) != after.get(name) and not mine:
            yield f"{name} was changed, made or removed at exit code {run.code}"
    if run.code == 0 and not dry:
        for name in outputs:
            yield from _output_complaints(folder / name)


def _output_complaints(path: Path) -> Iterator[str]:
    if not path.exists():
        yield f"no {path.name} at exit code 0"
        return
    try:
        found = formats.read(path)
    except Exception as error:
        yield f"the output does not read back: {type(error).__name__}: {error}"
        return
    if safety.judge(found.globals).level >= Level.DANGEROUS:
        yield "the output would run code when loaded"


def _reset_peak() -> int:
    """Begin to measure the peak of memory anew; give what is in use now."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
    return _peak()


_PEAK = re.compile(r"VmHWM:\s+(\d+) kB")


def _peak() -> int:
    try:
        with open("/proc/self/status") as status:
            return int(_PEAK.search(status.read())[1]) << 10  # type: ignore[index]
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
