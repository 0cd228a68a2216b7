"""Files far away: what is asked for, what is refused, and that the bytes are those of the file."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES
from far import Answer, Asked, Far, far_fixture  # noqa: F401  (a fixture)
from safetensors.torch import save as save_safetensors

import ckptool
from ckptool.errors import CkptoolError, DownloadFailed, Malformed
from ckptool.files import http, remote
from ckptool.state import checkpoint as places

COUNT, WIDTH = 40, 256 * 256  # 10 MiB of float32
STATE = {f"layers.{n}.weight": torch.zeros(256, 256) + n for n in range(COUNT)}
WHOLE = COUNT * WIDTH * 4
GOOD = FIXTURES / "good" / "plain.pth"


def saved(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


PTH = saved({"state_dict": STATE, "epoch": 3})


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def shards(far: Far) -> str:
    """Serve a set of four shards; give the URL of its index."""
    names = {key: f"model-{n % 4 + 1:05}-of-00004.safetensors" for n, key in enumerate(STATE)}
    for name in set(names.values()):
        part = {key: STATE[key] for key in STATE if names[key] == name}
        far.put(f"/set/{name}", save_safetensors(part))
    index = {"metadata": {"total_size": WHOLE}, "weight_map": names}
    return far.put("/set/model.safetensors.index.json", json.dumps(index).encode())


SETS: dict[str, Callable[[Far], str]] = {
    "torch zip": lambda far: far.put("/x.pth", PTH),
    "safetensors": lambda far: far.put("/x.safetensors", save_safetensors(STATE)),
    "sharded": shards,
}


@pytest.mark.parametrize("made", SETS.values(), ids=list(SETS))
def test_a_listing_fetches_headers_alone(far: Far, made: Callable[[Far], str]) -> None:
    listing = ckptool.keys(made(far))
    assert [*listing] == list(STATE) or sorted(listing) == sorted(STATE)
    files = len({each.path for each in far.asked})
    assert far.sent < (0.01 * WHOLE if files == 1 else 0.05 * WHOLE)
    assert len(far.asked) <= 4 * files
    assert len(far.connections) == 1  # kept from one request to the next


@pytest.mark.parametrize("made", SETS.values(), ids=list(SETS))
def test_what_is_written_is_what_the_file_holds(
    far: Far, made: Callable[[Far], str], tmp_path: Path
) -> None:
    url = made(far)
    ckptool.convert(url, tmp_path / "out.pth", unwrap=True)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[key], STATE[key]) for key in STATE)
    assert far.sent < 1.02 * sum(map(len, far.files.values())) + (1 << 20)


def test_what_is_dropped_is_not_fetched(far: Far, tmp_path: Path) -> None:
    url = far.put("/x.pth", PTH)
    steps = [ckptool.edits.keep("layers.7")]
    ckptool.convert(url, tmp_path / "out.pth", steps=steps, unwrap=True)
    assert [*torch.load(tmp_path / "out.pth", weights_only=True)] == ["layers.7.weight"]
    assert far.sent < WIDTH * 4 + 0.02 * WHOLE


def test_load_state_dict_and_diff_and_check(far: Far) -> None:
    url, other = far.put("/x.pth", PTH), SETS["safetensors"](far)
    loaded = ckptool.load_state_dict(url)
    assert all(torch.equal(loaded[key], STATE[key]) for key in STATE)
    assert ckptool.diff(url, other, left_at="state_dict").equal
    assert ckptool.check(url).status.value == "ok"


def test_a_server_without_ranges_gives_the_whole_file_and_one_note(
    far: Far, tmp_path: Path
) -> None:
    far.ranges = False
    url = far.put("/x.pth", PTH)
    found = ckptool.read(url)
    assert [each for each in found.notes if "sends no ranges" in each] == list(found.notes)
    assert len(found.notes) == 1
    ckptool.convert(url, tmp_path / "out.pth", unwrap=True)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[key], STATE[key]) for key in STATE)


# Versions.

VALIDATORS = {
    "strong": {"etag": '"v1"'},
    "weak": {"etag": 'W/"v1"'},
    "date": {"etag": None, "modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
    "weak and date": {"etag": 'W/"v1"', "modified": "Wed, 21 Oct 2015 07:28:00 GMT"},
}


@pytest.mark.parametrize("validators", VALIDATORS.values(), ids=list(VALIDATORS))
def test_a_file_that_changes_between_two_ranges_is_refused(
    far: Far, tmp_path: Path, validators: dict[str, Any]
) -> None:
    for name, value in validators.items():
        setattr(far, name, value)
    url = far.put("/x.pth", PTH)

    def change(asked: Asked, answer: Answer) -> None:
        if len(far.asked) == 3:
            far.etag = far.etag and far.etag.replace("v1", "v2")
            far.modified = far.modified and far.modified.replace("2015", "2016")

    ckptool.convert(url, tmp_path / "fine.pth")
    far.forget()
    far.spoil = change
    with pytest.raises(Malformed, match="was changed while it was read"):
        ckptool.convert(url, tmp_path / "out.pth")
    assert len(far.asked) > 3
    assert [path.name for path in tmp_path.iterdir()] == ["fine.pth"]


def test_another_size_is_another_version(far: Far, tmp_path: Path) -> None:
    far.etag = None
    url = far.put("/x.pth", PTH)
    assert any("neither ETag nor Last-Modified" in note for note in ckptool.read(url).notes)

    def grow(asked: Asked, answer: Answer) -> None:
        if len(far.asked) == 3:
            far.put("/x.pth", PTH + b"\0")

    far.forget()
    far.spoil = grow
    with pytest.raises(Malformed, match="was changed while it was read"):
        ckptool.convert(url, tmp_path / "out.pth")


# Answers that are short, broken, or not what was asked for.


def halve(answer: Answer) -> None:
    if answer.status == 206 and len(answer.body) > 100:
        start, _, whole = answer.headers["Content-Range"][6:].replace("/", "-").split("-")
        answer.body = answer.body[: len(answer.body) // 2]
        last = int(start) + len(answer.body) - 1
        answer.headers["Content-Range"] = f"bytes {start}-{last}/{whole}"


@pytest.mark.parametrize("every", [3, 4])
def test_short_and_broken_answers_are_gone_on_with(far: Far, tmp_path: Path, every: int) -> None:
    def spoil(asked: Asked, answer: Answer) -> None:
        if len(far.asked) % every == 0:
            halve(answer)
        elif len(far.asked) % every == 1:
            answer.stop = len(answer.body) // 3

    far.spoil = spoil
    ckptool.convert(far.put("/x.pth", PTH), tmp_path / "out.pth", unwrap=True)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[key], STATE[key]) for key in STATE)


def test_a_server_that_breaks_off_each_time_is_given_up(far: Far) -> None:
    def spoil(asked: Asked, answer: Answer) -> None:
        answer.stop = 0

    far.spoil = spoil
    with pytest.raises(DownloadFailed):
        ckptool.keys(far.put("/x.pth", PTH))
    assert len(far.asked) < 10


def moved(asked: Asked, answer: Answer) -> None:
    start, last, whole = answer.headers["Content-Range"][6:].replace("/", "-").split("-")
    answer.headers["Content-Range"] = f"bytes {int(start) + 1}-{int(last) + 1}/{whole}"


def longer(asked: Asked, answer: Answer) -> None:
    answer.body += b"x" * 10


def unsized(asked: Asked, answer: Answer) -> None:
    del answer.headers["Content-Range"]


def backwards(asked: Asked, answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes 100-0/{len(PTH)}"


def beyond(asked: Asked, answer: Answer) -> None:
    answer.headers["Content-Range"] = f"bytes 0-{len(PTH)}/{len(PTH)}"


def several(asked: Asked, answer: Answer) -> None:
    unsized(asked, answer)
    answer.headers["Content-Type"] = "multipart/byteranges; boundary=x"


def packed(asked: Asked, answer: Answer) -> None:
    answer.headers["Content-Encoding"] = "gzip"


def whole(asked: Asked, answer: Answer) -> None:
    answer.status, answer.body = 200, PTH
    del answer.headers["Content-Range"]


LIES = [moved, longer, unsized, backwards, beyond, several, packed, whole]


@pytest.mark.parametrize("lie", LIES, ids=lambda lie: lie.__name__)
@pytest.mark.parametrize("first", [2, 5])
def test_answers_that_lie_are_refused(
    far: Far, tmp_path: Path, lie: Callable[[Asked, Answer], None], first: int
) -> None:
    def spoil(asked: Asked, answer: Answer) -> None:
        if len(far.asked) >= first and answer.status == 206:
            lie(asked, answer)

    far.spoil = spoil
    with pytest.raises(DownloadFailed):
        ckptool.convert(far.put("/x.pth", PTH), tmp_path / "out.pth")
    assert len(far.asked) < first + 12
    assert [*tmp_path.iterdir()] == []


def test_all_encodings_but_identity_are_declined(far: Far) -> None:
    ckptool.keys(far.put("/x.pth", PTH))
    assert {each.headers["accept-encoding"] for each in far.asked} == {"identity"}


# Redirects.


def test_a_redirect_is_followed_once_and_again_when_it_expires(far: Far, tmp_path: Path) -> None:
    far.put("/signed", PTH)
    url = f"{far.root}/x.pth"
    good = {"1": 4, "2": 1000, "3": 1000}  # signature -> requests that it is good for
    seen: list[str] = []

    def spoil(asked: Asked, answer: Answer) -> None:
        path, _, signature = asked.path.partition("?s=")
        if path == "/x.pth":
            seen.append(str(len(seen) + 1))
            answer.status, answer.headers = 302, {"Location": f"/signed?s={seen[-1]}"}
            return
        good[signature] -= 1
        if good[signature] < 0:
            answer.status, answer.headers, answer.body = 403, {}, b""

    far.spoil = spoil
    ckptool.convert(url, tmp_path / "out.pth", unwrap=True)
    written = torch.load(tmp_path / "out.pth", weights_only=True)
    assert all(torch.equal(written[key], STATE[key]) for key in STATE)
    assert 2 <= len(seen) <= 3  # both threads may meet it


# Indices that lead elsewhere.


@pytest.mark.parametrize(
    "name",
    [
        "../secret.safetensors", "/etc/passwd", "http://127.0.0.1:1/x.safetensors", "//evil/x",
        "a/../../x", "..", "x\\..\\y", "a//b", "\x00", "C:x",
    ],
)  # fmt: skip
def test_an_index_names_files_beside_it_alone(far: Far, name: str) -> None:
    index = json.dumps({"metadata": {}, "weight_map": {"a": name, "b": "x.safetensors"}})
    url = far.put("/deep/er/model.safetensors.index.json", index.encode())
    with pytest.raises(Malformed, match="not the name of a file next to it"):
        ckptool.keys(url)
    assert {each.path for each in far.asked} == {"/deep/er/model.safetensors.index.json"}


@pytest.mark.parametrize("name", ["a b.safetensors", "a%2e%2e.safetensors", "q?x#y.safetensors"])
def test_names_in_an_index_are_names_whatever_urls_make_of_them(far: Far, name: str) -> None:
    far.put(f"/set/{name}", save_safetensors({"a": torch.ones(3)}))
    index = json.dumps({"metadata": {}, "weight_map": {"a": name}})
    url = far.put("/set/model.safetensors.index.json", index.encode())
    assert [*ckptool.keys(url + "?token=1")] == ["a"]
    assert all(each.path.endswith("?token=1") for each in far.asked)


def test_a_shard_that_is_not_there_is_named(far: Far) -> None:
    url = shards(far)
    del far.files["/set/model-00002-of-00004.safetensors"]
    with pytest.raises(Malformed, match="1 of 4 shards that the index names are missing"):
        ckptool.keys(url)


# Local headers of an archive are checked when a record is read.


def test_a_record_that_starts_elsewhere_is_found_when_it_is_read(far: Far, tmp_path: Path) -> None:
    data = bytearray(PTH)
    at = data.index(b"PK\3\4", data.index(b"archive/data/1") - 40)
    (extra,) = struct.unpack_from("<H", data, at + 28)
    struct.pack_into("<H", data, at + 28, extra - 4)
    url = far.put("/x.pth", bytes(data))
    assert len([*ckptool.keys(url)]) == COUNT
    with pytest.raises(Malformed):
        ckptool.convert(url, tmp_path / "out.pth")
    assert [*tmp_path.iterdir()] == []


def test_an_archive_that_is_not_aligned_is_read_as_here(far: Far, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(GOOD) as good, zipfile.ZipFile(tmp_path / "x.pth", "w") as other:
        for name in good.namelist():
            other.writestr(name, good.read(name))
    url = far.put("/x.pth", (tmp_path / "x.pth").read_bytes())
    assert ckptool.diff(url, tmp_path / "x.pth").equal


def test_members_of_archives_and_hosts_with_colons(far: Far, tmp_path: Path) -> None:
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(GOOD, "inner/plain.pth")
    url = far.put("/a.zip", (tmp_path / "a.zip").read_bytes())
    assert ckptool.diff(f"{url}::inner/plain.pth", GOOD).equal
    with pytest.raises(DownloadFailed):
        ckptool.keys("http://[::1]:1/x.pth")


def test_what_is_no_file_is_refused(far: Far) -> None:
    for body, what in ((b"<!DOCTYPE html><html>", "HTML page"), (b"", "empty file")):
        far.spoil = lambda asked, answer: None
        url = far.put("/x.pth", body)
        if not body:
            far.spoil = lambda asked, answer: (
                answer.headers.update({"Content-Range": "bytes */0"})
                or setattr(answer, "status", 416)
            )
        with pytest.raises(DownloadFailed, match=what):
            ckptool.keys(url)


def test_bytes_that_many_threads_ask_for_come_once(far: Far) -> None:
    from concurrent.futures import ThreadPoolExecutor

    from ckptool.files.fileio import Reader

    reader = Reader(ckptool.files.sites.of(far.put("/x.pth", PTH)))  # type: ignore[attr-defined]
    reader.file.expect([(0, len(PTH))])
    step = 1 << 17
    with ThreadPoolExecutor(8) as pool:
        starts = range(0, len(PTH) - step, step)
        parts = [*pool.map(lambda start: reader.read(start, step), starts)]
    assert b"".join(parts) == PTH[: len(parts) * step]
    assert far.sent < 1.05 * len(PTH) + remote.BLOCK


def test_secrets_are_in_no_text(far: Far) -> None:
    far.put("/x.pth", PTH)
    url = far.root.replace("//", "//me:secret@") + "/x.pth?token=hidden"
    found = ckptool.read(url)
    assert found.path == f"{far.root}/x.pth?..."
    texts = [repr(found), repr(ckptool.keys(url)), str(ckptool.info(url).to_dict())]
    with pytest.raises(CkptoolError) as caught:
        ckptool.keys(url.replace("x.pth", "no.pth"))
    texts += [caught.value.message, caught.value.hint, str(caught.value.evidence)]
    assert not [text for text in texts if "secret" in text or "hidden" in text or "me:" in text]
    assert {each.headers["authorization"] for each in far.asked} == {"Basic bWU6c2VjcmV0"}
    assert http.shown("https://u@h/a?b#c") == "https://h/a?..."


def test_the_last_look_is_at_all_files(far: Far) -> None:
    found = ckptool.read(shards(far))
    assert len(found.files) == 5
    assert places.find(found).entries.keys() == STATE.keys()


def test_files_beside_files_where_nothing_can_be_listed(far: Far, tmp_path: Path) -> None:
    import zipfile

    zipfile.ZipFile(GOOD).extractall(tmp_path)
    unpacked = next(path.parent for path in tmp_path.rglob("data.pkl"))
    for folder, name in ((FIXTURES / "good" / "dcp", ".metadata"), (unpacked, "data.pkl")):
        for path in folder.rglob("*"):
            if path.is_file():
                far.put(f"/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes())
        assert ckptool.diff(f"{far.root}/{name}/{name}", folder).equal


def test_one_shard_says_that_it_is_one(far: Far) -> None:
    shards(far)
    found = ckptool.read(f"{far.root}/set/model-00001-of-00004.safetensors")
    assert any("this is shard 1 of 4" in note for note in found.notes)
