"""Processes that write one output together, and what they ask of each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

from ckptool.files.copying import Progress

T = TypeVar("T")


class Group(Protocol):
    """Processes of the same program, with the same arguments; `rank` 0 publishes what all write.

    All do the same steps in the same order. What passes from one rank to another is JSON. Where a
    rank fails or is lost, the steps of all raise one error.
    """

    @property
    def rank(self) -> int:
        """Return the number of this process, from 0."""

    @property
    def size(self) -> int:
        """Count the processes."""

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do work on each rank; return what all have made on rank 0, on others their own alone."""

    def share(self, work: Callable[[], T]) -> T:
        """Do work on rank 0 alone; return what that has made on each rank."""

    def counting(self, progress: Progress) -> Progress:
        """Return what counts bytes on this rank; on rank 0, `progress` gets those of all."""

    def begin_publishing(self) -> None:
        """Let rank 0 move the output to its place, and others wait for that; no error comes after.

        Raises the error of a rank that has failed before.
        """

    def fail(self, error: BaseException) -> None:
        """Let all other ranks raise an error, unless one raises theirs already."""

    @property
    def may_remove(self) -> bool:
        """Check that rank 0 moves nothing to its place any more, nor will."""


class Alone:
    """The group of one process."""

    rank, size, may_remove = 0, 1, True

    def gather(self, work: Callable[[], T]) -> list[T]:
        """Do the work."""
        return [work()]

    def share(self, work: Callable[[], T]) -> T:
        """Do the work."""
        return work()

    def counting(self, progress: Progress) -> Progress:
        """Return what counts all bytes."""
        return progress

    def begin_publishing(self) -> None:
        """Wait for nobody."""

    def fail(self, error: BaseException) -> None:
        """Tell nobody."""


ALONE: Group = Alone()
