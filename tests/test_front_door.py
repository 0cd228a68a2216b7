"""What others run of this repository: the hook of pre-commit, the action, the forms of `.github`.

Each is read from the file that ships and run as pre-commit or GitHub runs it.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import picture
import pytest
from conftest import FIXTURES, Outcome, environment, step
from test_docs import ROOT

yaml = pytest.importorskip("yaml")

Spawn = Callable[..., Outcome]
GITHUB = ROOT / ".github"
ACTION = GITHUB / "actions" / "convert"
GOOD, HOSTILE = FIXTURES / "good", FIXTURES / "hostile"
EXPRESSION = re.compile(r"\$\{\{\s*(.*?)\s*\}\}")


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


# The hook of pre-commit.


def hook() -> dict[str, Any]:
    (only,) = read(ROOT / ".pre-commit-hooks.yaml")
    return dict(only)


def commit(spawn: Spawn, *files: Path) -> Outcome:
    """Run the hook as pre-commit does: the entry, its arguments, then the files."""
    program, *line = [*shlex.split(hook()["entry"]), *hook()["args"]]
    assert program == "ckptool"
    return spawn(*line, *files, env={"PYTHONPATH": str(ROOT)})


def test_the_hook_passes_good_checkpoints(spawn: Spawn) -> None:
    done = commit(spawn, GOOD / "plain.pth", GOOD / "model.safetensors", GOOD / "dino.pth")
    assert (done.code, done.err) == (0, "")


@pytest.mark.parametrize(
    ("name", "status", "code"),
    [("crc_mismatch.pth", "damaged", 1), ("os_system.pth", "unsafe", 4), ("text.pth", "not-a", 3)],
)
def test_the_hook_stops_broken_and_hostile_ones(
    spawn: Spawn, name: str, status: str, code: int
) -> None:
    done = commit(spawn, GOOD / "plain.pth", HOSTILE / name, GOOD / "half.pth")
    assert done.code == code
    good, bad, other = done.out.splitlines()
    assert "\tok\t" in good
    assert "\tok\t" in other
    assert f"{name}\t{status}" in bad


def test_the_hook_stops_large_ones(
    spawn: Spawn, tmp_path: Path, make_safetensors: Callable[..., Path]
) -> None:
    limit = 100 << 20
    large = make_safetensors(tmp_path / "large.safetensors", {"weight": [limit // 4]})
    fits = make_safetensors(tmp_path / "fits.safetensors", {"weight": [limit // 4 - 100]})
    assert fits.stat().st_size <= limit < large.stat().st_size
    assert commit(spawn, fits).code == 0
    done = commit(spawn, fits, large)
    assert done.code == 1
    assert re.search(r"large\.safetensors\ttoo-large\tmore than 100(\.0)? MiB; ", done.out)


def test_the_hook_takes_names_of_checkpoints_alone() -> None:
    names = re.compile(hook()["files"])
    checkpoints = "model_best.pth.tar a/m.pt m.safetensors x/pytorch_model-00001-of-2.bin m.ckpt"
    others = "data.bin src.tar x.pkl pt.py notes.pth.md pytorch_model.bin.index.json a.pth/readme"
    assert all(names.search(name) for name in checkpoints.split())
    assert not any(names.search(name) for name in others.split())


# The action.


def filled(text: str, values: Mapping[str, str]) -> str:
    return EXPRESSION.sub(lambda found: values[found[1]], str(text))


def act(folder: Path, *, install: bool = False, **inputs: str) -> tuple[int, dict[str, str], str]:
    """Run the steps of the action as GitHub does; return the exit code, outputs and summary."""
    action = read(ACTION / "action.yml")
    assert {name for name, spec in action["inputs"].items() if spec.get("required")} <= {*inputs}
    given = {name: spec.get("default", "") for name, spec in action["inputs"].items()} | inputs
    values = {f"inputs.{name}": value for name, value in given.items()}
    values["steps.python.outputs.python-path"] = sys.executable
    values["steps.install.outputs.python"] = sys.executable
    runner = folder / "runner"
    runner.mkdir(exist_ok=True)
    said, summary = runner / "output", runner / "summary"
    for each in action["runs"]["steps"]:
        if "run" not in each or (each["id"] == "install" and not install):
            continue
        said.write_text("")
        script = runner / "script.sh"
        script.write_text(each["run"])
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)],
            cwd=folder,
            env=environment(
                {
                    "PYTHONPATH": "" if install else str(ROOT),
                    **{name: filled(value, values) for name, value in each["env"].items()},
                    "GITHUB_ACTION_PATH": str(ACTION),
                    "GITHUB_OUTPUT": str(said),
                    "GITHUB_STEP_SUMMARY": str(summary),
                    "RUNNER_TEMP": str(runner),
                    "RUNNER_OS": "Linux",
                }
            ),
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        (runner / "shown").write_text(done.stdout + done.stderr)
        outputs = parsed(said.read_text())
        values |= {f"steps.{each['id']}.outputs.{name}": text for name, text in outputs.items()}
        if done.returncode:
            return done.returncode, {}, summary.read_text() if summary.exists() else ""
    outputs = {name: filled(spec["value"], values) for name, spec in action["outputs"].items()}
    return 0, outputs, summary.read_text()


def parsed(text: str) -> dict[str, str]:
    """Read the file of a step's outputs: `name=value`, or `name<<END` and lines up to END."""
    found, lines = {}, iter(text.splitlines())
    for line in lines:
        name, mark, end = line.partition("<<")
        if not mark:
            name, _, found[name] = line.partition("=")
            continue
        inner = []
        while (each := next(lines)) != end:
            inner.append(each)
        found[name] = "\n".join(inner)
    return found


def as_read(markdown: str) -> str:
    """Return what a reader of the summary sees."""
    return re.sub(r"&#(\d+);", lambda found: chr(int(found[1])), markdown)


posix = pytest.mark.skipif(sys.platform == "win32", reason="paths of another shell")


@posix
def test_the_action_converts_checks_and_sums_up(tmp_path: Path) -> None:
    shutil.copy(GOOD / "model_best.pth.tar", tmp_path)
    code, outputs, summary = act(
        tmp_path,
        input="model_best.pth.tar",
        output="out/weights only.safetensors",
        options="--strip-prefix=module\n\n  --dtype=bf16\n",
        check="--finite",
    )
    written = tmp_path / "out" / "weights only.safetensors"
    assert code == 0
    assert outputs == {
        "path": "out/weights only.safetensors",
        "sha256": sha256(written.read_bytes()).hexdigest(),
        "tensors": "8",
    }
    shown = as_read(summary)
    assert "### ckptool convert\n\n| | |\n|---|---|\n" in summary
    assert "| tensors | read 8, renamed 8, dropped 0, written 8 |" in shown
    assert "| not written | epoch, arch, best_acc1, optimizer |" in shown
    assert f"sha256 {outputs['sha256']}" in shown


@posix
def test_the_action_runs_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "map.toml").write_text("recipe = 1\n[[step]]\nrename = [['features', 'body']]\n")
    code, outputs, _ = act(
        tmp_path, input=str(GOOD / "plain.pth"), output="out.pth", recipe="map.toml"
    )
    assert (code, outputs["tensors"]) == (0, "8")


@posix
def test_the_action_writes_folders_of_shards(tmp_path: Path) -> None:
    code, outputs, summary = act(
        tmp_path, input=str(GOOD / "plain.pth"), output="out", options="--max-shard-size=300"
    )
    assert (code, outputs["path"], outputs["sha256"]) == (0, "out", "")
    assert "check: ok" in as_read(summary)


@posix
@pytest.mark.parametrize(
    ("inputs", "expected", "said"),
    [
        ({"input": "none.pth"}, 3, "none.pth"),
        ({"input": str(HOSTILE / "os_system.pth"), "output": "o.pth"}, 4, "would run code"),
        ({"input": str(GOOD / "special_values.pth"), "check": "--finite"}, 1, "check: damaged"),
        ({"command": "download"}, 2, ""),
        ({"command": "convert; echo > ran"}, 2, ""),
    ],
)
def test_what_fails_fails_the_job_and_sets_no_output(
    tmp_path: Path, inputs: dict[str, str], expected: int, said: str
) -> None:
    given = {"input": str(GOOD / "plain.pth"), "output": "o.safetensors", **inputs}
    code, outputs, summary = act(tmp_path, **given)
    assert (code, outputs) == (expected, {})
    assert said in as_read(summary)
    assert not (tmp_path / "ran").exists()


@posix
@pytest.mark.parametrize("field", ["input", "output", "command", "recipe", "options", "check"])
def test_no_input_is_code(tmp_path: Path, field: str) -> None:
    given = {"input": str(GOOD / "plain.pth"), "output": "o.safetensors"}
    act(tmp_path, **{**given, field: "$(touch ran)`touch ran`';touch ran;\"\npath=forged"})
    assert not (tmp_path / "ran").exists()
    assert parsed((tmp_path / "runner" / "output").read_text()).get("path") != "forged"


def test_no_expression_is_pasted_into_a_script() -> None:
    for step_ in read(ACTION / "action.yml")["runs"]["steps"]:
        assert not EXPRESSION.search(step_.get("run", ""))


@posix
def test_names_in_a_file_command_nothing(tmp_path: Path) -> None:
    """GitHub obeys a line that begins with `::`; summaries are Markdown and HTML."""
    key = "::set-output name=path::<b>|`x`"
    header = f'{{"{key}": {{"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}}}'.encode()
    (tmp_path / "in.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    options = "--drop=re:.*"
    act(tmp_path, input="in.safetensors", output="o.pth", options=f"{options}\n--rename=x=y")
    shown = (tmp_path / "runner" / "shown").read_text()
    first, *_, last = [line for line in shown.splitlines() if line.startswith("::")]
    assert last == f"::{first.removeprefix('::stop-commands::')}::"
    summary = (tmp_path / "runner" / "summary").read_text()
    rows = [line for line in summary.splitlines() if not line.startswith(("|", "#"))]
    assert rows
    assert not set("".join(rows).replace("<br>", "").replace("&#", "")) & set("<>|`*_[]:")


@posix
def test_the_action_installs(tmp_path: Path) -> None:
    if step(2) > 1:
        pytest.skip("with --all: makes a virtual environment")
    code, outputs, _ = act(
        tmp_path, install=True, input=str(GOOD / "plain.pth"), output="o.safetensors"
    )
    assert (code, outputs["tensors"]) == (0, "8"), (tmp_path / "runner" / "shown").read_text()


def test_the_action_passes_each_input_on() -> None:
    action = read(ACTION / "action.yml")
    used = {
        name
        for each in action["runs"]["steps"]
        for value in each.get("env", {}).values()
        for name in EXPRESSION.findall(value)
    }
    assert {f"inputs.{name}" for name in action["inputs"]} <= used
    assert os.path.isfile(ACTION / "convert.py")


# The papers of `.github`.

POSIX_OR_TORCH = {
    "torch", "torchvision", "safetensors", "timm", "huggingface_hub",
    "pty", "resource", "fcntl", "termios", "pwd", "grp",
}  # fmt: skip


def workflow() -> Any:
    return read(GITHUB / "workflows" / "ci.yml")


def test_the_workflow_runs_all_on_linux_and_the_base_elsewhere() -> None:
    jobs = workflow()["jobs"]
    everything, base = jobs["all"], jobs["base"]
    assert everything["runs-on"] == "ubuntu-latest"
    assert everything["steps"][-1]["run"] == ".ci/run"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    pythons = everything["strategy"]["matrix"]["python"]
    assert len(pythons) == 3
    assert project["requires-python"] == f">={pythons[0]}"
    assert base["strategy"]["matrix"]["system"] == ["macos-latest", "windows-latest"]


@posix
def test_the_base_tests_need_neither_torch_nor_posix() -> None:
    script = workflow()["jobs"]["base"]["steps"][-1]["run"]
    line = re.sub(r"\\\n", " ", script).splitlines()[-1].removeprefix("pytest -q ")
    done = subprocess.run(
        ["bash", "-c", f"echo {line}"], capture_output=True, text=True, check=True
    )
    names = done.stdout.split()
    assert len(names) > 10
    paths = {path.stem: path for path in (ROOT / "tests").rglob("*.py")}
    todo, seen = [ROOT / "tests" / name for name in names], set()
    while todo:
        path = todo.pop()
        for module in imported(path):
            assert module not in POSIX_OR_TORCH, f"{path.name} imports {module}"
            if module in paths and module not in seen:
                todo.append(paths[module])
                seen.add(module)


def imported(path: Path) -> set[str]:
    """Return the modules that a file imports as it is loaded."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    plain = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return plain | {
        str(n.module).split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module
    }


def test_files_that_the_architecture_names_are_there() -> None:
    text = (ROOT / "ckptool" / "manual" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([^`\s]+\.py)`", text)
    assert len(named) > 15
    roots = (ROOT, ROOT / "ckptool")
    assert not [name for name in named if not any((root / name).exists() for root in roots)]


def test_what_contributors_are_told_to_copy_is_there() -> None:
    text = (GITHUB / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = {name for name in re.findall(r"`([^`\s]+)`", text) if "/" in name or ".md" in name}
    assert len(named) > 20
    assert not [name for name in named if not (ROOT / name).exists()]
    for title in ("A container", "An edit", "A command"):
        section = re.search(rf"^## {title}\n\n(.*?)(?=\n## |\Z)", text, re.MULTILINE | re.DOTALL)
        assert section
        assert re.findall(r"^(\d+)\. ", section[1], re.MULTILINE) == [*map(str, range(1, 11))]
        assert "opy `" in section[1]
    for word, file in [
        ("MODULES", "containers/_registry.py"),
        ("EDITS", "state/edit_options.py"),
        ("GROUPS", "cli/main.py"),
    ]:
        assert f"`{word}`" in text
        assert re.search(rf"^{word} ?=", (ROOT / "ckptool" / file).read_text(), re.MULTILINE)


@pytest.mark.parametrize("name", ["bug", "checkpoint"])
def test_forms_ask_for_what_is_in_the_file(name: str) -> None:
    form = read(GITHUB / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"]
    assert form["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {each["type"] for each in form["body"]} <= kinds
    ids = [each["id"] for each in form["body"] if each["type"] != "markdown"]
    assert len(ids) == len({*ids})
    (info,) = (each for each in form["body"] if each.get("id") == "info")
    assert info["attributes"]["label"] == "`ckptool info --json FILE`"
    assert info["validations"]["required"]


def test_security_says_what_check_does_and_where_to_report() -> None:
    text = " ".join((GITHUB / "SECURITY.md").read_text(encoding="utf-8").split())
    for word in ("ckptool check", "--strict", "--max-memory", "exit code 4", "private advisory"):
        assert word in text
    assert not re.search(r"\S+@\S+|https?://", text)


# The picture of the README.


def written(svg: str) -> list[str]:
    """Return the texts of a picture; those of the torch that wrote the file may differ."""
    texts = ["".join(each.itertext()) for each in ElementTree.fromstring(svg).iter() if each.text]
    return [text for text in texts if "written by torch" not in text]


def test_the_picture_shows_commands_of_the_readme() -> None:
    svg = picture.PICTURE.read_text(encoding="utf-8")
    assert set(picture.COMMANDS) <= {*written(svg)}
    assert "<script" not in svg
    assert not re.search(r"(href|url)\b", svg)
    width = float(re.findall(r'width="(\d+)"', svg)[0])
    ends = re.findall(r'<text x="([\d.]+)" y="\d+" textLength="([\d.]+)"', svg)
    assert ends
    assert all(float(x) + float(length) <= width for x, length in ends)


@posix
def test_the_picture_is_what_a_terminal_shows() -> None:
    if step(2) > 1:
        pytest.skip("with --all: makes a ResNet-50")
    pytest.importorskip("torchvision")
    said = written(picture.drawn(picture.recorded()))
    shown = written(picture.PICTURE.read_text(encoding="utf-8"))
    assert said == shown, "python tests/picture.py draws it anew"


def test_a_run_of_colour_has_its_columns_and_long_lines_wrap() -> None:
    line = "FILE  \x1b[32m\x1b[1mok\x1b[0m  " + "x" * picture.COLUMNS
    (_, first, second) = picture._session("ckptool check", [line])
    assert first[:2] == [(0, "FILE", ""), (6, "ok", ' class="bold" style="fill:#7ee787"')]
    assert first[2] == (10, "x" * (picture.COLUMNS - 10), "")
    assert second == [(0, "x" * 10, "")]
