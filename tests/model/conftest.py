"""A server of one's own, and no proxy on the way to it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from server import Server, serving

PROXIES = "http_proxy https_proxy all_proxy no_proxy".split()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as server:
        yield server
