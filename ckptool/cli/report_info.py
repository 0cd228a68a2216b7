"""What `info` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from ckptool import containers
from ckptool.cli import screen
from ckptool.cli.report import container_title
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.pickles.safety import Verdict
from ckptool.records import dataclass
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.text import counted, listed, percent, readable, table, visible
from ckptool.verbs.frameworks import Framework
from ckptool.verbs.survey import Beside, Survey, Total

MAX_BESIDE = 30  # rows for people
MAX_PARTS = 8
MAX_NAMES = 12
Fact = tuple[str, ...]  # what it is about, then cells


@dataclass(frozen=True, slots=True)
class _Style:
    """How to write numbers and lists: for people, or for programs (raw and never cut)."""

    wide: bool

    def size(self, nbytes: int) -> str:
        return readable(nbytes) if self.wide else str(nbytes)

    def count(self, count: int, noun: str) -> str:
        return counted(count, noun) if self.wide else str(count)

    def name(self, dotted: str) -> str:
        return visible(dotted.rpartition(".")[2] if self.wide else dotted)

    def names(self, names: Iterable[str], limit: int) -> str:
        shown = list(names)
        return listed(shown, limit if self.wide else len(shown))

    def first(self, facts: Sequence[Fact], limit: int) -> list[Fact]:
        """Cut a list of facts for people."""
        more = len(facts) - limit
        if not self.wide or more <= 0:
            return list(facts)
        return [*facts[:limit], (facts[0][0], f"and {more} more, listed by --json")]


def info_table(facts: Survey, width: int) -> list[str]:
    """Show the facts to people: one below the other, then the commands that would help."""
    found = _facts(facts, _Style(wide=True))
    first = max(len(fact[0]) for fact in found)
    lines = []
    for name, group in groupby(found, key=lambda fact: fact[0]):
        cells = [fact[1:] for fact in group]
        if name == "file":  # a path, which is not cut
            cells = [("  ".join(*cells),)]
        group_lines = _aligned(cells, width - first - 2)
        names = [name, *[""] * (len(group_lines) - 1)]
        lines += table(list(zip((f"{each:{first}}" for each in names), group_lines, strict=True)))
    for each in facts.suggestions:
        reason = screen.wrapped(f"{visible(each.reason)}:", width)
        lines += ["", *reason, f"    {visible(each.command)}"]
    return lines


def _aligned(rows: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Align the rows of a group that have several cells; those of one cell are sentences below."""
    cells = max(map(len, rows))
    full = [row + ("",) * (cells - len(row)) for row in rows if len(row) > 1]
    sentences = (line for row in rows if len(row) == 1 for line in screen.wrapped(row[0], width))
    # The prefix of one state_dict is said of the keys, too.
    spare = (4,) if len(full) == 1 else (2,)
    return [*screen.table(full, width, spare=spare if cells > 4 else ()), *sentences]


def info_rows(facts: Survey) -> list[str]:
    """Write the facts for programs: a line each, with tabs between; sizes are bytes."""
    rows = ["\t".join(fact) for fact in _facts(facts, _Style(wide=False))]
    return rows + [
        f"suggestion\t{visible(each.reason)}\t{visible(each.command)}" for each in facts.suggestions
    ]


def _facts(facts: Survey, style: _Style) -> list[Fact]:
    checkpoint = facts.checkpoint
    found: list[Fact] = [
        ("file", visible(checkpoint.path), style.size(checkpoint.nbytes)),
        ("container", _container(facts)),
    ]
    if facts.framework is not None:
        found.append(("looks like", _framework(facts.framework)))
    if facts.part is not None:
        found.append(("part", visible(facts.part.text)))
    if checkpoint.program:
        found.append(("program", visible(checkpoint.program)))
    found += _places(facts, style)
    found += [
        ("dtype", label, style.count(total.count, "tensor"), style.size(total.nbytes))
        for label, total in facts.dtypes.items()
    ]
    if facts.place is not None:
        found += [("keys", visible(line)) for line in facts.place.worn]
    found += [("layout", line) for line in _layout(facts, style)]
    about = "beside" if facts.places else "inside"
    found += style.first([_beside(about, each, style) for each in facts.beside], MAX_BESIDE)
    found += _shares(facts, style)
    found += [("__metadata__", visible(k), _cut(v)) for k, v in checkpoint.metadata.items()]
    found += _safety(facts, style)
    return found + [("note", visible(note)) for note in _notes(facts, style)]


def _container(facts: Survey) -> str:
    checkpoint = facts.checkpoint
    parts = [container_title(checkpoint.container)]
    if checkpoint.generation:
        parts.append(f"written by {checkpoint.generation}")
    if checkpoint.protocol is not None:
        parts.append(f"pickle protocol {checkpoint.protocol or '0 or 1'}")
    if checkpoint.byteorder != "little":
        parts.append(f"{checkpoint.byteorder}-endian")
    if facts.deflated:
        parts.append(f"{counted(facts.deflated, 'record')} deflated")
    if len(checkpoint.files) > 1:
        parts.append(f"{len(checkpoint.files)} files")
    return ", ".join(parts)


def _framework(framework: Framework) -> str:
    by = f", with {listed(framework.seen, 6)}" if framework.seen else ""
    return f"{framework.name}{by}"


def _places(facts: Survey, style: _Style) -> list[Fact]:
    if not facts.places:
        holds = [("holds", visible(facts.root))]
        where = "none found; in the file" if facts.total.count else "none, and no tensors"
        return [*holds, ("state_dict", where, *_totals(facts.total, style))]
    rows = [
        (
            "state_dict" if len(facts.places) == 1 else "candidate",
            f"`{visible(walk.dotted(place.at))}`" if place.at else "(the top)",
            *_totals(place.total, style),
            *([f"prefix {visible(place.prefix)}"] if place.prefix else []),
        )
        for place in facts.places
    ]
    for place in facts.places:
        if place.module:
            rows.append(("whole model", visible(place.module)))
            kinds = [f"{style.name(name)} x {count}" for name, count in place.classes.items()]
            rows.append(("whole model", f"modules: {style.names(kinds, MAX_NAMES)}"))
    others = sum(place.other for place in facts.places)
    if others and style.wide:
        are = "is not a tensor" if others == 1 else "are not tensors"
        rows.append((rows[0][0], f"{counted(others, 'more entry')} {are}"))
    return rows


def _totals(total: Total, style: _Style) -> tuple[str, str, str]:
    elements = f"{total.elements:,} elements" if style.wide else str(total.elements)
    return style.count(total.count, "tensor"), elements, style.size(total.nbytes)


def _layout(facts: Survey, style: _Style) -> Iterator[str]:
    if facts.ties:
        yield "tied: " + style.names((f"{a} = {b}" for a, b in facts.ties.items()), 8)
    if facts.views:
        views = counted(len(facts.views), "view")
        yield f"{views} of a larger storage: {style.names(facts.views, 2)}"
    if facts.strided:
        yield f"{len(facts.strided)} not contiguous: {style.names(facts.strided, 2)}"
    if facts.requires_grad:
        yield f"{facts.requires_grad} of {facts.total.count} require a gradient"
    if set(facts.devices) - {"cpu"}:
        tags = (
            f"{name} ({counted(count, 'storage')})" if len(facts.devices) > 1 else name
            for name, count in facts.devices.items()
        )
        yield f"tagged for {style.names(tags, 8)}"
    traits = containers.by_name(facts.checkpoint.container).traits
    if facts.state is not None and traits.module_metadata:
        lacks = "no " if facts.state.metadata is None else ""
        yield f"{lacks}`_metadata` (module versions)"


def _beside(about: str, each: Beside, style: _Style) -> Fact:
    row = (about, visible(each.name), visible(each.what))
    if not each.tensors:
        return row
    return (*row, style.count(each.tensors, "tensor"), style.size(each.nbytes))


def _shares(facts: Survey, style: _Style) -> list[Fact]:
    whole = facts.checkpoint.nbytes
    return [
        ("bytes", name, style.size(size), percent(size / whole))
        for name, size in _parts(facts)
        if size
    ]


def _parts(facts: Survey) -> list[tuple[str, int]]:
    """Divide the bytes of the file: what each part takes."""
    found = [
        (visible(walk.dotted(place.at)) or "state_dict", place.stored) for place in facts.places
    ]
    heavy = sorted((each for each in facts.beside if each.nbytes), key=lambda each: -each.nbytes)
    found += [(visible(each.name), each.nbytes) for each in heavy[:MAX_PARTS]]
    found += [
        ("other tensors", facts.elsewhere + sum(each.nbytes for each in heavy[MAX_PARTS:])),
        ("records that nothing refers to", facts.checkpoint.unread_nbytes),
        ("structure (pickle, headers, padding)", facts.rest),
        ("of all this, used by no tensor", facts.unused),
    ]
    return found


def _safety(facts: Survey, style: _Style) -> list[Fact]:
    verdict, checkpoint = facts.verdict, facts.checkpoint
    if verdict.level is Level.PLAIN:
        return [("safety", _plain(checkpoint, verdict)), *_versions(verdict, style)]
    found: list[Fact] = []
    if verdict.level is Level.DANGEROUS:
        found.append(("safety", "dangerous: it would run code when loaded; nothing was executed"))
        lines = safety.evidence_of(verdict, checkpoint)
        found += [("safety", f"    {visible(line)}") for line in lines]
    if verdict.foreign:
        what = "foreign: torch.load(weights_only=True) refuses it; otherwise it would import"
        found.append(("safety", what))
        names: list[Fact] = [("safety", f"    {visible(str(name))}") for name in verdict.foreign]
        found += style.first(names, MAX_NAMES)
    found += _versions(verdict, style)
    return [*found, ("safety", _PROGRAM)] if checkpoint.program else found


_PROGRAM = "a TorchScript archive is a program, for torch.jit.load; its code was not judged"


def _versions(verdict: Verdict, style: _Style) -> list[Fact]:
    """Say of which torch the verdict is, where they differ."""
    lines: list[Fact] = [("safety", f"    {visible(line)}") for line in verdict.versions]
    return style.first(lines, MAX_NAMES)


def _plain(checkpoint: Checkpoint, verdict: Verdict) -> str:
    """Return what it means that nothing but plain names was found."""
    if checkpoint.program:
        return f"its names are plain: {_PROGRAM}"
    if not checkpoint.pickle_name:
        return "plain: there is no pickle in it"
    after = "".join(f" after `import {module}`" for module in verdict.imports)
    what = f"plain: loads with torch.load(weights_only=True){after}"
    if checkpoint.protocol in (None, 2) or len(checkpoint.files) > 1:  # no file for torch.load
        return what
    return f"{what} in protocol 2; this is protocol {checkpoint.protocol or '0 or 1'}"


def _notes(facts: Survey, style: _Style) -> Iterator[str]:
    yield from facts.notes
    if facts.checkpoint.unread:
        yield f"not read: {style.names(facts.checkpoint.unread, 4)}"


def _cut(text: str) -> str:
    return visible(text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)")
