"""Repositories of the Hugging Face Hub: a small Hub on this machine, judged by huggingface_hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, Outcome
from far import COMMIT, Answer, Asked, Far, far_fixture, serving  # noqa: F401  (a fixture)
from safetensors.torch import save as save_safetensors

import ckptool
from ckptool.errors import AmbiguousStateDict, DownloadFailed, NoSuchFile
from ckptool.files import hub

Run = Callable[..., Outcome]
GOOD = (FIXTURES / "good" / "plain.pth").read_bytes()
TOKEN = "hf_secret"
API = "/api/models/org/model/revision/"


@pytest.fixture(name="cdn")
def cdn_fixture() -> Iterator[Far]:
    with serving() as cdn:
        yield cdn


@pytest.fixture(name="files")
def files_fixture(
    far: Far, cdn: Far, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> dict[str, bytes]:
    """Run a Hub with one repository, whose large files are on another host."""
    files: dict[str, bytes] = {"config.json": b"{}"}

    def spoil(asked: Asked, answer: Answer) -> None:
        path, _, _ = asked.path.partition("?")
        revision = path.removeprefix(API)
        if path != revision and revision in ("main", "v1", "refs%2Fpr%2F1", COMMIT):
            siblings = [{"rfilename": name, "size": len(body)} for name, body in files.items()]
            told = {"id": "org/model", "sha": COMMIT, "siblings": siblings}
            answer.status, answer.body = 200, json.dumps(told).encode()
        at, _, name = path.removeprefix("/org/model/resolve/").partition("/")
        if at in ("v1", COMMIT) and name in files:
            cdn.put(f"/{name}", files[name])
            digest = hashlib.sha256(files[name]).hexdigest()
            answer.status, answer.body = 302, b""
            answer.headers = {
                "Location": f"{cdn.root}/{name}?Signature=hidden",
                "X-Repo-Commit": COMMIT, "X-Linked-Size": str(len(files[name])),
                "X-Linked-Etag": f'"{digest}"', "ETag": f'"{digest}"',
            }  # fmt: skip

    far.spoil = spoil
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", far.root)
    return files


def sharded(files: dict[str, bytes]) -> None:
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": names}).encode()
    for key, name in names.items():
        files[name] = save_safetensors({key: torch.ones(1000)})


def test_a_file_of_a_repository(files: dict[str, bytes], far: Far) -> None:
    files["sub/plain.pth"] = GOOD
    assert len([*ckptool.keys("hf://org/model/sub/plain.pth")]) == 8
    assert [each.path for each in far.asked if "/api/" in each.path] == [f"{API}main?blobs=1"]


@pytest.mark.parametrize(
    "revision", ["", "@main", "@v1", f"@{COMMIT}", "@refs/pr/1", "@refs%2Fpr%2F1"]
)
def test_all_files_of_a_set_are_of_one_commit(
    files: dict[str, bytes], far: Far, revision: str
) -> None:
    sharded(files)
    found = ckptool.read(f"hf://org/model{revision}")
    assert sorted(ckptool.keys(f"hf://org/model{revision}")) == ["a", "b"]
    assert found.path == f"hf://org/model{revision}"
    far.forget()
    ckptool.keys(f"hf://org/model{revision}/model.safetensors.index.json")
    asked = [each.path for each in far.asked]
    assert len([path for path in asked if path.startswith("/api/")]) == 1
    assert all(COMMIT in path for path in asked if not path.startswith("/api/"))
    assert len(asked) == 4


def test_several_checkpoints_are_listed(files: dict[str, bytes], run: Run) -> None:
    files["model.safetensors"] = save_safetensors({"a": torch.ones(3)})
    files["pytorch_model.bin"] = GOOD
    with pytest.raises(AmbiguousStateDict) as caught:
        ckptool.keys("hf://org/model")
    assert caught.value.evidence == ("model.safetensors", "pytorch_model.bin")
    assert run("keys", "hf://org/model").code == 2
    assert run("keys", "hf://org/model/model.safetensors").code == 0


def test_folders_and_names_that_are_not_there(files: dict[str, bytes]) -> None:
    files["unet/model.safetensors"] = save_safetensors({"a": torch.ones(3)})
    assert [*ckptool.keys("hf://org/model/unet")] == ["a"]
    with pytest.raises(NoSuchFile) as caught:
        ckptool.keys("hf://org/model/unet/model.safetensor")
    assert caught.value.hint == "did you mean hf://org/model/unet/model.safetensors?"
    with pytest.raises(DownloadFailed, match="hf://org/other: the server says 404"):
        ckptool.keys("hf://org/other")
    for wrong in ("hf://org", "hf://", "hf://org/a b", "hf://me:secret@org/model"):
        with pytest.raises(NoSuchFile, match="names no repository") as named:
            ckptool.keys(wrong)
        assert "secret" not in named.value.message


def test_names_that_lead_out_of_a_repository_are_not_in_it(
    files: dict[str, bytes], far: Far
) -> None:
    files["../../secret.pth"] = files["/x.pth"] = GOOD
    for name in ("../../secret.pth", "/x.pth"):
        with pytest.raises(NoSuchFile):
            ckptool.keys(f"hf://org/model/{name}")
    assert all("/api/models/org/model/" in each.path for each in far.asked)


def test_the_token_goes_to_the_hub_alone(
    files: dict[str, bytes], far: Far, cdn: Far, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    files["plain.pth"] = GOOD
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    done = [run(command, "hf://org/model/plain.pth", "--json") for command in ("keys", "info")]
    done.append(run("keys", "hf://org/model/no.pth"))
    done.append(run("--debug", "keys", "hf://org/other/no.pth"))
    assert [each.code for each in done] == [0, 0, 3, 6]
    assert {each.headers.get("authorization") for each in far.asked} == {f"Bearer {TOKEN}"}
    assert {each.headers.get("authorization") for each in cdn.asked} == {None}
    assert all(TOKEN not in each.path for each in (*far.asked, *cdn.asked))
    assert not [each for each in done if TOKEN in each.out + each.err]
    assert not [each for each in done if "hidden" in each.out + each.err]


def test_where_the_token_is_from(files: dict[str, bytes], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("hf_file\n")
    home = {"HF_HOME": str(tmp_path)}
    cases: list[tuple[dict[str, str], str]] = [
        (home, "hf_file"),
        ({"HF_TOKEN_PATH": str(tmp_path / "token")}, "hf_file"),
        ({"XDG_CACHE_HOME": str(tmp_path)}, ""),
        (home | {"HF_TOKEN": TOKEN}, TOKEN),
        (home | {"HUGGING_FACE_HUB_TOKEN": TOKEN}, TOKEN),
        (home | {"HF_TOKEN": TOKEN, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1"}, ""),
        (home | {"HF_TOKEN": "a\r\nX-Evil: 1"}, "aX-Evil: 1"),
        (home | {"HF_TOKEN": "\u00e9"}, ""),
    ]
    for environment, expected in cases:
        assert hub.token(environment.get) == expected, environment


def test_the_token_is_not_sent_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptool.files.web import Web

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for endpoint, is_sent in (
        ("http://hub.example", False), ("https://hub.example", True), ("http://127.0.0.1:1", True),
        ("http://127.0.0.1.example", False), ("http://[::1]:8000", True),
    ):  # fmt: skip
        monkeypatch.setenv("HF_ENDPOINT", endpoint)
        made = hub.Hub(Web(1, None, lambda name: None))  # type: ignore[arg-type,return-value]
        assert bool(made._headers()) is is_sent, endpoint


def test_another_commit_than_was_asked_for_is_refused(files: dict[str, bytes], far: Far) -> None:
    files["plain.pth"] = GOOD
    before = far.spoil

    def other(asked: Asked, answer: Answer) -> None:
        before(asked, answer)
        if "X-Repo-Commit" in answer.headers:
            answer.headers["X-Repo-Commit"] = COMMIT[::-1]

    far.spoil = other
    with pytest.raises(DownloadFailed, match=f"commit {COMMIT} was asked for"):
        ckptool.keys("hf://org/model/plain.pth")


@pytest.mark.parametrize("told", [b"", b"[]", b'{"sha": 1}', b'{"sha": "../x", "siblings": []}'])
def test_an_endpoint_that_is_no_hub(files: dict[str, bytes], far: Far, told: bytes) -> None:
    def other(asked: Asked, answer: Answer) -> None:
        answer.status, answer.body = 200, told

    far.spoil = other
    with pytest.raises(DownloadFailed, match="does not answer as the Hub does"):
        ckptool.keys("hf://org/model/plain.pth")


def test_huggingface_hub_reads_the_same(
    files: dict[str, bytes], far: Far, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = pytest.importorskip("huggingface_hub")
    files["plain.pth"] = GOOD
    asked = {"endpoint": far.root, "token": TOKEN}
    told = library.HfApi(**asked).model_info("org/model", revision="v1", files_metadata=True)
    assert told.sha == COMMIT
    path = library.hf_hub_download(
        "org/model", "plain.pth", revision="v1", cache_dir=tmp_path / "hub", **asked
    )
    theirs = {(each.path.partition("?")[0]) for each in far.asked}
    assert Path(path).read_bytes() == GOOD
    far.forget()
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert ckptool.diff("hf://org/model@v1/plain.pth", path).equal
    ours = {each.path.partition("?")[0] for each in far.asked}
    assert f"{API}v1" in ours & theirs
    resolved = {path for path in theirs if "/resolve/" in path}
    assert {path.replace("/v1/", f"/{COMMIT}/") for path in resolved} <= ours


@pytest.mark.parametrize("name", ["fsdp2_ranks", "mesh_ranks", "dcp", "dcp_safetensors"])
def test_folders_of_ranks(files: dict[str, bytes], name: str) -> None:
    folder = FIXTURES / "good" / name
    for path in folder.rglob("*"):
        if path.is_file():
            files[f"{folder.name}/{path.relative_to(folder).as_posix()}"] = path.read_bytes()
    url = f"hf://org/model/{folder.name}"
    assert ckptool.diff(url, folder).equal
    assert ckptool.check(url).status is ckptool.check(folder).status
