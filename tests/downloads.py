"""What the tests of downloads share: bodies, short patience, and looking at what is left."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from server import Reply, Server, serving

from ckptool.errors import CkptoolError
from ckptool.files.download import download
from ckptool.files.http import Client, Limits

BODY = random.Random(1).randbytes(500_000)
SHA = hashlib.sha256(BODY).hexdigest()
OTHER = random.Random(2).randbytes(400_000)
QUICK = Limits(connect=2, timeout=2, retries=2, backoff=0.01, longest_wait=0.05)
PAGE = b"<!DOCTYPE html>\n<html><body>Sign in</body></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1234\nsize 99\n"
DATE = "Wed, 21 Oct 2015 07:28:00 GMT"
PROXIES = "http_proxy https_proxy all_proxy no_proxy".split()


@pytest.fixture(name="no_proxy", autouse=True)
def no_proxy_fixture(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture(name="server")
def server_fixture() -> Iterator[Server]:
    with serving() as server:
        yield server


def get(url: str, target: object, limits: Limits = QUICK, **more: Any) -> Any:
    return download(url, str(target), client=Client(limits), **{"sync": False, **more})


def refused(kind: type[CkptoolError], url: str, target: Path, **more: Any) -> Any:
    """Download what cannot be, and see that nothing is left in the folder."""
    before = {path: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(kind) as caught:
        get(url, target, **more)
    assert {path: path.read_bytes() for path in target.iterdir()} == before
    assert type(caught.value) is kind
    return caught.value


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def redirect(location: str, status: int = 302) -> Reply:
    return Reply(status=status, headers={"Location": location})
