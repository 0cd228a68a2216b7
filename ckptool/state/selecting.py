"""The selection language: how a key, or several, are named; and what is said where none is.

A key or a dotted prefix, a template (`layers.{i}.q_proj`), a glob over the whole key, or a regular
expression after `re:`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import translate

from ckptool.errors import EditError, NothingMatched
from ckptool.state import wrappers
from ckptool.text import counted, several


def matcher(pattern: str) -> Callable[[str], bool]:
    """Compile one pattern, as above.

    Raises `EditError` for a regular expression that is none.
    """
    from ckptool.state import templates

    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise EditError(f"`{pattern[3:]}` is not a regular expression: {error}") from None
        return lambda key: len(key) <= templates.LONGEST and expression.fullmatch(key) is not None
    if templates.is_template(pattern):
        source, _ = templates.template(pattern.rstrip(".")).regex(1)
        under = re.compile(rf"{source}(?:\..*)?", re.DOTALL)
        return lambda key: under.fullmatch(key) is not None
    if any(sign in pattern for sign in "*?["):
        glob = re.compile(translate(pattern))
        return lambda key: glob.match(key) is not None
    exact = pattern.rstrip(".")
    return lambda key: key in (exact, pattern) or key.startswith(exact + ".")


def select(
    patterns: str | Iterable[str], keys: Sequence[str], *, optional: bool = False
) -> set[str]:
    """Return the keys that any pattern selects.

    Raises `NothingMatched` for a pattern that selects none, unless that is `optional`.
    """
    selected: set[str] = set()
    for pattern in several(patterns):
        matches = matcher(pattern)
        found = {key for key in keys if matches(key)}
        # A key may itself look like a glob: an exact match always counts.
        found |= {pattern} & set(keys)
        if not found and not optional:
            raise nothing_matched(pattern, keys)
        selected |= found
    return selected


def nothing_matched(pattern: str, keys: Sequence[str]) -> NothingMatched:
    """Return the error of a pattern that selects nothing, with example keys and close ones."""
    hint = _without_wrappers(pattern, keys)
    if not hint:
        hint = _inside(pattern, keys)
    if not hint:
        close = close_matches(pattern, keys)
        hint = f"did you mean `{close[0]}`?" if close else ""
    return NothingMatched(
        f"`{pattern}` selects none of {counted(len(keys), 'key')}",
        evidence=[f"keys look like {key}" for key in examples(keys)],
        hint=hint,
    )


def _inside(pattern: str, keys: Sequence[str]) -> str:
    """Offer a glob for a name that is inside keys, or at their end."""
    for wider in (f"*.{pattern}.*", f"*.{pattern}"):
        matches = matcher(wider)
        if count := sum(matches(key) for key in keys):
            return f"`{wider}` selects {counted(count, 'key')}"
    return ""


def _without_wrappers(pattern: str, keys: Sequence[str]) -> str:
    """Offer a pattern as it is after its wrapper prefixes have come off the keys."""
    found = wrappers.peeling([pattern])
    inner = found.name(pattern)
    if not found.prefixes:
        return ""
    matches = matcher(inner)
    count = sum(matches(key) for key in keys)
    if not count:
        return ""
    selects = f"`{inner}` selects {counted(count, 'key')}"
    return f"{selects}: here they have no `{found.prefix}` (transfer peels it first)"


def close_matches(wanted: str, keys: Sequence[str]) -> list[str]:
    """Return keys and dotted prefixes that are spelled like `wanted`."""
    from difflib import get_close_matches

    # Names as they would be written: whole prefixes, and those below a shared first component.
    named: dict[str, str] = {}
    for key in keys[:20_000]:
        steps = key.split(".")
        for depth in range(1, len(steps) + 1):
            path = ".".join(steps[:depth])
            named.setdefault(path, path)
            named.setdefault(".".join(steps[1:depth]) or path, path)
    close = get_close_matches(wanted, list(named)[:20_000], n=3, cutoff=0.7)
    return [name for name in dict.fromkeys(named[name] for name in close) if name != wanted]


def examples(given: Iterable[str]) -> list[str]:
    """Pick keys that show what keys look like: first, middle, last."""
    keys = list(given)
    if len(keys) <= 3:
        return keys
    return [keys[0], keys[len(keys) // 2], keys[-1]]
