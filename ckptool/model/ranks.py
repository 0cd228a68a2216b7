"""The ranks of a launcher (torchrun, srun, mpirun) as a group that writes one output.

They meet in the key-value store of torch.distributed, at MASTER_ADDR:MASTER_PORT. No tensor passes
between them, so that no backend (gloo, nccl) is needed, and what one sends another is JSON.
torchrun's agent serves the store, or else rank 0 does (torch/distributed/rendezvous.py).
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from time import monotonic
from typing import Any, TypeVar

from ckptool import errors
from ckptool.errors import (
    CkptoolError,
    EditError,
    RankLost,
    RanksDiffer,
    is_out_of_memory,
    out_of_memory,
)
from ckptool.files.copying import Progress
from ckptool.files.group import Group
from ckptool.model import libraries
from ckptool.model.pulse import BEAT, PUBLISH, Pulse
from ckptool.records import dataclass

T = TypeVar("T")
MISSING_AFTER = 60.0  # seconds
SHORTER = "CKPTOOL_MISSING_AFTER"  # seconds, for tests
LINGER = 10.0  # for the others to read how it ended
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MET = "met"  # the key that rank 0 sets once it has planned
AGAIN = "check why it ended, then run it again"

_joined: ContextVar[Group | None] = ContextVar("joined", default=None)


@dataclass(frozen=True, slots=True)
class Launched:
    """What a launcher has told this process; `speaks` for the first on its machine."""

    rank: int
    size: int
    address: str
    port: int
    speaks: bool


def launched(command: str = "SCRIPT.py") -> Launched:
    """Return the place of this process; raises `EditError` where no launcher gave it one."""
    hint = f"torchrun --nproc-per-node 2 {command}"
    if missing := [name for name in VARIABLES if not os.environ.get(name)]:
        raise EditError(
            f"--distributed needs a launcher, which sets {', '.join(missing)}", hint=hint
        )
    try:
        rank, size, port = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
        first = int(os.environ.get("LOCAL_RANK") or rank) == 0
    except ValueError as error:
        raise EditError(f"the launcher's variables: {error}", hint=hint) from None
    if not 0 <= rank < size or not 0 < port < 1 << 16:
        raise EditError(f"there is no rank {rank} of {size} at port {port}", hint=hint)
    return Launched(rank, size, os.environ["MASTER_ADDR"], port, first)


@contextmanager
def joined(command: str = "SCRIPT.py") -> Iterator[Group]:
    """Meet the other ranks, for a block that all of them run; an error of one is one of all.

    Inside such a block it is the same group. Raises `EditError` without a launcher, `MissingExtra`
    without torch, `RankLost` where a rank does not come, or is lost later.
    """
    around = _joined.get()
    if around is not None:
        yield around
        return
    place = launched(command)
    try:
        group = Ranks(place, _store(place))
    except CkptoolError as error:
        error.said_elsewhere = not place.speaks
        raise
    token = _joined.set(group)
    try:
        yield group
    except BaseException as error:
        raised = group.ended_by(error)
        if raised is error:
            raise
        raise raised from error
    finally:
        _joined.reset(token)
        with suppress(KeyboardInterrupt, SystemExit):  # a launcher that sees another end
            group.leave()


def _store(place: Launched) -> Any:
    """Connect to the store; the calls that a process has made before have keys of their own."""
    if "torch" not in sys.modules:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # it is said below
    distributed: Any = libraries.torch().distributed
    from datetime import timedelta

    limit = missing_after()
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = distributed.TCPStore(
            place.address,
            place.port,
            is_master=place.rank == 0 and not agent,
            timeout=timedelta(seconds=max(limit / 2, 1)),  # it tries twice
            wait_for_workers=False,
            multi_tenant=True,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        calls = store.add(f"ckptool/{attempt}/{place.rank}", 1)
        return distributed.PrefixStore(f"ckptool/{attempt}/call {calls}", store)
    except (RuntimeError, ValueError) as error:
        where = f"{place.address}:{place.port}"
        what = "cannot be served" if place.rank == 0 and not agent else "does not answer"
        raise RankLost(
            f"rank {place.rank}: the store of the ranks at {where} {what}",
            evidence=str(error).splitlines()[:1],
            hint="all ranks need the same MASTER_ADDR and MASTER_PORT, of rank 0's machine",
        ) from error


def missing_after() -> float:
    """Return for how many seconds a rank may be silent."""
    return float(os.environ.get(SHORTER) or MISSING_AFTER)


class Ranks:
    """The group of all ranks, as one of them sees it."""

    def __init__(self, place: Launched, store: Any) -> None:
        self.rank, self.size, self._speaks = place.rank, place.size, place.speaks
        self._step = 0
        self._publishing = self._failed = False
        self._pulse = Pulse(store, self.rank, self.size, missing_after(), self._silent)

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do work on each rank; return what all have made on rank 0, on others their own alone."""
        if not self._step and not self.rank:
            self._pulse.put(MET, b"-")
        step, mine = self._next(), _json({"value": work()})
        answers = [mine]
        if self.rank:
            self._pulse.put(f"{step}/{self.rank}", mine)
        else:
            answers += [self._get(f"{step}/{rank}") for rank in range(1, self.size)]
        return [json.loads(each)["value"] for each in answers]

    def share(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 alone; return what that has made on each rank."""
        if self.rank:
            answer = json.loads(self._get(str(self._next())))
        else:
            made = _json({"value": work()})
            self._pulse.put(str(self._next()), made)
            answer = json.loads(made)
        if "value" not in answer:
            raise self._said(answer)
        value: T = answer["value"]
        return value

    def counting(self, progress: Progress) -> Progress:
        """Return what counts bytes on this rank; on rank 0, `progress` gets those of all."""

        def count(nbytes: int) -> None:
            self._pulse.count(nbytes)
            if not self.rank:
                progress(nbytes)
            if self._pulse.is_over:
                raise self._agreed()

        if not self.rank:
            self._pulse.progress = progress
        return count

    def begin_publishing(self) -> None:
        """Let rank 0 move the output to its place, and others wait for that."""
        self._publishing = True
        if not self.rank:
            self._pulse.settle(PUBLISH)
            if self._pulse.is_over:
                raise self._agreed()

    @property
    def may_remove(self) -> bool:
        """Check that rank 0 moves nothing to its place any more, nor will."""
        end = self._pulse.end
        return end != PUBLISH if end else not self._publishing

    def fail(self, error: BaseException) -> None:
        """Let all other ranks raise an error, unless one raises theirs already.

        Before the plans are compared, rank 0 may well meet the same one: that is said then.
        """
        place = ""
        if self.rank and not self._step and isinstance(error, Exception):
            self._pulse.wait(MET)
        if is_out_of_memory(error):
            error = out_of_memory()
        if not isinstance(error, CkptoolError):
            error = _as_lost(error, self.rank)
        elif not isinstance(error, RankLost | RanksDiffer) and (self.rank or self._step):
            place = f"rank {self.rank}: "
        said = _packed(error, place)
        if self._pulse.end == PUBLISH and not self.rank:
            self._pulse.put(str(self._step), said)
        else:
            self._pulse.settle(said)
        self._failed = self._failed or self._pulse.end == said

    def ended_by(self, error: BaseException) -> BaseException:
        """Return the error of all where this rank, or another one, has failed."""
        signalled = isinstance(error, KeyboardInterrupt | SystemExit)
        self.fail(error)
        if self._pulse.end == PUBLISH:
            return _as_lost(error, self.rank) if self.rank and signalled else error
        if isinstance(error, KeyboardInterrupt) and not self.rank:
            return error
        if self._failed and not (signalled or isinstance(error, CkptoolError)):
            return error  # a defect: who has it can say where
        return self._agreed()

    def leave(self) -> None:
        """Wait until all have seen how it ended: rank 0 may serve the store."""
        others = range(1) if self.rank else range(1, self.size)
        if self.rank:
            self._pulse.put(f"left/{self.rank}", b"-")
        until = monotonic() + LINGER
        for rank in others:  # that are there: none comes back to say so
            while self._pulse.is_fresh(rank) and not self._pulse.lost and monotonic() < until:
                if self._pulse.wait(f"left/{rank}", BEAT, to_the_end=True):
                    break
        if not self.rank:
            self._pulse.put("left/0", b"-")
        self._pulse.close()

    def _next(self) -> int:
        self._step += 1
        return self._step - 1

    def _get(self, key: str) -> bytes:
        data = self._pulse.wait(key)
        if not data:
            raise self._agreed()
        return data

    def _agreed(self) -> CkptoolError:
        """Return the error that ended all."""
        if self._pulse.end not in (b"", PUBLISH):
            return self._said(json.loads(self._pulse.end))
        others = "rank 0" if self.rank else "the others"
        error = RankLost(f"rank {self.rank} lost {others}: {self._pulse.lost}", hint=AGAIN)
        error.said_elsewhere = not (self._speaks or self.rank == 1)
        return error

    def _said(self, answer: dict[str, Any]) -> CkptoolError:
        """Return the error that a rank has packed; one rank says it, 0 where that is there."""
        given = answer["error"]
        kind, more = getattr(errors, given.pop("kind")), given.pop("more")
        error: CkptoolError = kind(given.pop("message"), **given, **more)
        error.said_elsewhere = self.rank != answer["speaker"]
        return error

    def _silent(self, rank: int, came: bool) -> bytes:
        """Pack the error for a rank of which nothing is heard any more."""
        what = "nothing came from it" if came else "it did not come"
        lost = RankLost(f"rank {rank} was lost: {what} for {missing_after():g} s", hint=AGAIN)
        return _packed(lost, speaker=0 if rank else self.rank)


def _packed(error: CkptoolError, place: str = "", speaker: int = 0) -> bytes:
    said = {
        "kind": type(error).__name__,
        "message": f"{place}{error.message}",
        "evidence": error.evidence,
        "hint": error.hint,
        "option": error.option,
        "more": {"path": str(path)} if (path := getattr(error, "path", None)) else {},
    }
    return _json({"error": said, "speaker": speaker})


def _as_lost(error: BaseException, rank: int) -> RankLost:
    if isinstance(error, KeyboardInterrupt):
        return RankLost(f"rank {rank} was interrupted")
    if isinstance(error, SystemExit):
        what = "ended by a signal, as a launcher does it where another rank has failed"
        return RankLost(f"rank {rank} was {what}", hint=AGAIN)
    what = f"{type(error).__name__}: {error}"
    return RankLost(f"rank {rank} failed: {what}", hint="CKPTOOL_DEBUG=1 shows where")


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
