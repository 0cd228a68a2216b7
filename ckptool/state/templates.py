"""Templates of keys: `blocks.{i}.norm{n}.{rest:**}`.

A field of one letter of `ijklmne` holds digits, any other name one component of a key, and
`{name:**}` any number of components, none too. A field that is there twice holds the same twice.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

from ckptool.errors import EditError
from ckptool.records import dataclass

DIGITS = frozenset("ijklmne")
LONGEST = 1000  # characters of a key that is tried in many ways
MOST_CHOICES = 1
_FIELD = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)(:\*\*)?\}")
_UNCLEAR = r"\}\{|:\*\*\}\.\{[^{}]*:\*\*\}"
_CLEAR = (
    "put a text between them, more than a dot between {a:**} and {b:**}, of which two are the most"
)


def is_template(text: str) -> bool:
    """Return whether a text has a field."""
    return _FIELD.search(text) is not None


@dataclass(frozen=True, slots=True)
class Field:
    """A place for digits, a component, or with `deep` any number of components."""

    name: str
    deep: bool = False


@dataclass(frozen=True, slots=True)
class Template:
    """The parts of a template in order; `text` is what was written."""

    text: str
    parts: tuple[str | Field, ...]

    @property
    def fields(self) -> dict[str, Field]:
        """Return the fields by name, in order."""
        return {part.name: part for part in self.parts if isinstance(part, Field)}

    @property
    def unclear(self) -> str:
        """Return why a key does not tell how much of it each field holds, or an empty text."""
        if re.search(_UNCLEAR, self.text):
            return f"`{self.text}` does not say where one field ends and the next begins"
        many = self.choices > MOST_CHOICES
        return f"`{self.text}` can be read in too many ways" if many else ""

    @property
    def choices(self) -> int:
        """Count the fields beyond the first that may end at several places of one key."""
        deep = sum(field.deep for field in self.fields.values())
        named, count = 0, max(deep - 1, 0)
        for part in self.parts:
            if isinstance(part, str):
                named = 0 if "." in part else named
            elif not part.deep and part.name not in DIGITS:
                count, named = count + (named > 0), named + 1
        return count

    def regex(self, first: int) -> tuple[str, list[str]]:
        """Return a regular expression whose groups count from `first`, and their fields' names."""
        if self.unclear:
            raise EditError(self.unclear, hint=_CLEAR)
        source, names, dot = "", list[str](), False
        if self.choices:  # what does not match takes a power of the length
            source = rf"(?![\s\S]{{{LONGEST + 1}}})"
        for at, part in enumerate(self.parts):
            if isinstance(part, str):
                literal = part[1:] if dot and part.startswith(".") else part
                deep = at + 1 < len(self.parts) and self.parts[at + 1]
                before = isinstance(deep, Field) and deep.deep and literal.endswith(".")
                source += re.escape(literal[:-1] if before else literal)
                dot = False
                continue
            if part.name in names:
                source += f"(?:\\{first + names.index(part.name)})"
                continue
            names.append(part.name)
            previous = self.parts[at - 1] if at else ""
            following = self.parts[at + 1] if at + 1 < len(self.parts) else ""
            if not part.deep:
                source += "([0-9]+)" if part.name in DIGITS else "([^.]+)"
            elif isinstance(previous, str) and previous.endswith("."):
                source += r"((?:\.[^.]+)*)"
            elif isinstance(following, str) and following.startswith("."):
                source, dot = source + r"((?:[^.]+\.)*)", True
            else:
                source += r"([^.]+(?:\.[^.]+)*|)"
        return source, names

    def fill(self, values: Mapping[str, str]) -> str:
        """Return the key with a text for each field; an empty one takes a dot with it."""
        filled, skip = "", False
        for part in self.parts:
            if isinstance(part, str):
                filled += part[1:] if skip and part.startswith(".") else part
                skip = False
            elif values[part.name]:
                filled += values[part.name]
            else:
                skip = not filled
                filled = filled.removesuffix(".")
        return filled


@lru_cache(4096)
def template(text: str) -> Template:
    """Parse a template; raises `EditError` for braces that are no field."""
    parts: list[str | Field] = []
    end = 0
    for found in _FIELD.finditer(text):
        parts += [text[end : found.start()], Field(found[1], found[2] is not None)]
        end = found.end()
    parts.append(text[end:])
    parsed = Template(text, tuple(part for part in parts if part != ""))
    rest = "".join(part for part in parsed.parts if isinstance(part, str))
    if "{" in rest or "}" in rest:
        raise EditError(
            f"`{text}` has a brace that is not of a field",
            hint="fields are {i} (digits), {name} (one component) and {rest:**} (any number); "
            "re:PATTERN takes braces as they are",
        )
    fields = [part for part in parsed.parts if isinstance(part, Field)]
    odd = [each.name for each in fields if each != parsed.fields[each.name]]
    if odd:
        raise EditError(f"`{text}` has {{{odd[0]}}} both with and without `:**`")
    return parsed


def refuse_fields(one: Template, others: Sequence[Template]) -> None:
    """Raise `EditError` unless others have the fields that one has."""
    for other in others:
        for name in (*one.fields, *other.fields):
            if name in one.fields and name in other.fields:
                continue
            have, lack = (one, other) if name in one.fields else (other, one)
            raise EditError(f"`{have.text}` has {{{name}}}, and `{lack.text}` has not")
        refuse_kinds(one, other)


def refuse_kinds(one: Template, other: Template) -> None:
    """Raise `EditError` for a field that is written with `:**` in one alone."""
    for name, field in one.fields.items():
        if other.fields.get(name, field) != field:
            deep, plain = (one, other) if field.deep else (other, one)
            raise EditError(
                f"`{deep.text}` has {{{name}:**}}, and `{plain.text}` has {{{name}}}",
                hint=f"write {{{name}:**}} in both",
            )


class Matcher:
    """Finds what the fields of a template hold in a key, which it has to match whole."""

    def __init__(self, text: str) -> None:
        self.template = template(text)
        source, self._names = self.template.regex(1)
        self._regex = re.compile(source, re.DOTALL)

    def __call__(self, key: str) -> dict[str, str] | None:
        """Return what the fields hold, None where the key does not match."""
        found = self._regex.fullmatch(key)
        if found is None:
            return None
        return {
            name: held.strip(".") for name, held in zip(self._names, found.groups(), strict=True)
        }
