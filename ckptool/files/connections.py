"""Connections to web servers, kept from one request to the next, by the environment's proxies."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from ckptool.files.patience import Patience

if TYPE_CHECKING:
    from urllib3 import PoolManager

KEPT = 8  # idle connections to a server


class Connections:
    """Pools of connections; safe to share between threads."""

    def __init__(self) -> None:
        self._managers: dict[str, PoolManager] = {}
        self._asking = threading.local()  # whose request a thread waits for
        self._lock = threading.Lock()

    def manager(self, url: str, patience: Patience) -> PoolManager:
        """Return what requests a URL; what comes on this thread is read with this patience."""
        self._asking.patience = patience
        proxy = _proxy(url)
        with self._lock:
            manager = self._managers.get(proxy) or _made(proxy)
            self._managers[proxy] = manager
            pool = manager.connection_from_url(url)
            if not hasattr(pool.ConnectionCls, "patient"):
                pool.ConnectionCls = self._patient(pool.ConnectionCls)
        return manager

    def _patient(self, make: Any) -> Any:
        def connection(*args: Any, **kwargs: Any) -> Any:
            made = make(*args, **kwargs)
            made.response_class = self._respond  # what `http.client` makes of a connection
            return made

        connection.patient = True  # type: ignore[attr-defined]
        return connection

    def _respond(self, *args: Any, **kwargs: Any) -> Any:
        return self._asking.patience.respond(*args, **kwargs)


def _proxy(url: str) -> str:
    """Return the proxy that the environment names for a URL; an empty string for none."""
    from urllib.request import getproxies, proxy_bypass

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all") or ""
    if not proxy or proxy_bypass(parts.netloc):
        return ""
    return proxy if "://" in proxy else f"http://{proxy}"


def _made(proxy: str) -> PoolManager:
    from urllib3 import PoolManager, ProxyManager
    from urllib3.util import make_headers

    if not proxy:
        return PoolManager(maxsize=KEPT)
    login = unquote(urlsplit(proxy).netloc.rpartition("@")[0])
    headers = make_headers(proxy_basic_auth=login or None)
    return ProxyManager(proxy, proxy_headers=headers, maxsize=KEPT)
