"""How commands talk: data on stdout, talk and progress on stderr, colour on a terminal alone.

With `--json` nothing is said: stdout gets one document, which has the warnings, or stderr gets one
that describes an error.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, Protocol, TextIO, TypeVar

import click

from ckptool.cli.screen import wrapped
from ckptool.errors import (
    Bug,
    CkptoolError,
    Interrupted,
    MissingExtra,
    NoSuchFile,
    WriteError,
    is_out_of_memory,
    of_system,
    out_of_memory,
    reason,
)
from ckptool.text import readable, visible

if TYPE_CHECKING:
    from ckptool.documents import looking

TYPED = "^C"  # how a terminal shows it
COLUMNS = 80  # of a terminal that does not know
BAR_AFTER = 1.0  # seconds before a bar is worth drawing
LINE_EVERY = 10.0  # seconds between lines of progress off a terminal


_warned: list[str] | None = None  # with --json: the warnings of the next document
_quiet = False  # with -q


@contextmanager
def documents(wanted: bool) -> Iterator[None]:
    """Say nothing but documents, where that is wanted; libraries' warnings go into them too."""
    global _warned, _quiet
    before = _warned, _quiet
    _warned, _quiet = [] if wanted else None, False
    try:
        if not wanted:
            yield
            return
        import json  # noqa: F401  (now: there may be no memory for it when an error is written)

        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: warn(str(message))
            yield
    finally:
        _warned, _quiet = before


def hush(wanted: bool) -> None:
    """Say no more than errors and warnings, where that is wanted."""
    global _quiet
    _quiet = wanted


def speaks_json() -> bool:
    """Return whether documents are all that is said."""
    return _warned is not None


def say(lines: Iterable[str], *, always: bool = False) -> None:
    """Write lines of talk to stderr, with -q not but `always`; on a terminal, broken at words."""
    if (always or not _quiet) and not speaks_json():
        width = columns(sys.stderr)
        _to_stderr("".join(f"{part}\n" for line in lines for part in wrapped(line, width)))


def _to_stderr(text: str) -> None:
    with suppress(OSError):  # nobody listens: the work goes on
        sys.stderr.write(text)
        sys.stderr.flush()


def put(lines: Sequence[str], end: str = "\n") -> None:
    """Write lines of data to stdout; `end` comes after the last."""
    sys.stdout.write("\n".join(lines) + end if lines else "")
    sys.stdout.flush()


def document(fields: Mapping[str, object]) -> str:
    """Write one JSON document; ASCII alone, so that any stream can hold it, and nothing acts."""
    import json

    if _warned:
        fields = {**fields, "warnings": list(_warned)}
        _warned.clear()
    return json.dumps(fields, indent=2).replace("\x7f", "\\u007f")


def put_document(fields: Mapping[str, object]) -> None:
    """Write the document of `--json` to stdout, with what was warned of."""
    put([document(fields)])


class Result(Protocol):
    """What a verb found."""

    def to_dict(self) -> Mapping[str, object]:
        """Return its document."""
        ...


_Result = TypeVar("_Result", bound=Result)


def answer(
    found: _Result, rows: Callable[[_Result, int | None], Sequence[str]], lines: Iterable[str]
) -> None:
    """Write what a verb found: its document, or rows as wide as a terminal is, and the talk."""
    if speaks_json():
        put_document(found.to_dict())
    else:
        put(rows(found, columns()))
    say(lines)


def refusal(error: Exception) -> CkptoolError:
    """Return the error that describes any exception."""
    if isinstance(error, CkptoolError):
        return error
    if is_out_of_memory(error):
        return out_of_memory()
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, ImportError):
        return MissingExtra(
            f"a library cannot be loaded: {error}",
            hint="pip check says what is missing; its files may be unreadable, or too many open",
        )
    return Bug(
        f"{type(error).__name__}: {error}",
        hint="this is a defect in ckptool; CKPTOOL_DEBUG=1 shows where",
    )


def _of_system(error: OSError) -> CkptoolError:
    """Return the error for what the system refused; where stdout does again, it is that one."""
    if error.filename is None:
        try:
            sys.stdout.flush()
        except OSError:
            silence()
            return WriteError(f"the standard output cannot be written: {reason(error)}")
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
    return of_system(error, str(error.filename or "a file"), "written" if full else "used")


def silence() -> None:
    """Send what is left of stdout nowhere, so that flushing it at the end fails no more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def on_terminal() -> bool:
    """Return whether data goes to a terminal."""
    return sys.stdout.isatty()


def columns(stream: TextIO | None = None) -> int | None:
    """Return how wide the terminal is that a stream, or data, goes to; None for no terminal."""
    stream = stream or sys.stdout
    if not stream.isatty():
        return None
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal() and int(stated):
        return int(stated)
    with suppress(OSError, ValueError):  # a terminal in the tests has no file
        return os.get_terminal_size(stream.fileno()).columns or COLUMNS
    return COLUMNS


def folds() -> bool:
    """Return whether repetitions in talk fold."""
    return columns(sys.stderr) is not None


def coloured(text: str, colour: str, *, data: bool = False) -> str:
    """Colour a word of talk, or of data, where that is wanted."""
    wanted = in_colour(sys.stdout if data else sys.stderr)
    return click.style(text, fg=colour, bold=True) if wanted else text


def in_colour(stream: TextIO) -> bool:
    """Return whether colour is wanted on a stream: on a terminal, unless NO_COLOR; FORCE_COLOR."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def complain(error: CkptoolError, *, in_a_line: bool = False) -> int:
    """Write an error, with --json as a document; return its exit code.

    `in_a_line` leaves out what shows it and what helps.
    """
    if speaks_json():
        _to_stderr(document(failure(error)) + "\n")
    slug = coloured(f"error[{error.slug}]", "red")
    lines = [f"{slug}: {visible(error.message)}"]
    if not in_a_line:
        lines += [f"    {visible(line)}" for line in error.evidence]
    if error.hint and not in_a_line:
        lines.append(f"{coloured('hint', 'cyan')}: {visible(error.hint)}")
    say(lines, always=True)
    return error.exit_code


def say_interrupted(stopped: Interrupted) -> int:
    """Write that a run was interrupted, without the form of an error; return its exit code."""
    if speaks_json():
        return complain(stopped)
    # The line of a terminal ends in ^C by now.
    last = ["", stopped.message] if sys.stderr.isatty() else [stopped.message]
    say(map(visible, [*stopped.evidence, *last]), always=True)
    return stopped.exit_code


def spelled(error: CkptoolError) -> CkptoolError:
    """Name a file that is spelled like the missing one, in the hint."""
    if isinstance(error, NoSuchFile) and error.path and not error.hint:
        from ckptool.files.fileio import spelled_like

        error.hint = spelled_like(str(error.path))
    return error


def failure(error: CkptoolError) -> looking.Error:
    """Return the document of an error."""
    return {
        "error": error.slug,
        "message": error.message,
        "evidence": list(error.evidence),
        "hint": error.hint,
        "exit": error.exit_code,
    }


def warn(line: str, *evidence: str) -> None:
    """Write a warning and what shows it, which -q silences no more than errors."""
    say([f"{coloured('warning', 'yellow')}: {line}", *evidence], always=True)
    if _warned is not None:
        _warned.append("; ".join([line, *map(str.strip, evidence)]))


def warn_if_any(lines: Sequence[str]) -> None:
    """Write a warning, its first line, and what shows it, the others; nothing of none."""
    if lines:
        warn(*lines)


def without_secrets(word: str) -> str:
    """Return an argument as it may be shown: a URL without user, password and query."""
    if "://" not in word:
        return word
    from ckptool.files.http import shown

    return shown(word)


class _Unlocked(nullcontext[None]):
    """The lock of tqdm, whose `refresh` keeps it for ever where Ctrl-C comes: ours is enough."""

    def acquire(self) -> None:
        """Take nothing."""

    def release(self) -> None:
        """Give nothing back."""


class Progress:
    """A bar on a terminal once a job takes longer than a second, plain lines elsewhere."""

    def __init__(self, what: str, *, quiet: bool = False, unit: str = "B") -> None:
        self._what = visible(os.path.basename(without_secrets(what)))
        self._unit = unit
        self._total = 0
        self._quiet = quiet or _quiet or speaks_json()
        self._done = 0
        self._bar: Any = None
        self._lock = threading.Lock()
        self._started = self._said = time.monotonic()

    def begin(self, total: int) -> Progress:
        """Start to count towards so many bytes."""
        self._total = total
        self._started = self._said = time.monotonic()
        return self

    def __call__(self, count: int) -> None:
        """Count bytes, or another unit; may be called from any thread."""
        with self._lock:
            self._done += count
            now = time.monotonic()
            if self._bar is not None:
                self._bar.update(count)
            elif not self._quiet and now - self._started > BAR_AFTER:
                self._show(now)

    def reached(self, done: int, total: int | None, what: str = "") -> None:
        """Count up to `done` of `total`, of another name; a total of None is not known."""
        self._total = total or 0
        self._what = visible(what) or self._what
        if self._bar is not None:
            self._bar.set_description(self._what, refresh=False)
        self(done - self._done)

    def _show(self, now: float) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            tqdm.set_lock(_Unlocked())
            tqdm.monitor_interval = 0  # no thread of its own
            # What is interrupted in here is drawn by nobody, and takes no line from the next.
            self._bar = tqdm(
                total=self._total or None,
                desc=self._what,
                unit=self._unit,
                unit_scale=self._unit == "B",
                unit_divisor=1024,
                ascii=True,
                leave=False,
                delay=BAR_AFTER,
                position=0,
                # tqdm draws nothing where a terminal does not know its own size.
                ncols=(columns(sys.stderr) or COLUMNS) - len(TYPED) - 1,
                nrows=24,
            )
            self._bar.start_t -= now - self._started
            self._bar.n = self._bar.last_print_n = self._done
            self._bar.refresh()
        elif now - self._said > LINE_EVERY:
            self._said = now
            say([f"{self._what}: {self._reached()}"])

    def _reached(self) -> str:
        if self._unit != "B":
            return f"{self._unit} {self._done} of {self._total}"
        speed = readable(int(self._done / (self._said - self._started)))
        total = f" of {readable(self._total)}" if self._total else ""
        return f"{readable(self._done)}{total}, {speed}/s"

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            if kind is KeyboardInterrupt:  # what the terminal wrote behind the bar is still there
                blank = " " * ((columns(sys.stderr) or COLUMNS) - 1)
                sys.stderr.write(f"\r{blank}\r{TYPED}")
