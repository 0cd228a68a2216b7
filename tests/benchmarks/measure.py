"""Run one command and print its exit status, wall, user and system seconds and peak bytes.

A process of its own, because Linux hands memory readings on: the peak of what `exec` replaces is
counted as a peak of the new program (`exec_mmap` in fs/exec.c), after fork and vfork alike. So the
floor under every reading is this interpreter; run it with `-I -S` and let it import nothing more.

usage: python -I -S measure.py STDERR_FILE COMMAND [ARGUMENT ...]
"""

import os
import sys
import time


def main(stderr: str, command: list[str]) -> None:
    """Spawn the command with its output thrown away, wait for it, and print the five numbers."""
    actions = (
        (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
        (os.POSIX_SPAWN_OPEN, 2, stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600),
    )
    start = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=actions)
    _, status, usage = os.wait4(child, 0)
    wall = time.perf_counter() - start
    # macOS counts ru_maxrss in bytes, Linux in KiB
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(os.waitstatus_to_exitcode(status), wall, usage.ru_utime, usage.ru_stime, peak)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
