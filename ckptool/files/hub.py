"""Download a file: resumed, checked, published whole or not at all.

Bytes go to `NAME.part` beside the target, which is locked while it grows, and become the target
by one link or rename once their length and hash are right.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

from ckptool.errors import BadInput, DownloadFailed, HashMismatch, NoSpace, OutputExists, WriteError
from ckptool.files import body, filehash, fileio, filename, http, parts, publish, resume
from ckptool.files.http import Answer, Limits, shown
from ckptool.files.parts import Part
from ckptool.files.publish import Target
from ckptool.files.resume import Begun

CHUNK = 1 << 17
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

    def to_dict(self) -> dict[str, object]:
        """Return the document `download/1`."""
        fields = {key: value for key, value in asdict(self).items() if key != "warnings"}
        return {"schema": "download/1", **fields}


@dataclass(frozen=True, slots=True)
class Expected:
    """What the sha256 of a file must start with, all of them, and who says so."""

    prefixes: tuple[str, ...] = ()
    checked: str = NOTHING

    def fits(self, sha256: str) -> bool:
        """Tell whether a sha256 is the one expected."""
        return all(sha256.startswith(prefix) for prefix in self.prefixes)


@dataclass(frozen=True, slots=True)
class _Job:
    url: str
    path: str
    expected: Expected
    force: bool
    sync: bool
    progress: Progress
    limits: Limits


def download(
    url: str,
    target: str | Path = ".",
    *,
    sha256: str | None = None,
    expected_prefix: str | None = None,
    force: bool = False,
    sync: bool = True,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Downloaded:
    """Download a URL into a folder or to a file, and check it.

    A file that is there already is checked and left alone; `force` replaces one that is not what
    is expected. `expected_prefix` is the start of a sha256 that binds, as torchvision's registry
    knows it; without it, a hash in the URL's file name binds unless `sha256` is given. Raises
    `DownloadFailed`, `HashMismatch`, `OutputExists`, `NoSpace` or `WriteError`.
    """
    http.parsed(url)
    limits = limits or Limits()
    with _folder(target) as folder:
        name = filename.of_url(url) or (_served_name(url, limits) if folder else "")
        path = os.path.join(folder, name) if folder else os.fspath(target)
        expected = expectation(name, sha256, expected_prefix)
        job = _Job(url, path, expected, force, sync, progress or _silent, limits)
        return _already_there(job) or _fetched(job)


@contextmanager
def temporary(
    url: str,
    *,
    folder: str | None = None,
    progress: Progress | None = None,
    limits: Limits | None = None,
) -> Iterator[Downloaded]:
    """Download to a temporary folder, gone when the block ends; `folder` is where to make it."""
    with tempfile.TemporaryDirectory(prefix="ckptool-", dir=folder) as place:
        yield download(url, place, sync=False, progress=progress, limits=limits)


def is_url(text: str) -> bool:
    """Tell whether an argument is a web address and not a path."""
    return re.match(r"https?://", text, re.IGNORECASE) is not None


def expectation(name: str, sha256: str | None, registry: str | None) -> Expected:
    """Say what a file must be: a registry's hash always binds, a name's unless one is given."""
    given = (_full_hash(sha256),) if sha256 is not None else ()
    if registry is not None:
        return Expected((registry.lower(), *given), "sha256 given" if given else "registry")
    if given:
        return Expected(given, "sha256 given")
    found = filehash.hash_in(name)
    return Expected((found,), "hash in the name") if found else Expected()


def _full_hash(text: str) -> str:
    digits = text.strip().lower().removeprefix("sha256:")
    if not re.fullmatch(r"[0-9a-f]{64}", digits):
        raise BadInput("a sha256 has 64 hexadecimal digits", hint="sha256sum FILE prints one")
    return digits


def _silent(done: int, total: int | None) -> None:
    """Show no progress."""


@contextmanager
def _folder(target: str | Path) -> Iterator[str]:
    """Give the folder to download into, made where it ends in a slash; empty for a file."""
    text = os.fspath(target)
    if os.path.isdir(text):
        yield text
        return
    if not text.endswith(("/", os.sep)):
        yield ""
        return
    try:
        os.makedirs(text)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise WriteError(f"the folder {text} cannot be made: {reason}") from error
    try:
        yield text
    except BaseException:
        with suppress(OSError):  # a part is in it
            os.rmdir(text)
        raise


def _served_name(url: str, limits: Limits) -> str:
    """Ask the server for a file name where the URL has none."""
    with http.asked(url, {}, limits) as answer:
        http.refuse_status(url, answer)
        name = filename.of_disposition(answer.header("Content-Disposition"))
        name = name or filename.of_url(answer.url)
    if not name:
        raise DownloadFailed(
            f"{shown(url)}: neither the URL nor the server names the file",
            hint="name it yourself: -o FILE",
        )
    return name


def _already_there(job: _Job) -> Downloaded | None:
    """Look at a file that is there: the one expected, another (an error), or to be replaced."""
    if not os.path.isfile(job.path) or (job.force and not job.expected.prefixes):
        return None
    if not job.expected.prefixes and os.path.getsize(job.path) != _served_nbytes(job):
        raise OutputExists(
            f"{job.path} exists, in another size than the server's, and no hash is known",
            hint="--force replaces it, -o names another output",
        )
    nbytes = os.path.getsize(job.path)
    sha256 = resume.hash_of(job.path, nbytes).hexdigest()
    if job.expected.fits(sha256):
        checked = job.expected.checked if job.expected.prefixes else "size"
        return Downloaded(shown(job.url), job.path, nbytes, sha256, 0, True, checked)
    if job.force:
        return None
    raise HashMismatch(
        f"{job.path} is there already and is another file than expected; it was left alone",
        evidence=_both(job.expected, sha256),
        hint="--force replaces it, -o names another output",
    )


def _both(expected: Expected, sha256: str) -> list[str]:
    wanted = max(expected.prefixes, key=len)
    return [f"sha256 expected  {wanted}   ({expected.checked})", f"sha256 found     {sha256}"]


def _served_nbytes(job: _Job) -> int | None:
    with http.asked(job.url, {}, job.limits) as answer:
        http.refuse_status(job.url, answer)
        return answer.nbytes


def _fetched(job: _Job) -> Downloaded:
    target = publish.refuse_target(job.path, (), force=job.force, sync=job.sync)
    folder, name = os.path.split(target.path)
    path = os.path.join(folder, filename.of_part(name))
    with parts.part_output(path, target) as part:
        if part is None:
            raise DownloadFailed(
                f"another process downloads {job.path}", hint="wait for it, or use another -o"
            )
        try:
            publish.refuse_target(job.path, (), force=job.force, sync=job.sync)
            done = _grown(job, target, part)
        except (DownloadFailed, KeyboardInterrupt) as error:
            _tell_kept(error, part)
            raise
    return replace(done, warnings=tuple(part.warnings))


def _tell_kept(error: DownloadFailed | KeyboardInterrupt, part: Part) -> None:
    """Say what a later run will go on with: in the hint, or as a note of an interruption."""
    if not part.kept:
        return
    kept = f"{os.fstat(part.fd).st_size} bytes are kept in {part.path}"
    if isinstance(error, DownloadFailed):
        error.hint = f"{error.hint or 'run it again'}; {kept}"
    else:
        error.add_note(f"{kept}; run it again to go on")


def _grown(job: _Job, target: Target, part: Part) -> Downloaded:
    """Ask for what is missing, and for all of it where the answer does not go on."""
    begun = resume.begun(part, job.url)
    part.kept = begun.nbytes > 0
    if begun.record is not None:
        headers = {"Range": f"bytes={begun.nbytes}-", "If-Range": begun.record.validator}
        with http.asked(job.url, headers, job.limits) as answer:
            if resume.goes_on(answer, begun.record, begun.nbytes):
                return _taken(job, target, part, answer, begun)
            if answer.status not in (206, 416):
                return _taken(job, target, part, answer, resume.anew())
    with http.asked(job.url, {}, job.limits) as answer:
        return _taken(job, target, part, answer, resume.anew())


def _taken(job: _Job, target: Target, part: Part, answer: Answer, begun: Begun) -> Downloaded:
    """Take a body to the end of the part, and check what has become of it."""
    start, found = begun.nbytes, begun.hash
    http.refuse_status(job.url, answer)
    body.refuse_encoding(job.url, answer)
    if start == 0 and answer.status != 200:
        raise DownloadFailed(f"{shown(job.url)}: the server sends a part where all was asked for")
    total = answer.nbytes if begun.record is None else begun.record.total
    stream = answer.body.stream(CHUNK, decode_content=False)
    head = body.head(stream)
    if start == 0:
        body.refuse_page(job.url, answer, head)
    limit = _room(job, target, total, start)
    worth_keeping = resume.note(part, job.url, answer, begun, total)
    done = start
    job.progress(done, total)
    for data in chain([head], stream):
        done += len(data)
        if done > limit:
            part.kept = False
            raise _endless(job, target, total, limit)
        found.update(data)
        fileio.write_at(part.fd, data, done - len(data))
        part.kept = worth_keeping and done > 1
        job.progress(done, total)
    if total is not None and done < total:
        raise DownloadFailed(
            f"{shown(job.url)}: the body ended after {done} of {total} bytes", hint="run it again"
        )
    return _checked(job, part, done, found.hexdigest(), start)


def _checked(job: _Job, part: Part, nbytes: int, sha256: str, start: int) -> Downloaded:
    if not job.expected.fits(sha256):
        part.kept = False
        hint = "run it again, from the start" if start else "check the link"
        if job.expected.checked == "hash in the name":
            hint += "; if the name holds no hash, --sha256 says what to expect"
        raise HashMismatch(
            f"{shown(job.url)} is another file than expected; nothing was kept",
            evidence=_both(job.expected, sha256),
            hint=hint,
        )
    return Downloaded(shown(job.url), job.path, nbytes, sha256, start, False, job.expected.checked)


def _room(job: _Job, target: Target, total: int | None, start: int) -> int:
    """Say how many bytes may come: those declared, or what the disk can well take."""
    if total is not None:
        publish.refuse_full(target, total - start)
        return total
    free = publish.free_space(target)
    return job.limits.nbytes if free is None else min(job.limits.nbytes, free // 10 * 9)


def _endless(job: _Job, target: Target, total: int | None, limit: int) -> Exception:
    if total is None and limit < job.limits.nbytes:
        return NoSpace(f"{target.path} does not fit: {limit} bytes came, and more would")
    return DownloadFailed(
        f"{shown(job.url)}: the body does not end after {limit} bytes; nothing was kept",
        hint="look for another link",
    )
