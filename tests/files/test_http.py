"""Servers that answer what nobody wants, or in a way that nobody should follow."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from downloads import (  # noqa: F401  (fixtures)
    BODY,
    PAGE,
    POINTER,
    QUICK,
    SHA,
    get,
    names,
    no_proxy_fixture,
    redirect,
    refused,
    server_fixture,
)
from server import Reply, Server, certificate, closed_port, serving

from ckptool.errors import (
    DownloadFailed,
    NoSpace,
)
from ckptool.files import fileio, http, publish
from ckptool.files.http import Limits


@pytest.mark.parametrize(
    ("status", "hint"),
    [(404, "check the link"), (401, "login"), (403, "token"), (410, "removed"), (400, "")],
)
def test_a_refusal_is_not_asked_again(
    server: Server, tmp_path: Path, status: int, hint: str
) -> None:
    error = refused(DownloadFailed, server.on("/f.pth", Reply(status=status)), tmp_path)
    assert str(status) in error.message
    assert hint in error.hint
    assert len(server.asked) == 1


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_trouble_that_passes_is_asked_again(server: Server, tmp_path: Path, status: int) -> None:
    url = server.on("/f.pth", Reply(status=status), Reply(BODY))
    assert get(url, tmp_path).sha256 == SHA
    assert len(server.asked) == 2


def test_trouble_that_stays_is_told(server: Server, tmp_path: Path) -> None:
    error = refused(DownloadFailed, server.on("/f.pth", Reply(status=503)), tmp_path)
    assert "503" in error.message
    assert len(server.asked) == 1 + QUICK.retries


@pytest.mark.parametrize("text", ["9999999", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_retry_after_is_capped(server: Server, tmp_path: Path, text: str) -> None:
    url = server.on("/f.pth", Reply(status=429, headers={"Retry-After": text}), Reply(BODY))
    started = time.monotonic()
    get(url, tmp_path)
    assert time.monotonic() - started < 2


def test_retry_after_is_kept_to(server: Server, tmp_path: Path) -> None:
    replies = Reply(status=429, headers={"Retry-After": "1"}), Reply(BODY)
    started = time.monotonic()
    get(server.on("/f.pth", *replies), tmp_path, limits=Limits(backoff=0.01, longest_wait=5))
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize(
    "text", ["soon", "-1", "1e9", "Fri, 99 Foo", "\x00", "9" * 5000, "Fri, 32 Jan 99999 99:99:99"]
)
def test_a_senseless_retry_after_is_ignored(server: Server, tmp_path: Path, text: str) -> None:
    url = server.on("/f.pth", Reply(status=429, headers={"Retry-After": text}), Reply(BODY))
    started = time.monotonic()
    assert get(url, tmp_path, limits=Limits(backoff=0.01, longest_wait=5)).sha256 == SHA
    assert time.monotonic() - started < 2


def test_a_hostile_reason_is_cut(server: Server, tmp_path: Path) -> None:
    reply = Reply(status=403, reason="\x1b[2J" + "x" * 10_000)
    error = refused(DownloadFailed, server.on("/f.pth", reply), tmp_path)
    assert "\x1b[2J" in error.message  # the command line escapes it
    assert len(error.message) < 300


def test_an_error_with_an_endless_body_ends(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(status=500, endless=True))
    assert "500" in refused(DownloadFailed, url, tmp_path).message
    server.on("/f.pth", Reply(status=302, headers={"Location": "/g.pth"}, endless=True))
    server.on("/g.pth", Reply(BODY))
    assert get(url, tmp_path).sha256 == SHA


@pytest.mark.parametrize(
    "reply",
    [
        Reply(PAGE),
        Reply(PAGE, headers={"Content-Type": "text/html; charset=utf-8"}),
        Reply(b"\xef\xbb\xbf \n<HTML>" + b"x" * 5000),
        Reply(b"Please sign in", headers={"Content-Type": "text/html"}),
        Reply(b"<!doctype html>" + b"x" * 5000, chunked=True),
    ],
)
def test_a_page_is_no_file(server: Server, tmp_path: Path, reply: Reply) -> None:
    error = refused(DownloadFailed, server.on("/f.pth", reply), tmp_path, sha256=SHA)
    assert "HTML page" in error.message
    assert "login" in error.hint


def test_a_file_that_is_called_a_page_is_a_file(server: Server, tmp_path: Path) -> None:
    reply = Reply(b"PK\3\4\0\0" + BODY, headers={"Content-Type": "text/html"})
    assert get(server.on("/f.pth", reply), tmp_path).nbytes == len(BODY) + 6


def test_a_pointer_is_no_file(server: Server, tmp_path: Path) -> None:
    error = refused(DownloadFailed, server.on("/f.pth", Reply(POINTER)), tmp_path)
    assert "LFS" in error.message
    assert "git lfs pull" in error.hint


@pytest.mark.parametrize("more", [{}, {"chunked": True}, {"silent": True}])
def test_nothing_is_no_file(server: Server, tmp_path: Path, more: dict[str, Any]) -> None:
    url = server.on("/f.pth", Reply(b"", **more))
    assert "empty" in refused(DownloadFailed, url, tmp_path).message


def test_a_packed_body_is_refused(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, packed=True))
    assert "gzip" in refused(DownloadFailed, url, tmp_path).message


@pytest.mark.parametrize("status", [204, 206, 304])
def test_only_a_whole_answer_is_a_file(server: Server, tmp_path: Path, status: int) -> None:
    refused(DownloadFailed, server.on("/f.pth", Reply(BODY, status=status)), tmp_path)


@pytest.mark.parametrize("more", [{}, {"chunked": True}, {"declared": 600_000, "stop": 1.0}])
def test_a_short_body_is_no_file(server: Server, tmp_path: Path, more: dict[str, Any]) -> None:
    reply = Reply(BODY, **{"stop": 0.4, **more})
    refused(DownloadFailed, server.on("/f.pth", reply), tmp_path)


def test_a_body_longer_than_declared_is_stopped(server: Server, tmp_path: Path) -> None:
    reply = Reply(BODY, chunked=True, declared=300_000, etag='"v1"')
    error = refused(DownloadFailed, server.on("/f.pth", reply), tmp_path)
    assert "does not end" in error.message


def test_an_endless_body_is_stopped(server: Server, tmp_path: Path) -> None:
    limits = Limits(nbytes=1 << 20)
    url = server.on("/f.pth", Reply(endless=True, etag='"v1"'))
    assert "does not end" in refused(DownloadFailed, url, tmp_path, limits=limits).message


def test_an_endless_body_leaves_the_disk_room(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "free_space", lambda target: 1_000_000)
    refused(NoSpace, server.on("/f.pth", Reply(endless=True)), tmp_path)


def test_space_is_looked_at_first(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publish, "free_space", lambda target: 1000)
    refused(NoSpace, server.on("/f.pth", Reply(BODY, etag='"v1"')), tmp_path)


def test_a_disk_that_fills_up_is_given_back(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, data: bytes, position: int) -> None:
        raise OSError(28, "No space left on device")

    url = server.on("/f.pth", Reply(BODY, etag='"v1"'))
    original = fileio.write_at
    calls = iter([original, original, original])  # the record, the head, a chunk
    monkeypatch.setattr(fileio, "write_at", lambda *given: next(calls, full)(*given))
    refused(NoSpace, url, tmp_path)


def test_a_server_that_does_not_begin_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, wait=5))
    started = time.monotonic()
    error = refused(DownloadFailed, url, tmp_path, limits=Limits(timeout=0.2, retries=0))
    assert "stopped sending" in error.message
    assert time.monotonic() - started < 3


def test_a_server_that_stops_is_given_up(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, hold=0.4))
    error = refused(DownloadFailed, url, tmp_path, limits=Limits(timeout=0.2, retries=0))
    assert "stopped sending" in error.message


def test_nobody_listens(tmp_path: Path) -> None:
    error = refused(DownloadFailed, f"http://127.0.0.1:{closed_port()}/f.pth", tmp_path)
    assert "does not answer" in error.message
    assert "refused" in error.evidence[0]
    assert "0x" not in error.evidence[0]


def test_a_server_that_does_not_speak_http(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:

        def talk() -> None:
            for _ in range(1 + QUICK.retries):
                client, _ = listener.accept()
                with client:
                    client.recv(10_000)
                    client.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")

        threading.Thread(target=talk, daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/f.pth"
        assert "is not HTTP" in refused(DownloadFailed, url, tmp_path).message


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_followed(server: Server, tmp_path: Path, status: int) -> None:
    server.on("/b/other-name", Reply(BODY))
    done = get(server.on("/a/f.pth", redirect("../b/other-name", status)), tmp_path)
    assert (done.sha256, names(tmp_path)) == (SHA, ["f.pth"])


@pytest.mark.parametrize("location", ["/f.pth", "/other"])
def test_a_circle_is_left(server: Server, tmp_path: Path, location: str) -> None:
    server.on("/other", redirect("/f.pth"))
    url = server.on("/f.pth", redirect(location))
    assert "in a circle" in refused(DownloadFailed, url, tmp_path).message
    assert len(server.asked) <= 2


def test_a_long_way_is_left(server: Server, tmp_path: Path) -> None:
    for step in range(20):
        server.on(f"/{step}", redirect(f"/{step + 1}"))
    url = server.root + "/0"
    assert "more than 10 times" in refused(DownloadFailed, url, tmp_path).message
    assert len(server.asked) == 11


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("", "to nowhere"),
        ("file:///etc/passwd", "neither http nor https"),
        ("ftp://127.0.0.1/f", "neither http nor https"),
        ("http://[::1", "no URL"),
        ("https://", "no host"),
        ("http://127.0.0.1:99999999/", "not a URL"),
    ],
)
def test_a_redirect_to_something_else_is_refused(
    server: Server, tmp_path: Path, location: str, words: str
) -> None:
    url = server.on("/f.pth", redirect(location))
    assert words in refused(DownloadFailed, url, tmp_path).message


def test_from_https_to_http_is_refused() -> None:
    with pytest.raises(DownloadFailed, match="from https to http"):
        http.redirected("https://a.org/f", "http://a.org/f")
    assert http.redirected("http://a.org/f", "https://b.org/g#x") == "https://b.org/g"
    assert http.redirected("https://a.org/x/f", "//b.org/g") == "https://b.org/g"
    assert http.redirected("http://a.org/f", "/\u00c3\u00a9") == "http://a.org/\u00e9"


@pytest.fixture(scope="session")
def tls(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if shutil.which("openssl") is None:
        pytest.skip("needs openssl")
    return certificate(tmp_path_factory.mktemp("tls"))


def test_https_works_and_never_becomes_http(
    server: Server, tmp_path: Path, tls: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(tls[0]))
    plain = server.on("/f.pth", Reply(BODY))
    with serving(tls) as secure:
        error = refused(DownloadFailed, secure.on("/g.pth", redirect(plain)), tmp_path)
        assert "from https to http" in error.message
        assert server.asked == []
        assert get(secure.on("/h.pth", Reply(BODY)), tmp_path).sha256 == SHA


def test_a_certificate_that_nobody_trusts_is_refused(
    tmp_path: Path, tls: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with serving(tls) as secure:
        error = refused(DownloadFailed, secure.on("/f.pth", Reply(BODY)), tmp_path)
    assert "no trusted connection" in error.message
    assert secure.asked == []


@pytest.mark.parametrize(
    "url", ["ftp://a/f.pth", "file:///etc/passwd", "/etc/passwd", "f.pth", "http://", "http://[/f"]
)
def test_what_is_no_web_address(url: str, tmp_path: Path) -> None:
    refused(DownloadFailed, url, tmp_path)


def test_secrets_are_sent_and_not_shown(server: Server, tmp_path: Path) -> None:
    server.on("/f.pth", Reply(BODY, stop=0.4, etag='"v1"'))
    url = server.root.replace("//", "//me:s%40cret@") + "/f.pth?token=hidden#part"
    with pytest.raises(DownloadFailed) as caught:
        get(url, tmp_path)
    assert server.headers("Authorization") == ["Basic bWU6c0BjcmV0"]
    assert server.asked[0].path == "/f.pth?token=hidden"
    record = (tmp_path / "f.pth.part.json").read_text()
    shown = " ".join([str(caught.value), caught.value.hint, *caught.value.evidence, record])
    assert f"{server.root}/f.pth" in shown
    for secret in ("s@cret", "s%40cret", "hidden", "me:"):
        assert secret not in shown


def test_a_login_stays_with_its_host(server: Server, tmp_path: Path) -> None:
    with serving() as other:
        there = other.on("/f.pth", Reply(BODY))
        url = server.on("/f.pth", redirect("/again"))
        server.on("/again", redirect(there))
        get(url.replace("//", "//me:secret@"), tmp_path)
        assert server.headers("Authorization") == ["Basic bWU6c2VjcmV0"] * 2
        assert other.headers("Authorization") == [None]


def test_the_proxy_of_the_environment_is_used(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.root.replace("//", "//me:secret@"))
    server.replies["http://weights.invalid/f.pth"] = [Reply(BODY)]
    assert get("http://weights.invalid/f.pth", tmp_path).sha256 == SHA
    assert server.headers("Proxy-Authorization") == ["Basic bWU6c2VjcmV0"]


def test_no_proxy_is_kept_to(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{closed_port()}")
    url = server.on("/f.pth", Reply(BODY))
    assert "the proxy" in refused(DownloadFailed, url, tmp_path).message
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert get(url, tmp_path).sha256 == SHA


def test_each_redirect_goes_by_its_own_proxy(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving() as proxy:
        monkeypatch.setenv("http_proxy", proxy.root)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        proxy.replies["http://weights.invalid/f.pth"] = [Reply(BODY)]
        url = server.on("/f.pth", redirect("http://weights.invalid/f.pth"))
        assert get(url, tmp_path).sha256 == SHA
        assert (len(server.asked), len(proxy.asked)) == (1, 1)


@pytest.mark.parametrize("proxy", ["socks5://127.0.0.1:1", "quux://127.0.0.1:1"])
def test_a_proxy_of_another_kind_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    url = server.on("/f.pth", Reply(BODY))
    assert "the proxy" in refused(DownloadFailed, url, tmp_path).message
