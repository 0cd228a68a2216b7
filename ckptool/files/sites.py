"""What URLs are on, by their scheme, and how servers are asked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from ckptool.files import paths
from ckptool.records import NamedTuple

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.files.paths import Site


class Manner(NamedTuple):
    """How long to wait for a server, in seconds, and who is told what takes longer than expected.

    `progress` shows how a file comes that is fetched as a whole. What is known of sites is shared
    by all that is read while they are asked so; without `sites`, by the files of a set.
    """

    timeout: float = 60.0
    say: Callable[[str], None] | None = None
    progress: Callable[[str], AbstractContextManager[Any]] = nullcontext
    sites: dict[str, Site] | None = None


_manner: ContextVar[Manner | None] = ContextVar("manner", default=None)


def manner() -> Manner:
    """Return how servers are asked now."""
    return _manner.get() or Manner()


@contextmanager
def asking(manner: Manner) -> Iterator[None]:
    """Ask servers in this manner for a while."""
    token = _manner.set(manner)
    try:
        yield
    finally:
        _manner.reset(token)


def of(path: str | Path) -> str:
    """Return a path as text, an open file as it is, and a URL as what can be opened and shown."""
    if not isinstance(path, str):
        return str(path)
    if not paths.is_url(path) or isinstance(path, paths.Url) or hasattr(path, "url"):
        return path
    scheme, known = path.partition("://")[0].lower(), manner().sites
    known = {} if known is None else known
    if scheme not in known:
        known[scheme] = _site(scheme)
    return paths.Url(path, known[scheme])


def _site(scheme: str) -> Site:
    asked = manner()
    if scheme in paths.STORES:
        from ckptool.files import stores

        return stores.Store(scheme, asked.timeout)
    from ckptool.files import web

    servers = web.Web(asked.timeout, asked.say, asked.progress)
    if scheme == "hf":
        from ckptool.files import hub

        return hub.Hub(servers)
    return servers
