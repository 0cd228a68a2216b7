"""Servers that break HTTP or hold a client up: each ends soon, with a message that says how."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from downloads import (  # noqa: F401  (fixtures)
    get,
    names,
    no_proxy_fixture,
    redirect,
    server_fixture,
)
from server import Reply, Server

from ckptool.errors import CkptoolError, DownloadFailed, NoSpace
from ckptool.files import patience, publish
from ckptool.files.http import Limits

FILE = bytes(range(256)) * 8
SHORT = Limits(connect=0.3, timeout=0.3, retries=1, backoff=0.01, longest_wait=0.05, nbytes=1 << 20)
START = b"HTTP/1.1 200 OK\r\n"
CHUNKED = START + b"Transfer-Encoding: chunked\r\n\r\n"
SIZED = START + b"Content-Length: 2048\r\n\r\n"
WHOLE = b"800\r\n" + FILE + b"\r\n0\r\n\r\n"
BARE = START + b"\r\n"
SLOW, NO_END, NO_NUMBER = "stopped sending", "without end", "length that is not a number"
PACKED, LOST, NOT_HTTP = "packs the file", "was lost", "is not HTTP"


def sized(*lengths: bytes, body: bytes = FILE) -> tuple[bytes]:
    lines = [b"Content-Length: %s\r\n" % each for each in lengths]
    return (START + b"".join(lines) + b"\r\n" + body,)


def coded(*lines: bytes, body: bytes = WHOLE) -> tuple[bytes]:
    return (START + b"".join(b"%s\r\n" % line for line in lines) + b"\r\n" + body,)


def chunk(size: bytes) -> tuple[bytes]:
    return (CHUNKED + size + b"\r\n" + FILE + b"\r\n0\r\n\r\n",)


# What a server sends, whether all after the first piece repeats, and the message; none for a file.
BEHAVIOURS: dict[str, tuple[tuple[bytes | float | None, ...], bool, str]] = {
    # Slow: seconds are rests.
    "nothing": ((b"", 0.05), True, SLOW),
    "a status line in drips": ((b"HTTP/1.1 200", b" ", 0.02), True, SLOW),
    "headers in drips": ((START + b"X: ", b"x", 0.02), True, SLOW),
    "a header a second": ((START, b"X: x\r\n", 0.02), True, SLOW),
    "100 Continue in drips": ((b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.02), True, SLOW),
    "a body in drips": ((SIZED, b"x", 0.02), True, SLOW),
    "a body in drips of a chunk": ((CHUNKED, b"1\r\nx\r\n", 0.02), True, SLOW),
    "a body in drips, no length": ((BARE, b"x", 0.02), True, SLOW),
    "a chunk size in drips": ((CHUNKED, b"0", 0.02), True, SLOW),
    "a chunk extension in drips": ((CHUNKED + b"1;", b"x", 0.02), True, SLOW),
    "half a body, then nothing": ((SIZED + FILE[:1000], 0.05), True, SLOW),
    "half a chunk, then nothing": ((CHUNKED + b"800\r\n" + FILE[:1000], 0.05), True, SLOW),
    "a chunk, then nothing": ((CHUNKED + WHOLE[:-5], 0.05), True, SLOW),
    "a body in drips, fast enough": ((SIZED, *[FILE[:256], 0.1] * 8), False, ""),
    "trailers in drips": ((CHUNKED + WHOLE[:-2], b"X: x\r\n", 0.02), True, ""),
    "nothing after a whole body": ((SIZED + FILE, 0.05), True, ""),
    # Endless and fast.
    "endless 100 Continue": ((b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 1000), True, NO_END),
    "endless 102 Processing": ((b"", b"HTTP/1.1 102 Processing\r\n\r\n" * 1000), True, NO_END),
    "an endless header": ((START + b"X: ", b"x" * 10_000), True, NOT_HTTP),
    "endless headers": ((START, b"X: x\r\n" * 1000), True, NOT_HTTP),
    "an endless status line": ((b"HTTP/1.1 200 ", b"x" * 10_000), True, NOT_HTTP),
    "an endless chunk size": ((CHUNKED, b"0" * 10_000), True, NO_NUMBER),
    "an endless chunk extension": ((CHUNKED + b"1;", b"x" * 10_000), True, NO_NUMBER),
    "endless trailers": ((CHUNKED + WHOLE[:-2], b"X: x\r\n" * 1000), True, ""),
    "an endless body of chunks": ((CHUNKED, b"800\r\n" + FILE + b"\r\n"), True, "does not end"),
    "an endless body": ((BARE, FILE), True, "does not end"),
    "an endless body after its length": ((SIZED, FILE), True, ""),
    # Lengths that `int` would take.
    "a negative length": (sized(b"-5"), False, NO_NUMBER),
    "a length with a sign": (sized(b"+2048"), False, NO_NUMBER),
    "a length with an underscore": (sized(b"2_048"), False, NO_NUMBER),
    "a length in other digits": (sized("٢٠٤٨".encode()), False, NO_NUMBER),
    "a length in hexadecimal": (sized(b"0x800"), False, NO_NUMBER),
    "a length with a fraction": (sized(b"2048.0"), False, NO_NUMBER),
    "a length of nothing": (sized(b""), False, NO_NUMBER),
    "a length of words": (sized(b"soon"), False, NO_NUMBER),
    "a length of 30 digits": (sized(b"9" * 30), False, NO_NUMBER),
    "a length of 5000 digits": (sized(b"9" * 5000), False, NO_NUMBER),
    "a length twice": (sized(b"2048", b"2048"), False, NO_NUMBER),
    "two lengths": (sized(b"2048", b"1024"), False, "contradict"),
    "two lengths in one": (sized(b"2048, 1024"), False, "contradict"),
    "a length between spaces": (sized(b"  2048  "), False, ""),
    "a length with zeros": (sized(b"0002048"), False, ""),
    "a length too long": (sized(b"9000000"), False, "ended after 2048"),
    "a length beyond the disk": (sized(b"9" * 18), False, "too little room|needs|free"),
    # Sizes of chunks.
    "a negative chunk": (chunk(b"-5"), False, NO_NUMBER),
    "a chunk with a sign": (chunk(b"+800"), False, NO_NUMBER),
    "a chunk with an underscore": (chunk(b"8_00"), False, NO_NUMBER),
    "a chunk with 0x": (chunk(b"0x800"), False, NO_NUMBER),
    "a chunk after a space": (chunk(b" 800"), False, NO_NUMBER),
    "a chunk before a space": (chunk(b"800 "), False, NO_NUMBER),
    "a chunk of no size": (chunk(b""), False, NO_NUMBER),
    "a chunk of words": (chunk(b"soon"), False, NO_NUMBER),
    "a chunk of 2^64": (chunk(b"1" + b"0" * 16), False, NO_NUMBER),
    "a chunk of an extension alone": (chunk(b";x=1"), False, NO_NUMBER),
    "a chunk in other digits": (chunk("٨".encode()), False, NO_NUMBER),
    "a chunk with an extension": (chunk(b'800 ; x="y"'), False, ""),
    "a chunk with zeros": (chunk(b"0000800"), False, ""),
    "a chunk in capitals": ((CHUNKED + b"A\r\n0123456789\r\n0\r\n\r\n",), False, ""),
    "a chunk that is longer": (chunk(b"7FF"), False, "longer than the server states"),
    "a chunk that is shorter": (chunk(b"900"), False, LOST),
    "a chunk line without CR": ((CHUNKED + WHOLE.replace(b"\r", b""),), False, NO_NUMBER),
    "no last chunk": ((CHUNKED + WHOLE[:-5],), False, LOST),
    # Codings.
    "gzip on the way": (coded(b"Transfer-Encoding: gzip", body=FILE), False, PACKED),
    "gzip in chunks": (coded(b"Transfer-Encoding: gzip, chunked"), False, PACKED),
    "chunks twice": (coded(b"Transfer-Encoding: chunked, chunked"), False, PACKED),
    "chunks in two headers": (coded(*[b"Transfer-Encoding: chunked"] * 2), False, PACKED),
    "a coding nobody knows": (coded(b"Transfer-Encoding: x\xff"), False, PACKED),
    "brotli": (coded(b"Content-Encoding: br", body=FILE), False, PACKED),
    "two codings": (coded(b"Content-Encoding: identity, gzip", body=FILE), False, PACKED),
    "chunked as content": (coded(b"Content-Encoding: chunked", body=FILE), False, PACKED),
    "no coding": (coded(b"Transfer-Encoding: identity", body=FILE), False, ""),
    "chunks in capitals": (coded(b"Transfer-Encoding: CHUNKED"), False, ""),
    # Lengths from elsewhere.
    "a linked size": (coded(b"X-Linked-Size: 2048", body=FILE), False, ""),
    "a linked size too short": (coded(b"X-Linked-Size: 2000", body=FILE), False, "does not end"),
    "a linked size too long": (coded(b"X-Linked-Size: 3000", body=FILE), False, "ended after 2048"),
    "a linked size of nobody": (coded(b"X-Linked-Size: -5", body=FILE), False, ""),
    "two sizes": (
        coded(b"X-Linked-Size: 2000", b"Content-Length: 2048", body=FILE),
        False,
        "2000 bytes were announced",
    ),
    "a length and chunks": (
        coded(b"Content-Length: 2048", b"Transfer-Encoding: chunked"),
        False,
        "",
    ),
    "a length and other chunks": (
        coded(b"Content-Length: 2000", b"Transfer-Encoding: chunked"),
        False,
        "does not end",
    ),
    # Status lines.
    "a part unasked": ((b"HTTP/1.1 206 Partial\r\nContent-Length: 5\r\n\r\n12345",), False, "part"),
    "no status": ((b"HTTP/1.1\r\n\r\n" + FILE,), False, NOT_HTTP),
    "a status of words": ((b"HTTP/1.1 fine OK\r\n\r\n" + FILE,), False, NOT_HTTP),
    "a negative status": ((b"HTTP/1.1 -200 OK\r\n\r\n" + FILE,), False, NOT_HTTP),
    "a file alone": ((FILE,), False, NOT_HTTP),
    "HTTP/1.0": ((b"HTTP/1.0 200 OK\r\n\r\n" + FILE,), False, ""),
    "HTTP/9": ((b"HTTP/9.9 200 OK\r\n\r\n" + FILE,), False, NOT_HTTP),
    "early hints": ((b"HTTP/1.1 103 Early Hints\r\nLink: <x>\r\n\r\n" + SIZED + FILE,), False, ""),
    "nothing at all": ((b"",), False, LOST),
    "a reset at once": ((b"", None), False, LOST),
    "a reset in the headers": ((START, None), False, "empty file"),
    "a reset in the body": ((SIZED + FILE[:1000], 0.05, None), False, f"{LOST}|ended after 1000"),
    "a reset in a chunk": ((CHUNKED + b"800\r\n" + FILE[:1000], 0.05, None), False, LOST),
}


@pytest.mark.parametrize("name", BEHAVIOURS)
def test_each_ends_with_a_message_and_nothing_wrong(
    server: Server, tmp_path: Path, name: str
) -> None:
    raw, endless, message = BEHAVIOURS[name]
    url = server.on("/f.pth", Reply(raw=raw, endless=endless))
    began = time.monotonic()
    if message:
        with pytest.raises(CkptoolError, match=message) as caught:
            get(url, tmp_path, limits=SHORT)
        assert type(caught.value) in (DownloadFailed, NoSpace)
        assert names(tmp_path) == []
    else:
        get(url, tmp_path, limits=SHORT)
        assert (tmp_path / "f.pth").read_bytes() in (FILE, b"0123456789")
        assert names(tmp_path) == ["f.pth"]
    assert time.monotonic() - began < 3


def ends(kind: type[CkptoolError], message: str, url: str, folder: Path, **more: Any) -> Any:
    """Download what cannot be, in time; return the error."""
    began = time.monotonic()
    with pytest.raises(kind, match=message) as caught:
        get(url, folder, **{"limits": SHORT, **more})
    assert time.monotonic() - began < 3
    return caught.value


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Have each wait for a server take one of the three seconds that it has, whatever it takes."""
    clock = count()
    monkeypatch.setattr(patience, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    return replace(SHORT, timeout=3.0, retries=9)


def test_redirects_share_the_time(server: Server, tmp_path: Path, seconds: Limits) -> None:
    for step in range(9):
        hop = b"HTTP/1.1 302 Found\r\nLocation: /%d\r\nContent-Length: 0\r\n\r\n" % (step + 1)
        server.on(f"/{step}", Reply(raw=(hop,)))
    ends(DownloadFailed, SLOW, server.root + "/0", tmp_path, limits=seconds)
    assert len(server.asked) in (3, 4)  # the last may not have come to the server yet


def test_trouble_shares_the_time(server: Server, tmp_path: Path, seconds: Limits) -> None:
    busy = b"HTTP/1.1 503 Busy\r\nContent-Length: 0\r\n\r\n"
    url = server.on("/f.pth", Reply(raw=(busy,)))
    ends(DownloadFailed, SLOW, url, tmp_path, limits=seconds)
    assert len(server.asked) in (3, 4)  # the last may not have come to the server yet


def test_retries_are_counted_over_redirects(server: Server, tmp_path: Path) -> None:
    for step in range(9):
        server.on(f"/{step}", Reply(status=503), redirect(f"/{step + 1}"))
    ends(DownloadFailed, "503", server.root + "/0", tmp_path, limits=replace(SHORT, retries=2))
    assert len(server.asked) == 5


@pytest.mark.parametrize("drip", [b"", b"\x16\x03\x03"])
def test_tls_that_never_begins_is_given_up(tmp_path: Path, drip: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def talk() -> None:
            client, _ = listener.accept()
            with client, suppress(OSError):
                while not stop.wait(0.02):
                    client.sendall(drip[:1])

        threading.Thread(target=talk, daemon=True).start()
        url = f"https://127.0.0.1:{listener.getsockname()[1]}/f.pth"
        ends(DownloadFailed, "stopped sending|no trusted connection", url, tmp_path)
        stop.set()


def test_a_proxy_that_drips_is_given_up(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        stop = threading.Event()

        def talk() -> None:
            client, _ = listener.accept()
            with client, suppress(OSError):
                client.sendall(b"HTTP/1.1 200 OK\r\nX: ")
                while not stop.wait(0.02):
                    client.sendall(b"x")

        threading.Thread(target=talk, daemon=True).start()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")
        ends(DownloadFailed, SLOW, "https://weights.invalid/f.pth", tmp_path)
        stop.set()


def test_a_hub_states_the_size_on_the_way(server: Server, tmp_path: Path) -> None:
    hop = Reply(status=302, headers={"Location": "/blob", "X-Linked-Size": "2048"})
    url = server.on("/f.pth", hop)
    server.on("/blob", Reply(raw=(BARE + FILE,)))
    assert get(url, tmp_path, limits=SHORT).nbytes == 2048
    (tmp_path / "f.pth").unlink()
    server.on("/blob", Reply(raw=(BARE, FILE), endless=True))
    ends(
        DownloadFailed,
        "does not end after 2048",
        url,
        tmp_path,
        limits=replace(SHORT, nbytes=1 << 40),
    )
    server.on("/blob", Reply(raw=(BARE + FILE[:2000],)))
    ends(DownloadFailed, "ended after 2000 of 2048", url, tmp_path)
    assert names(tmp_path) == []


def test_half_the_free_space_is_left(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "free_space", lambda target: 5000)
    url = server.on("/f.pth", Reply(raw=(BARE, FILE), endless=True))
    error = ends(NoSpace, "no length, and 2.4 KiB", url, tmp_path)
    assert str(tmp_path) in error.message
    assert "TMPDIR" in error.hint
    server.on("/f.pth", Reply(raw=(BARE + FILE,)))
    assert get(url, tmp_path, limits=SHORT).nbytes == 2048


HALF = START + b'Content-Length: 2048\r\nETag: "v1"\r\n\r\n' + FILE[:1000]
REST = b"bytes 1000-2047/2048"


def part(content_range: bytes, *lines: bytes, body: bytes = FILE[1000:]) -> bytes:
    head = b"HTTP/1.1 206 Partial Content\r\nContent-Range: " + content_range
    return b"\r\n".join([head, *lines, b"", body])


# What a server sends for the rest of a file: pieces, whether the rest repeats, and the message.
RESTS: dict[str, tuple[tuple[bytes | float, ...], bool, str]] = {
    "the rest": ((part(REST, b"Content-Length: 1048"),), False, ""),
    "the rest without a length": ((part(REST),), False, ""),
    "the rest in drips": ((part(REST, body=b""), b"x", 0.02), True, SLOW),
    "headers in drips": ((b"HTTP/1.1 206 P\r\nX: ", b"x", 0.02), True, SLOW),
    "less than the rest": ((part(REST, body=FILE[1000:2000]),), False, "ended after 2000 of 2048"),
    "more than the rest": ((part(REST), FILE), True, "does not end after 2048"),
    "a negative length": ((part(REST, b"Content-Length: -5"),), False, NO_NUMBER),
    "packed": ((part(REST, b"Content-Encoding: gzip"),), False, PACKED),
    "another total": ((part(b"bytes 1000-2047/9999"),), False, "416"),
    "a negative start": ((part(b"bytes -1000-2047/2048"),), False, "416"),
    "a range that overlaps": ((part(b"bytes 999-2047/2048", body=FILE[999:]),), False, "416"),
    "a range that leaves a gap": ((part(b"bytes 1001-2047/2048", body=FILE[1001:]),), False, "416"),
    "a range with an underscore": ((part(b"bytes 1_000-2047/2048"),), False, "416"),
    "no range": ((b"HTTP/1.1 206 P\r\nContent-Length: 1048\r\n\r\n" + FILE[1000:],), False, "416"),
    "several ranges": ((part(REST + b", " + REST),), False, "416"),
    "another ETag": ((part(REST, b'ETag: "v2"'),), False, "416"),
}


@pytest.mark.parametrize("name", RESTS)
def test_the_rest_of_a_file_is_that_or_nothing(server: Server, tmp_path: Path, name: str) -> None:
    raw, endless, message = RESTS[name]
    rest, none = Reply(raw=raw, endless=endless), Reply(status=416)
    url = server.on("/f.pth", Reply(raw=(HALF,)), rest, none)
    ends(DownloadFailed, "ended after 1000 of 2048", url, tmp_path)
    assert server.headers("Range") == [None]
    if message:
        ends(DownloadFailed, message, url, tmp_path)
        kept = tmp_path / "f.pth.part"
        assert not kept.exists() or FILE.startswith(kept.read_bytes().rstrip(b"x"))
        assert not (tmp_path / "f.pth").exists()
    else:
        assert get(url, tmp_path, limits=SHORT).resumed_from == 1000
        assert (tmp_path / "f.pth").read_bytes() == FILE
