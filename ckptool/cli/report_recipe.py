"""Recipes -> text: what comes with ckptool, what steps say, and what they take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from ckptool.cli import screen
from ckptool.state.recipes import Recipe, described, left_over
from ckptool.text import at_most, counted, visible
from ckptool.verbs.recipe import Tried

SHOWN = 12  # differing keys in talk; --json has all


def _rows(title: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    return screen.listed(title, [[visible(cell) for cell in row] for row in rows], width)


def shipped_lines(names: Iterable[str], width: int | None) -> list[str]:
    """List recipes by name, and what each says of itself."""
    rows = [(name, Recipe.load(name).about) for name in names]
    return _rows(("RECIPE", "WHAT IT DOES"), rows, width)


def step_lines(recipe: Recipe, width: int | None, *, reverse: bool) -> list[str]:
    """List the rules of each step in the order in which they are done."""
    rows = [
        (str(asked.number), asked.step.name, line)
        for asked in recipe.asked(reverse=reverse)
        for line in _rules(asked.given)
    ]
    return _rows(("STEP", "WHAT", "RULE"), rows, width)


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


def count_lines(found: Tried, width: int | None) -> list[str]:
    """List how many entries each rule took."""
    rows = [(str(each.number), each.step, str(each.count), each.rule) for each in found.counts]
    return _rows(("STEP", "WHAT", "TAKES", "RULE"), rows, width)


def tried_lines(found: Tried) -> list[str]:
    """Return what comes out, what there is to know of it, and what is otherwise than in `like`.

    What no rule takes is said even where the recipe allows it.
    """
    lines = [f"{visible(found.source)}: {counted(found.read, 'key')} in, {found.made} out"]
    left = [left_over(found.unmatched)[1]] if found.unmatched else []
    lines += map(visible, dict.fromkeys([*found.notes, *left]))
    if found.like is None:
        return lines
    if found.fits:
        return [*lines, f"keys, shapes and dtypes are those of {visible(found.like)}"]
    lines.append(f"{counted(len(found.differing), 'key')} not as in {visible(found.like)}:")
    rows = [
        f"{visible(key)}   {described(here)} here, {described(there)} there"
        for key, here, there in found.differing
    ]
    return [*lines, *(f"    {row}" for row in at_most(rows, SHOWN, "; --json has all"))]
