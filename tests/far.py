"""A server on this machine that answers ranges and counts what it sends, and a small Hub on it."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """An answer before it is sent; a test may change all of it."""

    status: int
    headers: dict[str, str]
    body: bytes
    stop: int | None = None  # break off after so many bytes


@dataclass
class Asked:
    """A request as it came, and how many bytes of a body were sent for it."""

    path: str
    headers: dict[str, str]
    sent: int = 0


Spoil = Callable[[Asked, Answer], None]


@dataclass
class Far:
    """Files by path; `spoil` changes answers on their way."""

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: str | None = '"v1"'
    modified: str | None = None
    spoil: Spoil = lambda asked, answer: None
    asked: list[Asked] = field(default_factory=list)
    connections: set[object] = field(default_factory=set)
    root: str = ""

    def put(self, path: str, body: bytes) -> str:
        """Serve a file; give its URL."""
        self.files[path] = body
        return self.root + path

    @property
    def sent(self) -> int:
        """Count the bytes of all bodies so far."""
        return sum(each.sent for each in self.asked)

    def forget(self) -> None:
        """Count from here on."""
        self.asked.clear()
        self.connections.clear()

    def answer(self, asked: Asked) -> Answer:
        """Answer as a well-kept server does, then spoil that."""
        body = self.files.get(unquote(asked.path.partition("?")[0]))
        if body is None:
            made = Answer(404, {}, b"")
        else:
            headers = {"ETag": self.etag, "Last-Modified": self.modified}
            made = Answer(200, {k: v for k, v in headers.items() if v}, body)
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked.headers.get("range", ""))
            current = asked.headers.get("if-range") in (None, self.etag)
            if wanted and self.ranges and current:
                start, last = int(wanted[1]), min(int(wanted[2]), len(body) - 1)
                made.status, made.body = 206, body[start : last + 1]
                made.headers["Content-Range"] = f"bytes {start}-{last}/{len(body)}"
        self.spoil(asked, made)
        return made


def _handler(far: Far) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # a body would wait 40 ms for the headers' acknowledgement

        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            asked = Asked(self.path, headers)
            far.asked.append(asked)
            far.connections.add(self.connection)
            made = far.answer(asked)
            self.send_response(made.status)
            for name, value in {"Content-Length": str(len(made.body)), **made.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            body = made.body[: made.stop]
            if self.command == "HEAD":
                return
            asked.sent = len(body)
            with suppress(OSError):
                self.wfile.write(body)
            self.close_connection = self.close_connection or made.stop is not None

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    return Handler


@contextmanager
def serving() -> Iterator[Far]:
    """Run a server for a while."""

    class Quiet(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            pass

    far = Far()
    server = Quiet(("127.0.0.1", 0), _handler(far))
    far.root = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield far
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(name="far")
def far_fixture(monkeypatch: pytest.MonkeyPatch) -> Iterator[Far]:
    for name in "http_proxy https_proxy all_proxy no_proxy".split():
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with serving() as far:
        yield far
