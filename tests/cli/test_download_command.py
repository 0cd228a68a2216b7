"""`ckptool download`, as people and scripts meet it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, Outcome
from downloads import BODY, OTHER, SHA, names, no_proxy_fixture, server_fixture  # noqa: F401  (fixtures)
from server import Reply, Server

from ckptool.files import http

Run = Callable[..., Outcome]
GOOD = FIXTURES / "good" / "plain.pth"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_path_is_data_and_the_rest_is_talk(run: Run, server: Server, here: Path) -> None:
    done = run("download", server.on("/f.pth", Reply(BODY)), "--no-sync")
    assert done.code == 0
    assert Path(done.out.strip()).samefile(here / "f.pth")
    assert "not checked: no hash is known" in done.err
    assert SHA in done.err
    quiet = run("download", server.root + "/f.pth", "-q", "-o", "new/", "--sha256", SHA)
    assert (quiet.code, quiet.err) == (0, "")
    assert (here / "new" / "f.pth").read_bytes() == BODY


def test_the_document_says_it_all(run: Run, server: Server, here: Path) -> None:
    url = server.on("/f.pth?token=hidden", Reply(BODY))
    assert run("download", url, "-o", "mine.pth", "--json", "--sha256", SHA).document == {
        "schema": "download/1",
        "url": f"{server.root}/f.pth?...",
        "path": "mine.pth",
        "nbytes": len(BODY),
        "sha256": SHA,
        "resumed_from": 0,
        "already_there": False,
        "checked": "sha256 given",
        "weights": None,
    }
    again = run("download", url, "-o", "mine.pth", "--json", "--sha256", SHA)
    assert again.document["already_there"] is True
    assert "already there" in run("download", url, "-o", "mine.pth", "--sha256", SHA).err


def test_what_is_gone_on_with_is_said(run: Run, server: Server, here: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, stop=0.4, etag='"1"'), Reply(BODY, etag='"1"'))
    failed = run("download", url)
    assert (failed.code, failed.out) == (6, "")
    assert "error[download-failed]" in failed.err
    assert "200000 bytes are kept in" in failed.err
    assert "resumed after 195.3 KiB" in run("download", url).err


@pytest.mark.parametrize(
    ("reply", "more", "code", "slug"),
    [
        (Reply(status=404), [], 6, "download-failed"),
        (Reply(b"<html>"), [], 6, "download-failed"),
        (Reply(BODY), ["--sha256", "0" * 64], 6, "hash-mismatch"),
        (Reply(BODY), ["--sha256", "0"], 2, "bad-input"),
        (Reply(BODY), ["-o", "no/f.pth"], 5, "write-error"),
    ],
)
def test_failures_have_their_codes(
    run: Run, server: Server, here: Path, reply: Reply, more: list[str], code: int, slug: str
) -> None:
    done = run("download", server.on("/f.pth", reply), *more)
    assert (done.code, done.out) == (code, "")
    assert f"error[{slug}]" in done.err
    assert "hint: " in done.err
    assert os.listdir(here) == []


def test_another_file_is_not_replaced_without_force(run: Run, server: Server, here: Path) -> None:
    url = server.on("/f.pth", Reply(BODY))
    (here / "f.pth").write_bytes(OTHER)
    assert run("download", url).code == 5
    assert run("download", url, "--sha256", SHA).code == 6
    assert (here / "f.pth").read_bytes() == OTHER
    assert run("download", url, "--force").code == 0
    assert (here / "f.pth").read_bytes() == BODY


def test_what_a_server_says_is_made_harmless(run: Run, server: Server, here: Path) -> None:
    done = run("download", server.on("/f.pth", Reply(status=403, reason="\x1b[2J\u009b")))
    assert "\x1b" not in done.err
    assert "\\x1b[2J\\x9b" in done.err


def test_an_interruption_says_what_is_kept(
    run: Run, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.cli import talk

    def interrupt(progress: talk.Progress, done: int, total: int) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    monkeypatch.setattr(talk.Progress, "reached", interrupt)
    done = run("download", server.on("/f.pth", Reply(BODY, etag='"1"')))
    assert done.code == 130
    assert "bytes are kept in" in done.err
    assert (here / "f.pth.part").stat().st_size > 100_000


def test_nothing_to_download_is_a_usage_error(run: Run) -> None:
    assert run("download").code == 2


def test_names_come_from_the_registry(
    run: Run, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pytest.importorskip("torchvision").models
    value = models.ResNet18_Weights.IMAGENET1K_V1.value
    monkeypatch.setattr(value, "url", server.on(f"/resnet18-{SHA[:8]}.pth", Reply(BODY)))
    done = run("download", "resnet18", "--json")
    assert done.document["weights"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert done.document["checked"] == "registry"
    assert (here / f"resnet18-{SHA[:8]}.pth").read_bytes() == BODY
    monkeypatch.setattr(value, "url", server.on("/resnet18-12345678.pth", Reply(BODY)))
    assert run("download", "resnet18").code == 6
    unknown = run("download", "resnet17")
    assert unknown.code == 2
    assert "resnet18" in unknown.err


def test_the_registry_can_be_listed(run: Run) -> None:
    pytest.importorskip("torchvision")
    done = run("download", "--list", "vgg13*")
    rows = [line.split("\t") for line in done.out.splitlines()]
    assert rows[0][:2] == ["vgg13:IMAGENET1K_V1", "vgg13-19584684.pth"]
    assert (len(rows), rows[0][3:]) == (2, ["133047848", "69.928", "*"])
    found = run("download", "--list", "vgg13", "--json").document
    assert found["schema"] == "weights/1"
    assert [each["model"] for each in found["weights"]] == ["vgg13", "vgg13_bn"]
    assert run("download", "--list", "zzz").code == 2
    assert len(run("download", "--list").out.splitlines()) > 100


OF_A_URL = {
    "download": ("download", "URL"),
    "keys": ("keys", "URL"),
    "info": ("info", "URL"),
    "transfer": ("transfer", "URL", "out.pth"),
    "diff, first": ("diff", "URL", "f.pth"),
    "diff, second": ("diff", GOOD, "URL"),
}


@pytest.mark.parametrize("command", ["download", "keys"])
def test_a_server_that_drips_is_given_up_in_time(
    run: Run, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(here))
    began = time.monotonic()
    drip = Reply(raw=(b"HTTP/1.1 200 OK\r\nX: ", b"x", 0.02), endless=True)
    done = run(command, server.on("/f.pth", drip), "--timeout", "1")
    assert 0.9 < time.monotonic() - began < 20  # under load; the default is 60
    assert len(server.asked) == 1
    assert (done.code, done.out, names(here)) == (6, "", [])
    assert "less than 1.0 KiB/s for 1 s" in done.err
    assert "--timeout SECONDS" in done.err


@pytest.mark.parametrize("words", OF_A_URL.values(), ids=list(OF_A_URL))
def test_every_command_that_takes_a_url_takes_a_timeout(
    run: Run, server: Server, here: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    seen = []
    real = http.Client._requested

    def asked(client: http.Client, *more: Any) -> Any:
        seen.append(client.limits.timeout)
        return real(client, *more)

    monkeypatch.setattr(http.Client, "_requested", asked)
    (here / "f.pth").write_bytes(GOOD.read_bytes())
    url = server.on("/g.pth", Reply(GOOD.read_bytes()))
    arguments = [url if word == "URL" else word for word in words]
    assert run(*arguments, "--timeout", "7").code == 0
    assert run(*arguments, "--force" if "transfer" in words else "-q").code == 0
    assert set(seen) == {7, 60}


@pytest.mark.parametrize("seconds", ["0", "-5", "soon", "1e9", "nan", ""])
def test_a_timeout_is_seconds(run: Run, here: Path, seconds: str) -> None:
    done = run("keys", "http://127.0.0.1:1/f.pth", f"--timeout={seconds}")
    assert done.code == 2
    assert "--timeout" in done.err
