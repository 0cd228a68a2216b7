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

    def manager(self, url: str, patience: Patience) -> PoolManager:
        """Return what requests a URL; what comes on this thread is read with this patience."""
        self._asking.patience = patience
        proxy = _proxy(url)
        if proxy not in self._managers:
            manager = _made(proxy)
            pools = manager.pool_classes_by_scheme.items()
            manager.pool_classes_by_scheme = {name: self._patient(pool) for name, pool in pools}
            self._managers.setdefault(proxy, manager)
        return self._managers[proxy]

    def _patient(self, pool: Any) -> Any:
        """Return a class of pools whose connections make the responses of `http.client` here."""

        def respond(*args: Any, **kwargs: Any) -> Any:
            return self._asking.patience.respond(*args, **kwargs)

        made = pool.ConnectionCls
        made = type(made.__name__, (made,), {"response_class": staticmethod(respond)})
        return type(pool.__name__, (pool,), {"ConnectionCls": made})


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
