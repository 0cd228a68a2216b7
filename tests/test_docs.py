"""The README is run, not trusted: every console example gives what it shows."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
GOOD = ROOT / "fixtures" / "good"
README = (ROOT / "README.md").read_text(encoding="utf-8")

# What the examples work on: the name in the README, and the fixture behind it.
FILES = {
    "model_best.pth.tar": "good/model_best.pth.tar",
    "dino.pth": "good/dino.pth",
    "tied.pth": "good/tied.pth",
    "parallel_inside.pth": "good/parallel_inside.pth",
    "compiled_parallel.pth": "good/compiled_parallel.pth",
    "model.pkl": "good/whole_model.pth",
    "trained.pt": "good/whole_model_in_dict.pth",
    "flipped.pth": "hostile/crc_mismatch.pth",
    "hooked.pth": "hostile/eval_in_namespace.pth",
    "model.tar.gz": "hostile/tar_gz.pth",
    "flowers.safetensors": "good/flowers.safetensors",
}


def examples(text: str) -> list[tuple[str, list[str]]]:
    """List the console examples of a text: a command, and the lines that it shows."""
    found: list[tuple[str, list[str]]] = []
    for block in re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                found.append((line[2:], []))
            elif line:
                found[-1][1].append(line)
    return found


def on_terminal(command: str, folder: Path, *, columns: int = 200, term: str = "dumb") -> list[str]:
    """Run a command on a terminal; give the lines it shows."""
    import pty  # not on Windows

    arguments = shlex.split(command)
    assert arguments[0] == "ckptool"
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": term, "COLUMNS": f"{columns}", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "ckptool", *arguments[1:]],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=child,
        stderr=child,
    )
    os.close(child)
    shown = b""
    while True:
        try:
            data = os.read(parent, 65536)
        except OSError:  # Linux: the other side is closed
            break
        if not data:
            break
        shown += data
    os.close(parent)
    process.wait(timeout=60)
    return shown.decode().replace("\r\n", "\n").splitlines()


def matches(shown: list[str], expected: list[str]) -> bool:
    """Compare lines; `...` stands for any number of them."""
    if not expected:
        return not shown
    if expected[0] == "...":
        return any(matches(shown[skip:], expected[1:]) for skip in range(len(shown) + 1))
    return bool(shown) and shown[0] == expected[0] and matches(shown[1:], expected[1:])


def test_a_difference_is_noticed() -> None:
    assert matches(["a", "b", "c"], ["a", "...", "c"])
    assert not matches(["a", "b"], ["a"])
    assert not matches(["a"], ["b"])


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
def test_the_examples_give_what_they_show(tmp_path: Path) -> None:
    for name, fixture in FILES.items():
        shutil.copy(ROOT / "fixtures" / fixture, tmp_path / name)
    assert examples(README)
    for command, expected in examples(README):
        shown = on_terminal(command, tmp_path)
        assert matches(shown, expected), f"$ {command}\n" + "\n".join(shown)


def test_the_set_up_commands_are_the_ones_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    for command in ("pip install .", "ckptool keys fixtures/good/model_best.pth.tar"):
        assert command in README
        assert command.replace("pip install", "pip install --quiet") in script
    assert "pip install '.[test]' && pytest" in README


def test_the_table_of_containers_is_that_of_the_formats() -> None:
    from ckptool import containers as formats

    containers = list(formats.built_in())
    page = (ROOT / "ckptool" / "manual" / "containers.md").read_text(encoding="utf-8")
    table = re.search(
        r"^\| container \| read \| write .*\n\|[-|]+\n((?:\|.*\n)+)", page, re.MULTILINE
    )
    assert table
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table[1].splitlines()]
    titles = {title: row for row in rows for title in re.sub(r" \(.*", "", row[0]).split(", ")}
    assert titles.keys() == {each.title for each in containers}
    for each in containers:
        _, read, write, judge = titles[each.title]
        assert read
        assert judge
        assert (write == "yes") is bool(each.writer)
        if not each.writer and "--" not in write:
            assert write in ("as one file", f"as {each.written_as.replace('-', ' ')}")


def test_the_python_examples_run(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    for name, fixture in FILES.items():
        shutil.copy(ROOT / "fixtures" / fixture, tmp_path / name)
    page = (ROOT / "ckptool" / "manual" / "python.md").read_text(encoding="utf-8")
    in_page, in_readme = (
        re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for text in (page, README)
    )
    assert in_readme == in_page[:1]
    assert len(in_page) >= 2
    shown = [run_python(block, tmp_path) for block in in_page]
    assert shown[0].splitlines() == [
        "['module.features.0.weight', 'module.features.1.weight'] ('state_dict',)",
        "8 8 8",
        "0.8928571428571429 ['classifier.weight', 'classifier.bias']",
    ]
    assert shown[1].splitlines() == ["6 ['classifier.weight', 'classifier.bias']"]


def run_python(source: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 200


SYMPTOMS = (
    "Missing key(s) in state_dict",
    "size mismatch for",
    "Weights only load failed",
    "Attempting to deserialize object on a CUDA device",
    "ckptool unwrap",
    "ckptool check",
    "`.safetensors`",
    "ZeRO",
    "ckptool match",
)


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_readme_has_a_command_for_each_symptom_and_links_that_lead_somewhere(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    _, _, table, *_ = re.split(r"^## |^\| .*\|\n\|---", text, flags=re.MULTILINE)
    rows = [row for row in table.splitlines() if row.startswith("| ")]
    for symptom in SYMPTOMS:
        (row, *_) = (row for row in rows if symptom in row)
        assert "`ckptool " in row.rpartition(" | ")[2]
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) >= 7
    assert all((ROOT / link).is_file() for link in links)
    assert text.count("![") == 1


def test_the_chinese_readme_says_the_same() -> None:
    """Headings, code, what is in backquotes, links and numbers are those of the README."""
    chinese = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")

    def skeleton(text: str) -> list[tuple[int, int]]:
        return [
            (len(mark), len(re.findall(r"^\| ", body, re.MULTILINE)))
            for mark, body in re.findall(r"^(#+) .*\n((?:(?!#).*\n)*)", text, re.MULTILINE)
        ]

    def blocks(text: str) -> list[str]:
        return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)

    def quoted(text: str) -> list[str]:
        prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
        return sorted(re.findall(r"`[^`\n]+`", prose))

    def numbers(text: str) -> list[str]:
        return sorted(re.findall(r"\d+(?:\.\d+)?", text.replace("CN.md", "")))

    def links(text: str) -> list[str]:
        return re.findall(r"\]\(([^)]+)\)", text)

    for each in (skeleton, blocks, quoted, numbers, links):
        assert each(chinese) == each(README)
    assert len(re.findall(r"[\u4e00-\u9fff]", chinese)) > 600
