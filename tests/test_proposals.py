"""Every command that `info`, an error or a note proposes works when it is pasted into a shell.

A proposal is what follows `ckptool` up to the end of its line, to three spaces or to a backtick.
Each file is asked in many ways, as it is and as a member of archives; all that the answers propose
is split by bash, run, and what it writes is loaded.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from conftest import FIXTURES, Outcome, sampled, step

from ckptool.cli.main import ckptool

torch = pytest.importorskip("torch")
judge = pytest.importorskip("judge")
safetensors_torch = pytest.importorskip("safetensors.torch")

Run = Callable[..., Outcome]
CORPUS = Path(os.environ.get("CKPTOOL_CORPUS") or "no corpus")
INDEX = CORPUS / "index.json"
COMMAND = re.compile(r"(?:^|[\s`:(])(ckptool [a-z][a-z-]* .+?)(?=   |`|$)", re.MULTILINE)
HINT = re.compile(r"hint: (.*)")
LOOKS = ("info", "keys", "check", "diff", "verify")
# The structure is sound, and what is wrong with the bytes only reading them shows.
DAMAGED = "damaged at "
# How a file is asked; `{}` is the file.
QUESTIONS = """
    info {} | info --json {} | keys {} | keys --at nowhere {} | keys --select nothing.like.it {}
    check {} | diff {} {} | diff --at nowhere {} {} | unwrap {} asked.pth | strip-prefix {} asked
    strip-prefix --prefix nothing {} asked | strip-prefix --every {} asked
    convert {} asked.safetensors | convert {} asked.pth | convert --untie {} asked.safetensors
    convert --drop nothing.like.it {} asked | convert --max-shard-size 1kB {} asked_folder
    transfer {} asked.pth | transfer --like {} {} asked.pth | transfer --like plain.pth {} asked.pth
    add-prefix --in-place {} | convert --to dcp {} asked_folder | keys --all {} | check --finite {}
    convert --strip-prefix nothing {} asked | convert --rename nothing=like {} asked
    transfer --drop nothing.like.it {} asked | convert {} asked.gguf | keys --select weight {}
    diff --ignore-prefix nothing {} {} | diff --map nothing=like {} {} | diff {} plain.pth
    diff --left-at nowhere {} {} | transfer --like plain.pth --like-at nowhere {} asked
""".replace("\n", "|")


def fixtures() -> Iterator[Path]:
    for kind in ("good", "frameworks", "hostile"):
        yield from sorted((FIXTURES / kind).iterdir())


def of_corpus() -> list[Path]:
    if not INDEX.exists():
        return sorted(
            path for path in CORPUS.rglob("*") if path.is_file() and path.suffix != ".tsv"
        )
    return [CORPUS / row["path"] for row in json.loads(INDEX.read_text(encoding="utf-8"))]


FILES = [*fixtures(), *of_corpus()]
SLOW = ("module_laughs.pth", "expanded_far.pth")  # to read, or to write: with --all alone
by_name = {"ids": lambda path: path.name}


def proposals(text: str) -> list[str]:
    """List the commands that a text proposes."""
    return COMMAND.findall(text)


def proposed_by(outcome: Outcome) -> list[str]:
    """List what an answer proposes, in its data and in its talk; the options of hints exist."""
    if outcome.out.startswith("{"):
        suggested = outcome.document.get("suggestions", [])
        found = [command for each in suggested for command in [each["command"]]]
    else:
        rows = (row.split("\t") for row in outcome.out.splitlines())
        found = [row[2] for row in rows if row[0] == "suggestion"]
    return [*found, *proposals(outcome.err)]


def words(command: str) -> list[str]:
    """Split a command as bash does."""
    script = f"ckptool() {{ printf '%s\\0' \"$@\"; }}; {command}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, check=True)
    return [os.fsdecode(word) for word in done.stdout.split(b"\0")[:-1]]


def refuse_unknown_options(asked: str, hint: str) -> None:
    """Fail for an option in a hint that neither the command asked nor one it names has."""
    context = click.Context(ckptool)
    commands = [
        ckptool.get_command(context, n) for n in (asked, *re.findall(r"ckptool (\S+)", hint))
    ]
    known = {
        opt for each in commands if each for parameter in each.params for opt in parameter.opts
    }
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", hint))
    assert "git " in hint or options <= known, (asked, hint)


def written(arguments: list[str]) -> Path:
    """Return what a command writes."""
    context = click.Context(ckptool)
    command = ckptool.get_command(context, arguments[0])
    given, _, _ = command.make_parser(click.Context(command)).parse_args(arguments[1:])
    return Path(given["paths"][-1])


def loads(path: Path, run: Run) -> str:
    """Return why what was written does not load, or nothing."""
    if path.is_dir():
        return "" if run("check", path).code == 0 else "check refuses it"
    found = run("info", "--json", path)
    if found.code or run("check", path).code:
        return found.err or "check refuses it"
    document = found.document
    if document["container"] == "safetensors":
        safetensors_torch.load_file(path)
        return ""
    if document["safety"] == "plain" and document["protocol"] in (2, None):
        try:
            judge.load(path)
        except Exception as error:
            return "" if document["protocol"] and reads(path) else f"torch refuses it: {error}"
    return ""


def reads(path: Path) -> bool:
    """Check whether the standard pickle reads it, which knows all opcodes and Python 2's text.

    Only for what names nothing but what torch accepts.
    """
    return bool(torch.load(path, weights_only=False, encoding="latin1"))


def placed(path: Path, folder: Path) -> str:
    """Put a file, or what is in a folder, into another by links; return its name."""
    if path.is_dir():
        for inner in path.rglob("*"):
            target = folder / path.name / inner.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            if inner.is_file():
                target.symlink_to(inner.resolve())
    else:
        (folder / path.name).symlink_to(path.resolve())
    if not (folder / "plain.pth").exists():
        (folder / "plain.pth").symlink_to(FIXTURES / "good" / "plain.pth")
    return path.name


def ask(run: Run, name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Ask a file in every way, and run all that the answers propose; return how many that were."""
    monkeypatch.chdir(folder)
    before = {entry.name for entry in folder.iterdir()}
    done: set[str] = set()
    wrong = []
    for question in [*QUESTIONS.split("|"), *questions_at(run, name)]:
        arguments = [word.format(name) for word in question.split()]
        if not arguments or ("--in-place" in arguments and os.path.islink(name)):
            continue
        answer = run(*arguments)
        assert answer.code != 70, answer.err
        for hint in HINT.findall(answer.err):
            refuse_unknown_options(arguments[0], hint)
        for command in proposed_by(answer):
            if command in done:
                continue
            done.add(command)
            clear(folder, before)
            asked = " ".join(arguments)
            wrong += [f"{asked}\n  -> {why}" for why in paste(run, command, slug_of(answer))]
        clear(folder, before)
    assert not wrong, "\n".join(wrong)
    assert not (folder / "ckptool-was-executed").exists()
    return len(done)


def questions_at(run: Run, name: str) -> Iterator[str]:
    """Yield questions about each place where tensors are, quoted so that `split` keeps them."""
    answer = run("info", "--json", name)
    for each in answer.document["candidates"][:4] if answer.code == 0 else []:
        at = ".".join(each["at"]) or "."
        if " " not in at and "{" not in at:
            for question in ("info --json", "keys"):
                yield f"{question} --at {at} {{}}"
            for question in ("unwrap", "strip-prefix", "convert --untie"):
                yield f"{question} --at {at} {{}} asked"


def clear(folder: Path, keep: set[str]) -> None:
    for entry in folder.iterdir():
        if entry.name not in keep:
            if entry.is_dir() and not entry.is_symlink():
                clear(entry, set())
                entry.rmdir()
            else:
                entry.unlink()


def paste(run: Run, command: str, before: str) -> Iterator[str]:
    """Run a command; yield what is wrong with it.

    What an error (its slug is `before`) proposes mends that error; it may meet another one, which
    then was in the question too.
    """
    arguments = words(command)
    outcome = run(*arguments)
    slug = slug_of(outcome)
    if outcome.code and any(sign in outcome.err for sign in BAD_BYTES):
        return
    if slug == "no-space" and "--allow-expand" in arguments:  # 4 GiB, which a disk may not have
        return
    match arguments[0]:
        case "info":  # a look, which says what a file is that is not a checkpoint
            fine = outcome.code in (0, 3)
        case "check" | "diff":
            fine = not slug
        case _:
            fine = outcome.code == 0
    further = [each for each in proposals(outcome.err) if before and each != command]
    if further and not fine:
        yield from paste(run, further[0], slug)
    elif not fine and not (before and slug in DESERVED and slug != before):
        yield f"{command}\n     exit {outcome.code}: {outcome.err}"
    elif arguments[0] not in LOOKS and outcome.code == 0:
        why = loads(written(arguments), run)
        if why:
            yield f"{command}\n     {why}"


def slug_of(outcome: Outcome) -> str:
    found = re.search(r"error\[([a-z-]+)\]", outcome.err)
    return found[1] if found else ""


# What questions about `nothing` and `nowhere`, or without the place of a state_dict, come to next.
DESERVED = """
    edit-error no-state-dict nothing-matched no-such-key
    unsafe-pickle poor-fit key-collision not-representable
""".split()
# Of records that are damaged, which only reading them shows.
BAD_BYTES = (
    "does not match its checksum",
    "does not unpack",
    "ends too early",
    "is damaged",
    "longer than declared",
)


@pytest.mark.parametrize(
    "path",
    [path for path in sampled(FILES, 41) if step(2) == 1 or path.name not in SLOW],
    **by_name,
)
def test_what_is_proposed_for_a_file_works(
    run: Run,
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    name = placed(path, tmp_path)
    record_property("proposals", ask(run, name, tmp_path, monkeypatch))


def packed(path: Path, kind: str, folder: Path) -> str:
    """Put a file into an archive, and name the member as ckptool does."""
    data = path.read_bytes()
    if kind == "gz":
        with gzip.open(folder / f"{path.name}.gz", "wb", compresslevel=1) as packed:
            packed.write(data)
        return f"{path.name}.gz::{path.name}"
    if kind == "zip":
        with zipfile.ZipFile(folder / "a b.zip", "w", zipfile.ZIP_DEFLATED) as opened:
            opened.writestr(f"inner/{path.name}", data)
        return f"a b.zip::inner/{path.name}"
    with tarfile.open(folder / "archive.tar.gz", "w:gz", compresslevel=1) as tar:
        tar.add(path.resolve(), f"inner/{path.name}")
    return f"archive.tar.gz::inner/{path.name}"


KINDS = itertools.cycle(["gz", "zip", "tar.gz"])
MEMBERS = [(path, kind) for path, kind in zip(FILES, KINDS, strict=False) if path.is_file()]


@pytest.mark.parametrize(("path", "kind"), sampled(MEMBERS, 50, 4), ids=str)
def test_what_is_proposed_for_a_member_of_an_archive_works(
    run: Run,
    path: Path,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    name = packed(path, kind, tmp_path)
    (tmp_path / "plain.pth").symlink_to(FIXTURES / "good" / "plain.pth")
    record_property("proposals", ask(run, name, tmp_path, monkeypatch))
