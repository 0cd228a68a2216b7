"""Bytes on disk: reads, copies with checksums, deflated storages, and atomic output."""

from __future__ import annotations

import errno
import itertools
import os
import random
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import listing
from hypothesis import given, strategies as st

from ckptool.errors import (
    Malformed,
    NoSpace,
    NoSuchFile,
    NotACheckpoint,
    OutputExists,
    SameFile,
    WriteError,
)
from ckptool.files import copying, jobs as module
from ckptool.files.copying import NOTHING, Done, Moved, PlannedFile, run_jobs
from ckptool.files.fileio import CHUNK, OpenFile, Reader, Readers, unpacked
from ckptool.files.jobs import Copy
from ckptool.files.publish import (
    Output,
    Target,
    free_space,
    publish,
    refuse_full,
    refuse_target,
)
from ckptool.files.writing import write_file
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Computed, Packing, Storage
from ckptool.tensors.values import literal

DATA = random.Random(7).randbytes(3 * CHUNK + 12345)  # of several chunks, the last one short


def quiet(nbytes: int) -> None:
    """Count nothing."""


@pytest.fixture
def stored(tmp_path: Path) -> Storage:
    """Give a storage in a file, with bytes before and after it."""
    path = tmp_path / "stored"
    path.write_bytes(b"before" + DATA + b"after")
    return Storage(str(path), "0", 6, len(DATA), crc32=zlib.crc32(DATA))


def deflated(path: Path, data: bytes, nbytes: int | None = None) -> Storage:
    packer = zlib.compressobj(wbits=-15)
    packed = packer.compress(data) + packer.flush()
    path.write_bytes(b"before" + packed + b"after")
    return Storage(
        str(path), "0", 6, len(data) if nbytes is None else nbytes, crc32=zlib.crc32(data),
        packing=Packing.DEFLATED, packed_nbytes=len(packed),
    )  # fmt: skip


@pytest.fixture
def packed(tmp_path: Path) -> Storage:
    return deflated(tmp_path / "packed", DATA)


@pytest.fixture
def output(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def written(tmp_path: Path) -> bytes:
    return (tmp_path / "output").read_bytes()


# Reading.


def test_reads_are_positioned(stored: Storage) -> None:
    with Reader(stored.path) as reader:
        assert reader.nbytes == len(DATA) + 11
        assert reader.read(0, 6) == b"before"
        assert reader.read(6, 0) == b""
        assert reader.read(reader.nbytes - 5, 5) == b"after"
        assert reader.read(6, len(DATA)) == DATA


@pytest.mark.parametrize(
    ("start", "nbytes"), [(0, 12), (11, 1), (12, 0), (1 << 62, 1), (5, 1 << 62)]
)
def test_reading_past_the_end_is_refused_before_memory_is_taken(
    tmp_path: Path, start: int, nbytes: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"01234567890")
    with Reader(path) as reader, pytest.raises(Malformed, match="ends too early") as caught:
        reader.read(start, nbytes)
    assert caught.value.offset == 11


def test_a_file_that_becomes_shorter_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"01234567890")
    with Reader(path) as reader:
        os.truncate(path, 4)
        with pytest.raises(Malformed, match="became shorter"):
            reader.read(0, 11)
        with pytest.raises(Malformed, match="was changed"):
            reader.refuse_change()


def test_a_disk_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    path = tmp_path / "file"
    path.write_bytes(b"0123")
    monkeypatch.setattr(os, "preadv", broken)
    with Reader(path) as reader, pytest.raises(Malformed, match="input/output error") as caught:
        reader.read(2, 2)
    assert str(path) in caught.value.message
    assert caught.value.offset == 2


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    with pytest.raises(NotACheckpoint, match="is a folder"):
        Reader(tmp_path)
    with pytest.raises(NoSuchFile, match="does not exist"):
        Reader(tmp_path / "missing")
    with pytest.raises(NoSuchFile, match="cannot be opened"):
        Reader("nul\0byte")


# Copying.


@pytest.mark.parametrize(
    ("start", "nbytes"),
    [(0, len(DATA)), (0, 1), (1, 2), (CHUNK - 1, 2), (CHUNK, CHUNK), (5, 2 * CHUNK), (7, 0)],
)
@pytest.mark.parametrize("kind", ["stored", "packed"])
def test_ranges_are_copied(
    request: pytest.FixtureRequest, tmp_path: Path, output: int, kind: str, start: int, nbytes: int
) -> None:
    storage = request.getfixturevalue(kind)
    counted: list[int] = []
    done = run_jobs([Copy(storage, 10, start, nbytes)], output, counted.append)
    assert written(tmp_path)[10:] == DATA[start : start + nbytes]
    assert done == [(zlib.crc32(DATA[start : start + nbytes]), nbytes)]
    assert sum(counted) == nbytes


def test_a_copy_is_whole_unless_told_otherwise(stored: Storage) -> None:
    assert Copy(stored, 0).whole
    assert Copy(stored, 0, 5).nbytes == len(DATA) - 5
    assert not Copy(stored, 0, 5).whole


def test_many_jobs_in_any_order(
    tmp_path: Path, output: int, stored: Storage, packed: Storage
) -> None:
    pieces = [(index * 1000, 1000) for index in range(300)]
    jobs = [
        Copy(stored if index % 3 else packed, 300_000 - start, start, nbytes)
        for index, (start, nbytes) in enumerate(pieces)
    ]
    run_jobs(list(jobs), output, quiet)
    for start, nbytes in pieces:
        place = 300_000 - start
        assert written(tmp_path)[place : place + nbytes] == DATA[start : start + nbytes]


def computed(data: bytes) -> Storage:
    return literal(data, DType.U8, (len(data),), "made").storage


def test_computed_bytes_are_written_in_place(tmp_path: Path, output: int) -> None:
    run_jobs([Copy(computed(b"BEFORE!"), 3)], output, quiet)
    assert written(tmp_path) == b"\0\0\0BEFORE!"


@pytest.mark.parametrize("kind", ["stored", "packed"])
@pytest.mark.parametrize("target", [0, None], ids=["copied", "checked"])
def test_a_wrong_checksum_is_found(
    request: pytest.FixtureRequest, output: int, kind: str, target: int | None
) -> None:
    storage = replace(request.getfixturevalue(kind), crc32=1)
    with pytest.raises(Malformed, match="do not match their checksum") as caught:
        run_jobs([Copy(storage, target)], output, quiet)
    assert caught.value.evidence == (f"CRC-32 recorded 00000001, found {zlib.crc32(DATA):08x}",)
    assert storage.path in caught.value.message


def test_a_part_is_not_measured_against_the_checksum_of_all(output: int, stored: Storage) -> None:
    run_jobs([Copy(stored, 0, 0, 100)], output, quiet)
    run_jobs([Copy(replace(stored, crc32=None), 0)], output, quiet)


def test_checking_writes_nothing(tmp_path: Path, output: int, stored: Storage) -> None:
    run_jobs([Copy(stored, None)], output, quiet)
    assert written(tmp_path) == b""


def test_the_first_error_ends_all_jobs(tmp_path: Path, output: int, stored: Storage) -> None:
    missing = replace(stored, path=str(tmp_path / "missing"))
    with pytest.raises(NoSuchFile):
        run_jobs([Copy(missing, 0), *(Copy(stored, 0) for _ in range(50))], output, quiet)


def test_an_error_of_the_progress_is_raised(output: int, stored: Storage) -> None:
    def broken(nbytes: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_jobs([Copy(stored, 0)], output, broken)


# Every job answers for its bytes.


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)


@pytest.mark.parametrize(("cores", "far", "threads"), [(1, False, 0), (1, True, 1), (2, False, 1)])
def test_one_core_has_one_thread_but_for_files_far_away(
    output: int,
    stored: Storage,
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    far: bool,
    threads: int,
) -> None:
    started: list[object] = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {*range(cores)}, raising=False)
    monkeypatch.setattr(OpenFile, "far", far)
    monkeypatch.setattr(copying, "start_new_thread", lambda *_: started.append(1))
    run_jobs([Copy(replace(stored, path=OpenFile(stored.path)), 0)], output, quiet)
    assert len(started) == threads


def starved(where: str) -> Callable[[int], memoryview]:
    main = threading.get_ident()

    def allocate(nbytes: int) -> memoryview:
        if where == "all" or threading.get_ident() != main:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        return memoryview(bytearray(nbytes))

    return allocate


@pytest.mark.usefixtures("two_cores")
@pytest.mark.parametrize("where", ["all", "helpers"])
def test_workers_without_memory_end_the_run(
    output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.setattr(copying, "large_pages", starved(where))
    with pytest.raises(OSError, match="allocate memory"):
        run_jobs([Copy(stored, 0)] * 200, output, slowly)


def slowly(nbytes: int) -> None:
    time.sleep(0.001)  # so that the other thread comes to work


@pytest.mark.usefixtures("two_cores")
def test_a_thread_that_cannot_start_ends_the_run(
    output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(copying, "start_new_thread", refuse)
    with pytest.raises(MemoryError, match="can't start new thread"):
        run_jobs([Copy(stored, 0)], output, quiet)


def test_a_thread_that_never_gets_to_work_is_not_waited_for(
    tmp_path: Path, output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying, "start_new_thread", lambda *_: None)
    assert run_jobs([Copy(stored, 0)], output, quiet) == [(zlib.crc32(DATA), len(DATA))]
    assert written(tmp_path) == DATA


def test_bytes_that_nobody_moved_are_missed(
    output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = copying.tasks
    monkeypatch.setattr(module, "AT_ONCE", 1)
    monkeypatch.setattr(copying, "tasks", lambda *given: itertools.islice(real(*given), 2))
    with pytest.raises(RuntimeError, match=f"{2 * CHUNK} of {len(DATA)} bytes"):
        run_jobs([Copy(stored, 0)], output, quiet)


@pytest.mark.parametrize("nbytes", [6, 8])
def test_computed_bytes_are_as_many_as_planned(output: int, nbytes: int) -> None:
    def seven(out: memoryview, start: int) -> None:
        out[:] = b"1234567"

    storage = replace(computed(bytes(nbytes)), computed=Computed(seven, (), 1))
    with pytest.raises(ValueError, match="different structures"):
        run_jobs([Copy(storage, 3)], output, quiet)


@pytest.mark.parametrize("kind", ["stored", "packed", "computed"])
@pytest.mark.parametrize("fault", ["other bytes", "no bytes"])
def test_what_is_written_is_read_back(
    request: pytest.FixtureRequest, output: int, monkeypatch: pytest.MonkeyPatch,
    kind: str, fault: str,
) -> None:  # fmt: skip
    def wrong(target: int, data: memoryview, position: int) -> None:
        if fault == "other bytes":
            os.pwrite(target, bytes(len(data)), position)

    storage = computed(DATA) if kind == "computed" else request.getfixturevalue(kind)
    monkeypatch.setattr(copying, "write_at", wrong)
    with pytest.raises(OSError, match="what was written"):
        run_jobs([Copy(storage, 0)], output, quiet)


# Small copies are moved many at a time.


def small_copies(stored: Storage, count: int = 200) -> list[Copy]:
    return [Copy(stored, 7 + index * 90, index * 100, 64) for index in range(count)]


def small_parts(jobs: Sequence[Copy]) -> list[bytes]:
    return [DATA[job.start : job.start + job.nbytes] for job in jobs]


def test_small_copies_are_written_at_once(
    tmp_path: Path, output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[int] = []
    counted: list[int] = []
    real = copying.write_at

    def write(target: int, data: memoryview, position: int) -> None:
        writes.append(position)
        real(target, data, position)

    monkeypatch.setattr(copying, "write_at", write)
    jobs = small_copies(stored)
    done = run_jobs(jobs, output, counted.append)
    assert writes == [7]
    assert done == [(zlib.crc32(part), 64) for part in small_parts(jobs)]
    assert sum(counted) == 200 * 64
    assert written(tmp_path) == bytes(7) + bytes(26).join(small_parts(jobs))


def test_small_copies_leave_alone_what_others_write_between_them(
    tmp_path: Path, output: int, stored: Storage
) -> None:
    jobs = small_copies(stored)
    run_jobs([*jobs[::2], *jobs[1::2]], output, quiet)
    assert written(tmp_path) == bytes(7) + bytes(26).join(small_parts(jobs))


def test_what_is_known_beforehand_may_be_between_small_copies(
    tmp_path: Path, output: int, stored: Storage
) -> None:
    jobs = small_copies(stored, 2)
    write_file(output, PlannedFile("", 161, [(75, b"between")], jobs), quiet)
    first, second = small_parts(jobs)
    assert written(tmp_path) == bytes(7) + first + bytes(4) + b"between" + bytes(15) + second


@pytest.mark.parametrize("fault", ["a bit", "all"])
def test_each_small_copy_is_read_back(
    output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def wrong(target: int, data: memoryview, position: int) -> None:
        if fault == "all":
            os.pwrite(target, bytes(len(data)), position)
        else:
            os.pwrite(target, data, position)
            os.pwrite(target, bytes((data[9000] ^ 1,)), position + 9000)  # the first of a copy

    monkeypatch.setattr(copying, "write_at", wrong)
    with pytest.raises(OSError, match="what was written"):
        run_jobs(small_copies(stored), output, quiet)


@pytest.mark.parametrize("target", [True, False], ids=["copied", "checked"])
def test_a_wrong_checksum_is_found_among_small_copies(
    output: int, stored: Storage, target: bool
) -> None:
    places = [at * 64 if target else None for at in range(100)]
    storages = [
        replace(stored, key=str(at), start=6 + at * 64, nbytes=64, crc32=zlib.crc32(part))
        for at, part in enumerate(small_parts([Copy(stored, 0, at * 64, 64) for at in range(100)]))
    ]
    run_jobs([*map(Copy, storages, places)], output, quiet)
    storages[50] = replace(storages[50], crc32=1)
    with pytest.raises(Malformed, match="storage 50 do not match their checksum"):
        run_jobs([*map(Copy, storages, places)], output, quiet)


def test_small_copies_that_nobody_moved_are_missed(
    output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copying._Run, "_copy", lambda *_: 0)
    with pytest.raises(RuntimeError, match="0 of 64 bytes"):
        run_jobs(small_copies(stored), output, quiet)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("reading", [False, True], ids=["written", "read"])
def test_parts_of_several_files_make_one_output(
    tmp_path: Path, output: int, seed: int, reading: bool
) -> None:
    """Of any length, in any order where they are read, with gaps between them in the output."""
    random_ = random.Random(seed)
    for name in "ab":
        (tmp_path / name).write_bytes(DATA if name == "a" else DATA[::-1])
    jobs, sums, expected = list[Copy](), list[Done](), bytearray()
    near = 0
    for number in range(60):
        nbytes = random_.choice([0, 1, 64, 4000, module.SMALL, module.SMALL + 1, CHUNK + 77])
        name, gap = random_.choice("ab"), random_.choice([0, 0, 5, 64, module.NEAR + 1])
        start = near if random_.random() < 0.5 else random_.randrange(len(DATA) - nbytes)
        start = min(start, len(DATA) - nbytes)
        near = start + nbytes + random_.choice([0, 0, 30])
        data = (DATA if name == "a" else DATA[::-1])[start : start + nbytes]
        expected += bytes(gap)
        storage = Storage(str(tmp_path / name), str(number), start, nbytes)
        jobs.append(Copy(storage, None if reading else len(expected)))
        sums.append(Done(zlib.crc32(data), nbytes))
        expected += data
    assert run_jobs(jobs, output, quiet) == sums
    assert written(tmp_path).ljust(len(expected), b"\0") == (
        bytes(len(expected)) if reading else expected
    )


def joined(parts: Iterable[bytes]) -> Done:
    total = NOTHING
    for part in parts:
        total = total.followed_by(Done(zlib.crc32(part), len(part)))
    return total


@given(st.lists(st.binary(max_size=50), max_size=8))
def test_checksums_are_joined(parts: list[bytes]) -> None:
    whole = b"".join(parts)
    assert joined(parts) == (zlib.crc32(whole), len(whole))


def test_checksums_of_long_parts_are_joined() -> None:
    for cut in (1, CHUNK, len(DATA) - 1):
        assert joined((DATA[:cut], DATA[cut:])) == (zlib.crc32(DATA), len(DATA))


# Deflated storages.


def test_a_deflated_storage_comes_in_small_parts(packed: Storage) -> None:
    with Reader(packed.path) as reader:
        parts = list(unpacked(packed, reader))
    assert b"".join(parts) == DATA
    assert max(map(len, parts)) <= CHUNK


@pytest.mark.parametrize("data", [b"", b"x", b"\0" * (5 * CHUNK)], ids=["none", "one", "zeros"])
def test_deflated_storages_of_other_sizes(tmp_path: Path, data: bytes) -> None:
    storage = deflated(tmp_path / "packed", data)
    with Reader(storage.path) as reader:
        assert b"".join(unpacked(storage, reader)) == data


LIES: list[tuple[str, Callable[[Storage], Storage]]] = [
    ("longer than declared", lambda s: replace(s, nbytes=s.nbytes - 1)),
    ("is damaged", lambda s: replace(s, nbytes=s.nbytes + 1)),
    ("is damaged", lambda s: replace(s, packed_nbytes=s.packed_nbytes // 2)),
    ("is damaged", lambda s: replace(s, packed_nbytes=0)),
    ("is damaged", lambda s: replace(s, start=0)),
    ("is damaged", lambda s: replace(s, start=s.start + 1, packed_nbytes=s.packed_nbytes - 1)),
]


@pytest.mark.parametrize(("said", "lie"), LIES)
def test_deflated_storages_that_lie(
    tmp_path: Path, said: str, lie: Callable[[Storage], Storage]
) -> None:
    storage = lie(deflated(tmp_path / "packed", b"0123456789" * 1000))
    with Reader(storage.path) as reader, pytest.raises(Malformed, match=said):
        list(unpacked(storage, reader))


def test_a_deflated_storage_can_be_read_here_and_there(tmp_path: Path, packed: Storage) -> None:
    before = listing(tmp_path).keys()
    readers = Readers()
    reader = readers.unpacked(packed)
    assert reader.read(CHUNK, 10) == DATA[CHUNK : CHUNK + 10]
    assert reader.read(0, 3) == DATA[:3]
    assert readers.unpacked(packed) is reader
    assert listing(tmp_path).keys() == before
    readers.close()
    assert listing(tmp_path).keys() == before


def test_few_unpacked_storages_are_kept(tmp_path: Path) -> None:
    storages = [deflated(tmp_path / f"packed{index}", bytes([index]) * 99) for index in range(5)]
    readers = Readers()
    open_files = len(os.listdir("/dev/fd"))
    for index, storage in enumerate(storages):
        assert readers.unpacked(storage).read(0, 99) == bytes([index]) * 99
    assert len(os.listdir("/dev/fd")) == open_files + len(storages) + 2
    readers.close()
    assert len(os.listdir("/dev/fd")) == open_files


# Output.


def test_a_planned_file_is_written(tmp_path: Path, output: int, stored: Storage) -> None:
    planned = PlannedFile(
        "file", 20, [(0, b"head")], [Copy(stored, 4, 0, 8)],
        lambda done: [(12, done[0].crc32.to_bytes(4, "little")), (18, b"ok")],
    )  # fmt: skip
    assert planned.job_nbytes == 8
    assert write_file(output, planned, quiet) == [(zlib.crc32(DATA[:8]), 8)]
    crc = zlib.crc32(DATA[:8]).to_bytes(4, "little")
    assert written(tmp_path) == b"head" + DATA[:8] + crc + b"\0\0ok"


NEW = Output((PlannedFile("", 3, [(0, b"new")]),))


# The space of an output.


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="Linux and BSD reserve space")
@pytest.mark.parametrize("code", [errno.EBADF, errno.EOPNOTSUPP, errno.ENOSPC])
def test_space_is_reserved_but_never_by_writing(
    tmp_path: Path, output: int, stored: Storage, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """glibc writes where a file system cannot reserve, but not for what appends."""
    import fcntl

    asked: list[bool] = []

    def reserve(fd: int, start: int, nbytes: int) -> None:
        asked.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_APPEND))
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    planned = PlannedFile("", len(DATA), jobs=[Copy(stored, 0)])
    if code == errno.ENOSPC:
        with pytest.raises(OSError, match="No space left"):
            write_file(output, planned, quiet)
        assert not any(written(tmp_path))
    else:
        write_file(output, planned, quiet)
        assert written(tmp_path) == DATA
    assert asked == [True]
    assert not fcntl.fcntl(output, fcntl.F_GETFL) & os.O_APPEND


def published(target: Target, error: BaseException | None = None) -> None:
    def check(path: str, moved: Moved) -> None:
        assert moved == {Path(path).name: {}}
        assert Path(path).read_bytes() == b"new"
        if error is not None:
            raise error

    assert publish(target, NEW, quiet, check) == []


def test_output_is_published_at_the_end(tmp_path: Path) -> None:
    def check(temporary: str, moved: Moved) -> None:
        assert not (tmp_path / "file").exists()
        assert Path(temporary).parent == tmp_path
        assert Path(temporary).name.startswith(".file.")

    publish(Target(str(tmp_path / "file")), NEW, quiet, check)
    assert listing(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize(
    "error", [ZeroDivisionError(), KeyboardInterrupt(), SystemExit(143), OSError(errno.EIO, "x")]
)
@pytest.mark.parametrize("force", [True, False])
def test_whatever_fails_the_target_stays(tmp_path: Path, error: BaseException, force: bool) -> None:
    if force:
        (tmp_path / "file").write_bytes(b"old")
    before = listing(tmp_path)
    expected = WriteError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected):
        published(Target(str(tmp_path / "file"), force), error=error)
    assert listing(tmp_path) == before


def test_only_force_replaces(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OutputExists):
        published(Target(str(tmp_path / "file")))
    assert listing(tmp_path) == {"file": b"old"}
    published(Target(str(tmp_path / "file"), force=True))
    assert listing(tmp_path) == {"file": b"new"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_no_space(tmp_path: Path, code: int) -> None:
    with pytest.raises(NoSpace):
        published(Target(str(tmp_path / "file")), error=OSError(code, "full"))


def test_targets_are_refused_before_writing(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"in")
    (tmp_path / "old").write_bytes(b"old")
    (tmp_path / "link").symlink_to("in")
    source = [str(tmp_path / "in")]

    def place(name: str, force: bool = False) -> Target:
        return refuse_target(tmp_path / name, source, force=force, sync=True)

    assert place("new") == Target(str(tmp_path / "new"))
    assert place("old", force=True) == Target(str(tmp_path / "old"), force=True)
    for name in ("in", "link", "./in"):
        for force in (False, True):
            with pytest.raises(SameFile):
                place(name, force)
    with pytest.raises(OutputExists):
        place("old")
    with pytest.raises(WriteError, match="is a folder"):
        place(".")
    with pytest.raises(WriteError, match="does not exist") as caught:
        place("no where/new")
    assert caught.value.hint == f"mkdir -p '{tmp_path}/no where'"


def test_a_link_leads_to_its_target(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    target = refuse_target(tmp_path / "link", [], force=False, sync=True)
    assert target.path == str(tmp_path / "real")
    assert target.folder == str(tmp_path)


def test_free_space_is_told_and_judged(tmp_path: Path) -> None:
    target = Target(str(tmp_path / "file"))
    free = free_space(target)
    assert free is not None
    assert free > 0
    refuse_full(target, 0)
    with pytest.raises(NoSpace, match="are free"):
        refuse_full(target, 1 << 60)
