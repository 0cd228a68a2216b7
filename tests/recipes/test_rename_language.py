"""Templates of renaming rules against a matcher that tries every length of `{name:**}`."""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator

import pytest
from conftest import sampled

from ckptool.state.renaming import Renaming, Rule

PARTS = ("a", "b", "layer", "0", "1", "10", "ln_1", "ln_2")
FIELDS = ("{i}", "{j}", "{name}", "{other}", "ln_{n}", "{head:**}", "{rest:**}")
DEEP = re.compile(r"\{(\w+):\*\*\}")


def results(old: str, new: str, key: str) -> set[str]:
    """Return every new key that a rule may give to a key: fields of several components are tried
    with each number of them, and components may follow."""
    found = set()
    deep = DEEP.findall(old)
    size = len(key.split("."))
    for lengths in itertools.product(range(size + 1), repeat=len(deep)):
        for tail in range(size):
            counts = {**dict(zip(deep, lengths, strict=True)), "tail": tail}
            both = [flat(f"{text}.{{tail:**}}", counts) for text in (old, new)]
            if (fields := held(both[0], key)) is not None:
                found.add(re.sub(r"\{(\w+)\}", lambda each: fields[each[1]], both[1]))
    return found


def flat(text: str, counts: dict[str, int]) -> str:
    """Write as many fields of one component as `{name:**}` is said to have."""
    parts = []
    for part in text.split("."):
        deep = DEEP.fullmatch(part)
        count = counts[deep[1]] if deep else 0
        parts += [f"{{{deep[1]}__{at}}}" for at in range(count)] if deep else [part]
    return ".".join(parts)


def held(text: str, key: str) -> dict[str, str] | None:
    pattern, seen = "", set()
    for literal, name in re.findall(r"([^{]*)(?:\{(\w+)\})?", text):
        pattern += re.escape(literal)
        if name:
            kind = "[0-9]+" if name in set("ijklmne") else r"[^.]+"
            pattern += f"(?P={name})" if name in seen else f"(?P<{name}>{kind})"
            seen.add(name)
    found = re.fullmatch(pattern, key)
    return found.groupdict() if found else None


def rules(number: int) -> Iterator[tuple[str, str]]:
    """Yield rules at random: what NEW has, OLD has, and `:**` are apart, as one could not tell
    where one ends and the next begins."""
    draw = random.Random(number)
    for _ in range(10):
        old = [draw.choice((*PARTS[:5], *FIELDS)) for _ in range(draw.randint(1, 4))]
        fields = [part for part in old if "{" in part]
        new = [*dict.fromkeys(fields), *draw.choices(PARTS[:5], k=draw.randint(0, 2))]
        draw.shuffle(new)
        deep = [part for part in old if ":**}" in part]
        near = any(
            ":**}" in one and ":**}" in other
            for parts in (old, new)
            for one, other in itertools.pairwise(parts)
        )
        if new and old != new and not near and len(deep) == len(set(deep)):
            yield ".".join(old), ".".join(new)


def keys(number: int) -> list[str]:
    draw = random.Random(-1 - number)
    return [".".join(draw.choices(PARTS, k=draw.randint(1, 5))) for _ in range(40)]


@pytest.mark.parametrize("number", sampled(range(200), 20))
def test_a_template_gives_a_key_that_it_may_give(number: int) -> None:
    for old, new in rules(number):
        renaming = Renaming([Rule(old, new)])
        for key in keys(number):
            may = results(old, new, key)
            found = renaming.match(key)
            assert (found is not None) == bool(may), (old, new, key, found, may)
            if found is not None:
                assert found[1] in may, (old, new, key, found, may)


@pytest.mark.parametrize("number", sampled(range(200), 20))
def test_a_template_has_a_way_back(number: int) -> None:
    """What a rule gives, its reverse takes: to a key that the rule leads to the same one."""
    for old, new in rules(number):
        there, back = Renaming([Rule(old, new)]), Renaming([Rule(new, old)])
        for key in keys(number):
            if (found := there.match(key)) is not None and found[1]:
                again = back.match(found[1])
                assert again is not None, (old, new, key, found)
                assert found[1] in results(old, new, again[1]), (old, new, key, found, again)
