"""What the metadata of a run may cost in memory: one account, kept in estimates.

A few bytes of a file may say a lot, as deflated pickles and JSON do. Readers count what they make
before there is much of it, in the bytes that CPython takes for it (3.11 on 64 bits, measured over
the whole process by `tests/benchmarks/costs.py`). What is counted stays so until the run ends: one
file, or all that are open together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from ckptool.errors import TooCostly
from ckptool.text import parse_size, readable

MOST = 256 << 20  # by default, the process included
LEAST = 64 << 20  # whatever the size of the metadata is
EACH_BYTE = 64  # for each byte of metadata, as stored
UNBOUNDED = 1 << 62
PROCESS = 24 << 20  # the interpreter and the modules of a command that reads

PLACE = 20  # on a stack, in a list, in a memo
NUMBER = 32
TEXT = 64  # beside its letters
PAIR = 150
NODE = 140  # a list, a dict, a tuple
SEEN = 160  # in the sets of those that walks have met
CALL = 200
NAME = 300
TENSOR = 400  # with its storage
MEMBER = 450  # of an archive


class Budget:
    """What a run may spend: `most` where the user says so, else by the metadata that it reads.

    `share` is that of the files of a set which were begun.
    """

    def __init__(self, most: int | None = None) -> None:
        self.most = most
        self.stored = 0
        self.spent = PROCESS
        self.share = 1.0

    @property
    def limit(self) -> int:
        """Return how many bytes may be spent."""
        return self.most or min(MOST, LEAST + EACH_BYTE * self.stored)

    def read(self, nbytes: int, stored: int | None = None) -> None:
        """Count metadata that is read at once, of which so many bytes are in the file."""
        self.stored += nbytes if stored is None else stored
        self.spend(nbytes, brief=nbytes)

    def spend(self, nbytes: int, *, brief: int = 0, further: float = 0) -> None:
        """Count bytes of memory; `brief` ones are free again soon, `further` ones expected.

        Raises `TooCostly` where they are too many.
        """
        self.spent += nbytes
        if self.spent + brief > self.limit:
            raise self._refusal((self.spent + brief + further) / self.share)

    def _refusal(self, needed: float) -> TooCostly:
        asked = MOST
        while asked < max(self.limit + 1, 2.5 * needed):
            asked *= 2
        stored = f" ({readable(self.stored)} as stored)" if self.stored else ""
        return TooCostly(
            f"reading its metadata{stored} takes more than {readable(self.limit)} of memory",
            option=f"--max-memory {asked >> 20}MiB",
        )


_run: ContextVar[Budget | None] = ContextVar("run", default=None)


def current() -> Budget:
    """Return the budget of this run, or one of its own for what is read outside of any."""
    return _run.get() or Budget()


@contextmanager
def run(most: int | None = None, *, anew: bool = False) -> Iterator[None]:
    """Read under one budget: that of the run around it, but where there is `most`, or `anew`."""
    around = _run.get()
    if around and most is None and not anew:
        yield
        return
    token = _run.set(Budget(most or (around.most if around else None)))
    try:
        yield
    finally:
        _run.reset(token)


@contextmanager
def brief() -> Iterator[None]:
    """Count no longer than a block what nothing holds after it."""
    budget = current()
    before = budget.spent, budget.stored
    try:
        yield
    finally:
        budget.spent, budget.stored = before


@contextmanager
def max_memory(size: int | str) -> Iterator[None]:
    """Let what is read in a block take so much memory, bytes or text such as `2GiB`.

    Without it, metadata may take 64 MiB and 64 times its size as stored, 256 MiB in all; more is
    `TooCostly`.

    >>> with ckptool.max_memory("2GiB"):
    ...     checkpoint = ckptool.read("model_best.pth.tar")
    """
    with run(parse_size(str(size), "--max-memory 2GiB")):
        yield
