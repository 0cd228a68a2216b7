"""The command line as users and scripts meet it: exit code, stdout, stderr, and the file."""

from __future__ import annotations

import ast
import inspect
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import unicodedata
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest
from conftest import Outcome, environment, listing

import ckptool
from ckptool.cli import main as cli
from ckptool.errors import CkptoolError
from ckptool.state import edits

Run = Callable[..., Outcome]
PACKAGE = Path(ckptool.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
ROOT = Path(__file__).parent.parent.parent
COMMANDS = [name for names in cli.GROUPS.values() for name in names]
WRITERS = ["strip-prefix", "add-prefix", "unwrap", "transfer", "convert", "average"]

# A run of a command with every read slowed down, so that a test can step in while it copies.
SLOW = """
import os, sys, time
PAUSE = 0.04
for name in ("preadv", "pread", "copy_file_range", "sendfile"):
    if hasattr(os, name):
        def slow(*arguments, real=getattr(os, name)):
            time.sleep(PAUSE)
            return real(*arguments)
        setattr(os, name, slow)
from ckptool.cli.main import entry
entry()
"""
# To its end in about a second, which is long enough to show how far it is.
SLOWISH = "from ckptool.cli import talk; talk.BAR_AFTER = 0.1\n" + SLOW.replace("0.04", "0.006")


def everything(ours: int) -> bytes:
    """Read what a program shows until it ends."""
    shown = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # Linux says so when the last one has closed it
            break
        if not data:
            break
        shown += data
    os.close(ours)
    return shown


def on_terminal(
    *arguments: object,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    program: tuple[str, ...] = ("-m", "ckptool"),
) -> tuple[int, str]:
    """Run a command line on a pseudo-terminal; give its exit code and all that it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=cwd,
        env=environment({"TERM": "xterm-256color", **(env or {})}),
    )
    os.close(theirs)
    shown = everything(ours)
    return process.wait(timeout=60), shown.decode()


# Exit codes.

# arguments ({g} is the folder of good fixtures, {h} of hostile ones), exit code, slug
REFUSED = [
    ("transfer {g}/model_best.pth.tar out.pth --like {g}/tied.pth", 1, "poor-fit"),
    ("strip-prefix {g}/data_parallel.pth", 2, "usage"),
    ("keys", 2, "usage"),
    ("keys --no-such-option {g}/plain.pth", 2, "usage"),
    ("keys --depth 2 {g}/plain.pth", 2, "usage"),
    ("unwrap {g}/plain.pth {g}/plain.pth out.pth", 2, "usage"),
    ("convert --to pickle {g}/plain.pth out.pth", 2, "usage"),
    ("transfer --min-match 2 {g}/plain.pth out.pth", 2, "usage"),
    ("stripprefix {g}/data_parallel.pth out.pth", 2, "no-such-command"),
    ("strip-prefix {g}/plain.pth out.pth", 2, "nothing-matched"),
    ("strip-prefix --every {g}/part_prefixed.pth out.pth", 2, "edit-error"),
    ("strip-prefix --prefix auto --every {g}/compiled.pth out.pth", 2, "edit-error"),
    ("strip-prefix --prefix auto {g}/plain.pth out.pth", 2, "nothing-matched"),
    ("strip-prefix {g}/collision.pth out.pth", 2, "key-collision"),
    ("strip-prefix {g}/dino.pth out.pth", 2, "ambiguous-state-dict"),
    ("unwrap {g}/plain.pth out.pth", 2, "edit-error"),
    ("keys --at nowhere {g}/plain.pth", 2, "no-such-key"),
    ("keys --select nothing {g}/plain.pth", 2, "nothing-matched"),
    ("keys --select re:( {g}/plain.pth", 2, "edit-error"),
    ("keys --select @missing.txt {g}/plain.pth", 2, "edit-error"),
    ("average {g}/plain.pth", 2, "usage"),
    ("average {g}/plain.pth {g}/tied.pth out.pth", 2, "edit-error"),
    ("average {g}/plain.pth {g}/plain.pth out.pth --weights 1", 2, "edit-error"),
    ("average {g}/plain.pth {g}/plain.pth out.pth --in-place", 2, "edit-error"),
    ("average {g}/plain.pth {g}/dino.pth out.pth", 2, "ambiguous-state-dict"),
    ("average {g}/plain.pth {h}/os_system.pth out.pth", 2, "edit-error"),
    ("average {g}/plain.pth there.pth there.pth --force", 5, "same-file"),
    ("convert --rename classifier {g}/plain.pth out.pth", 2, "edit-error"),
    ("convert --rename nowhere=x {g}/plain.pth out.pth", 2, "nothing-matched"),
    ("convert --in-place {g}/plain.pth out.pth", 2, "edit-error"),
    ("keys missing.pth", 3, "no-such-file"),
    ("keys {h}/html_page.pth", 3, "not-a-checkpoint"),
    ("keys {h}/truncated.pth", 3, "malformed"),
    ("keys {h}/script_json_data_type.pt", 3, "unsupported"),
    ("keys {h}/deep_list.pth", 3, "limit-exceeded"),
    ("transfer {g}/plain.pth out.pth --like missing.pth", 3, "no-such-file"),
    ("convert {h}/os_system.pth out.pth", 4, "unsafe-pickle"),
    ("convert {g}/plain.pth there.pth", 5, "output-exists"),
    ("convert there.pth there.pth", 5, "same-file"),
    ("convert --force there.pth there.pth", 5, "same-file"),
    ("convert there.pth linked.pth", 5, "same-file"),
    ("convert there.pth hard.pth", 5, "same-file"),
    ("convert {g}/plain.pth folder", 5, "write-error"),
    ("convert --force {g}/plain.pth folder", 5, "write-error"),
    ("convert {g}/plain.pth nowhere/out.pth", 5, "write-error"),
    ("convert {g}/extra_state.pth out.safetensors", 5, "not-representable"),
    ("convert {g}/expanded_far.pth out.safetensors", 5, "write-error"),
]


@pytest.mark.parametrize(("line", "code", "slug"), REFUSED, ids=[row[0] for row in REFUSED])
def test_refusals(
    run: Run,
    good: Path,
    hostile: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    code: int,
    slug: str,
) -> None:
    """One clear error on stderr, nothing on stdout, no file made or changed."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(good / "plain.pth", "there.pth")
    os.symlink("there.pth", "linked.pth")
    os.link("there.pth", "hard.pth")
    Path("folder").mkdir()
    before = listing(tmp_path)
    done = run(*[part.format(g=good, h=hostile) for part in line.split()])
    assert (done.code, done.out) == (code, ""), done.err
    first, *rest = done.err.splitlines()
    assert first.startswith(f"error[{slug}]: ")
    assert not first.endswith(".")
    assert "Traceback" not in done.err
    assert all(each.startswith(("    ", "hint: ")) for each in rest)
    assert sum(each.startswith("hint: ") for each in rest) <= 1
    assert listing(tmp_path) == before


def test_error_of_every_class_has_the_code_of_its_branch() -> None:
    """The table of exit codes, as the classes of errors carry it."""
    codes = {
        "FormatError": 3, "NoSuchFile": 3, "NotACheckpoint": 3, "Malformed": 3, "Unsupported": 3,
        "PermissionDenied": 3, "Unreadable": 3, "OutputDenied": 5,
        "PartialCheckpoint": 3, "LimitExceeded": 3, "TooCostly": 3, "PluginFailed": 3,
        "UnsafePickle": 4,
        "EditError": 2, "NoSuchKey": 2, "NothingMatched": 2, "KeyCollision": 2,
        "AmbiguousStateDict": 2, "NoStateDict": 2, "NoSuchCommand": 2, "BadRecipe": 2,
        "RanksDiffer": 2, "NameCollision": 2,
        "PoorFit": 1, "NotAsExpected": 1, "Overflow": 1,
        "WriteError": 5, "OutputExists": 5, "SameFile": 5, "NotRepresentable": 5,
        "NoSpace": 5, "DownloadError": 6, "DownloadFailed": 6, "HashMismatch": 6, "ModelError": 7,
        "MissingExtra": 7, "NoDevice": 7, "OutOfMemory": 7, "RankLost": 7, "NoSuchModel": 2,
        "BadInput": 2, "DoesNotLoad": 1, "Bug": 70, "Usage": 2,
        "Interrupted": 130,
    }  # fmt: skip

    def below(kind: type[CkptoolError]) -> dict[str, int]:
        found = {}
        for each in kind.__subclasses__():
            if each.__module__ in ("ckptool.errors", "ckptool.cli.main"):
                found.update({each.__name__: each.exit_code}, **below(each))
        return found

    assert below(CkptoolError) == codes


def test_a_defect_is_exit_70(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool import containers

    def broken(path: str, **how: object) -> None:
        raise ZeroDivisionError("a \x1b[31mdefect")

    monkeypatch.setattr(containers, "read", broken)
    done = run("keys", good / "plain.pth")
    assert (done.code, done.out) == (70, "")
    assert done.err.startswith("error[bug]: ZeroDivisionError: a \\x1b[31mdefect\nhint: ")
    assert "Traceback" not in done.err
    done = run("--debug", "keys", good / "plain.pth")
    assert done.code == 70
    assert "Traceback" in done.err


@pytest.mark.parametrize("how", ["option", "variable"])
def test_debug_shows_the_trace_and_keeps_the_code(spawn: Run, how: str) -> None:
    env = {"CKPTOOL_DEBUG": "1"} if how == "variable" else {}
    option = ["--debug"] if how == "option" else []
    done = spawn("keys", "missing.pth", *option, env=env)
    assert (done.code, done.out) == (3, "")
    assert done.err.startswith("error[no-such-file]: missing.pth does not exist\n")
    assert "Traceback" in done.err


# Manners: what goes where.


def test_alone_it_prints_groups_and_examples(run: Run) -> None:
    done = run()
    assert (done.code, done.err) == (0, "")
    assert done.out.count("\n  ckptool ") == len(cli.EXAMPLES) == 3
    for title, names in cli.GROUPS.items():
        section = done.out.partition(f"\n{title}:\n")[2].partition("\n\n")[0]
        for name in names:
            assert re.search(rf"^  {name} +\S", section, re.MULTILINE)
    assert run("--help").out == run("-h").out == done.out


def test_version(run: Run) -> None:
    assert run("--version").out == run("-V").out == f"ckptool {ckptool.__version__}\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_usage_then_examples_that_are_real_then_options(run: Run, name: str) -> None:
    """Every example calls this command, with options that it has."""
    done = run(name, "--help")
    assert (done.code, done.err) == (0, "")
    assert run(name, "-h").out == done.out
    head, rest = re.split(r"\n\nExamples:\n", done.out)
    assert head.startswith(f"Usage: ckptool {name} ")
    examples, _, rest = rest.partition("\n\nOptions:\n")
    options = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rest))
    for example in examples.splitlines():
        assert example.strip().startswith(f"ckptool {name} ")
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", example)) <= options
    assert done.out.isascii()


def test_every_command_has_a_file_and_the_other_way_round() -> None:
    files = {
        path.stem
        for path in (PACKAGE / "cli").glob("*.py")
        if re.search(r"^(def )?command\b", path.read_text(), re.MULTILINE)
    }
    assert {name.replace("-", "_") for name in COMMANDS} == files


@pytest.mark.parametrize("name", WRITERS)
def test_writers_take_the_shared_options(name: str) -> None:
    shared = set(
        "--at --to --force --in-place --dry-run -n --json --quiet -q --tensors-only --untie "
        "--allow-expand --no-sync".split()
    )
    assert shared <= options_of(name)


def test_keys_takes_its_options() -> None:
    wanted = "--names --tree --depth --select --at --all --sort --json -q".split()
    assert set(wanted) <= options_of("keys")


def options_of(name: str) -> set[str]:
    group = cli.ckptool
    command = group.get_command(click.Context(group), name)
    assert command is not None
    return {option for parameter in command.params for option in parameter.opts}


# Each function of edits.py that makes an edit: the commands and options that offer it.
OFFERED: dict[str, list[tuple[str, str]]] = {
    "strip_prefix": [
        ("strip-prefix", "--prefix"),
        ("strip-prefix", "--every"),
        ("strip-prefix", "--anywhere"),
        ("convert", "--strip-prefix"),
    ],
    "strip_wrappers": [("strip-prefix", "--prefix"), ("transfer", "")],
    "add_prefix": [("add-prefix", "--prefix"), ("convert", "--add-prefix")],
    "rename": [("convert", "--rename"), ("transfer", "--rename"), ("diff", "--rename")],
    "renames": [("convert", "--recipe")],
    "drop": [("convert", "--drop"), ("transfer", "--drop")],
    "keep": [("convert", "--keep"), ("transfer", "--keep")],
    "without": [("transfer", "--like")],
    "cast": [],  # through steps of ckptool.convert alone, until its command comes
}


def test_every_edit_has_a_command_or_option_with_help() -> None:
    made = {
        name
        for name, function in inspect.getmembers(edits, inspect.isfunction)
        if function.__module__ == edits.__name__ and function.__annotations__["return"] == "Edit"
    }
    assert made == OFFERED.keys()
    group = cli.ckptool
    for name, option in (pair for pairs in OFFERED.values() for pair in pairs):
        command = group.get_command(click.Context(group), name)
        assert command is not None
        assert command.help
        found = [each for each in command.params if option in each.opts]
        assert not option or getattr(found[0], "help", None), (name, option)


def test_readme_has_a_line_for_every_command_and_the_manual_for_every_edit() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in COMMANDS:
        assert f"ckptool {name} " in readme, name
    for name, option in (pair for pairs in OFFERED.values() for pair in pairs):
        page = (PACKAGE / "manual" / f"{name}.md").read_text(encoding="utf-8")
        assert option in page, (name, option)


def test_console_script_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["scripts"] == {"ckptool": "ckptool.cli.main:entry"}


def test_talk_is_on_stderr_and_quiet_silences_it(run: Run, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    done = run("strip-prefix", good / "data_parallel.pth", out)
    assert (done.code, done.out) == (0, "")
    assert done.err.splitlines() == [
        "stripped `module.` from 8 of 8 keys",
        f"{out}: 8 tensors, 704 B",
        "read 8, renamed 8, dropped 0, written 8",
    ]
    done = run("strip-prefix", "-q", "--force", good / "data_parallel.pth", out)
    assert done == Outcome(0, "", "")
    done = run("keys", "--quiet", good / "plain.pth")
    assert done.err == ""
    assert done.out.count("\n") == 8


def test_quiet_silences_neither_errors_nor_warnings(
    run: Run, good: Path, hostile: Path, tmp_path: Path
) -> None:
    assert run("keys", "-q", "missing.pth").err.startswith("error[no-such-file]: ")
    done = run("keys", "-q", hostile / "os_system.pth")
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert "os.system('echo > ckptool-was-executed')" in done.err
    done = run("convert", "-q", hostile / "os_system.pth", tmp_path / "out.safetensors")
    assert done.code == 0
    assert done.err.startswith("warning: ")


def test_what_is_dropped_or_left_behind_is_named(run: Run, good: Path, tmp_path: Path) -> None:
    source, out = good / "model_best.pth.tar", tmp_path / "out.pth"
    done = run("transfer", source, out, "--drop", "classifier")
    assert done.err.splitlines() == [
        "took the state_dict at `state_dict`; not written: epoch, arch, best_acc1, optimizer",
        "stripped `module.` from 8 of 8 keys",
        "dropped 2: classifier.weight [10, 4], classifier.bias [10]",
        f"{out}: 6 tensors, 504 B",
        "read 8, renamed 6, dropped 2, written 6",
    ]


def test_unwrapping_what_is_bare_is_a_note_of_convert(run: Run, good: Path, tmp_path: Path) -> None:
    done = run("convert", "--unwrap", good / "plain.pth", tmp_path / "out.pth")
    assert done.code == 0
    assert "the state_dict is bare already: nothing to unwrap" in done.err.splitlines()
    done = run("convert", "--unwrap", good / "model_best.pth.tar", tmp_path / "out2.pth")
    assert "nothing to unwrap" not in done.err
    done = run("convert", "--unwrap", good / "whole_model.pth", tmp_path / "whole.pth")
    assert done.err.startswith("took the state_dict of the whole model `Sequential`")
    assert "nothing to unwrap" not in done.err


# The list of keys.


def test_off_a_terminal_lines_have_tabs_and_no_header(run: Run, good: Path) -> None:
    done = run("keys", good / "model_best.pth.tar")
    assert done.out.splitlines()[0] == "module.features.0.weight\tF32\t[4, 3, 3, 3]\t432"
    assert [len(line.split("\t")) for line in done.out.splitlines()] == [4] * 8
    assert done.err.splitlines() == [
        f"{good / 'model_best.pth.tar'}: torch zip, state_dict at `state_dict`, 8 tensors, 704 B; "
        "also contains: epoch, arch, best_acc1, optimizer",
        "every key starts with `module.` (DataParallel): "
        f"ckptool strip-prefix {good / 'model_best.pth.tar'} OUT   removes it",
    ]


def test_lines_are_never_cut(
    run: Run, tmp_path: Path, make_safetensors: Callable[..., Path]
) -> None:
    key = "layer." * 2000 + "weight"
    source = make_safetensors(tmp_path / "long.safetensors", {key: [1]})
    assert run("keys", source).out == f"{key}\tF32\t[1]\t4\n"


def test_on_a_terminal_there_is_a_table(good: Path, tmp_path: Path) -> None:
    code, shown = on_terminal("keys", "-q", good / "plain.pth", cwd=tmp_path)
    lines = shown.split("\r\n")
    assert code == 0
    assert lines[0].split() == ["KEY", "DTYPE", "SHAPE", "SIZE"]
    assert lines[1].split(maxsplit=2) == ["features.0.weight", "F32", "[4, 3, 3, 3]  432 B"]
    assert len({line.index("F32") for line in lines if "F32" in line}) == 1
    assert "\t" not in shown


KEYS_OF_PLAIN = [
    "features.0.weight",
    "features.1.weight",
    "features.1.bias",
    "features.1.running_mean",
    "features.1.running_var",
    "features.1.num_batches_tracked",
    "classifier.weight",
    "classifier.bias",
]
SELECTIONS = [
    (["--select", "features.1.bias"], KEYS_OF_PLAIN[2:3]),
    (["--select", "features.1"], KEYS_OF_PLAIN[1:6]),
    (["--select", "features.1."], KEYS_OF_PLAIN[1:6]),
    (["--select", "*.bias"], [KEYS_OF_PLAIN[2], KEYS_OF_PLAIN[7]]),
    (["--select", "re:.*running_(mean|var)"], KEYS_OF_PLAIN[3:5]),
    (["--select", "classifier", "--select", "features.0"], [KEYS_OF_PLAIN[i] for i in (0, 6, 7)]),
    (["--select", "@patterns.txt"], [KEYS_OF_PLAIN[0], KEYS_OF_PLAIN[7]]),
    (["--sort", "name"], sorted(KEYS_OF_PLAIN)),
    (["--sort", "size"], [KEYS_OF_PLAIN[i] for i in (0, 6, 7, 1, 2, 3, 4, 5)]),
    ([], KEYS_OF_PLAIN),
]


@pytest.mark.parametrize(("options", "keys"), SELECTIONS, ids=[str(row[0]) for row in SELECTIONS])
def test_names_selected_and_sorted(
    run: Run,
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    keys: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("patterns.txt").write_text("# two of them\nfeatures.0\n\n classifier.bias \n")
    done = run("keys", "--names", *options, good / "plain.pth")
    assert done.code == 0
    assert done.out.splitlines() == keys
    assert [each["key"] for each in run("keys", "--json", *options, good / "plain.pth").document[
        "tensors"
    ]] == keys  # fmt: skip


def test_tree_adds_up(run: Run, good: Path) -> None:
    rows = [line.split("\t") for line in run("keys", "--tree", good / "plain.pth").out.splitlines()]
    assert rows == [
        [".", "8", "704", "100.0 %"],
        ["features", "6", "504", "71.6 %"],
        ["features.0", "1", "432", "61.4 %"],
        ["features.1", "5", "72", "10.2 %"],
        ["classifier", "2", "200", "28.4 %"],
    ]
    shallow = run("keys", "--tree", "--depth", "1", good / "plain.pth").out.splitlines()
    assert [row.split("\t")[0] for row in shallow] == [".", "features", "classifier"]


def test_tree_on_a_terminal_is_indented(good: Path, tmp_path: Path) -> None:
    code, shown = on_terminal("keys", "-q", "--tree", good / "plain.pth", cwd=tmp_path)
    assert code == 0
    assert [line.partition("  ")[0] for line in shown.split("\r\n")][:2] == ["MODULE", "(all)"]
    assert "\r\n  features " in shown
    assert "\r\n    0 " in shown


def test_all_lists_the_optimizer_too(run: Run, good: Path) -> None:
    names = run("keys", "--all", "--names", good / "model_best.pth.tar").out.splitlines()
    assert "state_dict.module.classifier.bias" in names
    assert "best_acc1" in names
    assert "optimizer.state.0.momentum_buffer" in names


def test_all_needs_no_state_dict(run: Run, good: Path) -> None:
    assert run("keys", good / "dino.pth").code == 2
    done = run("keys", "--all", good / "dino.pth")
    assert done.code == 0
    assert done.out.count("\n") == 19
    done = run("keys", good / "list_of_tensors.pth")
    assert done.code == 0
    assert done.out
    assert "no state_dict in it" in done.err


def test_no_tensors_is_no_error(run: Run, good: Path) -> None:
    done = run("keys", good / "no_tensors.pth")
    assert (done.code, done.out) == (0, "")
    assert run("keys", "--json", good / "empty.pth").document["count"] == 0


@pytest.mark.parametrize(
    ("at", "keys"),
    [
        ("student", ["module.backbone.0.weight", "module.head.bias"]),
        ("teacher", ["backbone.0.weight", "head.bias"]),
    ],
)
def test_at_chooses(run: Run, good: Path, at: str, keys: list[str]) -> None:
    names = run("keys", "--at", at, "--names", good / "dino.pth").out.splitlines()
    assert [names[0], names[-1]] == keys


def test_an_ambiguous_file_lists_what_there_is(run: Run, good: Path, tmp_path: Path) -> None:
    done = run("unwrap", good / "dino.pth", tmp_path / "out.pth")
    assert done.code == 2
    first, *rows, hint = done.err.splitlines()
    assert "candidate state dicts" in first
    assert [row.split()[0] for row in rows] == ["student", "teacher", "dino_loss"]
    assert "8 tensors" in rows[0]
    assert "prefix module." in rows[0]
    assert hint.endswith("--at teacher")
    assert run("unwrap", good / "dino.pth", tmp_path / "out.pth", "--at", "teacher").code == 0


# JSON.

KEYS_1 = {"schema": str, "file": str, "container": str, "at": list, "count": int, "nbytes": int,
          "tensors": list, "beside": list}  # fmt: skip
REWRITE_1 = {"schema": str, "source": str, "target": str, "container": str, "read": int,
             "kept": int, "renamed": int, "written": int, "dropped": list, "not_carried": list,
             "map": list, "dry_run": bool}  # fmt: skip
TRANSFER_1 = {**REWRITE_1, "matched": int, "mismatched": list, "missing": list, "filled": float}


def assert_fields(document: dict[str, Any], fields: dict[str, type]) -> None:
    for name, kind in fields.items():
        assert type(document[name]) is kind, name


def test_json_of_keys(run: Run, good: Path) -> None:
    document = run("keys", "--json", good / "model_best.pth.tar").document
    assert_fields(document, KEYS_1)
    assert document["schema"] == "keys/1"
    assert document["file"] == str(good / "model_best.pth.tar")
    assert document["container"] == "torch-zip"
    assert document["at"] == ["state_dict"]
    assert (document["count"], document["nbytes"]) == (8, 704)
    assert document["tensors"][0] == {
        "key": "module.features.0.weight",
        "dtype": "F32",
        "shape": [4, 3, 3, 3],
        "nbytes": 432,
    }
    assert document["beside"] == ["epoch", "arch", "best_acc1", "optimizer"]


@pytest.mark.parametrize(
    ("name", "container"),
    [
        ("plain.pth", "torch-zip"),
        ("plain_legacy.pth", "torch-legacy"),
        ("plain.safetensors", "safetensors"),
    ],
)
def test_json_names_the_container(run: Run, good: Path, name: str, container: str) -> None:
    document = run("keys", "--json", good / name).document
    assert (document["container"], document["at"], document["beside"]) == (container, [], [])


def test_json_has_torchs_names_for_dtypes_without_another(run: Run, good: Path) -> None:
    document = run("keys", "--json", good / "qtensors.pth").document
    assert "qint8" in {tensor["dtype"] for tensor in document["tensors"]}


def test_json_of_a_rewrite(run: Run, good: Path, tmp_path: Path) -> None:
    source, out = good / "model_best.pth.tar", tmp_path / "out.safetensors"
    done = run("convert", "--json", source, out, "--drop", "*.bias", "--strip-prefix", "module")
    document = done.document
    assert_fields(document, REWRITE_1)
    assert document["schema"] == "rewrite/1"
    assert (document["source"], document["target"]) == (str(source), str(out))
    assert document["container"] == "safetensors"
    counts = [document[name] for name in ("read", "kept", "renamed", "written")]
    assert counts == [8, 0, 6, 6]
    assert [each["key"] for each in document["dropped"]] == [
        "module.features.1.bias",
        "module.classifier.bias",
    ]
    assert all(each.keys() >= {"key", "reason"} and each["reason"] for each in document["dropped"])
    assert document["not_carried"] == ["epoch", "arch", "best_acc1", "optimizer"]
    assert document["map"][0] == ["module.features.0.weight", "features.0.weight"]
    assert document["map"][2] == ["module.features.1.bias", None]
    assert document["read"] == document["kept"] + document["renamed"] + len(document["dropped"])
    assert document["dry_run"] is False
    assert done.err == ""


def test_json_of_a_transfer(run: Run, good: Path, tmp_path: Path) -> None:
    source, out = good / "model_best.pth.tar", tmp_path / "out.pth"
    document = run("transfer", "--json", source, out, "--like", good / "plain.pth").document
    assert_fields(document, TRANSFER_1)
    assert document["schema"] == "transfer/1"
    assert (document["matched"], document["mismatched"], document["missing"]) == (8, [], [])
    assert document["filled"] == 1.0
    document = run("transfer", "--json", "--force", source, out).document
    assert {*TRANSFER_1} <= document.keys()


def test_json_with_dry_run_is_one_document(run: Run, good: Path, tmp_path: Path) -> None:
    done = run("strip-prefix", "-n", "--json", good / "data_parallel.pth", tmp_path / "out.pth")
    assert done.document["dry_run"] is True
    assert done.document["written"] == 8
    assert listing(tmp_path) == {}


# Dry run, in place, outputs.


@pytest.mark.parametrize("name", ["data_parallel.pth", "model.safetensors"])
def test_dry_run_prints_the_plan_and_writes_nothing(
    run: Run, good: Path, tmp_path: Path, name: str
) -> None:
    out = tmp_path / f"out{Path(name).suffix}"
    done = run("strip-prefix", "--dry-run", good / name, out)
    assert done.code == 0
    *changes, counts, size = done.out.splitlines()
    assert changes[0].startswith("- module.")
    assert [line.replace("- module.", "+ ") for line in changes[::2]] == changes[1::2]
    count = len(changes) // 2
    assert counts == f"read {count}, renamed {count}, dropped 0, would write {count}"
    assert re.fullmatch(rf"{re.escape(str(out))}: \S+ \S+ to write, \S+ \S+ free", size)
    assert counts not in done.err
    assert listing(tmp_path) == {}
    assert run("strip-prefix", good / name, out).code == 0
    told = run("strip-prefix", "-n", "--force", "--json", good / name, out).document
    assert told["nbytes"] == out.stat().st_size


def test_dry_run_refuses_what_does_not_fit(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=1))
    for more in ((), ("--max-shard-size", "1GB")):
        out = tmp_path / ("folder" if more else "out.pth")
        done = run("convert", "-n", good / "plain.pth", out, *more)
        assert (done.code, done.out) == (5, "")
        assert re.search(r"error\[no-space\]: \S+ needs \S+ \w*B; 100 B are free", done.err)


def test_dry_run_refuses_what_a_run_would(run: Run, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")
    assert run("strip-prefix", "-n", good / "data_parallel.pth", out).code == 5
    assert run("strip-prefix", "-n", good / "collision.pth", tmp_path / "new.pth").code == 2
    assert listing(tmp_path) == {"out.pth": b"old"}


def test_dry_run_shows_dropped_keys_without_a_plus(run: Run, good: Path, tmp_path: Path) -> None:
    source, out = good / "plain.pth", tmp_path / "out.pth"
    lines = run("convert", "-n", source, out, "--drop", "classifier").out.splitlines()
    assert lines[:2] == ["- classifier.weight", "- classifier.bias"]
    assert lines[2].startswith("read 8, ")


def test_in_place_replaces_the_input(run: Run, good: Path, tmp_path: Path) -> None:
    here, out = tmp_path / "here.pth", tmp_path / "out.pth"
    shutil.copy(good / "data_parallel.pth", here)
    assert run("strip-prefix", good / "data_parallel.pth", out).code == 0
    done = run("strip-prefix", "--in-place", here)
    assert done.code == 0
    assert here.read_bytes() == out.read_bytes()
    assert done.err.splitlines()[-1] == "read 8, renamed 8, dropped 0, written 8"
    assert sorted(listing(tmp_path)) == ["here.pth", "out.pth"]
    before = here.read_bytes()
    assert run("strip-prefix", "--in-place", here).code == 2
    assert here.read_bytes() == before


def test_in_place_dry_run_writes_nothing(run: Run, good: Path, tmp_path: Path) -> None:
    here = tmp_path / "here.pth"
    shutil.copy(good / "data_parallel.pth", here)
    before = here.read_bytes(), here.stat().st_mtime_ns, here.stat().st_ino
    assert run("strip-prefix", "--in-place", "-n", here).code == 0
    assert (here.read_bytes(), here.stat().st_mtime_ns, here.stat().st_ino) == before


def test_same_file_says_what_helps(run: Run, good: Path, tmp_path: Path) -> None:
    here = tmp_path / "here.pth"
    shutil.copy(good / "data_parallel.pth", here)
    assert "--in-place" in run("strip-prefix", here, here).err
    assert "--force" in run("strip-prefix", good / "data_parallel.pth", here).err


def test_force_replaces(run: Run, good: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.pth"
    out.write_bytes(b"old")
    assert run("strip-prefix", "--force", good / "data_parallel.pth", out).code == 0
    assert run("keys", "--names", out).out.splitlines() == KEYS_OF_PLAIN


ZIP, SAFETENSORS = "torch-zip", "safetensors"
SUFFIXES = [
    ("plain.pth", "out.safetensors", [], SAFETENSORS),
    ("plain.pth", "out.SafeTensors", [], SAFETENSORS),
    *(("plain.safetensors", f"out.{suffix}", [], ZIP)
      for suffix in ("pth", "pt", "bin", "ckpt", "tar", "th", "pkl", "PTH", "pth.tar")),
    ("plain.pth", "out", [], ZIP),
    ("plain.pth", "out.weights", [], ZIP),
    ("plain_legacy.pth", "out.weights", [], ZIP),
    ("plain.safetensors", "out.weights", [], SAFETENSORS),
    ("plain.pth", "out.pth", ["--to", "safetensors"], SAFETENSORS),
    ("plain.safetensors", "out.safetensors", ["--to", "torch"], ZIP),
]  # fmt: skip


@pytest.mark.parametrize(("source", "target", "options", "container"), SUFFIXES)
def test_the_suffix_chooses_the_container(
    run: Run,
    good: Path,
    tmp_path: Path,
    source: str,
    target: str,
    options: list[str],
    container: str,
) -> None:
    done = run("convert", "--json", *options, good / source, tmp_path / target)
    assert done.document["container"] == container
    assert run("keys", "--json", tmp_path / target).document["container"] == container


def test_the_input_is_found_by_its_bytes(run: Run, good: Path, tmp_path: Path) -> None:
    shutil.copy(good / "plain.safetensors", tmp_path / "named.pth")
    document = run("keys", "--json", tmp_path / "named.pth").document
    assert document["container"] == "safetensors"


@pytest.mark.parametrize("target", ["out.pth", "out.safetensors"])
def test_same_input_same_bytes(run: Run, good: Path, tmp_path: Path, target: str) -> None:
    first, second = tmp_path / target, tmp_path / f"again.{target}"
    for out in (first, second):
        assert run("convert", good / "model_best.pth.tar", out).code == 0
    assert first.read_bytes() == second.read_bytes()


def test_no_sync_flushes_nothing(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (flushed.append(fd), real(fd))[1])
    run("convert", "--no-sync", good / "plain.pth", tmp_path / "fast.pth")
    assert flushed == []
    run("convert", good / "plain.pth", tmp_path / "durable.pth")
    assert len(flushed) == 2  # the file and its folder
    assert (tmp_path / "fast.pth").read_bytes() == (tmp_path / "durable.pth").read_bytes()


def test_convert_applies_edits_in_the_order_given(run: Run, good: Path, tmp_path: Path) -> None:
    source = good / "plain.pth"

    def first(*options: str) -> str:
        document = run("convert", "-n", "--json", source, tmp_path / "out.pth", *options).document
        return str(document["map"][0][1])

    assert first("--add-prefix", "a", "--rename", "a.features=b") == "b.0.weight"
    assert first("--add-prefix", "a", "--add-prefix", "b") == "b.a.features.0.weight"
    assert first("--add-prefix", "a", "--strip-prefix", "a") == "features.0.weight"
    assert first("--keep", "features", "--keep", "classifier") == "features.0.weight"
    assert first("--rename=features=f", "--drop=classifier") == "f.0.weight"
    out = tmp_path / "out.pth"
    assert run("convert", "-n", source, out, "--rename", "a.features=b", "--add-prefix", "a").code


@pytest.mark.parametrize("command", ["convert", "transfer"])
def test_edits_of_one_kind_are_one_step(run: Run, good: Path, tmp_path: Path, command: str) -> None:
    """Also where options that are no edits stand between them."""
    for options, count in (
        (("--drop", "classifier", "--drop", "classifier.bias"), 6),
        (("--keep", "features.0", "--drop-beside", "epoch", "--keep", "classifier"), 3),
        (("--rename", "classifier=features", "--force", "--rename", "features=classifier"), 8),
    ):
        prefix = ["--strip-prefix", "module."] if command == "convert" else []
        words = [command, "-n", "--json", *prefix, *options]
        done = run(*words, good / "model_best.pth.tar", tmp_path / "o.pth")
        assert done.code == 0, done.err
        assert done.document["written"] == count


def test_patterns_after_at_work_for_drop_and_keep(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("list.txt").write_text("classifier\nfeatures.1\n")
    for command, option, count in (
        ("transfer", "--drop", 1),
        ("convert", "--drop", 1),
        ("convert", "--keep", 7),
    ):
        done = run(command, good / "plain.pth", "out.pth", option, "@list.txt", "--json", "--force")
        assert done.document["written"] == count


# Streams, pipes, signals.


@pytest.fixture(scope="module")
def many_keys(
    tmp_path_factory: pytest.TempPathFactory, make_safetensors: Callable[..., Path]
) -> Path:
    path = tmp_path_factory.mktemp("many") / "many.safetensors"
    return make_safetensors(path, {f"layers.{i}.weight": [2, 2] for i in range(10_000)})


@pytest.mark.parametrize("unbuffered", ["", "1"], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("options", [[], ["--json"], ["--names"]], ids=str)
def test_a_reader_that_goes_away_is_exit_141(
    many_keys: Path, tmp_path: Path, options: list[str], unbuffered: str
) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "ckptool", "keys", *options, str(many_keys)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=tmp_path,
        env=environment({"PYTHONUNBUFFERED": unbuffered}),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert process.stderr.read() == b""


def test_head_in_a_shell(many_keys: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", "-c", '"$0" -m ckptool keys "$1" | head -1; echo ${PIPESTATUS[0]}', sys.executable,
         str(many_keys)],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    assert done.stdout.splitlines() == ["layers.0.weight\tF32\t[2, 2]\t16", "141"]
    assert done.stderr == ""


def test_a_full_device_on_stdout_is_an_error(spawn: Run, good: Path) -> None:
    for arguments in (["keys", good / "plain.pth"], ["keys", "--help"], []):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [sys.executable, "-m", "ckptool", *map(str, arguments)],
                stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, env=environment(),
            )  # fmt: skip
        assert done.returncode == 5
        assert done.stderr == (
            "error[write-error]: the standard output cannot be written: no space left on device\n"
        )


@pytest.mark.parametrize("closed", [1, 2])
def test_closed_streams_do_no_harm(good: Path, tmp_path: Path, closed: int) -> None:
    line = f'"$0" -m ckptool keys "$1" {closed}>&-; echo $? >&{3 - closed}'
    done = subprocess.run(
        ["bash", "-c", line, sys.executable, str(good / "plain.pth")],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment(),
    )  # fmt: skip
    said = done.stdout if closed == 2 else done.stderr
    assert said.splitlines()[-1] == "0"
    assert "Traceback" not in said


@pytest.fixture
def slow_source(tmp_path: Path, make_safetensors: Callable[..., Path]) -> Path:
    return make_safetensors(tmp_path / "in.safetensors", {"module.weight": [16 << 20]})


@pytest.mark.product(6)
@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (signal.SIGINT, 130, "interrupted; nothing was written\n"),
        (signal.SIGTERM, 143, ""),
        (signal.SIGHUP, 129, ""),
    ],
)
def test_a_signal_leaves_no_temporary_file(
    slow_source: Path, number: signal.Signals, code: int, said: str, force: bool
) -> None:
    folder = slow_source.parent
    if force:
        (folder / "out.safetensors").write_bytes(b"old")
    before = listing(folder)
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, "strip-prefix", "--force", "in.safetensors",
         "out.safetensors"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=folder, env=environment(),
    ) as process:  # fmt: skip
        deadline = time.monotonic() + 30
        while len(os.listdir(folder)) == len(before) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(os.listdir(folder)) > len(before)
        assert process.poll() is None
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert (out, err.decode()) == (b"", said)
    assert listing(folder) == before


def test_nohup_is_respected(slow_source: Path) -> None:
    """A signal that was to be ignored when ckptool began stays ignored."""
    ignoring = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{SLOWISH}"
    with subprocess.Popen(
        [sys.executable, "-c", ignoring, "strip-prefix", "in.safetensors", "out.safetensors"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=slow_source.parent, env=environment(),
    ) as process:  # fmt: skip
        while len(os.listdir(slow_source.parent)) == 1:
            time.sleep(0.02)
        process.send_signal(signal.SIGHUP)
        process.communicate(timeout=60)
    assert process.returncode == 0


# Progress.


def test_a_bar_on_a_terminal_once_it_takes_long(slow_source: Path) -> None:
    arguments = ("strip-prefix", "in.safetensors", "out.safetensors")
    code, shown = on_terminal(*arguments, cwd=slow_source.parent, program=("-c", SLOWISH))
    assert code == 0
    bars = [part for part in shown.split("\r") if part.startswith("out.safetensors: ")]
    assert len(bars) >= 2
    # done, all, elapsed < left, speed
    assert re.search(r"\d+%\|.*\| \d+\.\d+M/64\.0M \[00:0\d<00:\d\d, .*B/s\]", bars[1]), bars[1]
    assert shown.isascii()
    done = shown.split("\r\n")
    assert done[-2] == "read 1, renamed 1, dropped 0, written 1"


def test_quiet_draws_no_bar(slow_source: Path) -> None:
    arguments = ("strip-prefix", "-q", "in.safetensors", "out.safetensors")
    assert on_terminal(*arguments, cwd=slow_source.parent, program=("-c", SLOWISH)) == (0, "")


def test_a_quick_job_draws_no_bar(good: Path, tmp_path: Path) -> None:
    code, shown = on_terminal("convert", good / "plain.pth", "out.pth", cwd=tmp_path)
    assert code == 0
    assert "%" not in shown
    assert shown.count("\r") == shown.count("\r\n")


def test_off_a_terminal_progress_is_whole_lines(
    slow_source: Path, spawn: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    often = "from ckptool.cli import talk; talk.LINE_EVERY = 0.2"
    arguments = ("strip-prefix", "in.safetensors", "out.safetensors")
    done = spawn(*arguments, program=("-c", f"{often}\n{SLOWISH}"))
    assert done.code == 0
    assert "\r" not in done.err
    lines = [line for line in done.err.splitlines() if "/s" in line]
    assert lines
    line = r"out\.safetensors: \d+\.\d MiB of 64\.0 MiB, \d+\.\d MiB/s"
    assert all(re.fullmatch(line, each) for each in lines), lines


# Colour and characters.


def test_statuses_of_check_are_coloured_on_a_terminal(
    good: Path, hostile: Path, tmp_path: Path
) -> None:
    arguments = ("check", good / "plain.pth", hostile / "os_system.pth", hostile / "html_page.pth")
    shown = on_terminal(*arguments, cwd=tmp_path, env={"NO_COLOR": ""})[1]
    plain = on_terminal(*arguments, cwd=tmp_path, env={"NO_COLOR": "1"})[1]
    for colour, status in ((32, "ok"), (31, "unsafe"), (33, "not-a-checkpoint")):
        assert f"\x1b[{colour}m\x1b[1m{status:16}\x1b[0m" in shown
    assert re.sub(r"\x1b\[\d+m", "", shown) == plain


def test_hints_hold_what_was_asked(run: Run, good: Path, tmp_path: Path) -> None:
    def hint(*arguments: object) -> str:
        return run(*arguments).err.rpartition("hint: ")[2].strip()

    out = tmp_path / "out.safetensors"
    extra = good / "extra_state.pth"
    assert hint("convert", extra, out) == (
        f"ckptool convert {extra} {out} --tensors-only   leaves them out"
    )
    collision = good / "collision.pth"
    told = hint("strip-prefix", collision, out)
    assert told.startswith("drop one first: ckptool convert --drop ")
    assert told.endswith(f" {collision} OUT")
    assert run(*told.split()[4:-1], tmp_path / "first.pth").code == 0
    assert run("strip-prefix", tmp_path / "first.pth", tmp_path / "second.pth").code == 0
    assert "--max-shard-size SIZE" in hint("convert", extra, tmp_path)
    assert "--to dcp" in hint("convert", extra, tmp_path)
    assert "convert IN FOLDER/" in hint("convert", extra, tmp_path)
    assert hint("convert", "--at") == "ckptool convert --help"
    assert hint("keys", "--at") == "ckptool keys --help"
    peeled = hint("transfer", good / "model_best.pth.tar", out, "--drop", "module.classifier")
    assert peeled.startswith("`classifier` selects 2 keys")
    assert "transfer peels it first" in peeled
    done = run("convert", extra, out, "--keep", "@nofile")
    assert done.err == (
        "error[edit-error]: the pattern file nofile cannot be read: no such file or directory\n"
    )


def test_colour_is_for_terminals_that_want_it(tmp_path: Path) -> None:
    def shown(**env: str) -> str:
        return on_terminal("keys", "missing.pth", cwd=tmp_path, env=env)[1]

    assert "\x1b[31m\x1b[1merror[no-such-file]\x1b[0m: " in shown()
    assert "\x1b" not in shown(NO_COLOR="1")
    assert "\x1b" not in shown(TERM="dumb")
    assert "\x1b[" in shown(NO_COLOR="")  # no-color.org: when present and not empty


def test_no_escape_codes_off_a_terminal_that_are_not_asked_for(spawn: Run) -> None:
    done = spawn("keys", "missing.pth", env={"TERM": "xterm-256color"})
    assert "\x1b" not in done.out + done.err
    done = spawn("keys", "missing.pth", env={"FORCE_COLOR": "1"})
    assert "\x1b[31m\x1b[1merror[no-such-file]\x1b[0m: " in done.err
    done = spawn("keys", "missing.pth", env={"FORCE_COLOR": "1", "NO_COLOR": "1"})
    assert "\x1b" not in done.out + done.err


ENCODINGS = [
    ({"PYTHONIOENCODING": "gbk"}, "gbk"),
    ({"PYTHONIOENCODING": "ascii"}, "ascii"),
    ({"PYTHONIOENCODING": "latin-1"}, "latin-1"),
    ({"LC_ALL": "C"}, "utf-8"),
    ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "ascii"),
    ({}, "utf-8"),
]
ODD = ["unicode_keys.pth", "odd_keys.safetensors"]
# What may act on a terminal, or hides how text is ordered: categories of Unicode.
ACTING = {"Cc", "Cs", "Zl", "Zp"}
BIDIRECTIONAL = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def acting(text: str) -> set[str]:
    """Give the characters of a text that act on a terminal; line ends and tabs aside."""
    return {
        each
        for each in text
        if each in BIDIRECTIONAL or (unicodedata.category(each) in ACTING and each not in "\n\t")
    }


@pytest.mark.product(4)
@pytest.mark.parametrize(("env", "encoding"), ENCODINGS, ids=[str(row[0]) for row in ENCODINGS])
@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("options", [[], ["--json"], ["--tree"]], ids=str)
def test_no_stream_is_too_narrow(
    spawn: Run, good: Path, name: str, options: list[str], env: dict[str, str], encoding: str
) -> None:
    done = spawn("keys", *options, good / name, env=env, encoding=encoding)
    assert done.code == 0, done.err
    assert not acting(done.out + done.err)
    if options == ["--json"]:
        assert done.out.isascii()
        assert done.document["count"] == len(done.document["tensors"])
    elif not options:
        assert done.out.count("\n") == spawn("keys", "--json", good / name).document["count"]


@pytest.mark.parametrize(("env", "encoding"), ENCODINGS[:2], ids=["gbk", "ascii"])
def test_edits_of_odd_keys_can_be_told_everywhere(
    spawn: Run, good: Path, tmp_path: Path, env: dict[str, str], encoding: str
) -> None:
    for line in (
        ["add-prefix", good / "unicode_keys.pth", "out.pth", "-n"],
        ["convert", good / "unicode_keys.pth", "out.pth", "--drop", "*"],
        ["convert", good / "unicode_keys.pth", "out.safetensors"],
        ["strip-prefix", good / "unicode_keys.pth", "out2.pth"],
    ):
        done = spawn(*line, env=env, encoding=encoding)
        assert done.code in (0, 2, 5), done.err
        assert "error[bug]" not in done.err
        assert not acting(done.out + done.err)


@pytest.mark.parametrize(
    "name", [b"\xff\xfe.pth", "\u202egnp.pth".encode(), b"a\nb\x1b[31m.pth"], ids=repr
)
def test_hostile_file_names_are_shown_harmless(
    spawn: Run, good: Path, tmp_path: Path, name: bytes
) -> None:
    source = os.path.join(os.fsencode(tmp_path), name)
    shutil.copy(os.fsencode(good / "data_parallel.pth"), source)
    for line in (
        [b"keys", source],
        [b"keys", b"--json", source],
        [b"keys", source + b"x"],
        [b"strip-prefix", source, source + b".out.pth"],
        [b"strip-prefix", b"--json", source, source + b".json.pth"],
        [b"strip-prefix", b"-n", source, source + b".plan.pth"],
        [b"strip-prefix", source, source],
        [b"nosuch" + name],
        [b"keys", b"--nosuch" + name],
    ):
        done = spawn(*line)
        assert done.code in (0, 2, 3, 5), done.err
        assert "error[bug]" not in done.err
        assert not acting(done.out + done.err)
        if b"--json" in line:
            assert json.loads(done.out)
    assert os.path.exists(source + b".out.pth")


def test_our_own_words_are_ascii_and_harmless(run: Run, good: Path, hostile: Path) -> None:
    """Over all fixtures: what is not ASCII came out of the file, and nothing acts."""
    speaking = {"unicode_keys.pth", "odd_keys.safetensors", "lossy_utf8.pth", "same_string.pth"}
    for path in sorted([*good.iterdir(), *hostile.iterdir()]):
        for options in ([], ["--all", "--json"]):
            done = run("keys", *options, path)
            assert not acting(done.out + done.err), path.name
            if path.name not in speaking:
                assert (done.out + done.err).isascii(), path.name


def test_sources_are_ascii() -> None:
    for path in SOURCES:
        assert path.read_bytes().isascii(), path.name


def strings(path: Path) -> list[str]:
    """List the text literals of a source, without docstrings."""
    tree = ast.parse(path.read_text())
    told = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told
    ]


def test_no_message_advises_to_turn_safety_off_or_says_safe() -> None:
    advice = re.compile(
        r"weights_only\s*=\s*False|safe_globals|pickle\.load|trust_|--unsafe|--no-check|\bsafe\b",
        re.IGNORECASE,
    )
    found = [(path.name, text) for path in SOURCES for text in strings(path) if advice.search(text)]
    assert found == []


# Close matches.


def test_close_commands_are_offered(run: Run) -> None:
    for wrong, right in (("key", "keys"), ("strip_prefix", "strip-prefix"), ("covnert", "convert")):
        assert run(wrong, "x").err.splitlines()[-1] == f"hint: did you mean `ckptool {right}`?"
    assert run("zzz").err.splitlines()[-1] == "hint: ckptool --help lists them"


def test_close_options_are_offered(run: Run) -> None:
    assert "--names" in run("keys", "--name", "x").err


def test_close_keys_are_offered_and_examples_shown(run: Run, good: Path, tmp_path: Path) -> None:
    for line in (
        ["keys", "--select", "clasifier", good / "plain.pth"],
        ["convert", good / "plain.pth", tmp_path / "out.pth", "--drop", "clasifier"],
        ["convert", good / "plain.pth", tmp_path / "out.pth", "--keep", "clasifier"],
        ["convert", good / "plain.pth", tmp_path / "out.pth", "--rename", "clasifier=head"],
        ["transfer", good / "plain.pth", tmp_path / "out.pth", "--drop", "clasifier"],
    ):
        done = run(*line)
        assert done.code == 2
        assert "keys look like features.0.weight" in done.err
        assert done.err.splitlines()[-1] == "hint: did you mean `classifier`?"


def test_close_file_names_are_offered(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(good / "plain.pth", "model_best.pth.tar")
    hint = run("keys", "model-best.pth.tar").err.splitlines()[-1]
    assert hint == "hint: did you mean model_best.pth.tar?"
    hint = run("keys", tmp_path / "model_bst.pth.tar").err.splitlines()[-1]
    assert hint == f"hint: did you mean {tmp_path / 'model_best.pth.tar'}?"
    assert run("keys", "something.else").err == (
        "error[no-such-file]: something.else does not exist\n"
    )
    done = run("transfer", "model_best.pth.tar", "out.pth", "--like", "model_best.pth.tor")
    assert done.err.splitlines()[-1] == "hint: did you mean model_best.pth.tar?"


def test_a_leading_dash_in_a_name_works_after_two_dashes(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(good / "data_parallel.pth", "-in.pth")
    assert run("strip-prefix", "--", "-in.pth", "-out.pth").code == 0
    assert run("keys", "--names", "--", "-out.pth").out.splitlines() == KEYS_OF_PLAIN


def test_an_unsafe_file_says_what_helps_and_it_does(
    run: Run, hostile: Path, tmp_path: Path
) -> None:
    source, out = hostile / "os_system.pth", tmp_path / "out.pth"
    done = run("convert", source, out)
    assert done.code == 4
    assert "nothing was executed or written" in done.err
    assert re.search(r"^    data\.pkl, byte \d+: os\.system\('echo > ckptool-", done.err, re.M)
    assert done.err.splitlines()[-1].startswith("hint: ")
    assert "--tensors-only" in done.err.splitlines()[-1]
    done = run("convert", "--tensors-only", source, out)
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert "hook" in done.err  # what was not written: is named
    assert run("keys", "-q", out).err == ""


@pytest.mark.parametrize(
    "options", [("--names", "--tree"), ("--names", "--json"), ("--tree", "--json")]
)
def test_one_form_of_the_list_alone(run: Run, good: Path, options: tuple[str, str]) -> None:
    done = run("keys", *options, good / "plain.pth")
    assert (done.code, done.out) == (2, "")
    assert f"{options[0]} and {options[1]} do not go together" in done.err


@pytest.mark.parametrize(
    ("command", "said"),
    [("check", "interrupted\n"), ("strip-prefix", "interrupted; nothing was written\n")],
)
def test_interrupted_says_nothing_of_writing_where_nothing_writes(
    run: Run, good: Path, monkeypatch: pytest.MonkeyPatch, command: str, said: str
) -> None:
    from ckptool import containers

    def interrupted(path: str, **how: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(containers, "read", interrupted)
    output = [] if command == "check" else ["out.pth"]
    done = run(command, good / "plain.pth", *output)
    assert (done.code, done.out, done.err) == (130, "", said)


@pytest.mark.parametrize(
    "line", ["convert {s} out.safetensors", "convert -q --dtype bf16 {s} out.pth",
             "average {s} {s} out.pth", "convert -n {s} out.pth"],
)  # fmt: skip
def test_interrupted_says_what_was_written_before(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    arguments = line.format(s=good / "plain.pth").split()
    monkeypatch.setattr("ckptool.cli.report.rewrite_lines", interrupted)
    done = run(*arguments)
    written, target = "-n" not in arguments, tmp_path / arguments[-1]
    assert done.code == 130
    assert done.err.endswith(f"interrupted; {target if written else 'nothing'} was written\n")
    assert target.exists() is written
    again = run("convert", good / "nothing.pth", "other.pth")
    assert "was written" not in again.err


@pytest.mark.parametrize("options", [("--to", "safetensors"), ("--in-place",)])
def test_a_suffix_that_says_another_container_is_noted(
    run: Run, good: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    target = tmp_path / "out.pth"
    source = good / "plain.safetensors"
    if options == ("--in-place",):
        target.write_bytes(source.read_bytes())
        done = run("add-prefix", *options, target)
    else:
        done = run("add-prefix", *options, source, target)
    assert done.code == 0
    why = " (--to safetensors)" if options[0] == "--to" else ""
    assert f"{target} is a safetensors file despite its suffix{why}\n" in done.err


IDLE = """
    transfer --like-at model {g}/plain.pth out.pth | transfer --seed 3 {g}/plain.pth out.pth
    transfer --min-match 0.3 {g}/plain.pth out.pth | keys --all --at model {g}/ema.pth
    keys --tree --sort size {g}/plain.pth | keys --depth 2 {g}/plain.pth
    diff --structure --atol 1 {g}/plain.pth {g}/plain.pth | download --list --force
    diff --at . --left-at . --right-at . {g}/plain.pth {g}/plain.pth
"""


@pytest.mark.parametrize(
    "line", [each.strip() for each in IDLE.replace("\n", "|").split("|") if each.strip()]
)
def test_an_option_without_effect_is_a_usage_error(run: Run, good: Path, line: str) -> None:
    done = run(*line.format(g=good).split())
    assert (done.code, done.out) == (2, "")
    assert "has no effect with" in done.err


def test_a_new_folder_is_asked_for(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "weights"
    done = run("download", "http://127.0.0.1:9/f.pth", "-o", target)
    assert done.code == 2
    assert f"-o {target}/   makes a folder; a file has a suffix: -o {target}.pth" in done.err
    assert not target.exists()


def test_a_distributed_checkpoint_is_not_named_like_a_file(
    run: Run, good: Path, tmp_path: Path
) -> None:
    done = run("convert", "--to", "dcp", good / "plain.pth", tmp_path / "out.pth")
    assert (done.code, list(tmp_path.iterdir())) == (2, [])


def test_no_name_is_shown_as_such(run: Run) -> None:
    assert "error[no-such-file]: '' does not exist" in run("keys", "").err
