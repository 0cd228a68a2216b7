"""Rules that rename keys: `OLD=NEW`, with fields, with a `*`, or with a regular expression.

    fc=head                         a key, or a dotted prefix
    layers.{i}.ln_{n}=h.{i}.ln{n}   a template; it takes what follows after a dot along
    ema_*=*                         the whole key, `*` any text
    re:(.*)\\.gamma=\\1.weight        the whole key, a regular expression

All rules of one step see the key as it was before the step, and the first that matches wins: swaps
and shifts come out right.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

from ckptool.errors import EditError
from ckptool.records import dataclass, grouped
from ckptool.state.templates import LONGEST, is_template, refuse_kinds, template

REGEX = "re:"


@dataclass(frozen=True, slots=True)
class Rule:
    """What a key is called before and after."""

    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old}={self.new}"

    @property
    def no_way_back(self) -> str:
        """Return why the rule cannot be turned round, an empty string where it can."""
        if self.old.startswith(REGEX):
            return "a regular expression cannot be reversed"
        if self.old.count("*") != self.new.count("*"):
            return "what `*` holds is not in NEW"
        if unclear := template(self.new).unclear:
            return unclear
        lost = set(template(self.old).fields) - set(template(self.new).fields)
        return f"what {{{min(lost)}}} holds is not in NEW" if lost else ""


def read_rule(text: str, option: str = "--rename") -> Rule:
    """Read `OLD=NEW`, cut at the first `=`, at the last of a regular expression."""
    cut = text.rpartition if text.startswith(REGEX) else text.partition
    old, sign, new = cut("=")
    if not sign or old == new:
        what = "changes nothing" if sign else "is not OLD=NEW"
        raise EditError(f"`{text}` {what}", hint=f"{option} classifier=head")
    return Rule(old, new)


_SIGNS = re.compile(r"[{}*]")
Build = Callable[[Sequence[str | None]], str]  # the groups of a match -> the new key


def _compiled(rule: Rule, first: int) -> tuple[str, int, Build]:
    """Return an expression for whole keys, how many groups it has from `first` on, and NEW."""
    if "*" in rule.old.replace(":**}", "") or "*" in rule.new.replace(":**}", ""):
        return _compiled_star(rule)
    old, new = template(rule.old.rstrip(".")), template(rule.new.rstrip("."))
    if unknown := new.fields.keys() - old.fields.keys():
        raise EditError(f"{{{min(unknown)}}} is only in NEW, in `{rule}`")
    refuse_kinds(new, old)
    source, names = old.regex(first)

    def build(groups: Sequence[str | None]) -> str:
        *held, tail = groups
        values = {name: (each or "").strip(".") for name, each in zip(names, held, strict=True)}
        filled = new.fill(values)
        if tail is None:
            return filled
        return f"{filled}.{tail}" if filled else tail

    return (rf"{source}(?:\.(.*))?" if old.parts else "(.*)"), len(names) + 1, build


def _compiled_star(rule: Rule) -> tuple[str, int, Build]:
    if rule.old.count("*") != 1 or rule.new.count("*") > 1:
        raise EditError(
            f"`{rule}` needs one `*` in OLD, and at most one in NEW",
            hint="{name} matches one component, {name:**} for any number",
        )
    if is_template(rule.old) or is_template(rule.new):
        raise EditError(f"`{rule}` has both `*` and a field", hint="{name:**} is any number")
    before, after = map(re.escape, rule.old.split("*"))
    return f"{before}(.*){after}", 1, lambda groups: rule.new.replace("*", groups[0] or "")


Find = Callable[[str], tuple[int, str] | None]  # which rule takes a key, from 0 on, and NEW


class Renaming:
    """Rules of one step, ready to be used: a key goes in, its new name comes out.

    Prefixes are looked up. A template is tried on keys that have its rarest component, with those
    that have the same as one regular expression.
    """

    def __init__(self, rules: Sequence[Rule]) -> None:
        self.rules = tuple(rules)
        self._prefixes: dict[str, tuple[int, str]] = {}
        self._regexes: list[Find] = []
        self._templates: dict[str, Find] = {}
        templates: list[tuple[int, Rule]] = []
        for number, rule in enumerate(self.rules):
            try:
                if rule.old.startswith(REGEX):
                    self._regexes.append(_by_regex(number, rule))
                    continue
                _compiled(rule, 1)
                if _SIGNS.search(f"{rule.old}{rule.new}"):
                    templates.append((number, rule))
                else:
                    pair = number, rule.new.rstrip(".")
                    self._prefixes.setdefault(rule.old.rstrip("."), pair)
            except EditError as error:
                raise error.within(self.place(number)) from None
        self._longest = max(map(len, self._prefixes), default=0)
        self._groups = _by_component(templates)

    def place(self, number: int) -> str:
        """Name a rule in errors, where it is one of several."""
        return f"rule {number + 1}" if len(self.rules) > 1 else ""

    def match(self, key: str) -> tuple[int, str] | None:
        """Return which rule takes a key, from 0 on, and the new key."""
        found = [] if not self._prefixes else [*self._by_prefix(key)]
        if self._groups:
            for part in {"", *key.split(".")}:
                if part in self._groups:
                    if part not in self._templates:
                        self._templates[part] = _by_templates(self._groups[part])
                    if each := self._templates[part](key):
                        found.append(each)
        for find in self._regexes:
            if each := find(key):
                found.append(each)
                break
        return min(found, default=None)

    def _by_prefix(self, key: str) -> Iterator[tuple[int, str]]:
        end = len(key)
        while True:
            if end <= self._longest and (pair := self._prefixes.get(key[:end])):
                tail = key[end:] if end else f".{key}"
                yield pair[0], pair[1] + tail if pair[1] else tail[1:]
            if not end:
                return
            end = max(key.rfind(".", 0, end), 0)

    def __call__(self, key: str) -> str:
        """Return the new name of a key, the same where no rule takes it."""
        found = self.match(key)
        return found[1] if found else key


def _by_component(rules: Sequence[tuple[int, Rule]]) -> dict[str, list[tuple[int, Rule]]]:
    """Group rules by a component that each key has which they take, an empty text for none."""
    needs = [
        [part for part in rule.old.rstrip(".").split(".") if part and not _SIGNS.search(part)]
        for _, rule in rules
    ]
    counts = Counter(part for parts in needs for part in parts)
    rarest = (min(parts, key=counts.__getitem__, default="") for parts in needs)
    return grouped(zip(rarest, rules, strict=True))


def _by_templates(rules: list[tuple[int, Rule]]) -> Find:
    """Compile rules as one expression, of which the first alternative that fits is taken.

    The group around an alternative is the last to end, and `lastindex` tells which it was.
    """
    sources, places, group = [], {}, 1
    for number, rule in rules:
        source, count, build = _compiled(rule, group + 1)
        sources.append(f"({source})")
        places[group] = number, build, range(group, group + count + 1)
        group += count + 1
    regex = re.compile("|".join(sources), re.DOTALL)

    def find(key: str) -> tuple[int, str] | None:
        found = regex.fullmatch(key)
        if found is None:
            return None
        number, build, groups = places[found.lastindex or 0]
        return number, build(found.group(*groups)[1:])

    return find


def _by_regex(number: int, rule: Rule) -> Find:
    pattern = rule.old.removeprefix(REGEX)
    what = f"`{pattern}` is not a regular expression"
    try:
        regex = re.compile(pattern)
        what = f"`{rule.new}` is not a replacement for `{pattern}`"
        regex.sub(rule.new, "", count=1)
    except (re.error, IndexError, RecursionError, OverflowError) as error:
        raise EditError(f"{what}: {error}") from None

    def find(key: str) -> tuple[int, str] | None:
        found = regex.fullmatch(key) if len(key) <= LONGEST else None
        if found is None:
            return None
        try:
            return number, found.expand(rule.new)
        except (re.error, IndexError) as error:
            raise EditError(f"`{rule.new}` is not a replacement: {error}") from None

    return find
