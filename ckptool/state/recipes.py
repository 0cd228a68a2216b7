"""Recipes: steps from one naming scheme and layout to another, as a file of TOML without code.

    recipe = 1
    [[step]]
    rename = [['encoder.ln', 'norm'], ['layers.layer_{i}.ln_{n}', 'blocks.{i}.norm{n}']]
    [[step]]
    split = {from = 'blocks.{i}.qkv.{p}', to = ['h.{i}.q.{p}', 'h.{i}.k.{p}', 'h.{i}.v.{p}']}
    [expect]
    tensors = 152

Steps follow each other; `steps.STEPS` has their names and fields. `expect` is what must be true of
the output. A recipe opens nothing but the document that its `like` names, below its own folder.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any, Literal

from ckptool.errors import BadRecipe, EditError, NotAsExpected, reason
from ckptool.records import dataclass, grouped
from ckptool.state import edits
from ckptool.state.edits import Change, Edit, Entries, KeyMap
from ckptool.state.recipe_fields import fields_of, is_number, is_text, refuse_unknown, written
from ckptool.state.steps import STEPS, Given, Step
from ckptool.tensors.tensor import tensors_of
from ckptool.text import at_most, counted, did_you_mean, listed, quoted, several, shape

VERSION = 1  # a new step or field raises it
SUFFIX = ".toml"
MAX_NBYTES = 1 << 20
MAX_LIKE_NBYTES = 64 << 20
MAX_STEPS = 1000
MAX_RULES = 10_000
SHIPPED = os.path.join(os.path.dirname(__file__), "recipes")
_UNMATCHED = ("allow", "name", "refuse")
# tomllib keeps all that `a.b.c.d` begins with: the square of its length in memory.
MAX_DOTS = 16
_DEEP = re.compile(rf"(?:[\w-]+[ \t]*\.[ \t]*){{{MAX_DOTS + 1}}}")
_TEXTS = re.compile(
    r'"""(?:\\.|[^\\])*?(?:"""|\Z)|"(?:\\.|[^"\\\n])*"?'
    r"|'''.*?(?:'''|\Z)|'[^'\n]*'?|#[^\n]*",
    re.DOTALL,
)


Fact = tuple[str, tuple[int, ...]]  # dtype and shape


@dataclass(frozen=True, slots=True)
class Expect:
    """What must be true of the output of a recipe; `like` are dtype and shape by key."""

    tensors: int | None = None
    unmatched: Literal["allow", "name", "refuse"] = "name"
    like: Mapping[str, Fact] | None = None
    like_name: str = ""


@dataclass(frozen=True, slots=True)
class Asked:
    """A step as a recipe asks for it: `number` counts from 1."""

    number: int
    step: Step
    given: Given

    @property
    def where(self) -> str:
        """Name the step in errors."""
        return f"step {self.number} ({self.step.name})"

    def edit(self) -> Edit:
        """Make the edit of the step; raises `BadRecipe` for one that cannot be made."""
        try:
            made = self.step.make(**self.given)
        except EditError as error:
            raise _by_field(error).within(self.where) from None
        rule = "" if made.change else " ".join(several(self.given[self.step.alone]))
        return replace(made, where=self.where, number=self.number, rule=rule)


@dataclass(frozen=True, slots=True)
class Recipe:
    """The steps of a recipe in order, what is expected of them, and what it says of itself."""

    name: str
    steps: tuple[Asked, ...]
    expect: Expect = Expect()
    about: str = ""

    def __repr__(self) -> str:
        return f"<Recipe {self.name}: {counted(len(self.steps), 'step')}>"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe from a file, or one that comes with ckptool by its name.

        A text without a slash and `.toml` is a name. Raises `BadRecipe`.

        >>> ckptool.Recipe.load("fuse-qkv")
        <Recipe fuse-qkv: 1 step>
        """
        text = os.fspath(path)
        named = isinstance(path, str) and "/" not in text and not text.endswith(SUFFIX)
        file = _shipped(text) if named and os.sep not in text else text
        try:
            with open(file, "rb") as opened:
                data = opened.read(MAX_NBYTES + 1)
        except OSError as error:
            raise BadRecipe(f"the recipe {text} cannot be read: {reason(error)}") from None
        try:
            return _parsed(text, data, os.path.dirname(file))
        except EditError as error:
            raise error.within(text) from None

    def edit(self, *, reverse: bool = False) -> Edit:
        """Return the recipe as one edit, forwards or backwards.

        Raises `BadRecipe` for a step that has no way back, or that cannot be made; what is not as
        `expect` says raises `NotAsExpected` when it is applied.
        """
        asked = self.asked(reverse=reverse)
        try:
            steps = [each.edit() for each in asked]
        except EditError as error:
            raise error.within(self.name) from None

        def change(entries: Entries) -> Change:
            if reverse:
                self._refuse_unexpected(entries)
            try:
                key_map, edit = edits.apply(steps, entries)
            except EditError as error:
                raise _by_field(error) from None
            if not reverse:
                self._refuse_unexpected(key_map.entries)
            return _as_change(entries, key_map, edit, self._unmatched(key_map))

        return Edit("recipe", change=change, where=self.name)

    def asked(self, *, reverse: bool = False) -> list[Asked]:
        """Return the steps in the order in which they are done.

        Raises `BadRecipe` for one that has no way back.
        """
        if not reverse:
            return list(self.steps)
        turned = []
        for asked in reversed(self.steps):
            back = asked.step.back(asked.given)
            if isinstance(back, str):
                raise BadRecipe(f"{self.name}: {asked.where} has no way back: {back}")
            turned.append(Asked(asked.number, STEPS[back[0]], back[1]))
        return turned

    def _unmatched(self, key_map: KeyMap) -> list[str]:
        """Name the keys that no rule took, or refuse them."""
        left = key_map.unmatched
        if not left or self.expect.unmatched == "allow":
            return []
        what, line = left_over(left)
        if self.expect.unmatched == "refuse":
            raise NotAsExpected(
                f"{self.name}: {what}; nothing was written",
                evidence=left[:8],
                hint="add rules for them, or write unmatched = 'name' under [expect]",
            )
        return [line]

    def _refuse_unexpected(self, entries: Entries) -> None:
        """Raise `NotAsExpected` for entries that are not what the recipe says."""
        expect = self.expect
        found = facts(entries)
        if expect.tensors is not None and len(found) != expect.tensors:
            raise NotAsExpected(
                f"{self.name}: {counted(len(found), 'tensor')} where [expect] says "
                f"{expect.tensors}; nothing was written"
            )
        if expect.like is None:
            return
        others = [
            f"{key}   {described(here)} here, {described(there)} there"
            for key, here, there in differing(found, expect.like)
        ]
        if others:
            raise NotAsExpected(
                f"{self.name}: {counted(len(others), 'tensor')} not as in {expect.like_name}; "
                "nothing was written",
                evidence=at_most(others, 8),
            )


def _by_field(error: EditError) -> EditError:
    """Return an error whose remedy is a field of the step, not an option of a command."""
    name, _, value = error.option.removeprefix("--").partition(" ")
    if name and not error.hint:
        error.hint = f"{name} = '{value}'"
    error.option = ""
    return error


def facts(entries: Entries) -> dict[str, Fact]:
    """Return dtype and shape of each tensor."""
    return {key: (each.dtype.label, each.shape) for key, each in tensors_of(entries).items()}


def differing(
    here: Mapping[str, Fact], there: Mapping[str, Fact]
) -> Iterator[tuple[str, Fact | None, Fact | None]]:
    """Iterate over the keys that are not the same on both sides, None for a missing one."""
    for key in dict.fromkeys([*there, *here]):
        if here.get(key) != there.get(key):
            yield key, here.get(key), there.get(key)


def left_over(keys: Sequence[str]) -> tuple[str, str]:
    """Return how many keys no rule matches, and the line that lists them."""
    what = f"{counted(len(keys), 'key')} that no rule matches"
    return what, f"{what}: {listed(keys)}"


def described(fact: Fact | None) -> str:
    """Describe a tensor, or that there is none."""
    return "missing" if fact is None else f"{fact[0]} {shape(fact[1])}"


def _as_change(
    entries: Entries, key_map: KeyMap, edit: edits.KeyEdit, notes: Sequence[str]
) -> Change:
    """Return what several steps did as what one did."""
    sources = grouped((new, old) for old, new in key_map.pairs if new is not None)
    given = {id(value) for value in entries.values()}
    remade = {
        new
        for old, new in key_map.pairs
        if old in key_map.remade and new is not None and id(key_map.entries[new]) not in given
    }
    left = {*key_map.unmatched}
    return Change(
        [(tuple(sources[new]), new, value) for new, value in key_map.entries.items()],
        key_map.said,
        edit,
        key_map.why,
        remade,
        {old: "recipe" for old, _ in key_map.pairs if old not in left},
        key_map.counts,
        key_map.casts,
        [*key_map.notes, *notes],
    )


def shipped() -> dict[str, str]:
    """Return the recipes that come with ckptool, by name."""
    files = sorted(name for name in os.listdir(SHIPPED) if name.endswith(SUFFIX))
    return {name.removesuffix(SUFFIX): os.path.join(SHIPPED, name) for name in files}


def _shipped(name: str) -> str:
    known = shipped()
    if name not in known:
        lists = f"ckptool recipe --list names them; a file is ./{name} or {name}{SUFFIX}"
        raise BadRecipe(
            f"no recipe `{name}` comes with ckptool",
            hint=f"{did_you_mean(name, known)} {lists}".strip(),
        )
    return known[name]


# Parsing.


def _parsed(name: str, data: bytes, folder: str) -> Recipe:
    if len(data) > MAX_NBYTES:
        raise BadRecipe("more than 1 MiB")
    try:
        text = data.decode().removeprefix("\ufeff")  # which editors of Windows write
        if _DEEP.search(_TEXTS.sub("-", text)):
            raise BadRecipe(f"names with more than {MAX_DOTS} dots that are not in quotes")
        document = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise BadRecipe(f"byte {error.start} is not UTF-8 text") from None
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise BadRecipe(f"not TOML: {error}", hint="texts are 'in single quotes'") from None
    except ValueError:  # of Python's `int`, which tells no line
        raise BadRecipe("a number in it has thousands of digits") from None
    version = document.get("recipe")
    if type(version) is not int or version != VERSION:
        what = "`recipe = 1` is missing" if version is None else f"recipe = {written(version)}"
        raise BadRecipe(f"{what}: this ckptool reads version {VERSION}", hint="recipe = 1")
    refuse_unknown(document, ("recipe", "step", "expect"), "")
    asked = document.get("step", [])
    if not isinstance(asked, list) or not asked or not all(isinstance(s, dict) for s in asked):
        raise BadRecipe("no steps", hint="each begins with [[step]]")
    if len(asked) > MAX_STEPS:
        raise BadRecipe(f"{len(asked)} steps: at most {MAX_STEPS}")
    steps = tuple(_step(number, table) for number, table in enumerate(asked, 1))
    rules = sum(len(step.given.get("rules", ())) for step in steps)
    if rules > MAX_RULES:
        raise BadRecipe(f"{rules} rules: at most {MAX_RULES}")
    expect = _expect(document.get("expect", {}), folder)
    comment = takewhile(lambda line: line.startswith("#"), text.splitlines())
    about = " ".join(line.lstrip("# ") for line in comment).partition(". ")[0]
    recipe = Recipe(name, steps, expect, about.rstrip("."))
    for step in recipe.steps:  # what can be refused before a checkpoint is read
        step.edit()
    return recipe


def _step(number: int, table: dict[str, Any]) -> Asked:
    where = f"step {number}"
    refuse_unknown(table, (*STEPS, "optional"), where)
    optional = table.get("optional", False)
    names = [name for name in table if name != "optional"]
    if len(names) != 1 or not isinstance(optional, bool):
        what = f"{listed(names)}: one operation a step" if names else "no operation"
        raise BadRecipe(
            what if isinstance(optional, bool) else f"optional = {written(optional)}: true or false"
        ).within(where)
    step, value = STEPS[names[0]], table[names[0]]
    try:
        given = fields_of(step, {step.alone: value} if step.alone else value)
    except EditError as error:
        raise error.within(f"{where} ({step.name})") from None
    return Asked(number, step, given | ({"optional": True} if optional else {}))


def _expect(table: Any, folder: str) -> Expect:
    where = "[expect]"
    if not isinstance(table, dict):
        raise BadRecipe(f"{written(table)}: it is a table").within(where)
    refuse_unknown(table, ("tensors", "unmatched", "like"), where)
    tensors, unmatched = table.get("tensors"), table.get("unmatched", "name")
    if tensors is not None and not (is_number(tensors) and tensors >= 0):
        raise BadRecipe(f"tensors = {written(tensors)}: it must be a count").within(where)
    if unmatched not in _UNMATCHED:
        raise BadRecipe(f"unmatched = {written(unmatched)}: it is {listed(_UNMATCHED)}").within(
            where
        )
    if "like" not in table:
        return Expect(tensors, unmatched)
    try:
        return Expect(tensors, unmatched, _like(table["like"], folder), table["like"])
    except EditError as error:
        raise error.within(where) from None


def _is_below(folder: str, name: str) -> bool:
    """Check that a path, and what its links lead to, is below a folder."""
    root, path = os.path.realpath(folder), os.path.realpath(os.path.join(folder, name))
    try:
        return not os.path.isabs(name) and os.path.commonpath([root, path]) == root
    except ValueError:  # of Windows: another drive
        return False


def _like(name: Any, folder: str) -> dict[str, Fact]:
    """Read a document of `ckptool keys --json` that is below a folder."""
    if not is_text(name):
        raise BadRecipe(f"like = {written(name)}: it must be a text")
    if "\0" in name or "://" in name or not _is_below(folder, name):
        raise BadRecipe(
            f"like = {name!r} is not a path below the folder of the recipe",
            hint="put the document next to the recipe",
        )
    path = os.path.join(folder, name)
    try:
        if os.path.exists(path) and not os.path.isfile(path):
            raise BadRecipe(f"like = {name!r} is not a file")
        with open(path, "rb") as opened:
            data = opened.read(MAX_LIKE_NBYTES + 1)
        if len(data) > MAX_LIKE_NBYTES:
            raise BadRecipe(f"{name} has more than 64 MiB")
        rows = json.loads(data)["tensors"]
        return {row["key"]: (row["dtype"], tuple(row["shape"])) for row in rows}
    except OSError as error:
        raise BadRecipe(f"{name} cannot be read: {reason(error)}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise BadRecipe(
            f"{name} is not a list of keys",
            hint=f"ckptool keys --json MODEL > {quoted(name)}   makes one",
        ) from None
