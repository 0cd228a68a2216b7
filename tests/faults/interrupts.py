"""Interrupt the copy engine at random times: two threads that wait for each other must not hang.

    python tests/faults/interrupts.py --seconds 60 --seed 1

Each run turns a matrix, which both threads read together first. A run that takes 20 seconds ends
the program with the stack of each thread.
"""

import argparse
import faulthandler
import os
import random
import signal
import sys
import tempfile
import time

from ckptool.files.copying import no_progress, run_jobs
from ckptool.files.fileio import OpenFile
from ckptool.files.jobs import Copy
from ckptool.tensors import numbers, values
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Storage, TensorInfo

SIDE = 2048  # of a matrix of float32, more than one thread takes alone
NBYTES = 4 * SIDE * SIDE
LONGEST = 0.03  # seconds until the signal, longer than nearly all runs
HANGS = 20


def run(folder: str) -> None:
    """Turn the matrix, until a signal comes."""
    target = os.open(os.path.join(folder, "out"), os.O_RDWR | os.O_CREAT)
    storage = Storage(OpenFile(os.path.join(folder, "in")), "0", 0, NBYTES, DType.F32)  # type: ignore[arg-type]
    turned = values.in_order(TensorInfo(DType.F32, (SIDE, SIDE), (1, SIDE), storage))
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(2e-4, LONGEST))
        run_jobs([Copy(turned.storage, 0)], target, no_progress(0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.close(target)


def main() -> int:
    """Interrupt runs for some time, and say how many."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    random.seed(given.seed)
    numbers.load()
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    runs = interrupted = 0
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "in"), "wb") as file:
            file.write(os.urandom(NBYTES))
        end = time.monotonic() + given.seconds
        while time.monotonic() < end:
            faulthandler.dump_traceback_later(HANGS, exit=True)
            runs += 1
            try:
                run(folder)
            except KeyboardInterrupt:  # in the run, or just behind it
                interrupted += 1
    print(f"{runs} runs, {interrupted} interrupted, none hung")
    return 0


if __name__ == "__main__":
    sys.exit(main())
