"""Faults at the system calls of every writing command: a sample of `python tests/faults/run.py`."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import environment, step

from ckptool.files import copying, publish
from ckptool.files.writing import write_file

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")

FOLDER = Path(__file__).parent / "faults"
sys.path.append(str(FOLDER))

import faults  # noqa: E402

WHOLE = ("4", "17")  # the jobs many of whose faults are tried here: a file, a folder
SAMPLE = 41


def survived(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(FOLDER / "run.py"), *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.long
def test_every_command_survives_a_sample_of_faults() -> None:
    told = survived("--every", str(SAMPLE * step(6)), "--coarse", str(step(6)))
    numbers = [int(number) for number in re.findall(r"\d+", told)]
    assert numbers[0] > 500 // step(10)
    assert min(numbers[1:4]) > 20 // step(10)  # refused, killed, overcome


@pytest.mark.long
def test_one_command_survives_its_faults() -> None:
    """With `--all` one in two; else one in twenty. `faults/run.py` tries every one."""
    jobs = [word for job in WHOLE for word in ("--job", job)]
    assert " 0 wrong" in survived(*jobs, "--every", str(step(20, 2)), "--coarse", str(step(6)))


def test_every_writing_command_is_here() -> None:
    """Those that take the shared options of writing, and the ways in which they write."""
    from ckptool.cli import main as cli

    commands = {
        name
        for names in cli.GROUPS.values()
        for name in names
        if "--in-place" in command_options(name)
    }
    assert commands == {job.arguments[0] for job in faults.JOBS}
    for word in ("--in-place", "--force", "--no-sync", "--untie"):
        assert any(word in job.arguments for job in faults.JOBS), word
    assert {Path(job.target).suffix for job in faults.JOBS} >= {".pth", ".safetensors"}


def command_options(name: str) -> set[str]:
    import importlib

    module = importlib.import_module(f"ckptool.cli.{name.replace('-', '_')}")
    return {option for parameter in module.command.params for option in parameter.opts}


# What the harness must complain of.


def straight_to_the_target(place: Any, output: Any, progress: Any, *_: Any) -> list[str]:
    fd = os.open(place.path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
    write_file(fd, output.files[0], progress)
    os.close(fd)
    return []


def never_tidied(place: Any, output: Any, progress: Any, *_: Any) -> list[str]:
    temporary = f"{place.path}.new"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
    write_file(fd, output.files[0], progress)
    os.close(fd)
    os.replace(temporary, place.path)
    return []


def careless(output: Callable[..., Any]) -> Callable[[], None]:
    def prepare() -> None:
        publish.publish = output

    return prepare


def deaf() -> None:
    """Let workers end without a word when they have no memory."""
    real = copying._Run._work

    def work(run: Any) -> None:
        with suppress(MemoryError):
            real(run)

    copying._Run._work = work  # type: ignore[method-assign]


def test_a_silent_end_of_the_workers_is_found(tmp_path: Path) -> None:
    job = faults.Job("add-prefix {s} out.safetensors", "plain.safetensors", "out.safetensors")
    new, calls = faults.undisturbed(tmp_path, job)
    assert isinstance(new, bytes)
    faults.lay_out(tmp_path / "run", job)
    action = faults.Counter(calls.index("large_pages") + 1, "memory")
    done = faults.run(tmp_path / "run", job, action, deaf)
    found = list(faults.complaints(tmp_path / "run", job, new, done, "memory", "large_pages"))
    assert any("0 of" in line and "bytes of a job were moved" in line for line in found), found


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (careless(straight_to_the_target), "the target is neither old nor new"),
        (careless(never_tidied), "left behind: "),
        (careless(never_tidied), "the error does not name the file"),
    ],
    ids=["straight", "untidy", "unnamed"],
)
def test_carelessness_is_found(tmp_path: Path, prepare: Callable[[], None], said: str) -> None:
    count = faults.Count()
    job = faults.Job("convert --force {s} out.pth", "plain.safetensors", "out.pth", old=True)
    faults.at_each_call(tmp_path, job, count, 7, prepare=prepare)
    assert any(said in line for line in count.wrong), count.wrong[:5]
