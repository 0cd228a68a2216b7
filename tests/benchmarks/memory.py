"""Free memory that a virtual machine's host leaves alone while something is timed.

With free page reporting (virtio-balloon), Linux tells the host of a virtual machine which blocks of
2 MiB and more are free, and the host takes them (mm/page_reporting.c). To write to one of them
again takes ten times as long, whatever the program: what is timed then is the host. `cp` is spared,
which asks for small blocks that another copy has just left; who writes by half a MiB, or into large
pages, is not.
"""

import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MIB = 2**20
PAGE = mmap.PAGESIZE
LEFT = 1024 * MIB  # of the free memory, for everything else
LARGE = 128 * MIB  # what a program may have in large pages
REPORTING = 5  # VIRTIO_BALLOON_F_REPORTING (virtio specification, 5.5.3)


@contextmanager
def kept_from_host(nbytes: int) -> Iterator[None]:
    """Keep a page in use of each MiB of so much free memory: such blocks are not reported.

    Nothing is done where none are reported. It takes a few seconds for each GiB.
    """
    nbytes = min(nbytes, free_memory() - LEFT) // MIB * MIB
    if nbytes <= 0 or not are_reported():
        yield
        return
    print(f"keeping {nbytes // MIB} MiB of free memory from the host", file=sys.stderr, flush=True)
    with mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, nbytes, PAGE):
            memory[start] = 1
        for start in range(0, nbytes, MIB):
            memory.madvise(mmap.MADV_DONTNEED, start + PAGE, MIB - PAGE)
        yield


def fetch_large_pages() -> None:
    """Take back from the host what is asked for next in large pages, which are always reported."""
    if not are_reported():
        return
    with mmap.mmap(-1, LARGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_HUGEPAGE)
        for start in range(0, LARGE, PAGE):
            memory[start] = 1


def are_reported() -> bool:
    """Return whether free blocks are reported to a host."""
    devices = Path("/sys/bus/virtio/drivers/virtio_balloon").glob("virtio*/features")
    return any(device.read_text()[REPORTING : REPORTING + 1] == "1" for device in devices)


def free_memory() -> int:
    """Count the bytes of memory that nothing uses, where the system says so."""
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text().splitlines() if meminfo.exists() else []
    found = [line.split()[1] for line in lines if line.startswith("MemFree:")]
    return 1024 * int(found[0]) if found else 0
