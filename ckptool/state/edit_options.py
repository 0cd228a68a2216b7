"""The edits that commands have options for; `--help` reads this, and none of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ckptool.errors import EditError
from ckptool.records import dataclass
from ckptool.text import several

if TYPE_CHECKING:
    from ckptool.state.edits import Edit


@dataclass(frozen=True, slots=True)
class EditSpec:
    """An edit as an option; `parse` takes the texts that were given, and `flags` as keywords.

    With `selects`, those are patterns, and a text `@file` is replaced by the patterns in it. With
    `together`, options that follow each other make one edit.
    """

    option: str
    metavar: str
    help: str
    parse: Callable[..., Edit]
    selects: bool = False
    together: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name it as a keyword."""
        return self.option.removeprefix("--").replace("-", "_")


def stripping(texts: Sequence[str], *, every: bool = False, **flags: bool) -> Edit:
    """Make the edit of a prefix, or of `auto`."""
    from ckptool.state import edits

    if texts[0] != edits.AUTO:
        return edits.strip_prefix(texts[0], every=every, **flags)
    if every:
        raise EditError("--prefix auto takes no --every: it removes what all keys share")
    return edits.strip_wrappers(**flags)


def _add_prefix(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.add_prefix(texts[0])


def _rename(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits
    from ckptool.state.renaming import read_rule

    return edits.renames((rule.old, rule.new) for rule in map(read_rule, texts))


def recipe_edits(named: str | Sequence[str], *, reverse: bool = False) -> list[Edit]:
    """Return the edits of recipes: of files, or of those that come with ckptool by their names."""
    if not named:
        return []
    from ckptool.state.recipes import Recipe

    return [Recipe.load(each).edit(reverse=reverse) for each in several(named)]


def _recipe(texts: Sequence[str], *, reverse: bool = False) -> Edit:
    return recipe_edits(texts, reverse=reverse)[0]


def _drop(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.drop(texts)


def _keep(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.keep(texts)


STRIP_FLAGS = ("anywhere", "keep_bookkeeping")
RECIPE_FLAGS = ("reverse",)
EDITS = (
    EditSpec(
        "--strip-prefix", "P", "Remove a prefix from keys, or auto.", stripping, flags=STRIP_FLAGS
    ),
    EditSpec("--add-prefix", "P", "Add a prefix to keys.", _add_prefix),
    EditSpec("--rename", "RULE", "OLD=NEW: a prefix, a template.", _rename, together=True),
    EditSpec("--recipe", "FILE", "Do the steps of a recipe.", _recipe, flags=RECIPE_FLAGS),
    EditSpec("--drop", "PATTERN", "Drop keys.", _drop, selects=True, together=True),
    EditSpec("--keep", "PATTERN", "Drop all other keys.", _keep, selects=True, together=True),
)
