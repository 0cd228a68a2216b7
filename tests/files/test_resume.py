"""Downloads that go on with what an earlier run left, where that is the same file."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from downloads import (  # noqa: F401  (fixtures)
    BODY,
    DATE,
    OTHER,
    PAGE,
    SHA,
    get,
    names,
    no_proxy_fixture,
    refused,
    server_fixture,
)
from server import Reply, Server

from ckptool.errors import (
    CkptoolError,
    DownloadFailed,
    HashMismatch,
    OutputExists,
    WriteError,
)


def interrupted(server: Server, folder: Path, **more: Any) -> str:
    """Lose the connection at 40 %; leaves a part."""
    fields = {"etag": '"v1"', **more}
    url = server.on("/f.pth", Reply(BODY, stop=0.4, **fields), Reply(BODY, **fields))
    with pytest.raises(DownloadFailed) as caught:
        get(url, folder)
    assert "200000 of 500000" in caught.value.message
    assert "kept in" in caught.value.hint
    assert names(folder) == ["f.pth.part", "f.pth.part.json"]
    assert (folder / "f.pth.part").stat().st_size == 200_000
    return url


@pytest.mark.parametrize("validator", [{"etag": '"v1"'}, {"etag": None, "modified": DATE}])
def test_a_lost_connection_is_gone_on_with(
    server: Server, tmp_path: Path, validator: dict[str, Any]
) -> None:
    url = interrupted(server, tmp_path, **validator)
    seen: list[tuple[int, int | None]] = []
    done = get(url, tmp_path, sha256=SHA, progress=lambda *at: seen.append(at))
    assert (done.resumed_from, done.sha256, done.nbytes) == (200_000, SHA, len(BODY))
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]
    assert server.headers("Range") == [None, "bytes=200000-"]
    assert server.headers("If-Range") == [None, validator["etag"] or DATE]
    assert seen[0] == (200_000, len(BODY))


def test_a_part_that_cannot_be_told_apart_is_not_kept(server: Server, tmp_path: Path) -> None:
    for more in ({}, {"etag": 'W/"v1"'}):
        refused(DownloadFailed, server.on("/f.pth", Reply(BODY, stop=0.4, **more)), tmp_path)


@pytest.mark.parametrize(
    "second",
    [
        pytest.param(Reply(OTHER, etag='"v2"'), id="changed"),
        pytest.param(Reply(BODY[::-1], etag='"v2"', if_range=False), id="if-range-ignored"),
        pytest.param(Reply(OTHER, etag='"v1"', if_range=False), id="another-length"),
        pytest.param(Reply(OTHER, etag='"v1"', ranges=False), id="range-ignored"),
        pytest.param(Reply(BODY[:150_000], etag='"v1"'), id="416"),
        pytest.param(
            Reply(BODY, headers={"Content-Range": "bytes 0-499999/500000"}, etag='"v1"'),
            id="from-0",
        ),
        pytest.param(
            Reply(BODY, headers={"Content-Range": "bytes 200000-300000/500000"}, etag='"v1"'),
            id="another-end",
        ),
        pytest.param(Reply(BODY, headers={"Content-Range": "soon"}, etag='"v1"'), id="senseless"),
    ],
)
def test_what_does_not_go_on_is_begun_again(server: Server, tmp_path: Path, second: Reply) -> None:
    url = interrupted(server, tmp_path)
    server.on("/f.pth", second)
    done = get(url, tmp_path)
    assert done.resumed_from == 0
    assert server.headers("Range")[1] == "bytes=200000-"
    assert (tmp_path / "f.pth").read_bytes() == second.body
    assert names(tmp_path) == ["f.pth"]


@pytest.mark.parametrize(
    "record",
    ["", "{}", "[]", "null", '{"url": 1}', "[" * 100_000, "\x00", None],
)
def test_a_damaged_record_is_no_record(server: Server, tmp_path: Path, record: str | None) -> None:
    url = interrupted(server, tmp_path)
    (tmp_path / "f.pth.part.json").unlink()
    if record is not None:
        (tmp_path / "f.pth.part.json").write_text(record)
    assert get(url, tmp_path).resumed_from == 0
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]


@pytest.mark.parametrize("total", [True, "500000", -500_000, 5e5, None, 1 << 63, [500_000]])
def test_a_planted_total_is_no_length(server: Server, tmp_path: Path, total: object) -> None:
    url = interrupted(server, tmp_path)
    record = tmp_path / "f.pth.part.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "total": total}))
    assert get(url, tmp_path).resumed_from == 0
    assert (tmp_path / "f.pth").read_bytes() == BODY


def test_a_part_of_another_url_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    url = interrupted(server, tmp_path)
    server.on("/f.pth", Reply(BODY[::-1], etag='"v1"'))
    assert get(f"{url}?another", tmp_path).resumed_from == 0
    assert (tmp_path / "f.pth").read_bytes() == BODY[::-1]


def test_a_part_without_a_validator_is_not_gone_on_with(server: Server, tmp_path: Path) -> None:
    url = interrupted(server, tmp_path)  # as a kill leaves it
    record = tmp_path / "f.pth.part.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "validator": ""}))
    server.on("/f.pth", Reply(BODY[::-1], if_range=False))
    assert get(url, tmp_path).resumed_from == 0
    assert (tmp_path / "f.pth").read_bytes() == BODY[::-1]


@pytest.mark.parametrize("validator", ['"v1"\n', '"v1"\r\nX: y', '"\u6a21"', 1, None])
def test_a_planted_validator_is_not_sent(server: Server, tmp_path: Path, validator: object) -> None:
    url = interrupted(server, tmp_path)
    record = tmp_path / "f.pth.part.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "validator": validator}))
    assert get(url, tmp_path).resumed_from == 0
    assert server.headers("If-Range") == [None, None]


def test_a_part_that_is_whole_is_checked_with_the_server(server: Server, tmp_path: Path) -> None:
    url = interrupted(server, tmp_path)
    (tmp_path / "f.pth.part").write_bytes(BODY)
    assert get(url, tmp_path, sha256=SHA).resumed_from == len(BODY) - 1


@pytest.mark.parametrize("nbytes", [0, 1, len(BODY) + 1])
def test_a_part_of_a_senseless_length_is_begun_again(
    server: Server, tmp_path: Path, nbytes: int
) -> None:
    url = interrupted(server, tmp_path)
    (tmp_path / "f.pth.part").write_bytes(b"x" * nbytes)
    assert get(url, tmp_path, sha256=SHA).resumed_from == 0


def test_a_damaged_part_is_found_and_goes(server: Server, tmp_path: Path) -> None:
    url = interrupted(server, tmp_path)
    damaged = bytearray((tmp_path / "f.pth.part").read_bytes())
    damaged[7] ^= 1
    (tmp_path / "f.pth.part").write_bytes(damaged)
    with pytest.raises(HashMismatch) as caught:
        get(url, tmp_path, sha256=SHA)
    assert "from the start" in caught.value.hint
    assert names(tmp_path) == []
    assert get(url, tmp_path, sha256=SHA).sha256 == SHA


@pytest.mark.parametrize("reply", [Reply(PAGE), Reply(status=403), Reply(status=500)])
def test_a_part_outlives_an_answer_that_is_no_file(
    server: Server, tmp_path: Path, reply: Reply
) -> None:
    url = interrupted(server, tmp_path)
    server.on("/f.pth", reply)
    with pytest.raises(DownloadFailed, match=f"{reply.status}|HTML"):
        get(url, tmp_path)
    server.on("/f.pth", Reply(BODY, etag='"v1"'))
    assert get(url, tmp_path, sha256=SHA).resumed_from == 200_000


def test_ctrl_c_keeps_the_part(server: Server, tmp_path: Path) -> None:
    def interrupt(done: int, total: int | None) -> None:
        if done > 200_000:
            raise KeyboardInterrupt

    url = server.on("/f.pth", Reply(BODY, etag='"v1"'))
    with pytest.raises(KeyboardInterrupt) as caught:
        get(url, tmp_path, progress=interrupt)
    assert "bytes are kept in" in caught.value.__notes__[0]
    assert names(tmp_path) == ["f.pth.part", "f.pth.part.json"]
    done = get(url, tmp_path, sha256=SHA)
    assert 200_000 < done.resumed_from < len(BODY)


SCRIPT = "import sys; from ckptool.files.download import download; download(*sys.argv[1:])"


def begun_elsewhere(url: str, folder: Path) -> subprocess.Popen[bytes]:
    """Download in another process, and wait until 40 % is there."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, url, str(folder)], stderr=subprocess.PIPE
    )
    part = folder / "f.pth.part"
    for _ in range(1000):
        if part.exists() and part.stat().st_size > 100_000:
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError(f"the download did not begin: {process.communicate()[1]!r}")


def test_a_killed_download_is_gone_on_with(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, hold=0.4, etag='"v1"'), Reply(BODY, etag='"v1"'))
    process = begun_elsewhere(url, tmp_path)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert names(tmp_path) == ["f.pth.part", "f.pth.part.json"]
    assert json.loads((tmp_path / "f.pth.part.json").read_text())["total"] == len(BODY)
    done = get(url, tmp_path, sha256=SHA)
    assert 100_000 < done.resumed_from <= 200_000
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]


def test_two_processes_do_not_grow_one_part(server: Server, tmp_path: Path) -> None:
    slow = Reply(BODY, hold=0.4, etag='"v1"')
    url = server.on("/f.pth", slow, Reply(BODY, etag='"v1"'))
    process = begun_elsewhere(url, tmp_path)
    with pytest.raises(DownloadFailed, match="another process"):
        get(url, tmp_path)
    assert len(server.asked) == 1
    slow.go.set()
    assert process.communicate(timeout=20)[1] == b""
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]


def test_many_at_once_leave_one_whole_file(server: Server, tmp_path: Path) -> None:
    url = server.on("/f.pth", Reply(BODY, etag='"v1"'))
    failures: list[BaseException] = []

    def one() -> None:
        try:
            get(url, tmp_path)
        except CkptoolError as error:
            failures.append(error)

    threads = [threading.Thread(target=one) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(failures) < 8
    assert {type(error) for error in failures} <= {DownloadFailed, OutputExists}
    assert (tmp_path / "f.pth").read_bytes() == BODY
    assert names(tmp_path) == ["f.pth"]


@pytest.mark.parametrize("kind", ["symlink", "folder", "pipe"])
def test_a_part_that_is_no_file_is_left_alone(server: Server, tmp_path: Path, kind: str) -> None:
    victim, part = tmp_path / "victim", tmp_path / "f.pth.part"
    victim.write_bytes(OTHER)
    if kind == "symlink":
        part.symlink_to(victim)
    elif kind == "folder":
        part.mkdir()
    else:
        os.mkfifo(part)
    with pytest.raises(WriteError):
        get(server.on("/f.pth", Reply(BODY)), tmp_path)
    assert victim.read_bytes() == OTHER
    assert names(tmp_path) == ["f.pth.part", "victim"]


def by_group(part: Path, record: Path) -> None:
    part.chmod(0o664)


def by_all(part: Path, record: Path) -> None:
    record.chmod(0o646)


def by_another_name(part: Path, record: Path) -> None:
    os.link(part, part.with_name("another"))


def of_another_user(part: Path, record: Path) -> None:
    if os.geteuid():
        pytest.skip("root alone may give files away")
    os.chown(part, 65534, -1)


def record_of_another_user(part: Path, record: Path) -> None:
    if os.geteuid():
        pytest.skip("root alone may give files away")
    os.chown(record, 65534, -1)


def record_behind_a_link(part: Path, record: Path) -> None:
    record.rename(record.with_name("elsewhere"))
    record.symlink_to("elsewhere")


@pytest.mark.skipif(os.name == "nt", reason="users and modes of POSIX")
@pytest.mark.parametrize(
    "plant",
    [by_group, by_all, by_another_name, of_another_user, record_of_another_user,
     record_behind_a_link],
)  # fmt: skip
def test_what_somebody_else_may_write_is_not_gone_on_with(
    server: Server, tmp_path: Path, plant: Callable[[Path, Path], None]
) -> None:
    url = interrupted(server, tmp_path)
    part = tmp_path / "f.pth.part"
    plant(part, tmp_path / "f.pth.part.json")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    done = get(url, tmp_path)
    assert (done.resumed_from, (tmp_path / "f.pth").read_bytes()) == (0, BODY)
    for name in {"another", "elsewhere"} & set(names(tmp_path)):
        assert (tmp_path / name).read_bytes() == before[tmp_path / name]


@pytest.mark.skipif(os.name == "nt", reason="users and modes of POSIX")
@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_a_part_is_this_users_alone_and_the_file_has_the_mode_of_the_umask(
    server: Server, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        url = interrupted(server, tmp_path)
        parts = [tmp_path / "f.pth.part", tmp_path / "f.pth.part.json"]
        assert [path.stat().st_mode & 0o777 for path in parts] == [0o600, 0o600]
        assert get(url, tmp_path).resumed_from == 200_000
    finally:
        os.umask(before)
    found = (tmp_path / "f.pth").stat()
    assert (found.st_uid, found.st_mode & 0o777) == (os.geteuid(), 0o666 & ~umask)
