"""A map between two naming schemes -> text."""

from __future__ import annotations

from collections.abc import Iterator

from ckptool.cli import screen
from ckptool.errors import EditError
from ckptool.text import argument, counted, listed, measured, visible
from ckptool.verbs.match import Matched


def shown(text: str, width: int | None) -> list[str]:
    """Write a recipe; on a narrow terminal, comments are below what they are of."""
    lines = []
    for line in text.splitlines():
        rule, mark, comment = line.rpartition("# ")
        if width is None or not mark or measured(line) <= width:
            lines.append(line)
            continue
        indent = " " * (len(rule) - len(rule.lstrip()) + 2) if rule.strip() else ""
        lines += [rule.rstrip()] if rule.strip() else []
        parts = screen.wrapped(comment, width - len(indent) - len(mark))
        lines += [f"{indent}{mark}{part}" for part in parts]
    return lines


def lines(found: Matched, target: str | None) -> list[str]:
    """Return what is paired, ambiguous and left, and the command that comes next."""
    read, wanted = len(found.source.shapes), len(found.like.shapes)
    said = [f"{found.paired} of {counted(read, 'key')} paired with {found.paired} of {wanted}"]
    said += _ambiguous(found)
    for side, keys in ((found.source, found.left), (found.like, found.missing)):
        said += [f"without a partner in {visible(side.name)}: {listed(keys, 4)}"] if keys else []
    if target is None:
        return said
    rules = found.draft.plan.count
    said.append(
        f"{visible(target)}: {counted(rules, 'rule')}" + ("" if found.sure else "; review it")
    )
    command = f"ckptool convert --recipe {argument(target)} {argument(found.source.name)} OUT"
    return [*said, f"{visible(command)}   applies it"]


def _ambiguous(found: Matched) -> Iterator[str]:
    for choice in found.draft.choices:
        what = f"{listed(choice.here, 2)} may be {listed(choice.there, 2)}"
        yield f"ambiguous, {counted(choice.keys, 'key')}: {what}"
    for cut in found.draft.cuts:
        whole, parts = visible(cut.whole), listed(cut.parts, 3)
        one, other = (parts, whole) if cut.back else (whole, parts)
        yield f"ambiguous, {counted(cut.tensors, 'module')}: {one} may become {other}"
    for each in found.draft.reshapes:
        if not each.sure:
            what = f"ambiguous, {counted(each.tensors, 'tensor')}"
            yield f"{what}: the order of {listed(each.keys, 2)}"


def nothing_alike(found: Matched) -> EditError:
    """Return the error that nothing is alike, with a key of each side."""
    examples = (next(iter(side.shapes), "no tensor") for side in (found.source, found.like))
    here, there = examples
    return EditError(
        f"nothing in {found.source.name} has the shapes of anything in {found.like.name}",
        evidence=[f"keys are like {here}, and like {there}"],
    )
