"""What an earlier run left of a download, and whether an answer goes on with exactly that.

`NAME.part.json` says what `NAME.part` is a part of: the request (as a digest, for a URL may hold a
token), the server's validator and the whole length. A later run sends `Range` with `If-Range`
(RFC 9110, 13.1.5), and starts again where the answer does not go on. Without a strong validator
or a length nothing can be gone on with.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from ckptool.files.http import Answer, content_range, shown
from ckptool.files.parts import Part

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class Record:
    """What a part is a part of."""

    url: str
    request: str
    etag: str
    last_modified: str
    total: int | None

    @property
    def validator(self) -> str:
        """Give what If-Range may hold; an empty string for none."""
        return self.etag or self.last_modified


@dataclass(frozen=True, slots=True)
class Begun:
    """What an earlier run left: so many bytes of a file, and their hash."""

    nbytes: int
    hash: _Hash
    record: Record | None = None


def anew() -> Begun:
    """Begin with nothing."""
    return Begun(0, hashlib.sha256())


def begun(part: Part, url: str) -> Begun:
    """Find what an earlier run left of the same file; its last byte is asked for again."""
    record = _read(part)
    nbytes = os.fstat(part.fd).st_size
    if record is None or record.request != _digest(url) or not record.validator:
        return anew()
    if record.total is None or not 1 < nbytes <= record.total:
        return anew()
    nbytes = min(nbytes, record.total - 1)
    return Begun(nbytes, hash_of(part.path, nbytes), record)


def hash_of(path: str, nbytes: int) -> _Hash:
    """Hash the first bytes of a file."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while nbytes > 0 and (data := file.read(min(nbytes, 1 << 20))):
            found.update(data)
            nbytes -= len(data)
    return found


def goes_on(answer: Answer, record: Record, start: int) -> bool:
    """Tell whether an answer holds exactly the rest of the same file."""
    if answer.status != 206:
        return False
    part = content_range(answer.header("Content-Range"))
    if part is None or (part.start, part.end, part.total) != (start, record.total, record.total):
        return False
    pairs = (
        (_strong_etag(answer), record.etag),
        (answer.header("Last-Modified"), record.last_modified),
    )
    same = all(here == before for here, before in pairs if here and before)
    return same and answer.nbytes in (None, part.end - start)


def note(part: Part, url: str, answer: Answer, before: Begun, total: int | None) -> bool:
    """Cut a part to what is gone on with, note what it is; tell whether it is worth keeping."""
    os.ftruncate(part.fd, before.nbytes)
    if before.record is not None:
        return True
    etag, modified = _strong_etag(answer), answer.header("Last-Modified")
    record = Record(shown(url), _digest(url), etag, modified, total)
    part.note(json.dumps(asdict(record)))
    return bool(record.validator) and total is not None


def _strong_etag(answer: Answer) -> str:
    """Give an ETag that speaks about bytes; a weak one does not."""
    etag = answer.header("ETag")
    return etag if etag.startswith('"') else ""


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()


def _read(part: Part) -> Record | None:
    try:
        with open(part.record, encoding="utf-8") as file:
            record = Record(**json.loads(file.read(1 << 16)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    texts = (record.url, record.request, record.etag, record.last_modified)
    whole = record.total is None or type(record.total) is int
    return record if whole and all(isinstance(text, str) for text in texts) else None
