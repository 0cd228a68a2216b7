"""What `check` says of a file: is it whole, and would it run code when it is loaded.

The strict reader judges the structure, recorded checksums the bytes, names the danger; nothing is
loaded, and what was not looked at is said. Where the reader gives up inside a pickle, the names
that stood before are judged all the same: whatever loads the file elsewhere gets as far.

A `FormatError` becomes a status here, so that one file does not end the check of many. Damaged is
what breaks the rules of its container, and, where that was asked, what holds NaN or infinity, or
numbers beyond those of a dtype: no status is its own, and the answer to "can this be used" is no.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import field, replace
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import (
    FormatError,
    Malformed,
    NoSuchFile,
    NotACheckpoint,
    PermissionDenied,
    PluginFailed,
    TooCostly,
    Unreadable,
    Unsupported,
)
from ckptool.files import budget, fileio, paths, sites
from ckptool.files.copying import Begin, Progress, no_progress, run_jobs
from ckptool.files.fileio import CHUNK, Reader
from ckptool.files.filename import hash_in
from ckptool.files.jobs import Copy
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.pickles.safety import Call, Verdict
from ckptool.pickles.tree import Global, Object
from ckptool.records import dataclass
from ckptool.state import casting, checkpoint as places, walk
from ckptool.state.casting import Casting
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.parts import Part
from ckptool.tensors.counts import Tally
from ckptool.text import argument, at_most, counted, listed, parse_size, readable
from ckptool.verbs import indices
from ckptool.verbs.casting import Cast, losses, of_checkpoint
from ckptool.verbs.checked import BYTES_UNSEEN, Checked, Status
from ckptool.verbs.finite import floating, not_finite
from ckptool.verbs.ledger import unused_nbytes

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

MAX_CALLS = 100  # dangerous calls that are listed
SHOWN = 3  # problems in a line
NOTHING_LOST = "no value would become infinite, zero or subnormal"
MAX_LINES = 40  # tensors of which a cast would lose values


@dataclass(slots=True)
class _Findings:
    """What is gathered on the way."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    not_checked: list[str] = field(default_factory=list)
    not_finite: tuple[tuple[str, Tally], ...] = ()
    cast: Cast | None = None
    part: Part | None = None
    sha256: str = ""
    answers: list[str] = field(default_factory=list)
    asked_sha256: str = ""
    checksums: str = ""
    too_large: str = ""


@budget.run(anew=True)
def check(
    path: str | Path,
    *,
    sha256: bool = False,
    finite: bool = False,
    as_dtype: str | None = None,
    max_size: int | str | None = None,
    strict: bool = False,
    plugins: bool = False,
    alone: bool = True,
    progress: Begin = no_progress,
) -> Checked:
    """Check whether a file is whole, and whether loading it elsewhere would run code.

    `sha256` hashes the file, which is done anyway where its name holds the start of one; `finite`
    counts NaN and infinity, `as_dtype` what a cast to a dtype would make infinite, zero or
    subnormal; more than `max_size` (bytes, or a text: `100MiB`) is too large, `strict` calls
    foreign names and the code of TorchScript unsafe too, `plugins` lets installed ones read what
    no container of ckptool is. A file of a set that ranks wrote is checked `alone`, or the set
    with it; a folder is its set. Raises nothing for what a file holds: its `status` says that.

    >>> ckptool.check("model_best.pth.tar").status
    <Status.OK: 'ok'>
    """
    file = path = sites.of(path)
    found = _Findings()
    target = None if as_dtype is None else casting.target(as_dtype)
    most = None if max_size is None else parse_size(str(max_size), "--max-size 100MiB")
    said = hash_in(paths.name_of(path))
    with suppress(FormatError):  # its reader says why
        file = fileio.opened(path)  # once for all that is asked of it
    try:
        checkpoint = containers.read(file, plugins=plugins, alone=alone)
    except FormatError as error:
        if sha256 or said:
            _hash(file, said, sha256, found, progress)
        return _unreadable(file, error, found, strict=strict)
    hashed = bool(sha256 or said)
    cast = None if target is None else of_checkpoint(checkpoint, target)
    step = progress(_work(checkpoint, cast, finite=finite, hashed=hashed))
    if most is not None and checkpoint.nbytes > most:
        found.too_large = f"more than {readable(most)}"
    _structure(checkpoint, found)
    _checksums(checkpoint, found, step)
    if finite:
        with _noting(Malformed, checkpoint, found):
            _floats(checkpoint, found, step)
    else:
        found.not_checked.append("NaN and infinity (--finite looks for them)")
    if cast is not None:
        with _noting(Malformed, checkpoint, found):
            _losses(cast, found, step)
    if hashed:
        _hash(file, said, sha256, found, lambda total: step)
    with _noting(Malformed, checkpoint, found):
        for each, _ in checkpoint.files:
            fileio.refuse_changed(each)
    return _result(path, checkpoint, found, strict=strict)


def _work(checkpoint: Checkpoint, cast: Casting | None, *, finite: bool, hashed: bool) -> int:
    """Count the bytes that will be read, for a progress bar."""
    summed = sum(each.nbytes for each in checkpoint.records.values() if each.crc32 is not None)
    floats = sum(info.nbytes for _, info in floating(checkpoint.tree)) if finite else 0
    rounded = sum(before.nbytes for before, _ in cast.tensors.values()) if cast else 0
    return summed + floats + rounded + (checkpoint.nbytes if hashed else 0)


@contextmanager
def _noting(kind: type[FormatError], checkpoint: Checkpoint, found: _Findings) -> Iterator[None]:
    """Note what is raised as a problem, once."""
    try:
        yield
    except kind as error:
        said = _without_path(error, checkpoint.path)
        found.problems += [said] if said not in found.problems else []


def _structure(checkpoint: Checkpoint, found: _Findings) -> None:
    """Check what the reader lets pass."""
    found.checked.append("structure")
    found.notes += checkpoint.notes
    found.problems += checkpoint.flaws
    with _noting(FormatError, checkpoint, found):
        part = places.part_of(checkpoint, None)  # refuses modules without end
        repeated = places.repeated_keys(checkpoint)
        if beyond := indices.outside(checkpoint):
            found.problems.append(f"indices outside of sparse tensors: {listed(beyond)}")
        found.part = part
        found.notes += [f"the key {key} appears twice; the last one counts" for key in repeated]
    if checkpoint.unread and not checkpoint.program:
        size = readable(checkpoint.unread_nbytes)
        found.notes.append(f"nothing in it refers to {listed(checkpoint.unread)} ({size})")
    unused = unused_nbytes(checkpoint.tree)
    if unused:
        found.notes.append(f"{readable(unused)} of its storages is used by no tensor")
    if checkpoint.unlisted:
        found.notes.append(
            f"{readable(checkpoint.unlisted)} of the file are outside of all its records"
        )


def _checksums(checkpoint: Checkpoint, found: _Findings, step: Progress) -> None:
    """Compare every record with its checksum, those that nothing refers to as well."""
    recorded = {
        name: storage for name, storage in checkpoint.records.items() if storage.crc32 is not None
    }
    if not recorded:
        title = containers.by_name(checkpoint.container).title
        why = f"the writer of this {title} file recorded none"
        if not checkpoint.records:
            why = f"{title} files have no checksums"
        found.checksums = "no checksums recorded"
        found.not_checked.append(f"{BYTES_UNSEEN} ({why})")
        return
    silent = sum(s.crc32 is None and s.nbytes > 0 for s in checkpoint.records.values())
    if silent:
        why = (
            f"no checksums recorded for {counted(silent, 'record')}: torch.serialization.skip_data"
        )
        found.not_checked.append(f"{BYTES_UNSEEN} ({why})")
    # Without their checksums, so that the first wrong one does not hide the others.
    jobs = [
        Copy(replace(storage, key=name, crc32=None), None) for name, storage in recorded.items()
    ]
    with _noting(Malformed, checkpoint, found):
        done = run_jobs(jobs, None, step)
        for (name, storage), read in zip(recorded.items(), done, strict=True):
            if read.crc32 != storage.crc32:
                sums = f"CRC-32 recorded {storage.crc32:08x}, found {read.crc32:08x}"
                found.problems.append(f"record {name} does not match its checksum ({sums})")
        found.checksums = f"{counted(len(jobs), 'checksum')} match"
        found.checked.append(counted(len(jobs), "checksum"))


def _floats(checkpoint: Checkpoint, found: _Findings, step: Progress) -> None:
    """Count NaN and infinity."""
    held, skipped = not_finite(checkpoint, step)
    found.checked.append("NaN and infinity")
    found.not_finite = tuple(held.items())
    if held:
        rows = (f"{path} ({_counts(here)})" for path, here in held.items())
        tensors = f"{counted(len(held), 'tensor')} {'hold' if len(held) > 1 else 'holds'}"
        found.problems.append(f"{tensors} NaN or infinity: {listed(rows, SHOWN)}")
    if skipped:
        what = "NaN and infinity in views that overlap many times over"
        found.not_checked.append(f"{what}: {listed(skipped)}")


def _losses(cast: Casting, found: _Findings, step: Progress) -> None:
    """Count what a cast would make infinite, zero or subnormal."""
    found.cast = losses(cast, step)
    label = cast.target.label
    found.checked.append(f"what a cast to {label} loses")
    if found.cast.skipped:
        what = f"a cast to {label} of views that overlap many times over"
        found.not_checked.append(f"{what}: {listed(found.cast.skipped)}")
    said = found.problems if found.cast.overflows else found.answers
    said.append(f"as {label}, {found.cast.lost('would become') or NOTHING_LOST}")
    found.notes += at_most(found.cast.lines(), MAX_LINES, " (--json lists them)")


def _counts(here: Tally) -> str:
    parts = [f"{here.nan} NaN" if here.nan else "", f"{here.inf} infinite" if here.inf else ""]
    return ", ".join(filter(None, parts))


def _hash(path: str, said: str | None, asked: bool, found: _Findings, progress: Begin) -> None:
    """Hash the file, and compare that with what its name says."""
    from hashlib import sha256

    digest = sha256()
    try:
        with Reader(path) as reader:
            step = progress(reader.nbytes)
            for start in range(0, reader.nbytes, CHUNK):
                data = reader.read(start, min(CHUNK, reader.nbytes - start))
                digest.update(data)
                step(len(data))
    except (Malformed, NotACheckpoint, NoSuchFile, PermissionDenied):
        return  # the reader of the format says so, too
    found.sha256 = digest.hexdigest()
    found.asked_sha256 = f"sha256 {found.sha256}" if asked else ""
    found.checked.append("sha256")
    if said and found.sha256.startswith(said):
        found.notes.append(f"its sha256 starts with {said}, as its name says")
    elif said:
        found.notes.append(f"its sha256 does not start with {said}, as its name says")


# What it comes to.


def _result(path: str, checkpoint: Checkpoint, found: _Findings, *, strict: bool) -> Checked:
    verdict = safety.judge_file(checkpoint)
    calls = safety.evidence(verdict, checkpoint.calls, checkpoint.tree, MAX_CALLS)
    found.checked.append("names")
    if verdict.foreign:
        found.not_checked.append("third-party classes")
    program = f"holds the code of a {checkpoint.program}" if checkpoint.program else ""
    if program:
        found.not_checked.append("what the code of a TorchScript module does")
    part = f"only {found.part.text}" if found.part else ""
    problems = "; ".join(at_most(found.problems, SHOWN))
    if _unsafe(verdict, strict) or (strict and program):
        status, parts = Status.UNSAFE, [_danger(verdict, calls), program, part]
        parts += [f"damaged: {problems}", found.too_large] if problems else [found.too_large]
    elif problems:
        status, parts = Status.DAMAGED, [problems, part, found.too_large]
    else:
        status = Status.TOO_LARGE if found.too_large else Status.OK
        parts = [found.too_large, part, _summary(checkpoint), found.checksums, program]
        parts += [_foreign(verdict), listed(verdict.versions, 2), *found.answers]
    return _judged(
        path,
        status,
        parts,
        verdict,
        calls,
        found,
        container=checkpoint.container,
        safety=verdict.word(checkpoint.program),
        pickle_name=checkpoint.pickle_name,
    )


def _judged(
    path: str,
    status: Status,
    parts: Sequence[str],
    verdict: Verdict,
    calls: Sequence[Call],
    found: _Findings,
    **others: str,
) -> Checked:
    """Return what was found, and what its names would do."""
    return Checked(
        file=path,
        status=status,
        detail="; ".join(filter(None, [*parts, found.asked_sha256])),
        imports=verdict.imports,
        versions=verdict.versions,
        globals=tuple(map(str, [*verdict.dangerous, *verdict.foreign])),
        calls=tuple(calls),
        sha256=found.sha256,
        not_finite=found.not_finite,
        cast=found.cast,
        part=found.part,
        notes=tuple(found.notes),
        checked=tuple(found.checked),
        not_checked=tuple(found.not_checked),
        **others,
    )


def _unreadable(file: str, error: FormatError, found: _Findings, *, strict: bool) -> Checked:
    """Judge what the reader gave up on by what it had read before."""
    path, named, called = str(file), error.named, error.calls
    if isinstance(error, NotACheckpoint):
        named, called = _of_no_checkpoint(error)
    verdict = safety.judge(named, called)
    calls = safety.evidence(verdict, called, None, MAX_CALLS)
    status = _STATUS.get(type(error), Status.DAMAGED)
    detail = _without_path(error, path)
    if _unsafe(verdict, strict):
        detail = f"{_danger(verdict, calls)}; {status.value}: {detail}"
        status = Status.UNSAFE
    found.notes += error.evidence
    hint = f"ckptool check {error.option} {argument(path)}" if error.option else error.hint
    absent = isinstance(error, NoSuchFile) and not error.hint
    if status is not Status.NOT_A_CHECKPOINT:
        found.not_checked.append("the rest of the damaged file")
    return _judged(
        path,
        status,
        [detail],
        verdict,
        calls,
        found,
        safety=verdict.word("") if named else "",
        pickle_name="the pickle",
        hint=fileio.spelled_like(path) if absent else hint,
    )


def _of_no_checkpoint(error: FormatError) -> tuple[dict[Global, int], list[Object]]:
    """Return what is dangerous in a pickle of no container; a text may look like one."""
    wanted = {
        name: offset
        for name, offset in safety.judge(error.named, error.calls).dangerous.items()
        if all(step.isidentifier() for step in f"{name}".split("."))
    }
    return wanted, error.calls if wanted else []


_STATUS = {
    NotACheckpoint: Status.NOT_A_CHECKPOINT,
    NoSuchFile: Status.NOT_A_CHECKPOINT,
    Unsupported: Status.UNSUPPORTED,
    PluginFailed: Status.UNSUPPORTED,
    PermissionDenied: Status.UNSUPPORTED,
    TooCostly: Status.UNSUPPORTED,
    Unreadable: Status.UNSUPPORTED,
}


def _unsafe(verdict: Verdict, strict: bool) -> bool:
    return verdict.level is Level.DANGEROUS or (strict and verdict.level is Level.FOREIGN)


def _danger(verdict: Verdict, calls: Sequence[Call]) -> str:
    if not calls:  # strict: there are none but foreign ones
        return _foreign(verdict)
    first = calls[0]
    what = "run" if first.arguments is not None else "import"
    more = f" and {len(calls) - 1} more" if len(calls) > 1 else ""
    return f"would {what} {first.text}{more} when loaded"


def _foreign(verdict: Verdict) -> str:
    return f"foreign names: {listed(map(str, verdict.foreign), SHOWN)}" if verdict.foreign else ""


def _summary(checkpoint: Checkpoint) -> str:
    count = sum(1 for _ in walk.tensors(checkpoint.tree))
    title = containers.by_name(checkpoint.container).title
    return f"{title}, {readable(checkpoint.nbytes)}, {counted(count, 'tensor')}"


def _without_path(error: FormatError, path: str) -> str:
    """Take the name of the file off the front of a message that will be beside it."""
    message = error.message
    if not message.startswith(path):
        return message
    rest = message.removeprefix(path)
    place = re.match(r" \(([^)]*)\): ", rest)
    return f"{place[1]}: {rest[place.end() :]}" if place else re.sub("^(: | is | )", "", rest)
