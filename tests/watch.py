"""What Python does while ckptool reads a file: an audit hook that sees every import, open and call.

As a program it reads `[good files, other files, step]` as JSON from stdin, runs many command lines
over each good file and every `step`-th of them, other ones each time, over each other file, and
writes which kinds of events the good files caused, and every event of the others once:
`python tests/watch.py`. With `unpickle` it loads the files with pickle instead, to show that the
hook sees what runs.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

Event = tuple[str, tuple[Any, ...]]

# What no run of ckptool may cause that loads no model.
NEVER = (
    "exec", "compile", "import", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn",
    "os.spawn", "subprocess.Popen", "pty.spawn", "ctypes.dlopen", "ctypes.dlsym", "marshal.loads",
    "pickle.find_class", "code.__new__", "function.__new__", "socket.connect", "socket.__new__",
    "socket.bind", "urllib.Request", "webbrowser.open", "shutil.rmtree", "os.putenv",
)  # fmt: skip
COMMANDS: tuple[tuple[str | None, ...], ...] = (  # None stands for the file
    ("keys", None), ("keys", "--all", "--json", None), ("keys", "--tree", None),
    ("info", None), ("check", None), ("check", "--finite", "--sha256", "--json", None),
    ("convert", None, "out.pth"), ("convert", None, "out.safetensors"),
    ("convert", "--tensors-only", None, "out.pth"),
    ("convert", "--tensors-only", None, "out.safetensors"),
    ("strip-prefix", None, "out.pth"), ("add-prefix", None, "out.pth"),
    ("unwrap", None, "out.pth"), ("transfer", None, "out.pth", "--drop", "*.bias"),
)  # fmt: skip


class Watch:
    """An audit hook; hooks cannot be taken away, so that one is made for each process."""

    def __init__(self) -> None:
        self._seen: list[Event] | None = None
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._seen is not None:
            self._seen.append((event, arguments))

    @contextmanager
    def events(self) -> Iterator[list[Event]]:
        """Record what happens in the block."""
        seen: list[Event] = []
        self._seen = seen
        try:
            yield seen
        finally:
            self._seen = None


def run_commands(path: str, commands: Sequence[tuple[str | None, ...]]) -> list[Event]:
    """Run command lines over a file; return what they caused."""
    from ckptool.cli.main import main

    seen: list[Event] = []
    for command in commands:
        silent = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
        with silent[0], silent[1], WATCH.events() as events:
            main([path if part is None else part for part in command])
        seen += events
        for name in ("out.pth", "out.safetensors"):
            if os.path.exists(name):
                os.unlink(name)
    return seen


def unpickle(path: str, _: object) -> list[Event]:
    """Load the pickle of a torch zip as no one should; give what it caused."""
    import pickle
    import zipfile

    with WATCH.events() as events:
        pickle.loads(zipfile.ZipFile(path).read("archive/data.pkl"))
    return events


def written(event: str, arguments: tuple[Any, ...]) -> tuple[str, tuple[str, ...]]:
    """Write an event down; that of `id` has an address, another one each time."""
    shown = () if event == "builtins.id" else arguments
    return event, tuple(repr(each)[:4000] for each in shown)


if __name__ == "__main__":
    WATCH = Watch()
    run = unpickle if sys.argv[1:] == ["unpickle"] else run_commands
    good, others, step = json.load(sys.stdin)
    for each in good:
        run(each, COMMANDS)
    kinds = sorted({event for each in good for event, _ in run(each, COMMANDS)})
    told = {
        path: [*{written(*event): 0 for event in run(path, COMMANDS[number % step :: step])}]
        for number, path in enumerate(others)
    }
    json.dump([kinds, told], sys.stdout)
