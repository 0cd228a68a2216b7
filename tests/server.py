"""A web server on this machine that misbehaves as told."""

from __future__ import annotations

import gzip
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, cycle
from pathlib import Path


@dataclass
class Reply:
    """One answer. Unset, everything is as a well-kept server would do it."""

    body: bytes = b""
    status: int = 200
    reason: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    etag: str | None = None
    modified: str | None = None
    ranges: bool = True  # answers Range at all
    if_range: bool = True  # looks at If-Range
    declared: int | None = None  # another Content-Length than the body's
    silent: bool = False  # no Content-Length
    chunked: bool = False
    packed: bool = False  # gzip, whatever the client accepts
    stop: float | None = None  # close the connection after this share of the body
    hold: float | None = None  # stop sending after this share until `go`
    wait: float = 0.0  # seconds before the first byte
    endless: bool = False  # chunks that do not end, or all of `raw` but its first piece
    raw: tuple[bytes | float | None, ...] = ()  # all that is sent, seconds of rest; None resets
    go: threading.Event = field(default_factory=threading.Event)


@dataclass
class Asked:
    """A request as it came."""

    path: str
    headers: dict[str, str]


class Server:
    """Answers of a path, in order; the last is repeated."""

    def __init__(self, certificate: tuple[Path, Path] | None = None) -> None:
        self.replies: dict[str, list[Reply]] = {}
        self.asked: list[Asked] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, *_: object) -> None:
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *_: object) -> None:
                pass  # the client went away: some tests are about that

        self._http = Quiet(("127.0.0.1", 0), Handler)
        scheme = "http"
        if certificate is not None:
            scheme = "https"
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(*certificate)
            self._http.socket = context.wrap_socket(self._http.socket, server_side=True)
        self.root = f"{scheme}://127.0.0.1:{self._http.server_address[1]}"
        self.thread = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self.thread.start()

    def on(self, path: str, *replies: Reply) -> str:
        """Set the answers of a path; give its URL."""
        self.replies[path.partition("?")[0]] = list(replies)
        return self.root + path

    def headers(self, name: str) -> list[str | None]:
        """Give a header of every request so far."""
        return [each.headers.get(name.lower()) for each in self.asked]

    def close(self) -> None:
        """Let everyone go and stop."""
        for replies in self.replies.values():
            for reply in replies:
                reply.go.set()
        self._http.shutdown()
        self._http.server_close()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        """Answer a request."""
        headers = {name.lower(): value for name, value in handler.headers.items()}
        with self._lock:
            self.asked.append(Asked(handler.path, headers))
            replies = self.replies.get(handler.path.partition("?")[0], [Reply(status=404)])
            reply = replies.pop(0) if len(replies) > 1 else replies[0]
        handler.close_connection = True
        time.sleep(reply.wait)
        with suppress(BrokenPipeError, ConnectionResetError):
            _send(handler, reply, headers)


def _send(handler: BaseHTTPRequestHandler, reply: Reply, asked: dict[str, str]) -> None:
    if reply.raw:
        rest = cycle(reply.raw[1:]) if reply.endless else reply.raw[1:]
        for piece in chain(reply.raw[:1], rest):
            if reply.go.is_set():
                break
            if piece is None:
                linger = struct.pack("ii", 1, 0)
                handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif isinstance(piece, bytes):
                handler.wfile.write(piece)
            else:
                reply.go.wait(piece)
        return
    body, status, more = reply.body, reply.status, dict(reply.headers)
    wanted = _range(reply, asked)
    if wanted is not None and status == 200:
        start, last = wanted[0], min(wanted[1], len(body) - 1)
        if start >= len(body):
            body, status, more["Content-Range"] = b"", 416, f"bytes */{len(body)}"
        else:
            more["Content-Range"] = f"bytes {start}-{last}/{len(body)}"
            body, status = body[start : last + 1], 206
            more.update(reply.headers)
    if reply.packed:
        body = gzip.compress(body)
        more["Content-Encoding"] = "gzip"
    handler.send_response(status, reply.reason)
    if reply.etag:
        more.setdefault("ETag", reply.etag)
    if reply.modified:
        more.setdefault("Last-Modified", reply.modified)
    if reply.chunked or reply.endless:
        more["Transfer-Encoding"] = "chunked"
    if (not reply.silent and not (reply.chunked or reply.endless)) or reply.declared is not None:
        more["Content-Length"] = str(len(body) if reply.declared is None else reply.declared)
    for name, value in more.items():
        handler.send_header(name, value)
    handler.send_header("Connection", "close")
    handler.end_headers()
    _send_body(handler, reply, body)


def _range(reply: Reply, asked: dict[str, str]) -> tuple[int, int] | None:
    wanted = asked.get("range")
    if wanted is None or not reply.ranges:
        return None
    condition = asked.get("if-range")
    if condition is not None and reply.if_range and condition not in (reply.etag, reply.modified):
        return None
    start, _, last = wanted.removeprefix("bytes=").partition("-")
    return int(start), int(last or 1 << 62)


def _send_body(handler: BaseHTTPRequestHandler, reply: Reply, body: bytes) -> None:
    out = handler.wfile
    while reply.endless and not reply.go.is_set():
        out.write(b"10000\r\n" + bytes(0x10000) + b"\r\n")
    if reply.chunked:
        whole = len(body) if reply.stop is None else int(len(body) * reply.stop)
        for at in range(0, whole, 1000):
            piece = body[at : min(at + 1000, whole)]
            out.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        if reply.stop is None:
            out.write(b"0\r\n\r\n")
        return
    if reply.hold is not None:
        held = int(len(body) * reply.hold)
        out.write(body[:held])
        out.flush()
        reply.go.wait(30)
        body = body[held:]
    out.write(body if reply.stop is None else body[: int(len(body) * reply.stop)])


@contextmanager
def serving(certificate: tuple[Path, Path] | None = None) -> Iterator[Server]:
    """Run a server for a while."""
    server = Server(certificate)
    try:
        yield server
    finally:
        server.close()


def closed_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate for 127.0.0.1 that nobody signed."""
    paths = folder / "certificate.pem", folder / "key.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    more = ["-addext", "subjectAltName=IP:127.0.0.1", "-out", paths[0], "-keyout", paths[1]]
    subprocess.run([*command.split(), *map(str, more)], check=True, capture_output=True)
    return paths
