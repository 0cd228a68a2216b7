"""Convert and check a checkpoint as the action's inputs say; write its summary and outputs.

Inputs come as environment variables. What ckptool prints is kept from being taken for commands of
the workflow (`::set-output ...`), since names in it are those of a file from anywhere.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

COMMANDS = ("convert", "strip-prefix", "add-prefix", "unwrap", "transfer")


def main() -> int:
    """Run the command, then `check` on what it wrote; return the first exit code that is not 0."""
    command, source, target = (os.environ[name] for name in ("COMMAND", "INPUT", "OUTPUT"))
    if command not in COMMANDS:
        print(f"error: the input `command` is one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    recipe = os.environ["RECIPE"]
    options = [*([f"--recipe={recipe}"] if recipe else []), *arguments("OPTIONS")]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    done = ckptool(command, "--json", *options, "--", source, target)
    rows = [("input", source), ("output", target)]
    if done.returncode:
        summarize(command, [*rows, ("failed", f"exit code {done.returncode}")], said(done.stderr))
        return done.returncode
    written = json.loads(done.stdout)
    rows += [("tensors", counts(written))]
    rows += [("not written", ", ".join(written["not_carried"]))] if written["not_carried"] else []

    sums = [] if Path(target).is_dir() else ["--sha256"]
    checked = ckptool("check", "--json", *sums, *arguments("CHECK"), "--", target)
    files = json.loads(checked.stdout)["files"] if checked.stdout else []
    rows += [(f"check: {file['status']}", file["detail"]) for file in files]
    summarize(command, rows, said(checked.stderr) if checked.returncode else [])
    if not checked.returncode:
        outputs(path=target, sha256=files[0]["sha256"] or "", tensors=str(written["written"]))
    return checked.returncode


def arguments(name: str) -> list[str]:
    """Return the lines of an input, each an argument."""
    return [line.strip() for line in os.environ[name].splitlines() if line.strip()]


def ckptool(*given: str) -> subprocess.CompletedProcess[str]:
    """Run ckptool, and show what it says."""
    line = [sys.executable, "-P", "-m", "ckptool", *given]
    done = subprocess.run(line, capture_output=True, encoding="utf-8", check=False)
    token = secrets.token_hex(16)
    print(f"::stop-commands::{token}\n{done.stderr}\n::{token}::", flush=True)
    return done


def counts(written: dict[str, object]) -> str:
    """Return the line of counts of a document `rewrite/1`."""
    dropped = len(written["dropped"])  # type: ignore[arg-type]
    read, renamed, out = (written[name] for name in ("read", "renamed", "written"))
    return f"read {read}, renamed {renamed}, dropped {dropped}, written {out}"


def said(talk: str) -> list[str]:
    """Return the lines of what was said of a failure, as text or as the document of an error."""
    try:
        error = json.loads(talk)
        return [f"error[{error['error']}]: {error['message']}", *error["evidence"], error["hint"]]
    except ValueError:
        return talk.splitlines()


def summarize(command: str, rows: list[tuple[str, str]], talk: list[str]) -> None:
    """Append a table to the summary of the job, and what was said of a failure."""
    table = [f"### ckptool {command}", "", "| | |", "|---|---|"]
    table += [f"| {inert(name)} | {inert(value)} |" for name, value in rows]
    table += ["", *(f"{inert(line)}<br>" for line in talk)] if talk else []
    with open(os.environ["GITHUB_STEP_SUMMARY"], "a", encoding="utf-8") as summary:
        summary.write("\n".join([*table, "", ""]))


def inert(text: str) -> str:
    """Return text that neither Markdown nor HTML reads anything into."""
    return "".join(each if each.isalnum() or each == " " else f"&#{ord(each)};" for each in text)


def outputs(**values: str) -> None:
    """Set the outputs of the step; no value ends before its own random delimiter."""
    with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
        for name, value in values.items():
            end = secrets.token_hex(16)
            file.write(f"{name}<<{end}\n{value}\n{end}\n")


if __name__ == "__main__":
    sys.exit(main())
