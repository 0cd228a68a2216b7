"""`convert --distributed`: many processes write one output, or all end with one error."""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain, product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import FIXTURES, Outcome, environment, listing, sampled
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

import ckptool
from ckptool.errors import CkptoolError
from ckptool.files import blocks, publish, writing
from ckptool.files.copying import PlannedFile
from ckptool.files.jobs import Copy
from ckptool.model import pulse, ranks
from ckptool.model.ranks import Launched
from ckptool.tensors.tensor import Storage
from ckptool.verbs import agreement

# Ranks that are threads of this process, with a store that is a dict.


@dataclass
class Store:
    """What a rank needs of `torch.distributed.Store`; it may hang, or be gone."""

    held: dict[str, bytes]
    hangs: threading.Event = field(default_factory=threading.Event)
    hanging: bool = False
    gone: bool = False

    def answer(self) -> dict[str, bytes]:
        if self.hanging:
            self.hangs.wait(20)
        if self.gone:
            raise RuntimeError("Connection reset by peer")
        return self.held

    def set(self, key: str, value: str | bytes) -> None:
        self.answer()[key] = value.encode() if isinstance(value, str) else value

    def get(self, key: str) -> bytes:
        return self.answer()[key]

    def multi_get(self, keys: Sequence[str]) -> list[bytes]:
        return [self.answer()[key] for key in keys]

    def check(self, keys: Sequence[str]) -> bool:
        return all(key in self.answer() for key in keys)

    def compare_set(self, key: str, expected: str, desired: bytes) -> bytes:
        return self.answer().setdefault(key, desired)


class Threads:
    """Runs a function as so many ranks, and keeps what each returned or raised."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._here = threading.local()
        self.stores: list[Store] = []
        monkeypatch.setattr(ranks, "launched", lambda command="": self._here.place)
        monkeypatch.setattr(ranks, "_store", lambda place: self.stores[place.rank])
        monkeypatch.setattr(pulse, "BEAT", 0.05)
        monkeypatch.setattr(pulse, "POLL", 0.002)

    @property
    def rank(self) -> int:
        """Return the rank whose thread this is; -1 for a helper of the engine."""
        place = getattr(self._here, "place", None)
        return place.rank if place else -1

    def run(self, size: int, function: Callable[[int], Any]) -> list[Any]:
        held: dict[str, bytes] = {}
        self.stores = [Store(held) for _ in range(size)]
        found: list[Any] = [None] * size

        def one(rank: int) -> None:
            self._here.place = Launched(rank, size, "here", 1, rank == 0)
            try:
                found[rank] = function(rank)
            except BaseException as error:
                found[rank] = error

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        return found


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> Threads:
    return Threads(monkeypatch)


def weights() -> dict[str, torch.Tensor]:
    """Make tensors of odd sizes, so that nothing is aligned, and some that are views."""
    torch.manual_seed(0)
    shared = torch.randn(40, 50)
    return {
        "a.bytes": torch.randint(0, 255, (1237,), dtype=torch.uint8),
        "a.weight": torch.randn(301, 67),
        "a.turned": torch.randn(203, 101).t(),
        "a.half": torch.randn(77, 91).to(torch.bfloat16),
        "tied.one": shared,
        "tied.two": shared,
        "part": torch.randn(100, 100)[10:70, 3:50],
        "double": torch.randn(3001, dtype=torch.float64),
        **{f"many.{number}": torch.randn(5 + number) for number in range(60)},
        "empty": torch.zeros(0, 4),
        "flag": torch.tensor(True),
    }


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    found = {name: folder / name for name in ("in.pth", "in.safetensors", "in_dcp")}
    torch.save({"epoch": 3, "state_dict": weights()}, found["in.pth"])
    plain = {key: value.contiguous().clone() for key, value in weights().items()}
    save_file(plain, found["in.safetensors"])
    ckptool.convert(found["in.pth"], found["in_dcp"], to="dcp")
    return found


FORMS: dict[str, dict[str, Any]] = {
    "out.pth": {},
    "out.safetensors": {},
    "cast.safetensors": {"dtype": "bf16"},
    "cast.pth": {"dtype": "f16", "overflow": "clamp"},
    "shards": {"max_shard_size": "60KB"},
    "torch_shards": {"max_shard_size": "60KB", "to": "torch"},
    "dcp": {"to": "dcp"},
    "dcp_cast": {"to": "dcp", "dtype": "bf16", "dtype_except": "a.*"},
}


def bytes_of(path: Path) -> object:
    return listing(path) if path.is_dir() else path.read_bytes()


@pytest.mark.product(10, always=3)
@pytest.mark.parametrize("size", [2, 3, 4, 7])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("source", ["in.pth", "in.safetensors", "in_dcp"])
def test_bytes_are_those_of_one_process(
    threads: Threads,
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    form: str,
    size: int,
) -> None:
    """Cut anywhere, in elements too: on a file system, ranges end at 64 KiB at least."""
    monkeypatch.setattr(writing, "LEAST_CUT", 1)
    monkeypatch.setattr(writing, "PIECES", 1 << 30)
    monkeypatch.setattr(blocks, "LONG", 1)
    alone, together = tmp_path / "alone" / form, tmp_path / "together" / form
    alone.parent.mkdir(), together.parent.mkdir()
    expected = ckptool.convert(inputs[source], alone, **FORMS[form])

    def convert(rank: int) -> object:
        return ckptool.convert(inputs[source], together, distributed=True, **FORMS[form])

    found = threads.run(size, convert)
    assert all(isinstance(each, ckptool.Rewrite) for each in found), found
    assert bytes_of(together) == bytes_of(alone)
    assert [path.name for path in together.parent.iterdir()] == [form]
    assert found[0].casts == expected.casts


SOURCES = sampled(sorted((FIXTURES / "good").iterdir()), 12)


@pytest.mark.product(3)
@pytest.mark.parametrize("form", ["out.pth", "out.safetensors", "dcp"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_whatever_there_is_to_copy(
    threads: Threads, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Path, form: str
) -> None:
    """Deflated, big-endian, strided, in pieces; what is refused, is refused alike."""
    monkeypatch.setattr(writing, "LEAST_CUT", 1)
    monkeypatch.setattr(writing, "PIECES", 1 << 30)
    monkeypatch.setattr(blocks, "LONG", 1)
    options: dict[str, Any] = {"to": "dcp"} if form == "dcp" else {}

    for name in ("alone", "together"):
        (tmp_path / name).mkdir()

    def convert(name: str, *, distributed: bool) -> object:
        target = tmp_path / name / form
        try:
            ckptool.convert(source, target, distributed=distributed, **options)
        except CkptoolError as error:
            return error.slug, error.message.replace(name, "")
        return bytes_of(target)

    alone = convert("alone", distributed=False)
    assert threads.run(3, lambda _: convert("together", distributed=True)) == [alone] * 3


# What one rank cannot do, none does.


@pytest.fixture
def convert(inputs: dict[str, Path], tmp_path: Path) -> Callable[..., ckptool.Rewrite]:
    """Write shards into `out`, in a folder of its own."""

    def written(**given: Any) -> ckptool.Rewrite:
        form = {"max_shard_size": "60KB", "distributed": True, **given}
        return ckptool.convert(form.pop("source", inputs["in.pth"]), tmp_path / "out", **form)

    return written


def said(found: Sequence[Any]) -> list[tuple[str, str, bool]]:
    """Give what each rank has raised, and whether it leaves it to another to say so."""
    assert all(isinstance(each, CkptoolError) for each in found), found
    return [(each.slug, each.message, each.said_elsewhere) for each in found]


def on(threads: Threads, rank: int, action: Callable[[], Any], real: Callable[..., Any]) -> Any:
    """Return a function with which something happens on one rank."""

    def replaced(*arguments: Any, **named: Any) -> Any:
        if threads.rank == rank:
            action()
        return real(*arguments, **named)

    return replaced


def fails(error: BaseException) -> Callable[[], Any]:
    def action() -> None:
        raise error

    return action


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("where", ["move", "write_at"])
def test_a_full_disk_of_one_rank_ends_all(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
    rank: int,
) -> None:
    real = getattr(writing, where)
    monkeypatch.setattr(writing, where, on(threads, rank, fails(FULL), real))
    found = threads.run(3, lambda _: convert())
    what = f"rank {rank}: no space left while writing {tmp_path / 'out'}; nothing was kept"
    assert said(found) == [("no-space", what, False)] + 2 * [("no-space", what, True)]
    assert not any(tmp_path.iterdir())


def test_an_input_that_one_rank_cannot_read(
    threads: Threads, convert: Callable[..., ckptool.Rewrite], tmp_path: Path
) -> None:
    found = threads.run(2, lambda rank: convert(**{"source": "missing.pth"} if rank else {}))
    what = "rank 1: missing.pth does not exist"
    assert said(found) == [("no-such-file", what, False), ("no-such-file", what, True)]
    assert not any(tmp_path.iterdir())


def test_what_no_rank_can_do_is_said_of_none(
    threads: Threads, convert: Callable[..., ckptool.Rewrite], tmp_path: Path
) -> None:
    found = threads.run(3, lambda _: convert(source="missing.pth"))
    assert {each[:2] for each in said(found)} == {("no-such-file", "missing.pth does not exist")}
    assert [each[2] for each in said(found)] == [False, True, True]


def test_ranks_that_would_write_different_outputs(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = tmp_path / "elsewhere" / "in.pth"
    other.parent.mkdir()
    other.write_bytes(inputs["in.pth"].read_bytes())
    os.utime(other, ns=(0, 1))
    cast = {"dtype": "bf16"}
    for usual, odd, what in (
        (cast, {**cast, "overflow": "clamp"}, "would write another output than rank 0"),
        ({}, {"max_shard_size": "50KB"}, "would write another output than rank 0"),
        ({}, {"force": True}, "finds another target than rank 0"),
        ({}, {"source": other}, "reads other inputs than rank 0"),
    ):
        given = [usual, usual, odd]
        found = threads.run(3, lambda rank, given=given: convert(**given[rank]))  # type: ignore[misc]
        assert {each[:2] for each in said(found)} == {("ranks-differ", f"rank 2 {what}")}
        assert not (tmp_path / "out").exists()
    real = agreement._facts
    monkeypatch.setattr(
        agreement,
        "_facts",
        lambda *given: {**real(*given), **({"version": "0.0"} if threads.rank == 1 else {})},
    )
    found = threads.run(2, lambda _: convert())
    assert said(found)[0][1] == f"rank 1 has ckptool 0.0, rank 0 has {ckptool.__version__}"


def test_a_damaged_storage_of_which_no_rank_reads_all(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its checksum is that of parts which several ranks have read."""
    monkeypatch.setattr(writing, "LEAST_CUT", 1)
    for made in (torch.arange(30_000.0), torch.arange(30_000.0)[:20_000]):
        torch.save({"a": made}, tmp_path / "in.pth")
        data = bytearray((tmp_path / "in.pth").read_bytes())
        data[data.index(struct.pack("<2f", 12_345, 12_346))] ^= 1
        (tmp_path / "in.pth").write_bytes(data)
        found = threads.run(4, lambda _: convert(source=tmp_path / "in.pth"))
        assert {each[0] for each in said(found)} == {"malformed"}
        assert "do not match their checksum" in said(found)[0][1]
        assert not (tmp_path / "out").exists()


def test_losses_of_all_ranks_count(
    threads: Threads, convert: Callable[..., ckptool.Rewrite], tmp_path: Path
) -> None:
    torch.save({"a": torch.full((100_000,), 1e6)}, tmp_path / "in.pth")
    found = threads.run(2, lambda _: convert(source=tmp_path / "in.pth", dtype="f16"))
    assert {each[0] for each in said(found)} == {"overflow"}
    assert said(found)[0][1].startswith("rank 0: 100000 values in 1 tensor would be beyond")


def test_a_defect_is_said_by_who_has_it(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    broken = on(threads, 1, fails(ZeroDivisionError("oops")), writing.move)
    monkeypatch.setattr(writing, "move", broken)
    first, second = threads.run(2, lambda _: convert())
    assert said([first]) == [("rank-lost", "rank 1 failed: ZeroDivisionError: oops", False)]
    assert isinstance(second, ZeroDivisionError)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)], ids=["int", "term"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_ends_all(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
    error: BaseException,
) -> None:
    """torchrun ends the others with SIGTERM where one has failed: then they end as lost."""
    monkeypatch.setattr(writing, "move", on(threads, rank, fails(error), writing.move))
    found = threads.run(2, lambda _: convert())
    if rank == 0 and isinstance(error, KeyboardInterrupt):
        assert found.pop(0) is error
    words = "interrupted" if isinstance(error, KeyboardInterrupt) else "ended by a signal"
    assert {each.exit_code for each in found} == {7}
    assert all(f"rank {rank} was {words}" in each[1] for each in said(found))
    assert not any(tmp_path.iterdir())


# Who is silent is lost.


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ranks.SHORTER, "0.7")


@pytest.mark.thorough
@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_hangs_is_lost(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rank: int,
) -> None:
    """It may come back (SIGCONT): then it does not go on."""

    def hang() -> None:
        store = threads.stores[rank]
        store.hanging = True
        time.sleep(2)
        store.hanging = False
        store.hangs.set()

    monkeypatch.setattr(writing, "move", on(threads, rank, hang, writing.move))
    found = threads.run(3, lambda _: convert())
    others = [each for number, each in enumerate(found) if number != rank]
    what = f"rank {rank} was lost: nothing came from it for 0.7 s"
    assert {each[1] for each in said(others)} == {what}
    assert [each[2] for each in said(others)].count(False) == 1
    assert said([found[rank]])[0][0] == "rank-lost"
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_does_not_come_is_lost(
    threads: Threads, convert: Callable[..., ckptool.Rewrite], tmp_path: Path
) -> None:
    found = threads.run(3, lambda rank: convert() if rank != 1 else None)
    what = "rank 1 was lost: it did not come for 0.7 s"
    assert {each[1] for each in said([found[0], found[2]])} == {what}
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("impatient")
def test_a_rank_that_takes_long_is_not_lost(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        writing, "_within", on(threads, 1, lambda: time.sleep(1.5), writing._within)
    )
    found = threads.run(2, lambda _: convert(max_shard_size="1GB"))
    assert all(isinstance(each, ckptool.Rewrite) for each in found), found


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["gone", "hanging"])
def test_a_store_that_does_not_answer(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    """It goes with the machine of rank 0, or of the launcher."""

    def end() -> None:
        for store in threads.stores:
            setattr(store, how, True)

    monkeypatch.setattr(writing, "move", on(threads, 1, end, writing.move))
    found = threads.run(2, lambda _: convert())
    for store in threads.stores:
        store.hangs.set()
    assert [each[0] for each in said(found)] == ["rank-lost"] * 2
    assert "the store of the ranks" in said(found)[1][1]
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("impatient")
def test_what_rank_0_moves_to_its_place_is_left_to_it(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang() -> None:
        store = threads.stores[0]
        store.hanging = True
        time.sleep(1.5)
        store.hanging = False
        store.hangs.set()

    monkeypatch.setattr(publish, "_move", on(threads, 0, hang, publish._move))
    first, second = threads.run(2, lambda _: convert())
    assert isinstance(first, ckptool.Rewrite)
    assert "rank 0 was lost while it moved the output to its place" in said([second])[0][1]
    assert os.listdir(tmp_path) == ["out"]


def test_what_fails_at_the_last_moment(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def appear() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()

    monkeypatch.setattr(publish, "_move", on(threads, 0, appear, publish._move))
    found = threads.run(2, lambda _: convert())
    assert {each[0] for each in said(found)} == {"output-exists"}
    assert listing(tmp_path) == {"out": None, "out/theirs": b""}


# What each rank writes.

SIZES = st.lists(st.integers(0, 1 << 34), min_size=1, max_size=40)


@settings(max_examples=300, deadline=None)
@given(SIZES, st.integers(1, 64))
def test_ranks_have_ranges_of_about_one_size_with_no_page_in_two(
    sizes: list[int], count: int
) -> None:
    storage = Storage("", "", 0, 1)
    files = [PlannedFile(str(nbytes), nbytes, (), [Copy(storage, 0)]) for nbytes in sizes]
    shares = writing.shares(files, count)
    covered = list(chain.from_iterable(shares))
    ends = dict.fromkeys(range(len(sizes)), 0)
    for number, start, end in covered:
        assert start == ends[number] < end
        assert end == sizes[number] or end % writing.LEAST_CUT == 0
        ends[number] = end
    assert list(ends.values()) == sizes
    if sum(sizes) > count * writing.PIECES * writing.LEAST_CUT:
        nbytes = [sum(end - start for _, start, end in each) for each in shares]
        assert max(nbytes) <= 1.1 * min(nbytes)


def test_ranks_write_about_as_many_bytes(
    threads: Threads,
    convert: Callable[..., ckptool.Rewrite],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(writing, "LEAST_CUT", 1)
    moved: Counter[int] = Counter()
    real = writing.move

    def counted(jobs: Sequence[Copy], target: int | None, *given: Any, **named: Any) -> Any:
        moved[threads.rank] += sum(job.nbytes for job in jobs) if target is not None else 0
        return real(jobs, target, *given, **named)

    monkeypatch.setattr(writing, "move", counted)
    threads.run(4, lambda _: convert())
    assert len(moved) == 4
    assert max(moved.values()) <= 1.1 * min(moved.values())


# Processes of their own, as torchrun starts them.

HERE = Path(__file__).parent


@dataclass
class Ended:
    """What became of each rank."""

    codes: list[int]
    out: list[str]
    err: list[str]


def start(folder: Path, size: int, *arguments: object, misfortune: str = "") -> Ended:
    """Run so many ranks; one that is stopped goes on when the others have ended."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    what, _, unlucky = misfortune.rpartition("@")
    program = [HERE / "misfortune.py"] if misfortune else ["-m", "ckptool"]
    shared = {"WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared |= {"MISFORTUNE": misfortune, ranks.SHORTER: 4}
    processes = []
    for rank in range(size):
        variables = {**shared, "RANK": rank, "LOCAL_RANK": rank}
        processes.append(
            subprocess.Popen(
                [sys.executable, *map(str, (*program, *arguments))],
                env=environment({name: str(each) for name, each in variables.items()}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                cwd=folder,
            )
        )
    last = int(unlucky) if what.startswith("stop") else -1
    said = {}
    for rank in sorted(range(size), key=lambda rank: rank == last):
        if rank == last:
            processes[rank].send_signal(signal.SIGCONT)
        said[rank] = processes[rank].communicate(timeout=60)
    out, err = zip(*map(said.__getitem__, range(size)), strict=True)
    return Ended([each.returncode for each in processes], list(out), list(err))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a checkpoint that takes several writes of each rank."""
    path = tmp_path_factory.mktemp("large") / "in.pth"
    torch.manual_seed(1)
    torch.save({f"layer.{number}": torch.randn(513, 1025) for number in range(12)}, path)
    return path


ALL = [(2, "shards"), *product((2, 4), ("dcp", "out.pth", "torch_shards"))]


@pytest.mark.parametrize(("size", "form"), sampled(ALL, 10))
def test_ranks_write_what_one_process_writes(
    large: Path, tmp_path: Path, run: Callable[..., Outcome], size: int, form: str
) -> None:
    options = {
        "shards": ["--max-shard-size", "5MB"],
        "torch_shards": ["--max-shard-size", "5MB", "--to", "torch"],
        "dcp": ["--to", "dcp"],
    }.get(form, [])
    assert run("convert", large, tmp_path / "alone", *options).code == 0
    done = start(tmp_path, size, "convert", "--distributed", large, form, *options)
    assert (done.codes, done.out) == ([0] * size, [""] * size), done
    assert "read 12, renamed 0, dropped 0, written 12" in done.err[0]
    assert done.err[1:] == [""] * (size - 1)
    assert bytes_of(tmp_path / form) == bytes_of(tmp_path / "alone")
    assert {path.name for path in tmp_path.iterdir()} == {form, "alone"}


CASES = {
    "stop@copy@1": ([7, 7], "rank 1 was lost: nothing came from it for 4 s"),
    "stop@finish@0": ([5, 7], "rank 1 lost rank 0: the store"),  # whose files are gone then
    "kill@copy@1": ([7, -signal.SIGKILL], "rank 1 was lost: nothing came from it for 4 s"),
    "kill@finish@0": ([-signal.SIGKILL, 7], "rank 1 lost rank 0: the store"),
    "kill@plan@1": ([7, -signal.SIGKILL], "rank 1 was lost: nothing came from it for 4 s"),
    "full@copy@1": ([5, 5], "rank 1: no space left while writing"),
    "defect@copy@1": ([7, 70], "rank 1 failed: ZeroDivisionError: division by zero"),
}


@pytest.mark.thorough
@pytest.mark.parametrize("misfortune", sampled([*CASES], 10))
def test_a_rank_that_ends_or_stops_ends_all(large: Path, tmp_path: Path, misfortune: str) -> None:
    codes, what = CASES[misfortune]
    line = ["convert", "--distributed", large, "out", "--max-shard-size", "5MB"]
    done = start(tmp_path, 2, *line, misfortune=misfortune)
    assert (done.codes, done.out) == (codes, ["", ""]), done
    assert sum(what in text for text in done.err) == 1, done
    assert not any(tmp_path.iterdir())


def torchrun(folder: Path, *line: object, misfortune: str = "") -> Outcome:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, line)],
        env=environment({"MISFORTUNE": misfortune}),
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.mark.thorough
def test_torchrun_writes_one_output(large: Path, tmp_path: Path) -> None:
    line = ["convert", "--distributed", large, "out", "--max-shard-size", "5MB", "--json"]
    done = torchrun(tmp_path, "-m", "ckptool", *line)
    assert done.code == 0, done.err
    names = [each["file"] for each in done.document["shards"]]
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "model.safetensors.index.json"]
    assert done.document["written"] == 12


@pytest.mark.thorough
def test_torchrun_ends_all_where_a_rank_dies(large: Path, tmp_path: Path) -> None:
    line = ["convert", "--distributed", large, "out", "--max-shard-size", "5MB"]
    done = torchrun(tmp_path, HERE / "misfortune.py", *line, misfortune="kill@copy@1")
    assert done.code == 1  # its own
    assert done.err.count("error[rank-lost]: rank 0 was ended by a signal") == 1
    assert re.search(r"exitcode +: 7 |<NO_OTHER_FAILURES>", done.err)  # the latter by torch 2.6
    assert not any(tmp_path.iterdir())


# Without ranks.


def test_variables_of_a_launcher_alone_mean_nothing(
    run: Callable[..., Outcome], large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training scripts call ckptool on rank 0."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "nowhere"}.items():
        monkeypatch.setenv(name, value)
    assert run("convert", large, tmp_path / "out.pth").code == 0


def test_no_launcher(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    done = run("convert", "--distributed", "in 1.pth", "out", "--to", "dcp")
    assert (done.code, done.out) == (2, "")
    assert "--distributed needs a launcher, which sets RANK, WORLD_SIZE, MASTER_" in done.err
    line = "-m ckptool convert --distributed 'in 1.pth' out --to dcp"
    assert done.err.endswith(f"hint: torchrun --nproc-per-node 2 {line}\n")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be the only rank."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    given = {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.usefixtures("alone")
def test_no_torch(run: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    done = run("convert", "--distributed", "in.pth", "out", "--to", "dcp")
    assert (done.code, done.out) == (7, "")
    assert "this needs torch" in done.err
    assert "hint: pip install torch" in done.err


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize(
    ("target", "how"),
    [("-", "spawn"), ("s3://bucket/out.pth", "run"), ("https://host/out", "run")],
)
def test_what_is_on_no_file_system(
    request: pytest.FixtureRequest, large: Path, target: str, how: str
) -> None:
    done = request.getfixturevalue(how)("convert", "--distributed", large, target)
    assert (done.code, done.out) == (2, "")
    assert f"{target} is not on a file system" in done.err


@pytest.mark.usefixtures("alone")
def test_one_rank_more_than_once(large: Path, tmp_path: Path) -> None:
    """In one process, as after an epoch, with one port."""
    for name in ("one.pth", "two.pth"):
        ckptool.convert(large, tmp_path / name, distributed=True)
    assert (tmp_path / "one.pth").read_bytes() == (tmp_path / "two.pth").read_bytes()


@pytest.mark.parametrize(
    ("variables", "what"),
    [
        ({"RANK": "x"}, "the launcher's variables: invalid literal"),
        ({"RANK": "2"}, "there is no rank 2 of 1"),
        ({"MASTER_PORT": "70000"}, "there is no rank 0 of 1 at port 70000"),
    ],
)
@pytest.mark.usefixtures("alone")
def test_variables_that_make_no_sense(
    run: Callable[..., Outcome],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    what: str,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    done = run("convert", "--distributed", "in.pth", "out.pth")
    assert (done.code, done.out) == (2, "")
    assert what in done.err
