"""What an earlier run left of a download, and whether an answer continues exactly that.

`NAME.part.json` says what `NAME.part` is a part of: the request (as a digest, for a URL may hold a
token), the server's validator and the whole length. A later run sends `Range` with `If-Range`
(RFC 9110, 13.1.5), and starts again where the answer does not continue the part. Without a strong
validator or a length nothing can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ckptool.files.atomic import Part
from ckptool.files.http import Answer, shown

if TYPE_CHECKING:
    from hashlib import _Hash


@dataclass(frozen=True, slots=True)
class Partial:
    """The first bytes of a file with their hash; validator and length are the whole file's."""

    nbytes: int = 0
    sha256: _Hash = field(default_factory=hashlib.sha256)
    validator: str = ""
    total: int | None = None


def left(part: Part, url: str) -> Partial:
    """Return what an earlier run left of the same file, without the last byte of a whole one."""
    try:
        with open(part.record, encoding="utf-8") as file:
            record = json.loads(file.read(1 << 16))
    except (OSError, ValueError, RecursionError):
        return Partial()
    nbytes = os.fstat(part.fd).st_size
    match record:
        case {"request": request, "validator": str(validator), "total": int(total)} if (
            request == _digest(url) and _can_be_sent(validator) and 1 < nbytes <= total
        ):
            nbytes = min(nbytes, total - 1)  # so that there is something to ask for
            os.ftruncate(part.fd, nbytes)
            return Partial(nbytes, digest(part.path), validator, total)
    return Partial()


def digest(path: str) -> _Hash:
    """Return the sha256 of a file; more bytes may be added to it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256")


def continues(answer: Answer, partial: Partial) -> bool:
    """Return whether an answer holds exactly the rest of the same file."""
    total = partial.total or 0
    content_range = f"bytes {partial.nbytes}-{total - 1}/{total}"
    validator = answer.header("ETag" if partial.validator.startswith('"') else "Last-Modified")
    return (
        answer.body.status == 206
        and answer.header("Content-Range").lower() == content_range
        and validator in ("", partial.validator)
        and answer.nbytes in (None, total - partial.nbytes)
    )


def begin(part: Part, url: str, answer: Answer) -> bool:
    """Empty a part and record what it becomes a part of; return whether it can be resumed."""
    etag = answer.header("ETag")  # a weak one, W/"...", does not speak about bytes
    validator = etag if etag.startswith('"') else answer.header("Last-Modified")
    record = {"url": shown(url), "request": _digest(url), "validator": validator}
    os.ftruncate(part.fd, 0)
    part.note(json.dumps({**record, "total": answer.nbytes}))
    return _can_be_sent(validator) and answer.nbytes is not None


def _can_be_sent(validator: str) -> bool:
    return validator != "" and validator.isascii() and validator.isprintable()


def _digest(url: str) -> str:
    return hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
