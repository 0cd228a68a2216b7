"""A download that works, its hash, its name, and what is there already."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from downloads import (  # noqa: F401  (fixtures)
    BODY,
    OTHER,
    PAGE,
    QUICK,
    SHA,
    get,
    names,
    no_proxy_fixture,
    redirect,
    refused,
    server_fixture,
)
from server import Reply, Server

from ckptool.errors import (
    BadInput,
    DownloadFailed,
    HashMismatch,
    OutputExists,
    WriteError,
)
from ckptool.files import fileio
from ckptool.files.download import NOTHING, download, unnamed
from ckptool.files.http import Client


def test_a_file_is_downloaded_whole_and_hashed(server: Server, tmp_path: Path) -> None:
    seen: list[tuple[int, int | None]] = []
    done = get(
        server.on("/a/f.pth?x=1", Reply(BODY)), tmp_path, progress=lambda *at: seen.append(at)
    )
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]
    assert (done.nbytes, done.sha256, done.resumed_from) == (len(BODY), SHA, 0)
    assert (done.already_there, done.checked) == (False, NOTHING)
    assert done.url == f"{server.root}/a/f.pth?..."
    assert done.path == str(tmp_path / "f.pth")
    assert seen[0] == (0, len(BODY))
    assert seen[-1] == (len(BODY), len(BODY))
    assert server.headers("Accept-Encoding") == ["identity"]


def test_the_default_folder_is_the_current_one(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    download(server.on("/f.pth", Reply(BODY)))
    assert names(tmp_path) == ["f.pth"]


def test_a_file_may_be_named(server: Server, tmp_path: Path) -> None:
    done = get(server.on("/f.pth", Reply(BODY)), tmp_path / "mine.bin")
    assert done.path == str(tmp_path / "mine.bin")
    assert names(tmp_path) == ["mine.bin"]


def test_a_folder_with_a_slash_is_made(server: Server, tmp_path: Path) -> None:
    get(server.on("/f.pth", Reply(BODY)), f"{tmp_path}/new/")
    assert names(tmp_path / "new") == ["f.pth"]


def test_a_folder_made_for_nothing_goes(server: Server, tmp_path: Path) -> None:
    with pytest.raises(DownloadFailed):
        get(server.on("/f.pth", Reply(status=404)), f"{tmp_path}/new/")
    assert names(tmp_path) == []


def test_a_missing_folder_is_not_guessed(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WriteError, match="does not exist"):
        get(server.on("/f.pth", Reply(BODY)), tmp_path / "no" / "f.pth")
    assert server.asked == []


def test_the_mode_follows_the_umask(server: Server, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        get(server.on("/f.pth", Reply(BODY)), tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "f.pth").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("sync", [True, False])
def test_the_flush_can_be_left_to_the_system(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(fileio.os, "fsync", flushed.append)
    get(server.on("/f.pth", Reply(BODY)), tmp_path, sync=sync)
    assert len(flushed) == (2 if sync else 0)


def test_what_fails_after_the_file_is_there_is_a_warning(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.unlink

    def refuse(path: str) -> None:
        if os.path.exists(tmp_path / "f.pth"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)
        real(path)

    monkeypatch.setattr(fileio.os, "unlink", refuse)
    done = get(server.on("/f.pth", Reply(BODY)), tmp_path)
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert len(done.warnings) == 1
    assert "was written, but" in done.warnings[0]


@pytest.mark.parametrize("more", [{"chunked": True}, {"silent": True}])
def test_a_length_may_be_missing(server: Server, tmp_path: Path, more: dict[str, Any]) -> None:
    assert get(server.on("/f.pth", Reply(BODY, **more)), tmp_path).sha256 == SHA


def test_a_temporary_download_goes(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file, sha256 = unnamed(server.on("/f.pth", Reply(BODY)), Client(QUICK), {}, None)
    with file:
        file.seek(0)
        assert (file.read(), sha256) == (BODY, SHA)
        assert os.fstat(file.fileno()).st_dev == os.stat(tmp_path).st_dev
    assert names(tmp_path) == []


def test_a_temporary_download_that_fails_keeps_nothing(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    url = server.on("/f.pth", Reply(BODY, stop=0.4, etag='"v1"'))
    with pytest.raises(DownloadFailed) as caught:
        unnamed(url, Client(QUICK), {}, None)
    assert caught.value.hint == "run it again"
    assert names(tmp_path) == []


def test_a_hash_in_the_name_binds(server: Server, tmp_path: Path) -> None:
    url = server.on(f"/net-{SHA[:8]}.pth", Reply(BODY))
    assert get(url, tmp_path).checked == "hash in the name"
    error = refused(HashMismatch, server.on("/net-5c106cde.pth", Reply(BODY)), tmp_path)
    assert "5c106cde" in error.evidence[0]
    assert SHA in error.evidence[1]
    assert "--sha256" in error.hint
    assert error.exit_code == 6


def test_a_wrong_hash_in_the_name_binds_whatever_the_target_is_called(
    server: Server, tmp_path: Path
) -> None:
    url = server.on("/net-5c106cde.pth", Reply(BODY))
    with pytest.raises(HashMismatch):
        get(url, tmp_path / "mine.pth")
    assert names(tmp_path) == []


def test_a_given_sha256_is_checked(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY))
    refused(HashMismatch, url, tmp_path, sha256="0" * 64)
    assert get(url, tmp_path, sha256=SHA.upper()).checked == "sha256 given"


def test_a_given_sha256_overrides_the_name(server: Server, tmp_path: Path) -> None:
    url = server.on("/net-5c106cde.pth", Reply(BODY))
    assert get(url, tmp_path, sha256=SHA).sha256 == SHA


def test_a_hash_of_the_registry_binds_even_when_all_digits(server: Server, tmp_path: Path) -> None:
    url = server.on("/vgg13-19584684.pth", Reply(BODY))
    assert get(url, tmp_path / "free.pth").checked == NOTHING
    with pytest.raises(HashMismatch):
        get(url, tmp_path / "f.pth", expected_prefix="19584684")
    with pytest.raises(HashMismatch):  # not even a right sha256 frees from it
        get(url, tmp_path / "f.pth", expected_prefix="19584684", sha256=SHA)
    assert get(url, tmp_path / "f.pth", expected_prefix=SHA[:8]).checked == "registry"


@pytest.mark.parametrize("text", ["", "5c106cde", "g" * 64, SHA + "0"])
def test_what_is_no_sha256_is_refused_first(server: Server, tmp_path: Path, text: str) -> None:
    refused(BadInput, server.on("/f.pth", Reply(BODY)), tmp_path, sha256=text)
    assert server.asked == []


def test_a_file_with_the_right_hash_is_left_alone(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY))
    (tmp_path / "f.pth").write_bytes(BODY)
    before = (tmp_path / "f.pth").stat()
    identity = before.st_ino, before.st_mtime_ns
    done = get(url, tmp_path, sha256=SHA)
    assert done.already_there
    assert get(url, tmp_path, sha256=SHA, force=True).already_there
    after = (tmp_path / "f.pth").stat()
    assert (after.st_ino, after.st_mtime_ns) == identity
    assert server.asked == []


def test_a_file_with_another_hash_is_left_alone(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY))
    (tmp_path / "f.pth").write_bytes(OTHER)
    assert "--force" in refused(HashMismatch, url, tmp_path, sha256=SHA).hint
    assert server.asked == []
    assert not get(url, tmp_path, sha256=SHA, force=True).already_there
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_without_a_hash_the_size_decides(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY))
    (tmp_path / "f.pth").write_bytes(BODY[::-1])
    done = get(url, tmp_path)
    assert (done.already_there, done.checked) == (True, "size")
    (tmp_path / "f.pth").write_bytes(OTHER)
    refused(OutputExists, url, tmp_path)
    assert not get(url, tmp_path, force=True).already_there
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_a_failed_download_leaves_the_old_file(server: Server, tmp_path: Path) -> None:
    (tmp_path / "f.pth").write_bytes(OTHER)
    for reply in (Reply(status=404), Reply(PAGE), Reply(BODY, stop=0.4)):
        refused(DownloadFailed, server.on("/f.pth", reply), tmp_path, force=True)
    refused(HashMismatch, server.on("/f.pth", Reply(BODY)), tmp_path, force=True, sha256="0" * 64)


def test_a_file_made_meanwhile_is_left_alone(server: Server, tmp_path: Path) -> None:
    def meddle(done: int, total: int | None) -> None:
        if done == total:
            (tmp_path / "f.pth").write_bytes(OTHER)

    with pytest.raises(OutputExists):
        get(server.on("/f.pth", Reply(BODY)), tmp_path, progress=meddle)
    assert (tmp_path / "f.pth").read_bytes() == OTHER
    assert names(tmp_path) == ["f.pth"]


def test_a_symlink_is_written_through(server: Server, tmp_path: Path) -> None:
    (tmp_path / "real.pth").write_bytes(OTHER)
    (tmp_path / "f.pth").symlink_to("real.pth")
    get(server.on("/f.pth", Reply(BODY)), tmp_path, force=True)
    assert (tmp_path / "f.pth").is_symlink()
    assert (tmp_path / "real.pth").read_bytes() == BODY


def test_a_header_names_what_the_url_does_not(server: Server, tmp_path: Path) -> None:
    header = {"Content-Disposition": 'attachment; filename="../net-5c106cde.pth"'}
    url = server.on("/", Reply(BODY, headers=header))
    refused(HashMismatch, url, tmp_path)
    assert get(url, tmp_path, sha256=SHA).path == str(tmp_path / "net-5c106cde.pth")
    assert get(server.on("/g.pth", Reply(BODY, headers=header)), tmp_path).path.endswith("g.pth")


def test_a_redirect_names_what_nobody_else_does(server: Server, tmp_path: Path) -> None:
    server.on("/x/f.pth", Reply(BODY))
    assert get(server.on("/", redirect("/x/f.pth")), tmp_path).path == str(tmp_path / "f.pth")


def test_what_nobody_names_needs_a_name(server: Server, tmp_path: Path) -> None:
    url = server.on("/", Reply(BODY))
    assert "-o FILE" in refused(DownloadFailed, url, tmp_path).hint
    assert get(url, tmp_path / "f.pth").sha256 == SHA


@pytest.mark.parametrize(
    "name", ["n" * 251 + ".pth", "\u6a21" * 83 + ".pth", "n" * 241 + ".pth", "n" * 242 + ".pth"]
)
def test_the_longest_names_work(server: Server, tmp_path: Path, name: str) -> None:
    url = server.on("/f.pth", Reply(BODY, stop=0.4, etag='"v1"'), Reply(BODY, etag='"v1"'))
    with pytest.raises(DownloadFailed):
        get(url, tmp_path / name)
    assert get(url, tmp_path / name).resumed_from == 200_000
    assert names(tmp_path) == [name]


def test_importing_it_loads_no_network() -> None:
    script = "import sys, ckptool.files.download, ckptool.model.weights; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"urllib3", "ssl", "socket", "torch", "torchvision", "click"} & set(loaded)
