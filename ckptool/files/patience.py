"""How long a server may keep us waiting, whatever it sends meanwhile.

A timeout of a socket is for one `recv`: a byte a minute never ends.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import field
from typing import TYPE_CHECKING, Any

from ckptool.errors import DownloadFailed
from ckptool.records import dataclass
from ckptool.text import readable

if TYPE_CHECKING:
    from http.client import HTTPResponse
    from socket import socket

PACE = 1 << 10  # bytes of a file that a server must send in a second
IDLE = 1 << 20  # bytes that it may send before the next byte of the file: headers, chunk sizes


@dataclass(slots=True)
class Patience:
    """How long a server has kept us waiting; `reader` has what it sends on the last connection.

    Bytes of the file alone are progress: no `100 Continue`, header, chunk extension or trailer is.
    """

    timeout: float
    failed: Callable[[str, str], DownloadFailed]  # makes the error of what is wrong, and a hint
    waited: float = 0.0  # seconds for the bytes in `came`
    came: int = 0
    idle: int = 0  # bytes since the last one of the file
    reader: io.BufferedReader = field(init=False)
    response: HTTPResponse = field(init=False)

    def respond(self, sock: socket, *args: Any, **kwargs: Any) -> HTTPResponse:
        """Return a response of `http.client` that reads from its socket under these rules."""
        from http.client import HTTPResponse

        class Final(HTTPResponse):
            def begin(self) -> None:
                super().begin()
                while 101 < self.status < 200:  # `http.client` takes 100 alone for no answer yet
                    self.headers = None  # type: ignore[assignment]  # so that it reads on
                    super().begin()

        response = Final(sock, *args, **kwargs)
        self.reader = io.BufferedReader(_Received(response.fp.detach(), sock, self))
        response.fp = self.reader
        self.response = response
        return response

    def left(self) -> float:
        """Return the seconds that are left; raises `DownloadFailed`."""
        if self.idle > IDLE:
            raise self.failed(": the server sends headers or padding without end", "check the link")
        if self.waited >= self.timeout:
            pace = f"less than {readable(PACE)}/s for {self.timeout:g} s"
            what = f": the server stopped sending, or sent {pace}"
            raise self.failed(what, "run it again; --timeout SECONDS waits longer")
        return self.timeout - self.waited

    def progress(self, nbytes: int) -> None:
        """Count bytes of the file; as many as a whole timeout asks for begin another one."""
        self.came, self.idle = self.came + nbytes, 0
        if self.came >= PACE * self.timeout:
            self.came, self.waited = 0, 0.0


class _Received(io.RawIOBase):
    """What a socket receives, as long as there is patience."""

    def __init__(self, raw: io.RawIOBase, sock: socket, patience: Patience) -> None:
        self._raw, self._socket, self._patience = raw, sock, patience

    def readable(self) -> bool:
        """Return True: `BufferedReader` asks."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Wait for bytes; raises `DownloadFailed`."""
        patience = self._patience
        self._socket.settimeout(patience.left())
        began, nbytes = time.monotonic(), 0
        try:
            nbytes = self._raw.readinto(buffer) or 0
        except TimeoutError:
            patience.waited = patience.timeout
            patience.left()
        patience.waited += time.monotonic() - began
        patience.idle += nbytes
        return nbytes

    def close(self) -> None:
        """Close the socket too."""
        self._raw.close()
        super().close()
