"""Bytes of a planned file one after the other, into what has no positions: a pipe."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import suppress

from ckptool.errors import of_system

Bytes = bytes | bytearray | memoryview
GAP = 1 << 16  # zeros at once
ROOM = 1 << 20  # what a pipe may hold by `/proc/sys/fs/pipe-max-size`; 64 KiB where none asks


def widen(fd: int) -> None:
    """Let a pipe hold more, where it can: its ends wake each other once for all that it holds."""
    with suppress(ImportError, AttributeError, OSError):  # no Linux, no pipe, too many of them
        import fcntl

        if fcntl.fcntl(fd, fcntl.F_GETPIPE_SZ) < ROOM:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, ROOM)


class Pipe(str):
    """What is said for an open descriptor that takes bytes one after the other."""

    fd: int

    def __new__(cls, name: str, fd: int) -> Pipe:
        """Name a descriptor."""
        self = super().__new__(cls, name)
        self.fd = fd
        return self


class Stream:
    """A pipe that takes `nbytes` in order: `literals` by their offsets, and what is written.

    The last bytes are sent by `close` alone: what fails before that is cut off, and no reader takes
    it for whole.
    """

    def __init__(self, pipe: Pipe, nbytes: int, literals: Iterable[tuple[int, bytes]]) -> None:
        self._pipe, self._nbytes, self._position = pipe, nbytes, 0
        self._literals = sorted((pair for pair in literals if pair[1]), reverse=True)
        self._held: bytes | None = None
        widen(pipe.fd)

    def write(self, data: Bytes, position: int) -> None:
        """Write bytes that come after all others; what is before them goes first."""
        self._reach(position)
        self._send(data)

    def close(self) -> None:
        """Write the rest, once all is known to be right."""
        self._reach(self._nbytes)
        if self._held is not None:
            self._put(self._held)

    def _reach(self, position: int) -> None:
        """Write the literals before a position, and zeros between them."""
        while self._literals and self._literals[-1][0] < position:
            start, data = self._literals.pop()
            self._fill(start)
            self._send(data)
        self._fill(position)

    def _fill(self, position: int) -> None:
        if position < self._position:
            raise RuntimeError(f"byte {position} of a stream comes after {self._position}")
        while self._position < position:
            self._send(bytes(min(GAP, position - self._position)))

    def _send(self, data: Bytes) -> None:
        self._position += len(data)
        if self._position == self._nbytes:
            self._held = bytes(data)
        else:
            self._put(data)

    def _put(self, data: Bytes) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._pipe.fd, view) :]
        except BrokenPipeError:
            raise
        except OSError as error:
            raise of_system(error, str(self._pipe), "written") from error
