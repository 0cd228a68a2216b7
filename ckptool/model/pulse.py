"""The thread of a rank that talks to the store: it shows that the rank is there, and carries data.

No other thread does: a call may hang with the machine that serves the store. Every rank sets a key
once a second. Rank 0 watches those of all others, and they that of rank 0; who sees no change for
long ends the run. The key `end` has the first value that a rank gives it: the error that all raise,
or that rank 0 moves the output to its place, after which there is none.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from threading import Condition, Thread
from time import monotonic
from typing import Any

from ckptool.files.copying import Progress, no_progress

BEAT = 1.0  # seconds
POLL = 0.05
PIECE = 1 << 22  # bytes: the store takes 8 MiB at once (TCPStoreLibUvBackend.cpp)
PUBLISH = b"publish"


class Pulse:
    """What a rank knows of the others: the `end`, or whether they are `lost`, in words."""

    def __init__(
        self, store: Any, rank: int, size: int, limit: float, silent: Callable[[int, bool], bytes]
    ) -> None:
        self.end = b""
        self.lost = ""
        self.progress: Progress = no_progress(0)
        self._store, self._rank, self._limit, self._silent = store, rank, limit, silent
        self._copied = self._beats = 0
        self._out = deque[tuple[str, bytes]]()
        self._wanted: dict[str, bytes] = {}
        self._settling = b""
        self._closed = False
        now = self._asked = self._awake = self._beaten = self._arrived = monotonic()
        watched = range(1, size) if not rank else range(1)
        self._watched = dict.fromkeys(watched, (b"", now))
        self._changed = Condition()
        self._thread = Thread(target=self._run, daemon=True, name="ckptool-ranks")
        self._thread.start()

    # What the rank asks for.

    def count(self, nbytes: int) -> None:
        """Count bytes that this rank has copied."""
        with self._changed:
            self._copied += nbytes

    def put(self, key: str, data: bytes) -> None:
        """Give data to who waits for a key."""
        with self._changed:
            self._out.append((key, data))
            self._changed.notify_all()

    def wait(self, key: str, seconds: float = math.inf, *, to_the_end: bool = False) -> bytes:
        """Return the data of a key; nothing where all ends before, or in so many seconds.

        `to_the_end` waits for it though a rank has failed.
        """
        until = monotonic() + seconds
        with self._changed:
            self._wanted[key] = b""
            self._changed.notify_all()
            while not (self._wanted[key] or monotonic() > until):
                if self._is_lost() or (self.is_over and not to_the_end):
                    break
                self._changed.wait(BEAT)
            return self._wanted.pop(key)

    def settle(self, end: bytes) -> None:
        """Give `end` a value unless it has one, and wait until it has."""
        with self._changed:
            self._settling = self._settling or end
            self._changed.notify_all()
            while not (self.end or self._is_lost()):
                self._changed.wait(BEAT)

    @property
    def is_over(self) -> bool:
        """Check whether a rank has failed or is lost."""
        return self._is_lost() or self.end not in (b"", PUBLISH)

    def is_fresh(self, rank: int) -> bool:
        """Check whether a rank that is watched was there a moment ago."""
        return monotonic() - self._watched[rank][1] < 3 * BEAT

    def close(self) -> None:
        """Send what is still to be sent, and end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(BEAT)  # or it hangs, and ends with the process

    def _is_lost(self) -> bool:
        now = monotonic()
        slept, self._asked = now - self._asked, now
        if slept > 5 * BEAT:  # this process was stopped, and the thread with it
            self._awake += slept
        if now - self._awake > self._limit and not self.lost:
            self.lost = f"the store of the ranks has not answered for {self._limit:g} s"
        return bool(self.lost)

    # What the thread does.

    def _run(self) -> None:
        try:
            while not self._closed or self._out:
                self._round()
                with self._changed:
                    self._awake = monotonic()
                    self._changed.notify_all()
                    if not self._out:
                        self._changed.wait(POLL)
        except Exception as error:  # torch's RuntimeErrors of all kinds
            self.lost = f"the store of the ranks is gone: {str(error).partition(chr(10))[0]}"
        with self._changed:
            self._changed.notify_all()

    def _round(self) -> None:
        """Do all that is to be done."""
        while self._out:
            self._send(*self._out[0])
            self._out.popleft()
        if not self._beats or monotonic() - self._beaten > BEAT:
            self._beat()
        if self._settling and not self.end:
            self.end = self._store.compare_set("end", "", self._settling)
        if not self.end and self._store.check(["end"]):
            self.end = self._store.get("end")
        for key, data in list(self._wanted.items()):
            if not data and self._store.check([key]):
                found = self._fetch(key)
                with self._changed:
                    self._wanted |= {key: found} if key in self._wanted else {}

    def _send(self, key: str, data: bytes) -> None:
        pieces = range(0, len(data), PIECE)
        for number, start in enumerate(pieces):
            self._store.set(f"{key}.{number}", data[start : start + PIECE])
        self._store.set(key, str(len(pieces)))

    def _fetch(self, key: str) -> bytes:
        names = [f"{key}.{number}" for number in range(int(self._store.get(key)))]
        return b"".join(map(self._store.get, names))

    def _beat(self) -> None:
        """Show that this rank is there, and look whether the others are."""
        now = monotonic()
        slept = now - self._beaten
        self._beaten, self._beats = now, self._beats + 1
        self._store.set(f"beat/{self._rank}", f"{self._beats} {self._copied}")
        if slept > 2 * BEAT:  # this process was stopped: it has not watched meanwhile
            self._arrived += slept
            self._watched = {each: (beat, at + slept) for each, (beat, at) in self._watched.items()}
        for rank, beat in self._beats_of_others():
            before, _ = self._watched[rank]
            if beat != before:
                self._arrived = self._arrived if before else now
                self._watched[rank] = beat, now
                self.progress(_copied(beat) - _copied(before))
        if not (self.end and (self.end != PUBLISH or not self._rank)):
            self._look_for_silent(now)

    def _beats_of_others(self) -> list[tuple[int, bytes]]:
        """Return the last beats of all ranks that are watched and have come."""
        names = {rank: f"beat/{rank}" for rank in self._watched}
        come = [
            rank
            for rank, (beat, _) in self._watched.items()
            if beat or self._store.check([names[rank]])
        ]
        beats = self._store.multi_get([names[rank] for rank in come]) if come else []
        return list(zip(come, beats, strict=True))

    def _look_for_silent(self, now: float) -> None:
        for rank, (beat, at) in self._watched.items():
            if now - (at if beat else self._arrived) > self._limit:
                self.end = self._store.compare_set("end", "", self._silent(rank, bool(beat)))
                if self.end == PUBLISH:
                    self.lost = "rank 0 was lost while it moved the output to its place"
                return


def _copied(beat: bytes) -> int:
    """Return how many bytes a rank had copied."""
    return int(beat.split()[1]) if beat else 0
