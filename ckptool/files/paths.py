"""Where files are: paths of this machine and URLs, joined, split and listed in one way.

`sites.of` makes a `Url` of a URL; nothing of the network is loaded before there is one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from itertools import cycle, takewhile
from typing import TYPE_CHECKING, Any, Protocol

from ckptool.errors import of_system
from ckptool.records import NamedTuple

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

STORES = ("s3", "gs", "az", "memory")  # that fsspec knows; the last is its own, for tests
SCHEMES = ("http", "https", "hf", *STORES)
# What is replaced all the time is read anew for so many seconds, with pauses of so many between:
# were they of one length, a writer in step would win each time.
PATIENCE, PAUSES = 3.0, tuple(n / 200 for n in range(10))
MARK = "::"  # between an archive and the name of a member in it


class Entry(NamedTuple):
    """A name in a folder, and what it is; `nbytes` are -1 where they were not asked for."""

    name: str
    path: str
    is_file: bool
    is_folder: bool
    nbytes: int = -1


class Site(Protocol):
    """A place far away: what is asked twice in a run is answered the same.

    `is_web` says that its folders cannot be listed, and that names are quoted in its URLs.
    """

    is_web: bool

    def opened(self, url: Url) -> Any:
        """Open a file: an `OpenFile`."""

    def is_file(self, url: Url) -> bool:
        """Check whether there is a file."""

    def is_folder(self, url: Url) -> bool:
        """Check whether there is a folder."""

    def listing(self, url: Url) -> list[Entry]:
        """List what is in a folder by name."""


class Url(str):
    """A URL as it may be shown; `full` is what is asked for, with what may be a secret."""

    full: str
    site: Site

    def __new__(cls, full: str, site: Site) -> Url:
        """Take a URL that was not shown yet."""
        from ckptool.files import http

        self = super().__new__(cls, http.shown(full))
        self.full, self.site = full, site
        return self

    def inside(self, *names: str) -> Url:
        """Return the URL of what is in this folder; a query stays, which may let us in."""
        from ckptool.files.http import quote

        path, mark, query = self.full.partition("?")
        steps = "/".join(map(quote, names) if self.site.is_web else names)
        return Url(f"{path.rstrip('/')}/{steps}{mark}{query}", self.site)

    def cut(self) -> tuple[Url, str]:
        """Return the URL of the folder, and the last name."""
        from ckptool.files.http import unquote

        path, mark, query = self.full.partition("?")
        folder, _, name = path.rpartition("/")
        return Url(f"{folder}{mark}{query}", self.site), unquote(name) if self.site.is_web else name

    def members(self) -> tuple[Url, list[str]]:
        """Return the URL of an archive, and the names of a member in it; `::` is in hosts, too."""
        scheme, _, rest = self.full.partition("://")
        host, slash, path = rest.partition("/")
        file, *names = path.split(MARK)
        return Url(f"{scheme}://{host}{slash}{file}", self.site), names


def is_url(path: str | Path) -> bool:
    """Check for a URL that can be read."""
    scheme, mark, _ = str(path).partition("://")
    return bool(mark) and scheme.lower() in SCHEMES


def _url(path: str) -> Url | None:
    """Return the URL that is a path, or that of an open file."""
    path = getattr(path, "url", path)
    return path if isinstance(path, Url) else None


def join(folder: str, *names: str) -> str:
    """Return the path of what is in a folder."""
    url = _url(folder)
    return os.path.join(folder, *names) if url is None else url.inside(*names)


def split(path: str) -> tuple[str, str]:
    """Return the folder of a path, and its last name."""
    url = _url(path)
    return os.path.split(path) if url is None else url.cut()


def folder_of(path: str) -> str:
    """Return the folder that a path is in."""
    return split(path)[0]


def name_of(path: str) -> str:
    """Return the last name of a path."""
    return split(path)[1]


def is_file(path: str) -> bool:
    """Check whether there is a file."""
    url = _url(path)
    return os.path.isfile(path) if url is None else url.site.is_file(url)


def is_folder(path: str) -> bool:
    """Check whether there is a folder; on the web there is none."""
    url = _url(path)
    return os.path.isdir(path) if url is None else url.site.is_folder(url)


def can_list(folder: str) -> bool:
    """Check whether what is in a folder can be listed: on the web it cannot."""
    url = _url(folder)
    return url is None or not url.site.is_web


def listing(folder: str, *, sizes: bool = False) -> list[Entry]:
    """List what is in a folder by name, nothing where it cannot be listed.

    Raises a `FormatError` for what the system refuses.
    """
    url = _url(folder)
    if url is not None:
        return sorted(url.site.listing(url))
    try:
        with os.scandir(folder or ".") as found:
            return sorted(_entry(each, sizes) for each in found)
    except OSError as error:
        raise of_system(error, folder, "listed") from error


def inode(path: str) -> int | None:
    """Identify what is at a path: a folder may be exchanged while it is listed."""
    try:
        return os.stat(path).st_ino
    except (OSError, ValueError):
        return None


def tries() -> Iterator[None]:
    """Iterate while what was replaced meanwhile is worth reading anew; pause between."""
    last = time.monotonic() + PATIENCE
    for pause in takewhile(lambda _: time.monotonic() < last, cycle(PAUSES)):
        if pause:
            time.sleep(pause)
        yield


def _entry(found: os.DirEntry[str], sizes: bool) -> Entry:
    is_file = found.is_file()
    nbytes = found.stat().st_size if sizes and is_file else -1
    return Entry(found.name, found.path, is_file, found.is_dir(), nbytes)


def stays_inside(name: str) -> bool:
    """Check for a relative path without detours, on any system."""
    steps = name.split("/")
    return not re.search(r"[\x00-\x1f\\:]", name) and not {"", ".", ".."} & set(steps)
