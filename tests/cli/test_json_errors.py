"""With --json, stderr is empty or one document, whatever happens; stdout's has the warnings."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ckptool import containers
from ckptool.cli import talk

Run = Callable[..., Any]
FIELDS = ["error", "message", "evidence", "hint", "exit"]
LINES = {
    "keys --nosuch a.pth": ("usage", 2, "ckptool keys --help"),
    "keys": ("usage", 2, "ckptool keys --help"),
    "keys --tree --names plain.pth": ("usage", 2, "ckptool keys --help"),
    "keys --at": ("usage", 2, "ckptool keys --help"),
    "strip-prefix plain.pth": ("usage", 2, "ckptool strip-prefix --help"),
    "--nosuch": ("usage", 2, "ckptool --help"),
    "help": ("usage", 2, "ckptool help --help"),
    "keyz plain.pth": ("no-such-command", 2, "did you mean `ckptool keys`?"),
    "keys absent.pth": ("no-such-file", 3, ""),
    "keys plain.pth --at nowhere": ("no-such-key", 2, None),
    "unwrap plain.pth out.pth": ("edit-error", 2, None),
    "convert os_system.pth out.pth": (
        "unsafe-pickle",
        4,
        "ckptool convert os_system.pth out.pth --json --tensors-only",
    ),
    "add-prefix plain.pth plain.pth": ("same-file", 5, None),
    "transfer plain.pth out.pth --like flowers.safetensors --drop features": ("poor-fit", 1, None),
}


@pytest.fixture
def here(tmp_path: Path, good: Path, hostile: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for source in (good / "plain.pth", good / "flowers.safetensors", hostile / "os_system.pth"):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(done: Any) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(done.err)
    assert list(error) == FIELDS
    assert (error["exit"], done.out) == (done.code, "")
    return error


@pytest.mark.parametrize("line", LINES)
def test_an_error_is_one_document(run: Run, here: Path, line: str) -> None:
    plain, done = run(*line.split()), run(*line.split(), "--json")
    error = error_of(done)
    slug, code, hint = LINES[line]
    assert (error["error"], error["exit"]) == (slug, code) == (slug, done.code)
    if hint is not None:
        assert error["hint"].partition("   ")[0] == hint
    if slug != "usage":
        said = plain.err.splitlines()
        assert said[0] == f"error[{slug}]: {error['message']}"
        assert said[1 : 1 + len(error["evidence"])] == [f"    {each}" for each in error["evidence"]]


RAISED = {
    "out of memory": (MemoryError(), "out-of-memory", 7),
    "the system": (OSError(24, "Too many open files", "a.pth"), "unreadable", 3),
    "a library": (ImportError("libx.so: no such file"), "missing-extra", 7),
    "a defect": (ZeroDivisionError("a \x1b[31mdefect"), "bug", 70),
    "interrupted": (KeyboardInterrupt(), "interrupted", 130),
}


@pytest.mark.parametrize("what", RAISED)
@pytest.mark.parametrize("debug", [False, True])
def test_what_nobody_foresaw_is_one_too(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, what: str, debug: bool
) -> None:
    raised, slug, code = RAISED[what]

    def broken(*_: object, **__: object) -> None:
        raise raised

    monkeypatch.setattr(containers, "read", broken)
    error = error_of(run(*["--debug"][: int(debug)], "keys", "--json", "plain.pth"))
    assert (error["error"], error["exit"]) == (slug, code)


def test_a_reader_that_went_away_is_no_error(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(talk, "put", gone)
    monkeypatch.setattr("ckptool.cli.main.silence", lambda: None)
    done = run("keys", "--json", "plain.pth")
    assert (done.code, done.out, done.err) == (141, "", "")


@pytest.mark.parametrize(
    "line", ["keys os_system.pth", "diff os_system.pth plain.pth", "diff plain.pth os_system.pth"]
)
def test_a_warning_is_in_the_document(run: Run, here: Path, line: str) -> None:
    done = run(*line.split(), "--json")
    assert done.err == ""
    (warning,) = done.document["warnings"]
    assert warning.startswith("os_system.pth would run code when loaded; nothing was executed; ")
    assert "os.system(" in warning
    assert "warnings" not in run("keys", "plain.pth", "--json").document


def test_a_warning_of_a_library_is_too(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = containers.read

    def warned(*given: object, **more: Any) -> Any:
        warnings.warn("an old file", stacklevel=1)
        return read(*given, **more)

    monkeypatch.setattr(containers, "read", warned)
    done = run("info", "plain.pth", "--json")
    assert (done.document["warnings"], done.err) == (["an old file"], "")


def test_there_is_no_talk_and_no_progress(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(talk, "BAR_AFTER", -1.0)
    monkeypatch.setattr(talk, "LINE_EVERY", -1.0)
    assert "B/s" in run("convert", "plain.pth", "out.safetensors").err
    for line in ("convert plain.pth other.pth", "check plain.pth", "keys --stats plain.pth"):
        done = run(*line.split(), "--json")
        assert (done.code, done.err) == (0, "")


def test_a_defect_at_one_file_of_check_is_in_both_documents(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ckptool.verbs import checking

    check = checking.check

    def broken(path: str, **how: Any) -> Any:
        if path == "plain.pth":
            raise ZeroDivisionError("x")
        return check(path, **how)

    monkeypatch.setattr(checking, "check", broken)
    done = run("check", "--json", "plain.pth", "flowers.safetensors")
    assert done.code == 70
    assert json.loads(done.err)["error"] == "bug"
    assert [each["file"] for each in done.document["files"]] == ["flowers.safetensors"]
    reason = "error[bug]: ZeroDivisionError: not checked"
    assert done.document["not_looked_at"] == [{"file": "plain.pth", "reason": reason}]


def test_a_file_of_that_name_is_a_file(run: Run, here: Path) -> None:
    (here / "--json").write_bytes((here / "plain.pth").read_bytes())
    done = run("keys", "--names", "--", "--json")
    assert done.out.startswith("features.0.weight\n")
    assert "--json: torch zip" in done.err
