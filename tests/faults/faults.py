"""A command line run again and again, with a fault at each of its system calls in turn.

A run is a fork of this process in which the functions of `os` that touch files count their calls,
and so do those that allocate buffers and start threads; at the chosen one something goes wrong: an
error, a short write, no memory, no thread, a signal, or the end (SIGKILL, before the call, after
it, or after half of a write). Then the folder is looked at: the target is
old or new and never partial, the input is what it was, and a temporary file stays only where the
process had no chance to remove it, under a name that says what it is: `.OUT.12 hex digits.tmp`.
"""

from __future__ import annotations

import builtins
import errno
import itertools
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ckptool.cli import main as cli
from ckptool.containers import torch_zip
from ckptool.files import blocks, copying, fileio, gathering, moves, publish, spool, zips
from ckptool.tensors import numbers, tensor

GOOD = Path(__file__).parents[2] / "fixtures/good"
TEMPORARY = re.compile(r"\.(.{1,40})\.[0-9a-f]{12}\.tmp")
PATIENCE = 60.0  # seconds for one run
OLD = b"old"
SECOND = "second.pth"

# Calls that may fail, with the errors they get; `open` and `close` of input and output alike.
ERRORS: dict[str, tuple[int, ...]] = {
    "open": (errno.EIO, errno.EMFILE, errno.ENOSPC, errno.EACCES),
    "close": (errno.EIO, errno.ENOSPC),
    "preadv": (errno.EIO,),
    "pwrite": (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR),
    "write": (errno.EIO, errno.ENOSPC),
    "ftruncate": (errno.EIO, errno.ENOSPC, errno.EFBIG),
    "chmod": (errno.EPERM, errno.EIO),
    "chown": (errno.EPERM, errno.EIO),
    "fsync": (errno.EIO, errno.ENOSPC, errno.EINVAL),
    "link": (errno.EIO, errno.EPERM, errno.ENOSPC),
    "rename": (errno.EIO, errno.ENOSPC),
    "replace": (errno.EIO, errno.ENOSPC),
    "unlink": (errno.EIO,),
    "mkdir": (errno.EIO, errno.ENOSPC),
    "rmdir": (errno.EIO,),
    "swap": (errno.EIO, errno.ENOSYS, errno.EINVAL),  # of `moves`
    "posix_fallocate": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EOPNOTSUPP),
    "statvfs": (errno.EIO,),
}
HALVED = ("pwrite", "write", "preadv")
# Names of our modules under which buffers are allocated and threads started.
MEMORY = ("bytearray", "memoryview", "bytes", "large_pages", "start_new_thread")
STARVED: tuple[Any, ...] = (
    blocks, copying, fileio, gathering, numbers, spool, tensor, torch_zip, zips,
)  # fmt: skip
SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
RECIPE = Path(__file__).with_name("turned.toml")


@dataclass(frozen=True)
class Job:
    """A command line; what is at the target beforehand, if anything.

    `{s}` stands for the input, `{r}` for a recipe. The target of a `batch` is a folder: the input
    and `SECOND`, a copy of it, are written there each.
    """

    line: str
    source: str
    target: str
    old: bool = False
    folder: bool = False  # the target is one
    batch: bool = False

    @property
    def arguments(self) -> list[str]:
        return self.line.format(s=self.source, r=RECIPE).split()

    @property
    def before(self) -> object:
        """What is at the target beforehand: a file, or a folder with a file that is replaced."""
        if self.old and self.folder:
            if "dcp" in self.line:
                return {"__0_0.distcp": OLD}
            return {"config.json": OLD, "model.safetensors": OLD}  # the first stays
        return OLD if self.old else None

    @property
    def in_place(self) -> bool:
        return self.target == self.source


JOBS = (
    Job("strip-prefix {s} out.pth", "model_best.pth.tar", "out.pth"),
    Job("strip-prefix --in-place data_parallel.pth", "data_parallel.pth", "data_parallel.pth"),
    Job("strip-prefix --force {s} out.pth", "data_parallel.pth", "out.pth", old=True),
    Job("add-prefix {s} out.safetensors", "plain.safetensors", "out.safetensors"),
    Job("add-prefix --in-place {s}", "plain.safetensors", "plain.safetensors"),
    Job("unwrap {s} out.pth", "model_best_legacy.pth.tar", "out.pth"),
    Job("unwrap --force {s} out.pth", "model_best.pth.tar", "out.pth", old=True),
    Job("transfer {s} out.pth --drop classifier", "model_best.pth.tar", "out.pth"),
    Job("transfer --in-place {s}", "model_best.pth.tar", "model_best.pth.tar"),
    Job("convert {s} out.safetensors", "model_best.pth.tar", "out.safetensors"),
    Job("convert --force {s} out.safetensors", "strided.pth", "out.safetensors", old=True),
    Job("convert {s} out.safetensors", "rezipped.pth", "out.safetensors"),
    Job("convert --force {s} out.pth", "plain.safetensors", "out.pth", old=True),
    Job("convert --untie {s} out.pth", "tied.pth", "out.pth"),
    Job("convert --no-sync {s} out.pth", "plain_legacy.pth", "out.pth"),
    Job("convert --max-shard-size 300 {s} out", "plain.pth", "out", folder=True),
    Job("convert --to dcp {s} out", "tied.pth", "out", folder=True),
    Job("convert --to dcp {s} out --force", "tied.pth", "out", old=True, folder=True),
    Job("convert --max-shard-size 300 --force {s} out", "plain.pth", "out", True, folder=True),
    Job("convert --dtype f16 {s} out.pth", "plain.pth", "out.pth"),
    Job(
        "convert --to safetensors {s} second.pth out/", "plain.pth", "out", folder=True, batch=True
    ),
    Job("average {s} {s} out.safetensors", "plain.pth", "out.safetensors"),
    Job("convert --recipe {r} {s} out.pth", "plain.pth", "out.pth"),
)


def content_of(path: Path) -> bytes | dict[str, bytes] | None:
    """Give the bytes of a file, or of the files in a folder; None where nothing is."""
    if path.is_dir():
        return {each.name: each.read_bytes() for each in sorted(path.iterdir()) if each.is_file()}
    return path.read_bytes() if path.exists() else None


class Counter:
    """Counts the system calls of a run, and does something at one of them."""

    def __init__(self, turn: int, action: str) -> None:
        self.turn, self.action = turn, action
        self.names: list[str] = []
        self._lock = threading.Lock()
        self._met = not turn

    def install(self) -> None:
        """Put the counting functions in place of those of `os`."""
        for name in ERRORS:
            if hasattr(os, name):
                setattr(os, name, self._counting(name, getattr(os, name)))
        moves.swap = self._counting("swap", moves.swap)
        for module, name in itertools.product(STARVED, MEMORY):
            real = getattr(module, name, None) or getattr(builtins, name, None)
            if real is not None:
                setattr(module, name, self._counting(name, real))

    def _counting(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **more: Any) -> Any:
            with self._lock:
                self.names.append(name)
                due = not self._met and len(self.names) >= self.turn and fits(self.action, name)
                self._met |= due
            return self._wrong(name, real, arguments, more) if due else real(*arguments, **more)

        return call

    def _wrong(self, name: str, real: Callable[..., Any], arguments: Any, more: Any) -> Any:
        kind, _, value = self.action.partition(" ")
        if kind == "error":
            if name == "close":  # Linux closes the file whatever it says
                real(*arguments, **more)
            raise OSError(code := getattr(errno, value), os.strerror(code), *_named(arguments))
        if kind == "memory":
            raise RuntimeError("can't start new thread") if "thread" in name else MemoryError
        if kind == "signal":
            os.kill(os.getpid(), getattr(signal, value))
        elif name in HALVED and (kind == "short" or value == "in the middle"):
            arguments = _halved(name, arguments)
        if value == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return real(*arguments, **more)
        finally:
            if kind == "kill":
                os.kill(os.getpid(), signal.SIGKILL)


def _named(arguments: Any) -> tuple[Any, ...]:
    """Give the file name that the system would put into its error."""
    first = arguments[0] if arguments else None
    return (first,) if isinstance(first, str) else ()


def _halved(name: str, arguments: Any) -> Any:
    if name == "preadv":
        fd, (view,), start = arguments
        return fd, [view[: max(1, len(view) // 2)]], start
    fd, data, *rest = arguments
    return (fd, memoryview(data)[: max(1, len(data) // 2)], *rest)


def fits(action: str, name: str) -> bool:
    """Check whether an action can happen at a call: a lack of memory only at an allocation."""
    return action != "memory" or name in MEMORY


def actions(name: str) -> list[str]:
    """List what may go wrong at a call."""
    if name in MEMORY:
        return ["memory"]
    found = [f"error {errno.errorcode[code]}" for code in ERRORS[name]]
    found += [f"signal {each}" for each in SIGNALS] + ["kill before", "kill after"]
    if name in ("pwrite", "write"):
        found.append("kill in the middle")
    return [*found, "short"] if name in HALVED else found


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit code (or minus a signal), what it said, and its calls."""

    code: int
    said: str
    calls: tuple[str, ...]


def run(
    folder: Path, job: Job, counter: Counter, prepare: Callable[[], None] | None = None
) -> Outcome:
    """Run a job in a fork of this process, in a folder."""
    told = Path(tempfile.gettempdir()) / f"ckptool-faults-{os.getpid()}"
    child = os.fork()
    if not child:
        _child(folder, told, job, counter, prepare)
    deadline = time.monotonic() + PATIENCE
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Outcome(-99, "it hangs", ())
        time.sleep(0.0005)
    code = os.waitstatus_to_exitcode(status)
    said = told.read_text(encoding="utf-8", errors="replace")
    told.unlink()
    text, _, calls = said.partition("\0")
    return Outcome(code, text, tuple(calls.split()))


def _child(
    folder: Path, told: Path, job: Job, counter: Counter, prepare: Callable[[], None] | None
) -> None:
    """Be the run; never returns."""
    code = 99
    try:
        os.chdir(folder)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
        sys.stderr = told.open("w", encoding="utf-8", errors="backslashreplace")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for name in SIGNALS[1:]:
            signal.signal(getattr(signal, name), signal.SIG_DFL)
        if prepare:
            prepare()
        exit_, close = os._exit, os.close
        gathering.LEAST, blocks.grain.__defaults__ = 1, (64,)  # both threads turn the small ones
        counter.install()
        try:
            code = cli.main(job.arguments)
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else 1
        os.close = close
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        sys.stderr.write("\0" + " ".join(counter.names))
        sys.stderr.flush()
        exit_(code)
    except BaseException as error:
        with open(told, "a", encoding="utf-8") as file:
            file.write(f"the harness failed: {error!r}")
    finally:
        os._exit(code)


def lay_out(folder: Path, job: Job) -> None:
    """Make the folder of a run: the input, and the old target."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(GOOD / job.source, folder / job.source)
    if job.batch:
        shutil.copy(GOOD / job.source, folder / SECOND)
    if isinstance(job.before, dict):
        (folder / job.target).mkdir()
        for name, data in job.before.items():
            (folder / job.target / name).write_bytes(data)
    elif job.old:
        (folder / job.target).write_bytes(OLD)


def undisturbed(
    place: Path, job: Job, prepare: Callable[[], None] | None = None
) -> tuple[bytes | dict[str, bytes] | None, tuple[str, ...]]:
    """Run a job without faults; give what it writes, and its calls."""
    folder = place / "run"
    lay_out(folder, job)
    done = run(folder, job, Counter(0, ""), prepare)
    assert done.code == 0, done
    assert "cannot be" not in done.said, done.said
    return content_of(folder / job.target), done.calls


def complaints(
    folder: Path, job: Job, new: object, done: Outcome, action: str, call: str
) -> Iterator[str]:
    """Say what is wrong after a run that met a fault."""
    if job.batch:
        yield from _batch_complaints(folder, job, new, done, action, call)
        return
    source = (GOOD / job.source).read_bytes()
    old: object = source if job.in_place else job.before
    found = content_of(folder / job.target)
    is_new, is_old = found == new, found == old
    killed = action.startswith("kill")
    aside = killed and any(
        content_of(each) == old for each in folder.glob(f"{job.target}/.*.tmp/old")
    )
    if not (is_new or is_old or (aside and is_no_set(found))):
        yield f"the target is neither old nor new: {'nothing' if found is None else len(found)}"
    if not job.in_place and (folder / job.source).read_bytes() != source:
        yield "the input was changed"
    left = {each.name for each in folder.iterdir()} - {job.source, job.target}
    left |= {each.name for each in folder.glob(f"{job.target}/*/")}
    kept_by_force = action.startswith("error") and call in ("unlink", "rmdir")
    for name in sorted(left):
        named = TEMPORARY.fullmatch(name)
        if not ((killed or kept_by_force) and named and job.target.startswith(named[1])):
            yield f"left behind: {name}"
    if killed:
        if done.code != -signal.SIGKILL:
            yield f"exit code {done.code} of a killed run"
        return
    yield from _exit_complaints(job, done, action, is_new=is_new, is_old=is_old)


def _batch_complaints(
    folder: Path, job: Job, new: object, done: Outcome, action: str, call: str
) -> Iterator[str]:
    """Say what is wrong with a batch: each output is whole or not there, and counted."""
    assert isinstance(new, dict)
    found, killed = content_of(folder / job.target), action.startswith("kill")
    outputs = found if isinstance(found, dict) else {}
    written = [name for name in outputs if name in new]
    yield from (f"{name} is not whole" for name in written if outputs[name] != new[name])
    if {each.name for each in folder.iterdir()} - {job.target} != {job.source, SECOND}:
        yield f"in the folder: {sorted(each.name for each in folder.iterdir())}"
    if killed:
        return
    kept_by_force = action.startswith("error") and call in ("unlink", "rmdir")
    if not kept_by_force and (len(written) < len(outputs) or found == {}):
        yield f"left behind: {sorted(outputs)}"
    expected = {"error": {0, 3, 5}, "memory": {0, 7}}.get(action.partition(" ")[0], {0})
    if action.startswith("signal"):
        expected = {0, 130, 129, 143}
    if done.code not in expected or "Traceback" in done.said or "harness" in done.said:
        yield f"exit code {done.code}: {done.said[:600]}"
    if (done.code == 0) is not (len(written) == len(new)) and done.code not in (129, 130, 143):
        yield f"exit code {done.code} with {written}: {done.said[:600]}"
    told = re.findall(r"(\d+) of 2 files written", done.said)
    if told != [str(len(written))] and (written or told) and done.code not in (129, 143):
        yield f"{len(written)} were written, and it says: {done.said[:600]}"
    if done.code and not written and done.code < 100 and "error[" not in done.said:
        yield f"no error said at exit code {done.code}"


def is_no_set(found: object) -> bool:
    """Tell whether what is in a folder reads as nothing: its index is not there."""
    return isinstance(found, dict) and not any(name.endswith((".json", "a")) for name in found)


def _exit_complaints(
    job: Job, done: Outcome, action: str, *, is_new: bool, is_old: bool
) -> Iterator[str]:
    kind, _, value = action.partition(" ")
    expected = {"error": {0, 3, 5}, "memory": {7}}.get(kind, {0})
    if kind == "signal":  # which may come too late to matter
        expected = {0, 130 if value == "SIGINT" else 128 + getattr(signal, value)}
    if done.code not in expected:
        yield f"exit code {done.code}: {done.said[:300]}"
    if "Traceback" in done.said or "harness" in done.said:
        yield done.said[:600]
    if done.code == 0 and not is_new:
        yield "exit code 0, and no new target"
    if done.code == 0 and "error[" in done.said:
        yield "exit code 0, and an error"
    if done.code in (3, 5):
        first = next((line for line in done.said.splitlines() if "error[" in line), "")
        if not first:
            yield f"no error said at exit code {done.code}"
        if (job.target if done.code == 5 else job.source) not in first:
            yield f"the error does not name the file: {first[:200]}"
        if not is_old:
            yield f"the target is new, and it says: {first[:200]}"
    if done.code == 7 and not ("error[out-of-memory]" in done.said and is_old):
        yield f"the target is {'old' if is_old else 'new'}, and it says: {done.said[:200]}"
    if done.code == 130 and ("nothing was written" in done.said) is not is_old:
        yield f"the target is {'old' if is_old else 'new'}, and it says: {done.said[:200]}"


@dataclass
class Count:
    """How many faults were survived, and what went wrong."""

    faults: int = 0
    killed: int = 0
    handled: int = 0
    wrong: list[str] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.wrong = []

    def add(self, job: Job, what: str, done: Outcome, found: list[str]) -> None:
        """Count a run."""
        self.faults += 1
        self.killed += done.code < 0
        self.handled += done.code > 0
        self.wrong += [f"ckptool {' '.join(job.arguments)}: {what}: {each}" for each in found]


def at_each_call(
    place: Path,
    job: Job,
    count: Count,
    every: int = 1,
    offset: int = 0,
    prepare: Callable[[], None] | None = None,
) -> None:
    """Let everything go wrong at each call of a job, or at every n-th pair of call and action."""
    new, calls = undisturbed(place, job, prepare)
    pairs = [(turn, name, act) for turn, name in enumerate(calls, 1) for act in actions(name)]
    folder = place / "run"
    for turn, name, action in pairs[offset::every]:
        lay_out(folder, job)
        done = run(folder, job, Counter(turn, action), prepare)
        # Threads take turns: another call may be there, or none: one came too late to allocate.
        met = next((each for each in done.calls[turn - 1 :] if fits(action, each)), None)
        if not done.code and met is None:
            action = "none"
        found = list(complaints(folder, job, new, done, action, met or name))
        count.add(job, f"{action} at call {turn}, {name}", done, found)


def at_each_size(place: Path, job: Job, count: Count, sizes: int = 24) -> None:
    """Limit the size of files (RLIMIT_FSIZE), from nothing to one byte too little."""
    new, _ = undisturbed(place, job)
    assert isinstance(new, bytes)
    folder = place / "run"
    for limit in sorted({len(new) * part // sizes for part in range(sizes)} | {len(new) - 1}):
        lay_out(folder, job)

        def prepare(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

        done = run(folder, job, Counter(0, ""), prepare)
        found = list(complaints(folder, job, new, done, "error EFBIG", "pwrite"))
        if done.code != 5:
            found.append(f"exit code {done.code}")
        count.add(job, f"files of at most {limit} bytes", done, found)


def on_full_disks(
    disk: Path, mount: Callable[[int], None], job: Job, count: Count, step: int = 1
) -> None:
    """Write to file systems with too few pages; `mount` makes one of so many bytes.

    ckptool's own look at the free space is answered with None, so that the disk really fills up.
    """
    folder = disk / "run"
    page = os.sysconf("SC_PAGE_SIZE")
    for pages in range(3, 40, step):
        mount(pages * page)
        try:
            lay_out(folder, job)
        except OSError:  # the input alone is too large
            continue
        done = run(folder, job, Counter(0, ""), _unknown_space)
        if done.code == 0:
            return
        new = (folder / job.target).read_bytes() if (folder / job.target).exists() else None
        meant = OLD if job.old else (GOOD / job.source).read_bytes() if job.in_place else None
        found = [] if new == meant else ["the target is not the old one"]
        if done.code != 5 or "no-space" not in done.said:
            found.append(f"exit code {done.code}: {done.said[:200]}")
        if {each.name for each in folder.iterdir()} - {job.source, job.target}:
            found.append("something was left behind")
        count.add(job, f"a disk of {pages} pages", done, found)


def _unknown_space() -> None:
    publish.free_space = lambda target: None
