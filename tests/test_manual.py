"""The manual is run, not trusted: its examples, its lists of options, its table of contents.

`python tests/test_manual.py` writes the lists of options anew.
"""

from __future__ import annotations

import inspect
import re
import shlex
import shutil
import sys
from itertools import takewhile
from pathlib import Path

import click
import pytest
from test_docs import FILES, ROOT, examples, matches, on_terminal

from ckptool.cli import help as manual
from ckptool.cli.main import ckptool
from ckptool.state.steps import STEPS, Step

PAGES = sorted(path.stem for path in Path(manual.FOLDER).glob("*.md"))
OPTIONS = re.compile(r"(?<=\n## Options\n\n```text\n).*?(?=```\n)", re.DOTALL)
WIDTH = 80
# What the examples find beside the fixtures.
FIRST = """```console
$ ckptool strip-prefix model_best.pth.tar clean.pth
$ ckptool strip-prefix --prefix auto compiled_parallel.pth plain.pth
$ ckptool convert clean.pth clean.safetensors
```
"""


def context() -> click.Context:
    return click.Context(ckptool, info_name="ckptool", **ckptool.context_settings)


def options(name: str) -> str:
    """Return the options of a command as its help shows them."""
    command = ckptool.get_command(context(), name)
    assert command
    inner = click.Context(command, info_name=name, parent=context())
    formatter = click.HelpFormatter(width=WIDTH - 4)
    command.format_options(inner, formatter)
    return "\n".join(line[2:] for line in formatter.getvalue().splitlines()[1:]).strip("\n") + "\n"


def test_every_command_and_subject_has_a_page() -> None:
    topics = manual.topics(context())
    assert sorted(name for names in topics.values() for name in names) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_begins_with_its_name_and_fits_a_terminal(name: str) -> None:
    text = manual.page(name)
    assert re.match(rf"# {re.escape(name)}: .{{3,60}}\n\n", text)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    long = [line for line in prose.splitlines() if len(line) > 100 and not line.startswith("|")]
    assert not long


@pytest.mark.parametrize("name", manual.topics(context())["Commands"])
def test_the_options_are_those_of_the_command(name: str) -> None:
    found = OPTIONS.search(manual.page(name))
    assert found
    assert found[0] == options(name), "python tests/test_manual.py writes them anew"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder of what the examples find."""
    folder = tmp_path_factory.mktemp("examples")
    for file, fixture in FILES.items():
        shutil.copy(ROOT / "fixtures" / fixture, folder / file)
    for command, _ in examples(FIRST):
        on_terminal(command, folder)
    return folder


@pytest.mark.skipif(sys.platform == "win32", reason="terminals are those of POSIX")
@pytest.mark.parametrize("name", [name for name in PAGES if examples(manual.page(name))])
def test_the_examples_give_what_they_show(name: str, found: Path, tmp_path: Path) -> None:
    shutil.copytree(found, tmp_path, dirs_exist_ok=True)
    for command, expected in examples(manual.page(name)):
        shown = on_terminal(command, tmp_path)
        assert matches(shown, expected), f"$ {command}\n" + "\n".join(shown)


@pytest.mark.parametrize("step", STEPS.values(), ids=lambda step: step.name)
def test_the_fields_of_steps_are_named(step: Step) -> None:
    row = next(line for line in manual.page("recipes").splitlines() if f"`{step.name} " in line)
    written = row[row.index(f"`{step.name} ") :].split("`")[1]
    fields = {name.rstrip("_") for name in inspect.signature(step.make).parameters}
    named = set(re.findall(r"[a-z]+(?= *[=,}])", written.partition("{")[2]))
    assert named == (set() if step.alone else fields - {"optional", "back"})


def lines_named(text: str) -> list[str]:
    """List the command lines in a text that are not run: in prose, tables and blocks of shell."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    inline = [" ".join(line.split()) for line in re.findall(r"`(ckptool [^`]+)`", prose)]
    shell = [line for block in blocks for line in block.splitlines()]
    return [*inline, *(line for line in shell if line.startswith("ckptool "))]


SHELL = ("|", ">", "<", "&&")
PAPERS = {
    **{name: manual.page(name) for name in PAGES},
    **{
        path.name: path.read_text(encoding="utf-8")
        for path in (*ROOT.glob("README*.md"), *(ROOT / ".github").glob("*.md"))
    },
}


@pytest.mark.parametrize("name", [name for name in PAPERS if lines_named(PAPERS[name])])
def test_command_lines_that_are_named_are_understood(name: str) -> None:
    """Their commands and options are there; what is in capitals stands for something else."""
    for line in lines_named(PAPERS[name]):
        words = takewhile(lambda each: each not in SHELL, shlex.split(line, comments=True))
        _, word, *arguments = words
        if word.isupper() or word.startswith("-"):
            continue
        command = ckptool.get_command(context(), word)
        assert command, line
        flags = {flag for each in command.params for flag in (*each.opts, *each.secondary_opts)}
        given = {each.partition("=")[0] for each in arguments if re.match(r"--?[a-z]", each)}
        assert given <= flags | {"-h", "--help"}, line
        if word == "help" and arguments:
            assert {*arguments} <= {*PAGES, *manual.schemas(), "TOPIC", "COMMAND"}, line


def main() -> None:
    """Write the lists of options into the pages of commands."""
    for name in manual.topics(context())["Commands"]:
        path = Path(manual.FOLDER, name + manual.SUFFIX)
        text = path.read_text(encoding="utf-8")
        before, after = OPTIONS.split(text)
        path.write_text(before + options(name) + after, encoding="utf-8")


if __name__ == "__main__":
    main()
