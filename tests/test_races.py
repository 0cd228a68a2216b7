"""Kills, races of two writers and inputs that are replaced: a sample of `tests/faults/races.py`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment, step

SCRIPT = Path(__file__).parent / "faults/races.py"
INTERRUPTS = SCRIPT.with_name("interrupts.py")


@pytest.mark.long
@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
def test_whatever_comes_between_no_message_is_wrong() -> None:
    runs = 60 // step(30)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--runs", str(runs)], env=environment(),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = re.findall(rf"^(\w+): {runs} runs in \d+ s, 0 wrong", done.stdout, re.MULTILINE)
    assert told == ["kill", "race", "replaced"]


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="signals come from a timer")
def test_threads_that_wait_for_each_other_end_when_one_is_interrupted() -> None:
    seconds = str(60 // step(20))
    done = subprocess.run(
        [sys.executable, str(INTERRUPTS), "--seconds", seconds], env=environment(),
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\d+ runs, [1-9]\d* interrupted, none hung\n", done.stdout), done.stderr
