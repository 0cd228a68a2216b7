"""Run ckptool as ranks to one of which something happens: MISFORTUNE=kill@copy@1.

What happens: `kill`, `stop` (until SIGCONT), `full` (the disk), `defect`. When: with the `plan`, in
a `copy`, when files are finished, before the output is published or right after it.
"""

import errno
import os
import signal
from collections.abc import Callable
from typing import Any

from ckptool.cli.main import entry
from ckptool.files import copying, publish, writing
from ckptool.verbs import agreement

MOMENTS = {
    "plan": (agreement, "digest"),
    "copy": (copying, "write_at"),
    "finish": (writing, "write_at"),
    "publish": (publish, "_move"),
    "published": (publish.moves, "removed"),
}


def happen(what: str) -> None:
    if what in ("kill", "stop"):
        os.kill(os.getpid(), signal.SIGKILL if what == "kill" else signal.SIGSTOP)
    elif what == "full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif what == "defect":
        raise ZeroDivisionError("division by zero")


def prepare(what: str, when: str) -> None:
    module, name = MOMENTS[when]
    real: Callable[..., Any] = getattr(module, name)

    def unlucky(*arguments: Any) -> Any:
        setattr(module, name, real)
        happen(what)
        return real(*arguments)

    setattr(module, name, unlucky)


if __name__ == "__main__":
    what, when, rank = os.environ["MISFORTUNE"].split("@")
    if rank == os.environ["RANK"]:
        prepare(what, when)
    entry()
