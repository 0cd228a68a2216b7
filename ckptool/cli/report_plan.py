"""The plan of a dry run -> lines of text: each change of keys, then counts and sizes."""

from __future__ import annotations

from collections.abc import Sequence

from ckptool.cli import folding, screen
from ckptool.cli.folding import Block
from ckptool.cli.report import counts_line
from ckptool.text import counted, readable, visible
from ckptool.verbs.surgery import Rewrite

Group = tuple[dict[str, None], dict[str, None]]  # the old keys and the new ones of a change
_RENAMED = ("- ", "+ ")
_RULE = ("", "-> ")


def plan_lines(result: Rewrite, counts: str = "", width: int | None = None) -> list[str]:
    """Write the plan of a dry run: each change as `- old` and `+ new`, then counts and sizes.

    The tensors of a group that becomes another follow each other, with two spaces before one that
    stays; `~` is before a tensor that is rearranged under its key. On a terminal, which has a
    width, a change of many keys is a row: `module.* -> *   110 keys`.
    """
    blocks = [_block(*group) for group in _groups(result.map) if list(group[0]) != list(group[1])]
    blocks += [((visible(key),), ("~ ",)) for key in result.remade]
    shards = [
        (visible(each.name), counted(each.count, "key"), readable(each.nbytes))
        for each in result.shards
    ]
    lines = [line for block in blocks for line in _lines(*block)]
    if width is not None:
        lines = screen.table(_folded(blocks), width)
    lines += screen.table(shards, width, (1, 2))
    free = "unknown" if result.free is None else readable(result.free)
    size = f"{visible(result.target)}: {readable(result.nbytes)} to write, {free} free"
    ends = (counts or counts_line(result), size)
    return [*lines, *(line for end in ends for line in screen.wrapped(end, width))]


def _groups(pairs: Sequence[tuple[str, str | None]]) -> list[Group]:
    """Return the old keys and the new ones of each change, in order."""
    groups: dict[int, Group] = {}
    of_old: dict[str, int] = {}
    of_new: dict[str, int] = {}
    for number, (old, new) in enumerate(pairs):
        known = {of_old.get(old, number), of_new.get(new, number) if new is not None else number}
        at = min(known)
        olds, news = groups.setdefault(at, ({}, {}))
        for other in known - {at, number}:  # a pair that joins two groups
            for key in groups[other][0]:
                of_old[key] = at
            for key in groups[other][1]:
                of_new[key] = at
            olds.update(groups[other][0])
            news.update(groups.pop(other)[1])
        olds[old] = None
        of_old[old] = at
        if new is not None:
            news[new] = None
            of_new[new] = at
    return list(groups.values())


def _block(olds: dict[str, None], news: dict[str, None]) -> Block:
    added = [key for key in news if key not in olds]
    signs = ["  " if key in news else "- " for key in olds] + ["+ "] * len(added)
    return tuple(map(visible, (*olds, *added))), tuple(signs)


def _lines(keys: Sequence[str], signs: Sequence[str]) -> list[str]:
    return [sign + key for sign, key in zip(signs, keys, strict=True)]


def _folded(blocks: Sequence[Block]) -> list[tuple[str, str]]:
    """Fold changes that are the same but for numbers, and renames but for the end of the key."""
    rows = []
    for (keys, signs), indices in folding.blocks_folded(list(map(_rule, blocks))):
        lines, count = _lines(*blocks[indices[0]]), ""
        if len(indices) > 1:
            lines, count = _lines(keys, signs), counted(len(indices), "key")
            lines = [" ".join(lines)] if signs == _RULE else lines
        rows += [(line, count) for line in lines]
    return rows


def _rule(block: Block) -> Block:
    """Write a rename without what both keys end in: `module.*` becomes `*`."""
    keys, signs = block
    if signs != _RENAMED:
        return block
    old, new = (key.split(".") for key in keys)
    same = 0
    while same < min(len(old), len(new)) and old[-same - 1] == new[-same - 1]:
        same += 1
    if not same:
        return keys, _RULE
    return tuple(".".join([*key[:-same], "*"]) for key in (old, new)), _RULE
