"""Let every system call of every writing command fail, in every way: `python tests/faults/run.py`.

Counts the faults that were survived; exit code 1 says that one was not. `--every N` takes a sample
of the calls, `--coarse N` one of the limits and of the disks.
The full disks are small tmpfs mounts, where this process may mount (as root).
"""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from faults import JOBS, Count, at_each_call, at_each_size, lay_out, on_full_disks

from ckptool.cli import main as cli


def main() -> int:
    """Run all jobs with all faults."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=1, help="only every n-th fault")
    parser.add_argument("--coarse", type=int, default=1, help="only every n-th limit and disk")
    parser.add_argument("--job", type=int, action="append", help="only the n-th command line")
    given = parser.parse_args()
    started, total = time.monotonic(), Count()
    warm_up()
    with tempfile.TemporaryDirectory() as name:
        for number, job in enumerate(JOBS):
            if given.job and number not in given.job:
                continue
            count = Count()
            at_each_call(Path(name), job, count, given.every, number % given.every)
            if not job.folder:
                at_each_size(Path(name), job, count, max(24 // given.coarse, 1))
            disk = Path(name) / "disk"
            disk.mkdir(exist_ok=True)
            if not job.folder and can_mount(disk):
                on_full_disks(disk, partial(remount, disk), job, count, given.coarse)
                subprocess.run(["umount", str(disk)], check=True)
            print(f"{' '.join(job.arguments)}: {told(count)}", flush=True)
            total.faults += count.faults
            total.killed += count.killed
            total.handled += count.handled
            total.wrong += count.wrong
    for line in total.wrong:
        print(line)
    print(f"{told(total)} in {time.monotonic() - started:.0f} s")
    return 1 if total.wrong else 0


def told(count: Count) -> str:
    """Write a count."""
    return (
        f"{count.faults} faults: {count.handled} refused, {count.killed} killed, "
        f"{count.faults - count.handled - count.killed} overcome, {len(count.wrong)} wrong"
    )


def warm_up() -> None:
    """Load what the forks would load, each on its own: run each command line once."""
    for job in JOBS:
        with tempfile.TemporaryDirectory() as name:
            lay_out(Path(name, "run"), job)
            quiet = redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO())
            with chdir(Path(name, "run")), quiet[0], quiet[1]:
                assert cli.main(job.arguments) == 0, job


def can_mount(disk: Path) -> bool:
    """Mount a small file system, where that is allowed."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(disk)]
    try:
        return subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def remount(disk: Path, nbytes: int) -> None:
    """Give the file system another size, and nothing in it."""
    for path in disk.iterdir():
        shutil.rmtree(path)
    subprocess.run(["mount", "-o", f"remount,size={nbytes}", str(disk)], check=True)


if __name__ == "__main__":
    sys.exit(main())
