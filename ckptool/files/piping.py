"""Output into a pipe: in constant memory, and without a file of it anywhere.

A container with checksums before its bytes (the headers of a zip archive) is read twice, and so is
what is computed: all that may be refused is known before the first byte goes out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ckptool.errors import CkptoolError, Malformed
from ckptool.files.copying import PlannedFile, Progress, no_bytes, run_jobs
from ckptool.files.jobs import Copy
from ckptool.files.stream import Pipe, Stream
from ckptool.tensors import values

_CUT_OFF = "the output is cut off"


def is_read_twice(file: PlannedFile) -> bool:
    """Check whether all has to be read before the first byte can go out."""
    return file.finish is not no_bytes or any(
        values.has_numbers(each.storage) for each in file.jobs
    )


def publish(pipe: Pipe, file: PlannedFile, progress: Progress, accept: Callable[[], None]) -> None:
    """Write a file into a pipe; `accept` raises what is wrong once all was read.

    What ends early lacks its last bytes at least, and the error says so.
    """
    literals, jobs = list(file.literals), sorted(file.jobs, key=_place)
    known = None
    if is_read_twice(file):
        known = run_jobs([replace(job, target=None) for job in file.jobs], None, progress)
        literals += file.finish(known)
        accept()
        jobs = [job for job in jobs if job.target is not None]
    stream = Stream(pipe, file.nbytes, literals)
    try:
        done = dict(zip(jobs, run_jobs(jobs, stream, progress), strict=True))
        if known is None:
            accept()
        elif any(done.get(job, each) != each for job, each in zip(file.jobs, known, strict=True)):
            raise Malformed("an input was changed while it was read")
        stream.close()
    except CkptoolError as error:
        error.message += f"; {_CUT_OFF}"
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_CUT_OFF) from None


def _place(job: Copy) -> tuple[bool, int]:
    """Sort jobs by where they write, what is only read behind them."""
    return job.target is None, job.target or 0
