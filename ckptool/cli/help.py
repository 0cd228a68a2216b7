"""`ckptool help`: the manual, a page for each command and each subject, in the package."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from functools import cache
from textwrap import wrap
from typing import Any

import click

from ckptool.cli import screen, talk
from ckptool.cli._options import Command
from ckptool.errors import NoSuchCommand, of_system

FOLDER = os.path.join(os.path.dirname(os.path.dirname(__file__)), "manual")
SUFFIX = ".md"
SCHEMAS = "json"  # the page that lists them, and what their own names begin with
SUBJECTS = (
    "writing many terminal selecting recipes dtypes containers remote whole-models plugins ci "
    "safety trust exit-codes json python numbers scale architecture"
).split()


def topics(context: click.Context) -> dict[str, list[str]]:
    """Return the names of pages: those of commands, in their order, and of subjects."""
    group = context.find_root().command
    commands = group.list_commands(context) if isinstance(group, click.Group) else []
    return {"Commands": commands, "Subjects": SUBJECTS}


@cache
def schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schemas of documents by the names of their pages: `json/keys-1`."""
    from ckptool.documents.schemas import schemas

    return {f"{SCHEMAS}/{name.replace('/', '-')}": each for name, each in schemas().items()}


def page(topic: str) -> str:
    """Return a page of the manual as it is stored, in Markdown, or a JSON Schema."""
    if "/" in topic:
        import json

        return json.dumps(schemas()[topic], indent=2) + "\n"
    path = os.path.join(FOLDER, topic + SUFFIX)
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError as error:
        raise of_system(error, path, "read") from None


def title(topic: str) -> str:
    """Return what a page is about: its first line, behind the name; a schema's description."""
    if "/" in topic:
        return str(schemas()[topic]["description"])
    return page(topic).partition("\n")[0].partition(": ")[2]


def shown(text: str, *, styled: bool, width: int | None = None) -> str:
    """Return a page for a terminal or a pipe: examples indented, without the marks around them.

    With a width, which a terminal has, paragraphs and tables are laid out anew.
    """
    lines: list[str] = []
    for kind, block in _blocks(text):
        if kind == "example":
            lines += (f"    {line}".rstrip() for line in block[1:])
        elif kind == "heading":
            plain = (line.lstrip("#").strip() for line in block)
            lines += (click.style(line, bold=True) if styled else line for line in plain)
        elif width is None or kind == "":
            lines += block
        elif kind == "table":
            cells = [[cell.strip() for cell in line.split(" | ")] for line in block]
            rows = [[cell.strip("| ") for cell in row] for row in cells if row[0][:2] != "|-"]
            lines += screen.table(rows, width)
        else:
            following = "  " if kind == "item" else ""
            line = " ".join(part.strip() for part in block)
            lines += wrap(
                line,
                width,
                subsequent_indent=following,
                break_long_words=False,
                break_on_hyphens=False,
            )
    return "\n".join(lines) + "\n"


def _blocks(text: str) -> Iterator[tuple[str, list[str]]]:
    """Divide Markdown in examples, headings, tables, list items and paragraphs."""
    kind, block = "", list[str]()
    for line in text.splitlines():
        before = kind
        if kind == "example":
            kind = "end" if line.startswith("```") else kind
        else:
            kind = _kind(line, kind)
        if (kind != before or (kind == "item" and line.startswith("- "))) and block:
            yield before, block
            block = []
        block += [] if kind == "end" else [line]
    yield kind, block


def _kind(line: str, before: str) -> str:
    marks = {"```": "example", "#": "heading", "|": "table", "- ": "item"}
    found = next((kind for mark, kind in marks.items() if line.startswith(mark)), None)
    if found or not line.strip():
        return found or ""
    return before if before == "item" else "paragraph"


def _complete(context: click.Context, _: click.Parameter, start: str) -> list[Any]:
    from click.shell_completion import CompletionItem

    names = [*(name for group in topics(context).values() for name in group), *schemas()]
    return [CompletionItem(name, help=title(name)) for name in names if name.startswith(start)]


@click.command("help", cls=Command, reads=False)
@click.argument("topic", required=False, shell_complete=_complete)
@click.pass_context
def command(context: click.Context, topic: str | None) -> None:
    """Read the manual: a page for each command, and for containers, recipes, safety ...

    \b
    ckptool help strip-prefix
    ckptool help safety
    ckptool help json/keys-1                     (the JSON Schema of a document)

    Without a topic, all pages are listed. On a terminal a page that is longer than
    the screen goes through $PAGER.
    """
    from shutil import get_terminal_size

    groups = topics(context)
    if topic is None:
        talk.put(_contents(groups))
        return
    names = [name for names in groups.values() for name in names]
    if topic not in names and topic not in schemas():
        raise _no_such_page(topic, [*names, *schemas()])
    text = page(topic)
    if "/" not in topic:
        text = shown(text, styled=talk.in_colour(sys.stdout), width=talk.columns())
    if topic == SCHEMAS:
        text += "".join(f"  {name:18} {title(name)}\n" for name in schemas())
    if talk.on_terminal() and text.count("\n") >= get_terminal_size().lines:
        click.echo_via_pager(text)
    else:
        talk.put(text.splitlines())


def _contents(groups: dict[str, list[str]]) -> list[str]:
    lines = []
    for name, topics in groups.items():
        lines += ["", f"{name}:", *(f"  {topic:14}{title(topic)}" for topic in topics)]
    return [*lines[1:], "", "ckptool help TOPIC shows a page"]


def _no_such_page(topic: str, names: list[str]) -> NoSuchCommand:
    from difflib import get_close_matches

    close = get_close_matches(topic, names, n=1, cutoff=0.5)
    hint = f"ckptool help {close[0]}" if close else "ckptool help   lists the pages"
    return NoSuchCommand(f"there is no command or subject `{topic}`", hint=hint)
