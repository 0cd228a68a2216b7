"""Storages of files in the memory of a GPU: read on several threads, copied on streams meanwhile.

A copy of pageable memory goes through a small pinned buffer of the driver and waits for it
(docs.nvidia.com/cuda, "cudaMemcpyAsync"). Here each worker has two pinned buffers and a stream of
its own: while one buffer is copied, the other is read into. There is one allocation for all; what a
file has side by side is read at once.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import field
from typing import Any

from ckptool.files.fileio import Readers
from ckptool.model import libraries
from ckptool.records import dataclass
from ckptool.tensors.tensor import Storage

ALIGNMENT = 512  # of each storage, as the allocator of CUDA has it (CUDACachingAllocator.cpp)
CHUNK = 16 << 20  # of a pinned buffer
GAP = 64 << 10  # reading on takes less time than another read
WORKERS = 8
BUFFERS = 2  # of a worker


@dataclass(frozen=True, slots=True)
class Copies:
    """How bytes get to a device: buffers to read into, and streams and events as of `torch.cuda`.

    `copy(stream, target, source)` begins a copy, which `event.record(stream)` and then
    `event.synchronize()` wait for.
    """

    buffer: Callable[[int], Any]
    stream: Callable[[], Any]
    event: Callable[[], Any]
    copy: Callable[[Any, Any, Any], object]


def of_cuda(device: Any) -> Copies:
    """Return the copies to a CUDA device."""
    torch = libraries.torch()

    def stream() -> Any:
        made = torch.cuda.Stream(device)
        made.wait_stream(torch.cuda.current_stream(device))  # which may still use that memory
        return made

    def copy(stream: Any, target: Any, source: Any) -> None:
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)

    return Copies(
        buffer=lambda nbytes: torch.empty(nbytes, dtype=torch.uint8, pin_memory=True),
        stream=stream,
        event=torch.cuda.Event,
        copy=copy,
    )


@dataclass(frozen=True, slots=True)
class _Read:
    """A range of a file, and what of it goes where: offset in it, bytes, place in memory."""

    path: str
    start: int
    stop: int
    pieces: list[tuple[int, int, int]]


def load(storages: Iterable[Storage], device: Any, copies: Copies) -> dict[Storage, Any]:
    """Return storages of a device with the bytes of plain ones, all in one allocation.

    Raises what reading raises.
    """
    torch = libraries.torch()
    places: dict[Storage, int] = {}
    total = 0
    for storage in sorted({*storages}, key=lambda each: (each.path, each.start)):
        places[storage] = total
        total += -(-storage.nbytes // ALIGNMENT) * ALIGNMENT
    memory = torch.empty(total, dtype=torch.uint8, device=device)
    reads = deque(_reads(places))
    nbytes = max((read.stop - read.start for read in reads), default=0)
    with closing(Readers()) as readers, ThreadPoolExecutor(WORKERS) as pool:
        count = min(WORKERS, len(reads), os.cpu_count() or 1)
        working = [pool.submit(_work, reads, memory, readers, copies, nbytes) for _ in range(count)]
        for each in working:
            each.result()
    whole = memory.untyped_storage()
    return {each: whole[place : place + each.nbytes] for each, place in places.items()}


def _reads(places: dict[Storage, int]) -> Iterator[_Read]:
    """Cut storages into pieces, and join those that are near each other, up to a buffer."""
    last: _Read | None = None
    for storage, place in places.items():
        for at in range(0, storage.nbytes, CHUNK):
            start, nbytes = storage.start + at, min(CHUNK, storage.nbytes - at)
            near = last is not None and last.path == storage.path and start - last.stop <= GAP
            if last is None or not near or start + nbytes - last.start > CHUNK:
                if last is not None:
                    yield last
                last = _Read(storage.path, start, start, [])
            pieces = [*last.pieces, (start - last.start, nbytes, place + at)]
            last = _Read(last.path, last.start, max(last.stop, start + nbytes), pieces)
    if last is not None:
        yield last


@dataclass(slots=True)
class _Buffer:
    """A buffer, and the event after which it may be read into again."""

    memory: Any
    view: memoryview = field(init=False)
    free: Any = None

    def __post_init__(self) -> None:
        self.view = memoryview(self.memory.numpy())


def _work(reads: deque[_Read], memory: Any, readers: Readers, copies: Copies, nbytes: int) -> None:
    """Read into buffers of so many bytes, and copy, until nothing is left or somebody failed."""
    stream = copies.stream()
    buffers = deque(_Buffer(copies.buffer(nbytes)) for _ in range(BUFFERS))
    try:
        while (read := _next(reads)) is not None:
            buffer = buffers[0]
            buffers.rotate()
            if buffer.free is not None:
                buffer.free.synchronize()
            readers[read.path].read_into(buffer.view[: read.stop - read.start], read.start)
            for offset, nbytes, place in read.pieces:
                source = buffer.memory[offset : offset + nbytes]
                copies.copy(stream, memory[place : place + nbytes], source)
            buffer.free = copies.event()
            buffer.free.record(stream)
    except BaseException:
        reads.clear()
        raise
    finally:
        for buffer in buffers:  # before anybody uses the memory, or frees it
            if buffer.free is not None:
                buffer.free.synchronize()


def _next(reads: deque[_Read]) -> _Read | None:
    try:
        return reads.popleft()
    except IndexError:
        return None
