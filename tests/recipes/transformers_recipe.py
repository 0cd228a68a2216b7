"""A recipe made of transformers' conversion rules: each rule becomes a step, in their order.

transformers (core_model_loading.py) searches a regular expression in a key and replaces what it
found, one rule after the other, then groups what a converter matches by the key it gets. A rule
that is a name, whole components of a key, becomes a template with what is around it in `{head:**}`
and `{tail:**}`. Of others the keys of this model are looked at: their digits become `{i}`, `{j}`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import core_model_loading as core

LETTERS = "ijklmn"
Step = tuple[str, Any]  # the word of a step and what it is given
Shapes = dict[str, tuple[int, ...]]


class NotExpressible(Exception):
    """What a rule does that no step of a recipe can."""


@dataclass
class Translation:
    """A recipe that is being made, and the keys that there are after its last step."""

    model: Any
    keys: Shapes
    steps: list[Step] = field(default_factory=list)
    rules: int = 0

    def add(self, word: str, fields: Any) -> None:
        self.steps.append((word, fields))

    def text(self) -> str:
        lines = ["recipe = 1"]
        for word, fields in self.steps:
            lines += ["[[step]]", f"{word} = {toml(fields)}"]
        return "\n".join([*lines, "[expect]", f"tensors = {len(self.keys)}", ""])


def toml(value: Any) -> str:
    """Return a value as TOML in one line, but for a list of lists."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list) and value and isinstance(value[0], list):
        return "[\n" + "".join(f"    {toml(each)},\n" for each in value) + "]"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml, value)) + "]"
    return str(value) if isinstance(value, int) else f"'{value}'"


# Templates of the keys that there are.


def template(key: str, expert: int | None = None) -> str:
    """Return a key with a letter for each component of digits, `{e}` for the one at `expert`."""
    letters = iter(LETTERS)
    parts = key.split(".")
    for at, part in enumerate(parts):
        if at == expert:
            parts[at] = "{e}"
        elif part.isdigit():
            parts[at] = f"{{{next(letters)}}}"
    return ".".join(parts)


def covers(text: str, key: str) -> bool:
    return re.fullmatch(re.sub(r"\\\{\w\\\}", r"\\d+", re.escape(text)), key) is not None


def renames(pairs: Mapping[str, str], keys: Iterable[str]) -> list[list[str]]:
    """Return the rules that rename these keys and no others: templates, or else the keys."""
    rules: dict[str, set[str]] = defaultdict(set)
    for old, new in pairs.items():
        digits = [[part for part in key.split(".") if part.isdigit()] for key in (old, new)]
        rules[template(old) if digits[0] == digits[1] else old].add(
            template(new) if digits[0] == digits[1] else new
        )
    found = []
    for old, news in rules.items():
        covered = [key for key in keys if covers(old, key)]
        if len(news) == 1 and all(key in pairs for key in covered):
            found.append([old, news.pop()])
        else:
            found += [[key, pairs[key]] for key in covered if key in pairs]
    return found


def by_name(
    rule: core.WeightTransform, changed: Mapping[str, str], keys: Iterable[str]
) -> list[list[str]]:
    """Return the rules for any key of a renaming whose pattern is a name of whole components."""
    source, target = rule.source_patterns[0], rule.target_patterns[0]
    name = source.removeprefix("^").replace("\\.", ".").replace("(\\d+)", "{i}")
    new = target.replace("\\1", "{i}") if "{i}" in name else target
    if type(rule) is not core.WeightRenaming or re.search(r"[^\w.\-{}]|\\", name + new):
        return []
    heads = set()
    for key in changed:
        start, end = rule.compiled_sources.search(key[len(scope(rule, key)) :]).span()
        start, end = start + len(scope(rule, key)), end + len(scope(rule, key))
        before = key[:start] + "." * name.startswith(".")
        if before[-1:] not in ("", ".") or (key + ".")[end - name.endswith(".")] != ".":
            return []
        anchored = source.startswith("^") or before == scope(rule, key)
        heads.add(scope(rule, key) + ("" if anchored else "{head:**}."))
    name, new = name.strip("."), new.strip(".")
    firsts = tuple(f"{head.partition('{')[0]}{name}." for head in heads if "{" in head)
    if any(f"{key}.".startswith(firsts) for key in keys):  # where `{head:**}` could be nothing
        return []
    return [[head + name, head + new] for head in sorted(heads)]


def scope(rule: core.WeightTransform, key: str) -> str:
    """Return the prefix of a key before which a rule of a part of a model does not look."""
    inside = f"{rule.scope_prefix}." if rule.scope_prefix else ""
    whole = f"{rule.base_model_prefix}.{inside}" if rule.base_model_prefix else inside
    if rule.scope_prefix is None:
        return ""
    return whole if key.startswith(whole) else inside


def rename(made: Translation, rule: core.WeightTransform, stays: set[str]) -> None:
    """Add the step of a rule that renames, if it finds a key."""
    pairs = {}
    for key in made.keys:
        new = key if key in stays else rule.rename_source_key(key)[0]
        if new != key:
            pairs[key] = new
    if pairs:
        made.rules += 1
        found = [] if stays else by_name(rule, pairs, made.keys)
        made.add("rename", found or renames(pairs, made.keys))
        made.keys = {pairs.get(key, key): shape for key, shape in made.keys.items()}


# Converters: tensors that become others.


@dataclass
class Group:
    """The tensors that become one or several: keys by the pattern of the converter they match."""

    rule: core.WeightConverter
    full: str  # the key with the first target
    members: dict[str, list[str]]

    def target(self, pattern: str) -> str:
        """Return the key of a target, as `WeightConverter.convert` puts it together."""
        full = self.full.replace("*.", "0.")
        first = self.rule.target_patterns[0]
        here = next(each for each in (first, pattern) if each in full or each == pattern)
        before, _, after = full.partition(here)
        return before + pattern + after


def groups_of(made: Translation, rules: Sequence[core.WeightConverter]) -> list[Group]:
    found: dict[str, Group] = {}
    for key in sorted(made.keys, key=core.dot_natural_key):
        for rule in rules:
            full, pattern = rule.rename_source_key(key)
            if pattern is not None:
                group = found.setdefault(full, Group(rule, full, {}))
                group.members.setdefault(pattern, []).append(key)
                break
    return list(found.values())


def convert(made: Translation, rules: Sequence[core.WeightConverter]) -> None:
    """Add the steps of all converters: for each, its operations one after the other."""
    by_rule: dict[int, list[Group]] = defaultdict(list)
    for group in groups_of(made, rules):
        by_rule[id(group.rule)].append(group)
    for groups in by_rule.values():
        made.rules += 1
        steps: dict[str, list[Step]] = defaultdict(list)
        for group in groups:
            for at, (word, fields) in enumerate(Operations(made, group).run()):
                steps[f"{at:02} {word}"].append((word, fields))
        for name in sorted(steps):
            merge(made, steps[name])


def merge(made: Translation, steps: list[Step]) -> None:
    """Add one step for those of groups that differ in the numbers of their layers alone."""
    different: dict[str, Step] = {}
    rules: dict[str, list[str]] = {}
    for word, fields in steps:
        if word == "rename":
            rules[toml(fields)] = fields
        else:
            text = {name: templates(name, value) for name, value in fields.items()}
            others = toml({name: text[name] for name in text if name != "keys"})
            known = different.setdefault(toml([word, others]), (word, text))[1]
            if "keys" in text:
                known["keys"] = list(dict.fromkeys([*known["keys"], *text["keys"]]))
    made.steps += different.values()
    if rules:
        made.add("rename", list(rules.values()))


def templates(name: str, value: Any) -> Any:
    """Return a field with templates in the place of keys; in `keys` a glob has no fields."""
    if name == "keys":
        return [re.sub(r"\{\w\}", "*", template_of(each)) for each in value]
    if name not in ("from", "to") or value in ("half", "interleaved"):
        return value
    return [template_of(each) for each in value] if isinstance(value, list) else template_of(value)


def template_of(key: str) -> str:
    parts = key.split(".")
    return template(key, parts.index("{e}") if "{e}" in parts else None)


class Operations:
    """The steps of one group of tensors, and what becomes of its keys."""

    def __init__(self, made: Translation, group: Group) -> None:
        self.made, self.group = made, group
        self.now = {pattern: list(keys) for pattern, keys in group.members.items()}
        self.steps: list[Step] = []

    def run(self) -> list[Step]:
        operations = self.group.rule.operations
        for at, operation in enumerate(operations):
            name = f"on_{type(operation).__name__}"
            if not hasattr(self, name):
                raise NotExpressible(f"{type(operation).__name__} is not a move of whole tensors")
            getattr(self, name)(operation, at == len(operations) - 1)
        self.finish()
        return self.steps

    def shape(self, key: str) -> tuple[int, ...]:
        return self.made.keys[key]

    def replace(self, olds: Iterable[str], news: Mapping[str, tuple[int, ...]]) -> None:
        for old in olds:
            del self.made.keys[old]
        self.made.keys.update(news)

    def finish(self) -> None:
        """Give the last names to tensors that were changed where they are."""
        targets = {self.group.target(each) for each in self.group.rule.target_patterns}
        (left,) = [list(keys) for keys in self.now.values()] if len(self.now) == 1 else [[]]
        if len(left) == 1 and len(targets) == 1 and left[0] not in targets:
            (target,) = targets
            self.steps.append(("rename", renames({left[0]: target}, [left[0]])[0]))
            self.replace_name(left[0], target)

    def replace_name(self, old: str, new: str) -> None:
        self.made.keys[new] = self.made.keys.pop(old)

    def on_MergeModulelist(self, operation: core.MergeModulelist, last: bool) -> None:
        for pattern, keys in self.now.items():
            new = self.target(pattern, last, keys)
            shape = list(self.shape(keys[0]))
            shape.insert(operation.dim, len(keys))
            self.steps.append(
                ("stack", {"from": over(keys), "to": new, "over": "e", "dim": operation.dim})
            )
            self.replace(keys, {new: tuple(shape)})
            self.now[pattern] = [new]

    def target(self, pattern: str, last: bool, keys: list[str]) -> str:
        """Return the last key of what a pattern collected, or one for the time between."""
        if last and len(self.now) == 1:
            return self.group.target(self.group.rule.target_patterns[0])
        return over(keys).replace(".{e}.", ".stacked.")

    def on_Concatenate(self, operation: core.Concatenate, last: bool) -> None:
        sources = [
            key for each in self.group.rule.source_patterns for key in self.now.pop(each, [])
        ]
        new = self.group.target(self.group.rule.target_patterns[0])
        fields: dict[str, Any] = {"from": sources, "to": new, "dim": operation.dim}
        lengths = [self.shape(key)[operation.dim] for key in sources]
        if len(set(lengths)) > 1:
            fields["sizes"] = lengths
        shape = list(self.shape(sources[0]))
        shape[operation.dim] = sum(lengths)
        self.steps.append(("fuse", fields))
        self.replace(sources, {new: tuple(shape)})
        self.now = {self.group.rule.target_patterns[0]: [new]}

    def cut(self, operation: Any, targets: Mapping[str, str]) -> None:
        """Split as the model has the targets; equal parts need no sizes."""
        ((key,),) = self.now.values()
        wanted = self.made.model.state_dict()
        lengths = [wanted[target].shape[operation.dim] for target in targets.values()]
        fields: dict[str, Any] = {
            "from": key,
            "to": list(targets.values()),
            "dim": operation.dim,
        }
        if len(set(lengths)) > 1:
            fields["sizes"] = lengths
        shape = list(self.shape(key))
        made = {}
        for target, length in zip(targets.values(), lengths, strict=True):
            shape[operation.dim] = length
            made[target] = tuple(shape)
        self.steps.append(("split", fields))
        self.replace([key], made)
        self.now = {pattern: [target] for pattern, target in targets.items()}

    def on_Chunk(self, operation: core.Chunk, last: bool) -> None:
        patterns = operation.get_target_patterns(
            self.group.rule.target_patterns, config=self.made.model.config
        )
        targets = {pattern: self.group.target(pattern) for pattern in patterns}
        self.cut(operation, targets)

    def on_Split(self, operation: core.Split, last: bool) -> None:
        patterns = self.group.rule.target_patterns
        targets = {pattern: self.group.target(pattern) for pattern in patterns}
        self.cut(operation, targets)

    def on_Transpose(self, operation: core.Transpose, last: bool) -> None:
        ((key,),) = self.now.values()
        dims = sorted((operation.dim0, operation.dim1))
        if operation.check_dims:
            target = self.group.target(self.group.rule.target_patterns[0])
            if self.made.model.get_parameter(target).shape == self.shape(key):
                return
        self.steps.append(("transpose", {"keys": [key], "dims": dims}))
        shape = list(self.shape(key))
        shape[dims[0]], shape[dims[1]] = shape[dims[1]], shape[dims[0]]
        self.made.keys[key] = tuple(shape)

    def on_PermuteForRope(self, operation: core.PermuteForRope, last: bool) -> None:
        config = self.made.model.config
        config = getattr(config, operation.subconfig_key or "", config)
        names = operation.permute_layer_names
        for pattern, keys in self.now.items():
            if names is None or any(name in pattern for name in names):
                fields = {"keys": keys, "heads": config.num_attention_heads}
                to = "interleaved" if operation.inverse else "half"
                self.steps.append(("rope", {**fields, "to": to}))

    def on_Interleave(self, operation: core.Interleave, last: bool) -> None:
        """Move every second row behind the others: three views."""
        ((key,),) = self.now.values()
        shape, dim = list(self.shape(key)), operation.dim
        halves = [2, shape[dim] // 2] if operation.inverse else [shape[dim] // 2, 2]
        pairs = [*shape[:dim], *halves, *shape[dim + 1 :]]
        order = list(range(len(pairs)))
        order[dim], order[dim + 1] = dim + 1, dim
        turned = [pairs[at] for at in order]
        self.steps += [
            ("reshape", {"keys": [key], "shape": pairs, "was": shape}),
            ("permute", {"keys": [key], "dims": order}),
            ("reshape", {"keys": [key], "shape": shape, "was": turned}),
        ]

    def on_Inkling2UnpadVocab(self, operation: core.Inkling2UnpadVocab, last: bool) -> None:
        """Do nothing where there are no rows of padding, which the way back would make."""
        ((key,),) = self.now.values()
        wanted = self.made.model.state_dict()[self.group.target(self.group.full)]
        if wanted.shape != self.shape(key):
            raise NotExpressible("Inkling2UnpadVocab appends rows of zeros on the way back")


def over(keys: Sequence[str]) -> str:
    """Return the keys of a list of modules with `{e}` for the number in which they differ."""
    parts = [key.split(".") for key in keys]
    columns = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    at = columns.index(True) if True in columns else last_digit(parts[0])
    return ".".join([*parts[0][:at], "{e}", *parts[0][at + 1 :]])


def last_digit(parts: Sequence[str]) -> int:
    return max(at for at, part in enumerate(parts) if part.isdigit())


def recipe_of(model: Any, rules: Sequence[core.WeightTransform], saved: Shapes) -> Translation:
    """Return the recipe from what `save_pretrained` wrote to the names of the model."""
    rules = deepcopy(list(rules))
    wanted = model.state_dict()
    made = Translation(model, {key: saved[key] for key in sorted(saved, key=core.dot_natural_key)})
    renamings = [rule for rule in rules if not isinstance(rule, core.WeightConverter)]
    converters = [rule for rule in rules if isinstance(rule, core.WeightConverter)]
    # convert_and_load_state_dict_in_model: a key of the model that rules would lead elsewhere stays
    ends = {
        key: core.rename_source_key(key, deepcopy(renamings), deepcopy(converters))[0]
        for key in made.keys
    }
    stays = {key for key, end in ends.items() if end not in wanted and key in wanted}
    for rule in renamings:
        rename(made, rule, stays)
    convert(made, converters)
    tie(made, wanted)
    return made


def tie(made: Translation, wanted: Mapping[str, torch.Tensor]) -> None:
    """Add the second names of tied tensors, which safetensors cannot hold."""
    places = {place(tensor): key for key, tensor in wanted.items() if key in made.keys}
    for key in wanted.keys() - made.keys.keys():
        first = places.get(place(wanted[key]))
        if first:
            made.add("tie", {"from": first, "to": key})
            made.keys[key] = made.keys[first]


def place(tensor: torch.Tensor) -> tuple[int, int, torch.Size]:
    return tensor.data_ptr(), tensor.storage_offset(), tensor.shape
