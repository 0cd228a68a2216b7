"""A short run of the fuzzer, its corpus, and the proof that it would find something."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FIXTURES, environment, sampled, step

FUZZ = Path(__file__).parent / "fuzz"
sys.path.insert(0, str(FUZZ))  # tests/faults has a run.py too

import cases  # noqa: E402
import mutate  # noqa: E402
import run as fuzzer  # noqa: E402

SEEDS = (FUZZ / "seeds.txt").read_text(encoding="utf-8").split()


def fuzzed(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FUZZ / "run.py"), "--findings", str(folder), *arguments],
        capture_output=True, text=True, timeout=300, check=False, env=environment(),
    )  # fmt: skip


@pytest.mark.thorough
def test_the_corpus_finds_nothing(tmp_path: Path) -> None:
    """One case for each kind of outcome that was ever seen."""
    done = fuzzed(tmp_path, "--corpus")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" {len(fuzzer.CORPUS.read_text().split())} cases," in done.stdout


@pytest.mark.parametrize("seed", sampled(SEEDS, 3))
def test_a_short_run_finds_nothing(tmp_path: Path, seed: str) -> None:
    count = 200 // step(4)
    done = fuzzed(tmp_path, "--seed", seed, "--cases", str(count))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f" {count} cases, {5 * count} runs" in done.stdout


@pytest.mark.parametrize("name", [name for name in cases.fixtures() if "good" in name][::9])
def test_a_case_is_the_same_each_time(tmp_path: Path, name: str) -> None:
    case = cases.parsed(f"{name}+good/tied.pth@1.2")
    places = [tmp_path / "one", tmp_path / "other"]
    for place in places:
        place.mkdir()
    one, other = (cases.make(case, place) for place in places)
    assert cases.snapshot(one.parent).keys() == cases.snapshot(other.parent).keys()
    assert [each for _, each in cases.snapshot(one.parent).values()] == [
        each for _, each in cases.snapshot(other.parent).values()
    ]
    assert str(cases.parsed(str(case))) == str(case)


def test_every_container_is_taken_apart() -> None:
    """A mutation that always fell back to plain bytes would be none."""
    good = FIXTURES / "good"
    for name, change in (
        ("plain.pth", mutate.change_record),
        ("plain.pth", mutate.change_members),
        ("plain.pth", mutate.change_header),
        ("plain.pth", mutate.change_directory),
        ("plain_legacy.pth", mutate.change_legacy),
        ("plain.safetensors", mutate.change_json),
        ("torch_0_1.tar", mutate.change_tar),
        ("plain_pickle.pkl", mutate.change_pickle),
    ):
        data = (good / name).read_bytes()
        assert change in mutate.BY_KIND[mutate.kind_of(data)]
        made = {change(cases.Random(seed), data) for seed in range(60)}
        assert len(made) > 20, (name, change)


# What the fuzzer must complain of.


class Bench(cases.Bench):
    """A bench whose command line is another program."""

    def __init__(self, place: Path, program: Any) -> None:
        self.program = program
        super().__init__(place)

    def run(self, line: tuple[str, str], arguments: list[str]) -> cases.Run:
        real, cases.cli.main = cases.cli.main, self.program
        try:
            return super().run(line, arguments)
        finally:
            cases.cli.main = real


@pytest.fixture
def undisturbed() -> Iterator[None]:
    """Undo what a bench does to the command line."""
    real = cases.cli._trace
    yield
    cases.cli._trace = real


def raises(arguments: list[str]) -> int:
    raise ValueError("boom")


def says(code: int, out: str = "", err: str = "") -> Any:
    def program(arguments: list[str]) -> int:
        print(out, end="")
        print(err, end="", file=sys.stderr)
        return code

    return program


def leaves(name: str, code: int) -> Any:
    def program(arguments: list[str]) -> int:
        Path(name).write_bytes(b"new")
        return says(code, err="error[malformed]: x\n" if code else "")([])

    return program


def opens(arguments: list[str]) -> int:
    with open("/etc/hostname", "rb"):
        return says(3, err="error[malformed]: x\n")([])


def executes(arguments: list[str]) -> int:
    os.system("true")
    return says(3, err="error[malformed]: x\n")([])


def takes_memory(arguments: list[str]) -> int:
    return len(bytearray(os.urandom(1 << 20) * 300)) * 0 + says(3, err="error[malformed]: x\n")([])


def takes_time(arguments: list[str]) -> int:
    start = time.process_time()
    while time.process_time() - start < 0.2:
        pass
    return says(3, err="error[malformed]: x\n")([])


WRONG = {
    "an exception left main": raises,
    "exit code 70": says(70, err="error[bug]: x\n"),
    "data on stdout": says(3, "data", "error[malformed]: x\n"),
    "0 errors": says(3),
    "2 errors": says(3, err="error[malformed]: x\nerror[malformed]: x\n"),
    "an error at exit code 0": says(0, "{}", "error[malformed]: x\n"),
    "a traceback": says(3, err="error[malformed]: Traceback\n"),
    "characters that a terminal obeys": says(3, err="error[malformed]: \x1b[31m\n"),
    "audit event open /etc/hostname": opens,
    "audit event os.system": executes,
    "rest.tmp was changed, made or removed": leaves("rest.tmp", 3),
    "in.pth was changed": leaves("in.pth", 3),
    "out.pth was changed": leaves("out.pth", 3),
    "the output does not read back": leaves("out.pth", 0),
    "no out.pth at exit code 0": says(0, "{}"),
    "large: ": takes_memory,
    "slow: ": takes_time,
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: None, what: str
) -> None:
    monkeypatch.setattr(cases, "SLOW", 0.1)
    bench = Bench(tmp_path, WRONG[what])
    report = cases.Report(case := cases.parsed("good/plain.pth@1.1"))
    folder = tmp_path / "case"
    folder.mkdir()
    bench._run_line(report, folder, cases.make(case, folder), ("convert", "{s} {p}"))
    assert any(each.startswith(what) for _, each, _ in report.complaints), report.complaints


@pytest.mark.thorough
def test_hanging_and_dying_workers_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The supervisor ends a worker that hangs, and goes on behind a case that killed one."""
    for body, what in (
        ("import time; time.sleep(60)", "hangs for 2 s"),
        ("import os; os.abort()", "the worker ended with -6"),
    ):
        worker = tmp_path / "worker.py"
        begun = '{"begin": 0, "case": "good/plain.pth@1.0"}'
        worker.write_text(f"import sys\nprint('{begun}', flush=True)\n{body}\n")
        monkeypatch.setattr(fuzzer, "HANG", 2.0)
        monkeypatch.setattr(fuzzer, "WORKER", worker)
        monkeypatch.setattr(
            sys, "argv", ["run.py", "--cases", "1", "--findings", str(tmp_path / "found")]
        )
        assert fuzzer.main() == 1
        assert what in capsys.readouterr().out
        assert (tmp_path / "found/001-1/input/in.pth").exists()
