"""Recipes -> text: what comes with ckptool, what steps say, and what they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptool.state.recipes import Recipe, described
from ckptool.text import counted, listed, table, visible
from ckptool.verbs.recipe import Tried

SHOWN = 12  # differing keys in talk; --json has all


def _rows(rows: Sequence[Sequence[str]], title: Sequence[str], *, wide: bool) -> list[str]:
    """Write a table for people, or lines with tabs for programs."""
    rows = [[visible(cell) for cell in row] for row in rows]
    return table([title, *rows]) if wide else ["\t".join(row) for row in rows]


def shipped_lines(names: Iterable[str], *, wide: bool) -> list[str]:
    """List recipes by name, and what each says of itself."""
    rows = [(name, Recipe.load(name).about) for name in names]
    return _rows(rows, ("RECIPE", "WHAT IT DOES"), wide=wide)


def step_lines(recipe: Recipe, *, reverse: bool, wide: bool) -> list[str]:
    """List the rules of each step in the order in which they are done."""
    rows = [
        (str(asked.number), asked.step.name, line)
        for asked in recipe.asked(reverse=reverse)
        for line in _rules(asked.given)
    ]
    return _rows(rows, ("STEP", "WHAT", "RULE"), wide=wide)


def _rules(given: dict[str, Any]) -> Iterator[str]:
    """Describe the fields of a step, each rule of a rename for itself."""
    if "rules" in given:
        yield from (f"{old}={new}" for old, new in given["rules"])
        return
    fields = (
        f"{name.rstrip('_')}={' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in given.items()
    )
    yield "  ".join(fields)


def count_lines(found: Tried, *, wide: bool) -> list[str]:
    """List how many entries each rule took."""
    rows = [(str(each.number), each.step, str(each.count), each.rule) for each in found.counts]
    return _rows(rows, ("STEP", "WHAT", "TAKES", "RULE"), wide=wide)


def tried_lines(found: Tried) -> list[str]:
    """Return what comes out, what no rule takes, and what is otherwise than in `like`."""
    lines = [f"{visible(found.source)}: {counted(found.read, 'key')} in, {found.made} out"]
    if found.unmatched:
        what = f"{counted(len(found.unmatched), 'key')} that no rule matches"
        lines.append(visible(f"{what}: {listed(found.unmatched)}"))
    if found.like is None:
        return lines
    if found.fits:
        return [*lines, f"keys, shapes and dtypes are those of {visible(found.like)}"]
    lines.append(f"{counted(len(found.differing), 'key')} not as in {visible(found.like)}:")
    lines += [
        f"    {visible(key)}   {described(here)} here, {described(there)} there"
        for key, here, there in found.differing[:SHOWN]
    ]
    more = len(found.differing) - SHOWN
    return lines + ([f"    and {more} more; --json has all"] if more > 0 else [])
