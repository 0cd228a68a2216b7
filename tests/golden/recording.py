"""Run cases, each command line in a process forked off one that has imported the program."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import importlib
import os
import pkgutil
import pty
import re
import resource
import shutil
import signal
import stat
import struct
import sys
import tempfile
import termios
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fcntl import ioctl
from pathlib import Path
from typing import Any

from lines import Case, is_variable, matching
from preparing import prepare

SECONDS = 120  # for a command line
ROOTS = ("good", "hostile", "frameworks")
SIZE = (24, 100)  # of the terminals
MASKS = (
    (re.compile(r"(Traceback .*\n)(?:  .*\n)+"), r"\1"),
    (re.compile(r"\.[0-9a-f]{12}\.tmp"), ".TEMPORARY.tmp"),
    (re.compile(r"\d[\d.]* \w+ free\b"), "SPACE free"),
    (re.compile(r"; \d[\d.]* \w+ are free\b"), "; SPACE are free"),
    (re.compile(r"\d+\.\d ms"), "TIME ms"),
    (re.compile(r'("seconds_\w+": \[)[^\]]*\]'), r"\1TIME]"),
    (re.compile(r"0x[0-9a-f]{9,}"), "ADDRESS"),
)
UNPRINTABLE = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


@dataclass(frozen=True)
class Sources:
    """Where the files that lines name are copied from."""

    fixtures: Path
    corpus: Path | None

    @property
    def roots(self) -> dict[str, Path]:
        roots = {name: self.fixtures / name for name in ROOTS}
        return roots if self.corpus is None else {**roots, "corpus": self.corpus}


@dataclass(frozen=True)
class Stage:
    """What a command line runs against."""

    sources: Sources
    program: Callable[[], Any]
    url: str
    masks: tuple[tuple[str, str], ...]


def record(cases: Sequence[Case], sources: Sources, folder: Path, checkout: Path, jobs: int) -> int:
    """Record cases in a folder that is absent or empty; return the number of command lines."""
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise SystemExit(f"{folder} is not empty")
    _settle()
    with _serving(sources) as url, tempfile.TemporaryDirectory(prefix="golden-") as scratch:
        program = _imported(checkout.resolve())
        paths = ((scratch, "SCRATCH"), (str(checkout.resolve()), "CHECKOUT"), (url, "URL"))
        stage = Stage(sources, program, url, paths)
        plain = [case for case in cases if not case.with_torch]
        _all(plain, stage, folder, Path(scratch), jobs)
        heavy = [case for case in cases if case.with_torch]
        if heavy:
            _import_torch()
            _all(heavy, stage, folder, Path(scratch), jobs)
    return sum(not step[:1] or step[0][:1] != "+" for case in cases for step in case.steps)


def _settle() -> None:
    """Set what a command line may take from its surroundings."""
    os.umask(0o022)
    path = os.environ.get("PATH", "")
    os.environ.clear()
    os.environ.update(
        PATH=path,
        LANG="C.UTF-8",
        TERM="xterm-256color",
        OMP_NUM_THREADS="1",
        no_proxy="*",
        HF_HUB_OFFLINE="1",
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.fsync = os.fdatasync = lambda fd: None  # nothing here is to outlive the power


def _imported(checkout: Path) -> Callable[[], Any]:
    """Import all modules of the program; return its entry, wherever the checkout has it."""
    sys.path.insert(0, str(checkout))
    package = importlib.import_module("ckptool")
    if checkout not in Path(str(package.__file__)).parents:
        raise SystemExit(f"ckptool came from {package.__file__}, not from {checkout}")
    for module in pkgutil.walk_packages(package.__path__, "ckptool."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    cli = importlib.import_module("ckptool.cli")
    if callable(cli.main):
        return cli.main
    return cli.main.main


def _import_torch() -> None:
    import torch
    import torch.distributed.checkpoint.format_utils
    import torchvision

    assert torchvision
    torch.set_num_threads(1)


@contextlib.contextmanager
def _serving(sources: Sources) -> Iterator[str]:
    """Serve the files of all roots from a process of its own."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def translate_path(self, path: str) -> str:
            root, _, rest = path.strip("/").partition("/")
            place = sources.roots.get(root)
            return str(place / rest) if place else "/absent"

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        server.serve_forever()
    server.server_close()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _all(cases: Sequence[Case], stage: Stage, folder: Path, scratch: Path, jobs: int) -> None:
    """Share the cases among processes."""
    workers = []
    for number in range(jobs):
        pid = os.fork()
        if not pid:
            code = 1
            try:
                for case in cases[number::jobs]:
                    place = scratch / f"{number}"
                    _case(case, stage, folder, place)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        workers.append(pid)
    codes = [os.waitpid(pid, 0)[1] for pid in workers]
    if any(codes):
        raise SystemExit("a worker failed")


def _case(case: Case, stage: Stage, folder: Path, place: Path) -> None:
    place.mkdir()
    os.chdir(place)
    try:
        text = "".join(_step(step, stage) for step in case.steps)
    except Exception as error:
        raise RuntimeError(case.line) from error
    finally:
        os.chdir("/")
        shutil.rmtree(place)
    path = folder / case.group / f"{_slug(case.line)}.txt"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"{case.line}\n\n{text}", encoding="utf-8")


def _slug(line: str) -> str:
    digest = hashlib.sha256(line.encode()).hexdigest()[:8]
    return f"{re.sub(r'[^A-Za-z0-9.]+', '_', line).strip('_.')[:80]}-{digest}"


def _step(step: list[str], stage: Stage) -> str:
    words = [name for word in step for name in _brought(word, stage)]
    if words and words[0].startswith("+"):
        pid = os.fork()  # torch is loaded there, if it is
        if not pid:
            _leave(lambda: prepare(words))
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{words} failed")
        return ""
    variables: dict[str, str] = {}
    while words and is_variable(words[0]):
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    terminal = words[:1] == ["tty"]
    if terminal:
        del words[0]
    if words[:1] == ["ckptool"]:
        del words[0]
    before = _files()
    code, out, err = _run(words, variables, stage, terminal)
    typed = " ".join(words).replace(stage.url, "URL")
    told = [f"$ ckptool {typed}", f"exit {code}"]
    told += [*_marked("out", out, stage), *_marked("err", err, stage), *_changes(before)]
    return "".join(f"{line}\n" for line in [*told, ""])


def _brought(word: str, stage: Stage) -> list[str]:
    """Copy the files that a word names into the current folder; return the names."""
    word = word.replace("{url}", stage.url)
    option, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
    root, slash, rest = value.partition("/")
    source = stage.sources.roots.get(root)
    if source is None or (rest and not slash):
        return [word]
    if "*" in rest:
        names = matching(value, stage.sources.roots)
        return [name for each in names for name in _brought(each, stage)]
    whole = rest if root == "corpus" else rest.split("/")[0]  # a set of files with its index
    target = Path(root, whole)
    if (source / whole).exists() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / whole).is_dir():
            shutil.copytree(source / whole, target, copy_function=shutil.copyfile)
        else:
            shutil.copyfile(source / whole, target)
    return [f"{option}{sign}{value}"]


def _run(
    words: list[str], variables: dict[str, str], stage: Stage, terminal: bool
) -> tuple[int, bytes, bytes]:
    """Run the program in a fork; return exit code, stdout and stderr."""
    pipes = [_terminal() if terminal else os.pipe() for _ in range(2)]
    pid = os.fork()
    if not pid:
        _leave(lambda: _program(words, variables, stage, [write for _, write in pipes]))
    data = [b"", b""]
    readers = []
    for number, (read, write) in enumerate(pipes):
        os.close(write)
        reader = threading.Thread(target=_drain, args=(read, data, number))
        reader.start()
        readers.append(reader)
    _, status = os.waitpid(pid, 0)
    for reader in readers:
        reader.join()
    return os.waitstatus_to_exitcode(status), data[0], data[1]


def _terminal() -> tuple[int, int]:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *SIZE, 0, 0))
    return ours, theirs


def _drain(fd: int, data: list[bytes], number: int) -> None:
    with contextlib.suppress(OSError):  # a terminal says so when its last user has closed it
        while block := os.read(fd, 65536):
            data[number] += block
    os.close(fd)


def _leave(job: Callable[[], int | None]) -> None:
    """Do a job in this fork and end it."""
    code = 1
    try:
        code = job() or 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        with contextlib.suppress(Exception):
            sys.stderr.flush()
        os._exit(code)


def _program(
    words: list[str], variables: dict[str, str], stage: Stage, streams: list[int]
) -> int | None:
    signal.alarm(SECONDS)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for fd, write in enumerate(streams, 1):
        os.dup2(write, fd)
    encoding = variables.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115  (until the end)
    sys.stderr = open(2, "w", encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    os.environ["HOME"] = os.getcwd()
    os.environ.update(variables)
    sys.argv = ["ckptool", *words]
    code: int | None = stage.program()
    return code


def _marked(stream: str, data: bytes, stage: Stage) -> list[str]:
    """Mark each line of a stream with its name."""
    text = data.decode("utf-8", "backslashreplace").replace("\r\n", "\\r\n")
    for path, name in ((os.getcwd(), "FOLDER"), *stage.masks):
        text = text.replace(path, name)
    for pattern, mask in MASKS:
        text = pattern.sub(mask, text)
    text = UNPRINTABLE.sub(lambda char: "\t" if char[0] == "\t" else f"\\x{ord(char[0]):02x}", text)
    lines = text.split("\n")
    last = [f"{stream} (no newline at the end)"] if lines[-1] else []
    if not lines[-1]:
        lines.pop()
    return [f"{stream}| {line}" for line in lines] + last


Files = dict[str, tuple[int, str]]


def _files() -> Files:
    """Describe every file under the current folder."""
    files: Files = {}
    for folder, folders, names in os.walk("."):
        for name in [*names, *folders]:
            path = os.path.relpath(os.path.join(folder, name), ".")
            status = os.lstat(path)
            files[path] = (status.st_ino, _described(path, status))
    return files


def _described(path: str, status: os.stat_result) -> str:
    mode = stat.filemode(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        return f"{mode} -> {os.readlink(path)}"
    if not stat.S_ISREG(status.st_mode):
        return mode
    if _is_distributed(path):
        return f"{mode} of a distributed checkpoint"
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return f"{mode} {status.st_size} {digest}"


def _is_distributed(path: str) -> bool:
    """Say whether torch wrote a file: its bytes are another version's another time."""
    given = path.split("/")[0] in (*ROOTS, "corpus")
    return not given and (Path(path).parent / ".metadata").is_file()


def _changes(before: Files) -> list[str]:
    """List the files that were written or removed."""
    after = _files()
    lines = []
    for path in sorted({*before, *after}):
        if path not in after:
            lines.append(f"file {path}: removed")
        elif path not in before or before[path][1] != after[path][1]:
            lines.append(f"file {path}: {after[path][1]}")
        elif stat.S_ISREG(os.lstat(path).st_mode) and before[path][0] != after[path][0]:
            lines.append(f"file {path}: replaced")
    written = [line for line in lines if line.split(":")[0].endswith(".metadata")]
    for line in written:
        lines += _distributed(os.path.dirname(line.split(":")[0].removeprefix("file ")))
    return lines


def _distributed(folder: str) -> list[str]:
    """List what torch reads from a distributed checkpoint."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        _leave(lambda: _list_distributed(folder, write))
    os.close(write)
    data = [b""]
    _drain(read, data, 0)
    os.waitpid(pid, 0)
    return data[0].decode().splitlines()


def _list_distributed(folder: str, fd: int) -> None:
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # torch warns there
    with open(fd, "w", encoding="utf-8") as file:
        try:
            with tempfile.NamedTemporaryFile() as flat:
                dcp_to_torch_save(folder, flat.name)
                loaded = torch.load(flat.name, weights_only=False)
        except Exception as error:
            file.write(f"torch {folder}: {type(error).__name__}: {error}\n".replace(folder, "OUT"))
            return
        for line in sorted(_listed(loaded, "")):
            file.write(f"torch {folder}: {line}\n")


def _listed(value: Any, path: str) -> Iterator[str]:
    import torch

    if isinstance(value, dict) and value:
        for key, each in value.items():
            yield from _listed(each, f"{path}/{key}")
    elif isinstance(value, (list, tuple)) and value:
        for number, each in enumerate(value):
            yield from _listed(each, f"{path}/{number}")
    elif isinstance(value, torch.Tensor):
        data = value.detach().contiguous()
        raw = data.reshape(-1).view(torch.uint8).numpy().tobytes() if data.numel() else b""
        digest = hashlib.sha256(raw).hexdigest()[:16]
        yield f"{path} {data.dtype} {list(data.shape)} {digest}"
    else:
        yield f"{path} {type(value).__name__} {str(value)[:200]}"
