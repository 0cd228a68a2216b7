"""Download a file: resumed, checked, published whole or not at all.

Bytes go to `NAME.part` beside the target, which is locked while it grows, and becomes the target
by one link or rename once its length and hash are right. `NAME.part.json` says what it is a part
of: the request (as a digest, for a URL may hold a token), the server's validator and the whole
length. A later run sends `Range` with `If-Range` (RFC 9110, 13.1.5), and starts again where the
answer does not continue the part. Without a strong validator or a length nothing can be resumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING

from ckptool.errors import (
    BadInput,
    DownloadFailed,
    HashMismatch,
    NoSpace,
    OutputExists,
    WriteError,
    of_system,
)
from ckptool.files import fileio, filename, http, parts, publish, temporary
from ckptool.files.http import Answer, Client, Range, shown
from ckptool.files.parts import Part
from ckptool.files.publish import Target
from ckptool.records import dataclass
from ckptool.text import length, quoted, readable

if TYPE_CHECKING:
    from hashlib import _Hash

    from ckptool.documents import models

NOTHING = "nothing to check against"
Progress = Callable[[int, int | None], None]  # bytes here so far, bytes in all


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What a download did.

    `url` is without secrets; `resumed_from` counts the bytes that an earlier run left; `checked`
    says what the file was checked against; `weights` is torchvision's name of them, if it has one.
    """

    url: str
    path: str
    nbytes: int
    sha256: str
    resumed_from: int
    already_there: bool
    checked: str
    weights: str | None = None
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> models.Download:
        """Return the document `download/1`."""
        return {
            "schema": "download/1",
            "url": self.url,
            "path": self.path,
            "nbytes": self.nbytes,
            "sha256": self.sha256,
            "resumed_from": self.resumed_from,
            "already_there": self.already_there,
            "checked": self.checked,
            "weights": self.weights,
        }


@dataclass(frozen=True, slots=True)
class _Job:
    """A file to download; `prefixes` are starts of its sha256, `checked` is where they are from."""

    url: str
    path: str
    prefixes: tuple[str, ...]
    checked: str
    client: Client
    progress: Progress | None
    force: bool = False
    sync: bool = True
    resumable: bool = True

    def fits(self, sha256: str) -> bool:
        """Return whether a file of this sha256 is the expected one."""
        return all(map(sha256.startswith, self.prefixes))

    def mismatch(self, message: str, sha256: str, hint: str) -> HashMismatch:
        """Return the error for a file of this sha256."""
        expected = max(self.prefixes, key=len)
        evidence = [f"sha256 expected  {expected}   ({self.checked})", f"sha256 found     {sha256}"]
        return HashMismatch(message, evidence=evidence, hint=hint)


@dataclass(frozen=True, slots=True)
class _Partial:
    """The first bytes of a file with their hash; validator and length are the whole file's."""

    nbytes: int = 0
    sha256: _Hash = field(default_factory=hashlib.sha256)
    validator: str = ""
    total: int = 0


def download(
    url: str,
    target: str | Path = ".",
    *,
    sha256: str | None = None,
    expected_prefix: str | None = None,
    force: bool = False,
    sync: bool = True,
    progress: Progress | None = None,
    client: Client | None = None,
) -> Downloaded:
    """Download a URL into a folder or to a file, and check it.

    A file that is there already is checked and left alone; `force` replaces one that is not what
    is expected. `expected_prefix` is the start of a sha256 that binds, as torchvision's registry
    knows it; without it, a hash in the URL's file name binds unless `sha256` is given. A run that
    fails keeps what came, if the server can go on with it. Raises `DownloadFailed`,
    `HashMismatch`, `OutputExists`, `NoSpace` or `WriteError`.
    """
    http.parsed(url)
    client = client or Client()
    with _folder(target) as folder:
        name = filename.of_url(url) or (_asked_name(url, client) if folder else "")
        path = os.path.join(folder, name) if folder else os.fspath(target)
        hashes = _hashes(name, sha256, expected_prefix)
        job = _Job(url, path, *hashes, client, progress, force, sync)
        return _existing(job) or _fetched(job)


def unnamed(
    url: str, client: Client, headers: Mapping[str, str], progress: Progress | None
) -> tuple[IO[bytes], str]:
    """Download to a temporary file, gone when it is closed; return it with its sha256."""
    with client.asked(url, headers) as answer, temporary.temporary():
        name = filename.of_url(url) or _served_name(answer)
        target = Target(os.path.join(temporary.where(), name))
        job = _Job(url, target.path, *_hashes(name), client, progress, resumable=False)
        file = temporary.unnamed()
        try:
            part = Part(file.fileno(), target.path)
            return file, _taken(job, target, part, answer, _Partial()).sha256
        except BaseException as error:
            file.close()
            if isinstance(error, WriteError):
                error.hint = temporary.ELSEWHERE
            raise


def _hashes(
    name: str, sha256: str | None = None, registry: str | None = None
) -> tuple[tuple[str, ...], str]:
    """Return what a sha256 must start with, and who says so; a given one overrides the name's."""
    given = () if sha256 is None else (_full_hash(sha256),)
    if registry is not None:
        return (registry.lower(), *given), "sha256 given" if given else "registry"
    if given:
        return given, "sha256 given"
    named = filename.hash_in(name)
    return ((named,), "hash in the name") if named else ((), NOTHING)


def _full_hash(text: str) -> str:
    digits = text.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise BadInput("a sha256 has 64 hexadecimal digits", hint="sha256sum FILE prints one")
    return digits


@contextmanager
def _folder(target: str | Path) -> Iterator[str]:
    """Yield the folder to download into, made where it ends in a slash; empty for a file."""
    text = os.fspath(target)
    if not (os.path.lexists(text) or os.path.splitext(text)[1] or text.endswith(("/", os.sep))):
        raise BadInput(
            f"{text} does not exist: is it a folder or a file?",
            option=f"-o {quoted(text + '/')}",
            hint=f"makes a folder; a file has a suffix: -o {quoted(text + '.pth')}",
        )
    if os.path.isdir(text) or not text.endswith(("/", os.sep)):
        yield text if os.path.isdir(text) else ""
        return
    try:
        os.makedirs(text)
    except OSError as error:
        raise of_system(error, f"the folder {text}", "written") from error
    try:
        yield text
    except BaseException:
        with suppress(OSError):  # a part is in it
            os.rmdir(text)
        raise


def _served_name(answer: Answer) -> str:
    """Return the file name that a server gives; an empty string for none."""
    disposition = filename.of_disposition(answer.header("Content-Disposition"))
    return disposition or filename.of_url(answer.url)


def _asked_name(url: str, client: Client) -> str:
    """Ask the server for the file name that the URL lacks."""
    with client.asked(url, {}) as answer:
        name = _served_name(answer)
    if not name:
        what = ": neither the URL nor the server names the file"
        raise http.failed(url, what, "name it yourself: -o FILE")
    return name


def _existing(job: _Job) -> Downloaded | None:
    """Check a file that is there; return None where there is none or it is to be replaced."""
    if not os.path.isfile(job.path) or (job.force and not job.prefixes):
        return None
    hint = "--force replaces it, -o names another output"
    nbytes = os.path.getsize(job.path)
    if not job.prefixes:
        with job.client.asked(job.url, {}) as answer:
            if nbytes != answer.nbytes:
                what = "exists, in another size than the server's, and no hash is known"
                raise OutputExists(f"{job.path} {what}", hint=hint)
    sha256 = _sha256(job.path).hexdigest()
    if job.fits(sha256):
        checked = job.checked if job.prefixes else "size"
        return Downloaded(shown(job.url), job.path, nbytes, sha256, 0, True, checked)
    if job.force:
        return None
    what = "already exists, with other content than expected; it was not changed"
    raise job.mismatch(f"{job.path} {what}", sha256, hint)


def _fetched(job: _Job) -> Downloaded:
    target = publish.refuse_target(job.path, (), force=job.force, sync=job.sync)
    folder, name = os.path.split(target.path)
    with parts.part_output(os.path.join(folder, filename.of_part(name)), target) as part:
        if part is None:
            hint = "wait for it, or use another -o"
            raise DownloadFailed(f"another process downloads {job.path}", hint=hint)
        try:
            done = _grown(job, target, part)
        except (DownloadFailed, KeyboardInterrupt) as error:
            kept = f"{os.fstat(part.fd).st_size} bytes are kept in {part.path}"
            if part.kept and isinstance(error, DownloadFailed):
                error.hint = f"{error.hint or 'run it again'}; {kept}"
            elif part.kept:
                error.add_note(f"{kept}; run it again to resume")
            raise
    return replace(done, warnings=tuple(part.warnings))


def _grown(job: _Job, target: Target, part: Part) -> Downloaded:
    """Request what is missing, and all of it where the answer does not continue the part."""
    partial = _left(part, job.url)
    part.kept = partial.nbytes > 0
    if partial.nbytes:
        ranged = {"Range": f"bytes={partial.nbytes}-", "If-Range": partial.validator}
        with job.client.asked(job.url, ranged) as answer:
            if _continues(answer, partial):
                return _taken(job, target, part, answer, partial)
            if answer.body.status == 200:
                return _taken(job, target, part, answer, _Partial())
    with job.client.asked(job.url, {}) as answer:
        return _taken(job, target, part, answer, _Partial())


def _left(part: Part, url: str) -> _Partial:
    """Return what an earlier run left of the same file, without the last byte of a whole one."""
    try:
        record = json.loads(part.noted())
    except (ValueError, RecursionError):
        return _Partial()
    nbytes = os.fstat(part.fd).st_size
    match record:
        case {"request": request, "validator": str(validator), "total": total} if (
            request == _digest(url)
            and _can_be_sent(validator)
            and 1 < nbytes <= (length(total) or 0)
        ):
            nbytes = min(nbytes, total - 1)  # so that there is something to request
            os.ftruncate(part.fd, nbytes)
            return _Partial(nbytes, _sha256(part.fd), validator, total)
    return _Partial()


def _continues(answer: Answer, partial: _Partial) -> bool:
    """Return whether an answer holds exactly the rest of the same file."""
    validator = answer.header("ETag" if partial.validator.startswith('"') else "Last-Modified")
    rest = Range(partial.nbytes, partial.total, partial.total)
    return answer.range == rest and validator in ("", partial.validator)


def _begun(part: Part, url: str, answer: Answer) -> bool:
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


def _sha256(file_or_path: int | str) -> _Hash:
    with open(file_or_path, "rb", closefd=isinstance(file_or_path, str)) as file:
        file.seek(0)
        return hashlib.file_digest(file, "sha256")


def _taken(job: _Job, target: Target, part: Part, answer: Answer, partial: _Partial) -> Downloaded:
    """Write a body to the end of the part, and check the file that this makes."""
    done, digest = partial.nbytes, partial.sha256
    total = partial.total or answer.nbytes
    stream = answer.chunks()
    head = b""
    while len(head) < http.HEAD and (data := next(stream, b"")):
        head += data
    if not done:
        http.refuse_page(job.url, answer, head, answer.nbytes)
    limit = _room(job, target, total, done)
    resumable = bool(done) or (job.resumable and _begun(part, job.url, answer))
    show = job.progress or (lambda done, total: None)
    show(done, total)
    for data in chain([head], stream):
        if done + len(data) > limit:
            part.kept = False
            if total is None and limit < job.client.limits.nbytes:
                what = f"the server states no length, and {readable(limit)} that came are half"
                raise NoSpace(
                    f"{shown(job.url)}: {what} of the free space of {os.path.dirname(target.path)}",
                    hint="choose a folder with more room: -o DIR, or TMPDIR for what is only read",
                )
            what = f": the body does not end after {limit} bytes; nothing was kept"
            raise http.failed(job.url, what, "look for another link")
        digest.update(data)
        fileio.write_at(part.fd, data, done)
        done += len(data)
        part.kept = resumable and done > 1
        show(done, total)
    if total is not None and done < total:
        what = f": the body ended after {done} of {total} bytes"
        raise http.failed(job.url, what, "run it again")
    return _checked(job, part, done, digest.hexdigest(), partial.nbytes)


def _checked(job: _Job, part: Part, nbytes: int, sha256: str, start: int) -> Downloaded:
    if not job.fits(sha256):
        part.kept = False
        hint = "run it again, from the start" if start else "check the link"
        if job.checked == "hash in the name":
            hint += "; if the name holds no hash, --sha256 says what to expect"
        message = f"{shown(job.url)} is another file than expected; nothing was kept"
        raise job.mismatch(message, sha256, hint)
    return Downloaded(shown(job.url), job.path, nbytes, sha256, start, False, job.checked)


def _room(job: _Job, target: Target, total: int | None, start: int) -> int:
    """Return how many bytes may come: those announced, or half of what the disk can take."""
    if total is not None:
        publish.refuse_full(target, total - start)
        return total
    free = publish.free_space(target)
    return job.client.limits.nbytes if free is None else min(job.client.limits.nbytes, free // 2)
