"""Fuzz ckptool: damaged fixtures of all containers through all commands.

    python tests/fuzz/run.py --minutes 10                  (a seed of the clock)
    python tests/fuzz/run.py --minutes 10 --seed 7 --containers zip,legacy --commands convert
    python tests/fuzz/run.py --case good/plain.pth@7.123   (one case again, in this process)
    python tests/fuzz/run.py --corpus                      (the cases of corpus.txt)
    python tests/fuzz/run.py --minutes 10 --torch          (ask torch, see agree.py)
    python tests/fuzz/run.py --minutes 1 --collect         (add new kinds of outcome to corpus.txt)

Cases run in a process of their own, which is ended where a command hangs and started again after
the case that ended it. Findings go to a folder: the file, and how to see it again. Exit code 1
says that there are some.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
CORPUS = HERE / "corpus.txt"
WORKER = HERE / "run.py"
HANG = 5.0  # seconds without a sign of life
MEMORY = 300 << 20  # address space that a worker may take beyond what it has when it starts, bytes
STARTED = 60.0  # seconds for a worker to start


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--cases", type=int, help="so many cases, instead of minutes")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--containers", default="", help="zip,legacy,safetensors,tar,pickle")
    parser.add_argument("--commands", default="", help="keys,convert,...")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"))
    parser.add_argument("--log", type=Path, help="append one line of JSON about the run")
    parser.add_argument("--collect", action="store_true")
    parser.add_argument("--corpus", action="store_true")
    parser.add_argument("--torch", action="store_true", help="ask torch, see agree.py")
    parser.add_argument("--case", action="append", default=[])
    parser.add_argument("--keep", type=Path, help="with --case: write the damaged file there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        return work(json.loads(given.worker))
    if given.case:
        return again(given)
    return fuzz(given)


# The worker.


def work(job: dict[str, Any]) -> int:
    """Run cases, a line of JSON on stdout before and after each."""
    import resource

    from cases import draw, fixtures, parsed

    faulthandler.register(signal.SIGUSR1)  # the supervisor asks where it hangs
    tell = os.fdopen(os.dup(1), "w", buffering=1)
    names = fixtures(job["containers"])
    corpus = [parsed(name) for name in job["corpus"]]
    number = job["first"]
    with tempfile.TemporaryDirectory(dir=_quick_folder()) as place:
        bench = make_bench(Path(place), job["torch"])
        import ml_dtypes  # noqa: F401  (libraries are no file's doing)

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY * (4 if job["torch"] else 1)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        while number < job["end"]:
            case = corpus[number] if corpus else draw(names, job["seed"], number)
            tell.write(json.dumps({"begin": number, "case": str(case)}) + "\n")
            said = lambda line: tell.write(json.dumps({"line": line}) + "\n")  # noqa: E731
            report = bench.run_case(case, job["commands"], said)
            done = {
                "end": number, "case": str(case), "complaints": report.complaints,
                "signatures": report.signatures, "runs": report.runs, "written": report.written,
            }  # fmt: skip
            tell.write(json.dumps(done) + "\n")
            number += job["step"]
    return 0


def make_bench(place: Path, ask_torch: bool) -> Any:
    """Make what runs a case."""
    if ask_torch:
        from agree import Judge

        return Judge(place)
    from cases import Bench

    return Bench(place)


def _quick_folder() -> str | None:
    """Choose a folder in memory, where there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# The supervisor.


@dataclass
class Tally:
    """What a run of the fuzzer came to."""

    cases: int = 0
    runs: int = 0
    written: int = 0
    findings: dict[str, list[str]] = field(default_factory=dict)  # what, without numbers -> cases
    signatures: dict[str, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    stop: threading.Event = field(default_factory=threading.Event)


def fuzz(given: argparse.Namespace) -> int:
    """Run cases until the time is up; report."""
    corpus = CORPUS.read_text().split() if given.corpus else []
    tally, started = Tally(), time.monotonic()
    deadline = started + 60 * given.minutes if not (given.cases or corpus) else started + 86400
    end = len(corpus) or given.cases or 1 << 60
    threads = [
        threading.Thread(target=supervise, args=(given, tally, deadline, each, end, corpus))
        for each in range(given.jobs)
    ]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except KeyboardInterrupt:  # enough: tell what was found
        tally.stop.set()
        for thread in threads:
            thread.join()
    minutes = (time.monotonic() - started) / 60
    print(
        f"seed {given.seed}: {minutes:.1f} minutes, {tally.cases} cases, {tally.runs} runs, "
        f"{tally.written} files written, {len(tally.signatures)} kinds of outcome, "
        f"{len(tally.findings)} findings"
    )
    for what, cases in tally.findings.items():
        print(f"  {len(cases)} x {what}")
        print(f"      python tests/fuzz/run.py {'--torch ' * given.torch}--case {cases[0]}")
    if given.collect:
        collect(tally)
    if given.log:
        with given.log.open("a") as log:
            numbers = {"seed": given.seed, "minutes": round(minutes, 1), "cases": tally.cases}
            numbers |= {"runs": tally.runs, "findings": len(tally.findings)}
            log.write(json.dumps(numbers) + "\n")
    return 1 if tally.findings else 0


def supervise(
    given: argparse.Namespace,
    tally: Tally,
    deadline: float,
    first: int,
    end: int,
    corpus: list[str],
) -> None:
    """Keep a worker at work; whatever ends it is a finding, and the next one goes on behind it."""
    number = first
    while number < end and time.monotonic() < deadline and not tally.stop.is_set():
        job = {
            "torch": given.torch,
            "seed": given.seed, "first": number, "step": given.jobs, "end": end, "corpus": corpus,
            "containers": [each for each in given.containers.split(",") if each],
            "commands": [each for each in given.commands.split(",") if each],
        }  # fmt: skip
        number = _watch_over(given, tally, deadline, job, number)


def _watch_over(
    given: argparse.Namespace, tally: Tally, deadline: float, job: dict[str, Any], number: int
) -> int:
    """Listen to one worker until it ends, hangs, or the time is up; give the number to go on at."""
    worker = subprocess.Popen(
        [sys.executable, str(WORKER), "--worker", json.dumps(job)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "MALLOC_ARENA_MAX": "1"},  # glibc reserves 64 MiB for each thread
    )  # fmt: skip
    assert worker.stdout is not None
    assert worker.stderr is not None
    lines: queue.Queue[str | None] = queue.Queue()
    said: list[str] = []
    readers = [
        threading.Thread(target=lambda: [*map(lines.put, worker.stdout), lines.put(None)]),
        threading.Thread(target=lambda: said.extend(worker.stderr)),
    ]
    for reader in readers:
        reader.start()
    case = line = ""
    patience = STARTED
    try:
        while time.monotonic() < deadline and not tally.stop.is_set():
            try:
                heard = lines.get(timeout=patience)
            except queue.Empty:
                worker.send_signal(signal.SIGUSR1)
                time.sleep(0.5)
                trace = "".join(said)[-3000:]
                finding(given, tally, case, line, f"hangs for {patience:.0f} s", trace)
                return number + job["step"]
            patience = HANG
            if heard is None:
                if worker.wait() == 0:
                    return int(job["end"])
                trace = "".join(said)[-3000:]
                finding(
                    given, tally, case, line, f"the worker ended with {worker.returncode}", trace
                )
                return number + job["step"]
            told = json.loads(heard)
            case, line = told.get("case", case), told.get("line", line)
            number = told.get("begin", number)
            if "end" in told:
                number = told["end"] + job["step"]
                count(given, tally, told)
        return number
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        for reader in readers:
            reader.join()


def count(given: argparse.Namespace, tally: Tally, told: dict[str, Any]) -> None:
    """Add a case to the tally."""
    with tally.lock:
        tally.cases += 1
        tally.runs += told["runs"]
        tally.written += told["written"]
        for signature in told["signatures"]:
            tally.signatures.setdefault(signature, told["case"])
    for line, what, trace in told["complaints"]:
        finding(given, tally, told["case"], line, what, trace)


def finding(
    given: argparse.Namespace, tally: Tally, case: str, line: str, what: str, trace: str
) -> None:
    """Note a finding; keep the first few files of each kind."""
    place = [each.strip() for each in trace.splitlines() if each.strip().startswith("File")][-1:]
    kind = "".join("#" if each.isdigit() else each for each in f"{what[:80]} {place}")
    with tally.lock:
        cases = tally.findings.setdefault(kind, [])
        cases.append(case)
        if len(cases) > 3:
            return
        folder = given.findings / f"{len(tally.findings):03d}-{len(cases)}"
        folder.mkdir(parents=True, exist_ok=True)
        print(f"finding: {case}: ckptool {line}: {what}", flush=True)
        (folder / "about.txt").write_text(f"{case}\nckptool {line}\n{what}\n{trace}\n")
        if case:
            from cases import make, parsed

            shutil.rmtree(folder / "input", ignore_errors=True)
            (folder / "input").mkdir()
            make(parsed(case), folder / "input")


def collect(tally: Tally) -> None:
    """Add the cases whose outcomes are of a new kind to the corpus, and run what is there."""
    lines = CORPUS.read_text().splitlines() if CORPUS.exists() else []
    cases = dict.fromkeys([*lines, *tally.signatures.values()])
    CORPUS.write_text("".join(f"{case}\n" for case in cases))
    print(f"{len(cases)} cases in {CORPUS.name}, {len(cases) - len(lines)} of them new")


def again(given: argparse.Namespace) -> int:
    """Run named cases in this process, and say all about them."""
    from cases import make, parsed

    found = 0
    with tempfile.TemporaryDirectory(dir=_quick_folder()) as place:
        bench = make_bench(Path(place), given.torch)
        for name in given.case:
            if given.keep:
                given.keep.mkdir(parents=True, exist_ok=True)
                print(make(parsed(name), given.keep))
            report = bench.run_case(parsed(name), tell=lambda line: print(f"ckptool {line}"))
            for line, what, trace in report.complaints:
                print(f"ckptool {line}\n  {what}\n{trace}")
            found += len(report.complaints)
            print(f"{name}: {report.runs} runs, {len(report.complaints)} complaints")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
