"""Object stores, by way of fsspec: s3:// (s3fs), gs:// (gcsfs), az:// (adlfs).

What is written is made in a temporary folder first. These stores show an object once it is whole,
and a set has its index put last: nobody sees a part of either.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ckptool.errors import (
    CkptoolError,
    DownloadFailed,
    Malformed,
    MissingExtra,
    NoSuchFile,
    OutputDenied,
    OutputExists,
    PermissionDenied,
    WriteError,
    is_out_of_memory,
)
from ckptool.files import remote
from ckptool.files.paths import Entry
from ckptool.text import length

if TYPE_CHECKING:
    from ckptool.files.paths import Url

LIBRARIES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "memory": "fsspec"}
# What tells versions of an object apart, as each store calls it.
_VERSION = (
    "ETag etag VersionId generation md5Hash LastModified last_modified updated created".split()
)
_REASON = 200  # characters of what a library says


class Store:
    """What is asked of a store in one run."""

    is_web = False

    def __init__(self, scheme: str, timeout: float) -> None:
        self._system, self.opened = _system(scheme, timeout), remote.Opened(self.open)

    def open(self, url: Url) -> Object:
        """Open an object; raises what says why it cannot be."""
        return Object(self._system, url)

    def is_file(self, url: Url) -> bool:
        """Check whether there is an object."""
        with _reading(url):
            return url in self.opened or bool(self._system.isfile(url.full))

    def is_folder(self, url: Url) -> bool:
        """Check whether there are objects whose names begin as a path does."""
        with _reading(url):
            return bool(self._system.isdir(url.full))

    def listing(self, url: Url) -> list[Entry]:
        """List a folder."""
        with _reading(url):
            found = self._system.ls(url.full, detail=True)
        entries = []
        for each in found:
            name = str(each["name"]).rstrip("/").rpartition("/")[2]
            is_folder = each.get("type") == "directory"
            place = url.inside(name)
            entries.append(Entry(name, place, not is_folder, is_folder, each.get("size") or -1))
        return entries

    def put(self, file: str, url: Url, *, replace: bool) -> None:
        """Write an object as a whole; raises `OutputExists` where one came meanwhile."""
        with _writing(url):
            self._system.put_file(file, url.full, **({} if replace else self._anew()))
            self._system.invalidate_cache()
            stored = self._system.info(url.full)["size"]
        if stored != os.path.getsize(file):
            raise WriteError(f"{url} has {stored} bytes, {os.path.getsize(file)} were written")

    def _anew(self) -> dict[str, str]:
        """Return what lets the store itself refuse to replace an object, if it can."""
        put = getattr(self._system, "_put_file", self._system.put_file)
        return {"mode": "create"} if "mode" in inspect.signature(put).parameters else {}

    def remove(self, url: Url) -> None:
        """Remove an object that was written."""
        with suppress(Exception):  # the first error is the one to report
            self._system.rm_file(url.full)


class Object:
    """One version of an object."""

    note: str = ""
    head: bytes | bytearray = b""

    def __init__(self, system: Any, url: Url) -> None:
        self._system, self._url = system, url
        self._lock = threading.Lock()
        found = self._info()
        if found.get("type") != "file":
            raise NoSuchFile(f"{url} is a folder", path=url)
        self.nbytes = length(found["size"]) or 0
        self._version = _version(found)
        version = "\n".join((url.full, self._version)).encode()
        self.identity = int.from_bytes(hashlib.sha256(version).digest()[:8], "big")

    def fetch(self, start: int, stop: int) -> bytes:
        """Return these bytes; raises `Malformed` where they are of another version by now."""
        with _reading(self._url):
            data: bytes = self._system.cat_file(self._url.full, start=start, end=stop)
        if len(data) != stop - start or _version(self._info()) != self._version:
            raise Malformed(f"{self._url} was changed while it was read", path=self._url)
        return data

    def _info(self) -> dict[str, Any]:
        with self._lock, _reading(self._url):
            self._system.invalidate_cache()
            found: dict[str, Any] = self._system.info(self._url.full)
            return found


def _version(found: dict[str, Any]) -> str:
    return repr([found["size"], *(str(found.get(name)) for name in _VERSION)])


def _system(scheme: str, timeout: float) -> Any:
    """Return fsspec's file system, without what it would keep of listings."""
    try:
        import fsspec

        made = fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise MissingExtra(
            f"{scheme}:// needs {LIBRARIES[scheme]}, which is not installed",
            hint="pip install 'ckptool[remote]'",
        ) from error
    with _calling(lambda what: DownloadFailed(f"{scheme}:// cannot be used{what}")):
        waits = {"connect_timeout": min(timeout, 10), "read_timeout": timeout}  # of botocore
        how = {"config_kwargs": waits} if scheme == "s3" else {}
        return made(use_listings_cache=False, skip_instance_cache=True, **how)


@contextmanager
def _calling(failed: Callable[[str], CkptoolError]) -> Iterator[None]:
    """Turn what a library raises, whatever it is, into an error that names it."""
    try:
        yield
    except CkptoolError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        text = " ".join(str(error).split())[:_REASON]
        raise failed(f": {type(error).__name__}{': ' if text else ''}{text}") from error


@contextmanager
def _reading(url: Url) -> Iterator[None]:
    with _calling(lambda what: DownloadFailed(f"{url} cannot be read{what}")):
        try:
            yield
        except FileNotFoundError:
            raise NoSuchFile(f"{url} does not exist", path=url) from None
        except PermissionError as error:
            what = f"{url} may not be read: {str(error)[:_REASON]}"
            raise PermissionDenied(what, path=url) from None


@contextmanager
def _writing(url: Url) -> Iterator[None]:
    with _calling(lambda what: WriteError(f"{url} cannot be written{what}")):
        try:
            yield
        except FileExistsError:
            what = f"{url} was written by another process meanwhile; it was not changed"
            raise OutputExists(what, hint="name another output, or use --force") from None
        except PermissionError as error:
            raise OutputDenied(f"{url} may not be written: {str(error)[:_REASON]}") from None
