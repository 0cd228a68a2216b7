"""What `info` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ckptool import checkpoint as places, safety
from ckptool.edits import WRAPPERS
from ckptool.report import container_title, document
from ckptool.safety import Level
from ckptool.suggestions import Suggestion
from ckptool.survey import Beside, Place, Survey, Total
from ckptool.text import counted, listed, percent, readable, table, visible

Fact = tuple[str, str]  # what it is about, and what there is to say; no name goes on


def info_table(facts: Survey, suggested: Sequence[Suggestion]) -> list[str]:
    """Show the facts to people: one below the other, then the commands that would help."""
    named: list[Fact] = []
    for name, text in _facts(facts):
        named.append(("" if named and name == _last(named) else name, text))
    lines = table(named)
    for each in suggested:
        lines += ["", f"{visible(each.reason)}:", f"    {visible(each.command)}"]
    return lines


def _last(named: Sequence[Fact]) -> str:
    return next((name for name, _ in reversed(named) if name), "")


def info_rows(facts: Survey, suggested: Sequence[Suggestion]) -> list[str]:
    """Give the facts to programs: a line each, with tabs between."""
    rows = [f"{name}\t{text}" for name, text in _facts(facts)]
    return rows + [
        f"suggestion\t{visible(each.reason)}\t{visible(each.command)}" for each in suggested
    ]


def _facts(facts: Survey) -> list[Fact]:
    checkpoint = facts.checkpoint
    found: list[Fact] = [
        ("file", f"{visible(checkpoint.path)}, {readable(checkpoint.nbytes)}"),
        ("container", _container(facts)),
    ]
    if facts.framework is not None:
        found.append(("looks like", _framework(facts)))
    found += [("state_dict", line) for line in _places(facts)]
    found += [("dtypes", line) for line in _dtypes(facts.dtypes)]
    if facts.place is not None:
        found += [("keys", line) for line in _keys(facts.place)]
    found += [("layout", line) for line in _layout(facts)]
    found += [("beside", line) for line in _beside(facts.beside)]
    found += [("bytes", line) for line in _shares(facts)]
    found += [("__metadata__", f"{visible(k)}: {_cut(v)}") for k, v in checkpoint.metadata.items()]
    found += [("safety", line) for line in _safety(facts)]
    return found + [("note", visible(note)) for note in _notes(facts)]


def _container(facts: Survey) -> str:
    checkpoint = facts.checkpoint
    parts = [container_title(checkpoint.container)]
    if checkpoint.generation:
        parts.append(f"written by {checkpoint.generation}")
    if checkpoint.protocol is not None:
        parts.append(f"pickle protocol {checkpoint.protocol or '0 or 1'}")
    if checkpoint.byteorder != "little":
        parts.append("big-endian")
    if facts.deflated:
        parts.append(f"{counted(facts.deflated, 'record')} deflated")
    return ", ".join(parts)


def _framework(facts: Survey) -> str:
    framework = facts.framework
    assert framework is not None
    by = f" (by {listed(framework.seen, 6)})" if framework.seen else ""
    note = f"; {visible(framework.note)}" if framework.note else ""
    return f"{framework.name}{by}{note}"


def _places(facts: Survey) -> list[str]:
    if not facts.places:
        count = facts.total.count
        return [f"none found; {_counted(facts.total)} in the file" if count else "no tensors"]
    if len(facts.places) == 1:
        place = facts.places[0]
        where = f"at `{visible(places.dotted(place.at))}`: " if place.at else ""
        others = f", and {place.other} entries that are no tensors" if place.other else ""
        return [f"{where}{_counted(place.total)}{others}"]
    rows = [
        (
            visible(places.dotted(place.at) or "."),
            counted(place.total.count, "tensor"),
            readable(place.total.nbytes),
            f"prefix {visible(place.prefix)}" if place.prefix else "",
        )
        for place in facts.places
    ]
    return [f"{len(rows)} candidates; --at chooses one", *table(rows)]


def _counted(total: Total) -> str:
    return (
        f"{counted(total.count, 'tensor')}, {total.elements:,} elements, {readable(total.nbytes)}"
    )


def _dtypes(dtypes: dict[str, Total]) -> list[str]:
    return [
        f"{label}  {counted(total.count, 'tensor')}, {readable(total.nbytes)}"
        for label, total in dtypes.items()
    ]


def _keys(place: Place) -> list[str]:
    if place.wrappers:
        kinds = ", ".join(WRAPPERS[wrapper] for wrapper in place.wrappers)
        return [f"all start with `{''.join(place.wrappers)}` ({kinds})"]
    lines = [f"all start with `{visible(place.prefix)}`"] if place.prefix else []
    for wrapper, kind in WRAPPERS.items():
        count = sum(key.startswith(wrapper) for key in place.keys)
        inside = sum(f".{wrapper}" in key for key in place.keys)
        if count:
            lines.append(f"{count} of {len(place.keys)} start with `{wrapper}` ({kind})")
        if inside:
            lines.append(f"{inside} of {len(place.keys)} hold `.{wrapper}` ({kind})")
    return lines


def _layout(facts: Survey) -> list[str]:
    lines = []
    if facts.ties:
        lines.append("tied: " + listed(f"{one} = {two}" for one, two in facts.ties.items()))
    if facts.views:
        lines.append(
            f"{counted(len(facts.views), 'view')} of a larger storage: {listed(facts.views, 4)}"
        )
    if facts.strided:
        lines.append(f"{len(facts.strided)} not contiguous: {listed(facts.strided, 4)}")
    if facts.requires_grad:
        lines.append(f"{facts.requires_grad} of {facts.total.count} require a gradient")
    if set(facts.devices) - {"cpu"}:
        tagged = ", ".join(
            f"{visible(name)} ({counted(count, 'storage')})"
            for name, count in facts.devices.items()
        )
        lines.append(f"tagged for {tagged}")
    if facts.state is not None and facts.checkpoint.container != "safetensors":
        there = "there" if facts.state.metadata is not None else "not there"
        lines.append(f"`_metadata` (versions of modules) is {there}")
    return lines


def _beside(beside: Sequence[Beside]) -> list[str]:
    rows = []
    for each in beside[:40]:
        weight = f"{counted(each.tensors, 'tensor')}, {readable(each.nbytes)}"
        rows.append((visible(each.name), visible(each.what), weight if each.tensors else ""))
    more = [f"and {len(beside) - 40} more"] if len(beside) > 40 else []
    return [*table(rows), *more]


def _shares(facts: Survey) -> list[str]:
    whole = facts.checkpoint.nbytes
    rows = [(name, readable(size), percent(size / whole)) for name, size in parts(facts) if size]
    return table(rows, right=(1, 2))


def parts(facts: Survey) -> list[tuple[str, int]]:
    """Divide the bytes of the file: what each part takes."""
    found = [
        (visible(places.dotted(place.at)) or "state_dict", place.stored) for place in facts.places
    ]
    heavy = sorted((each for each in facts.beside if each.nbytes), key=lambda each: -each.nbytes)
    found += [(visible(each.name), each.nbytes) for each in heavy[:8]]
    others = sum(each.nbytes for each in heavy[8:]) + facts.elsewhere
    found += [
        ("other tensors", others),
        ("records not read", facts.checkpoint.unread_nbytes),
        ("structure (pickle, headers, padding)", facts.rest),
    ]
    if facts.unused:
        found.append(("of all this, used by no tensor", facts.unused))
    return found


def _safety(facts: Survey) -> list[str]:
    verdict, checkpoint = facts.verdict, facts.checkpoint
    if checkpoint.container == "safetensors":
        return ["plain: the container has no place for code"]
    if verdict.level is Level.PLAIN:
        return ["plain: every name in it is one that torch.load(weights_only=True) accepts"]
    lines = []
    if verdict.dangerous:
        lines.append("dangerous: it would run code when loaded; nothing was executed")
        lines += map(
            visible,
            safety.evidence_lines(
                verdict, checkpoint.calls, checkpoint.tree, checkpoint.pickle_name
            ),
        )
    if verdict.foreign:
        lines.append(f"foreign: {listed(map(str, verdict.foreign), 40)}")
    return lines


def _notes(facts: Survey) -> Iterable[str]:
    yield from facts.checkpoint.notes
    if facts.state is not None:
        yield from facts.state.notes
    if facts.checkpoint.unread:
        yield f"not read, as nothing refers to it: {listed(facts.checkpoint.unread, 6)}"


def _cut(text: str) -> str:
    return visible(text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)")


def info_document(facts: Survey, suggested: Sequence[Suggestion]) -> str:
    """Write the document `info/1`."""
    checkpoint, state = facts.checkpoint, facts.state
    return document(
        "info/1",
        file=checkpoint.path,
        container=checkpoint.container,
        generation=checkpoint.generation,
        protocol=checkpoint.protocol,
        byteorder=checkpoint.byteorder,
        file_nbytes=checkpoint.nbytes,
        framework=facts.framework.name if facts.framework else None,
        at=list(state.at) if state is not None else None,
        candidates=[_place_fields(place) for place in facts.places],
        count=facts.total.count,
        elements=facts.total.elements,
        nbytes=facts.total.nbytes,
        dtypes={label: _total_fields(total) for label, total in facts.dtypes.items()},
        wrappers=list(facts.place.wrappers) if facts.place else [],
        ties=facts.ties,
        views=list(facts.views),
        not_contiguous=list(facts.strided),
        requires_grad=facts.requires_grad,
        devices=facts.devices,
        module_metadata=state is not None and state.metadata is not None,
        beside=[each.name for each in facts.beside],
        beside_values=[
            {"name": each.name, "what": each.what, "tensors": each.tensors, "nbytes": each.nbytes}
            for each in facts.beside
        ],
        bytes={
            "unused": facts.unused,
            "unread": checkpoint.unread_nbytes,
            "structure": facts.rest,
        },
        unread=list(checkpoint.unread),
        metadata=checkpoint.metadata,
        safety=facts.verdict.level.name.lower(),
        globals=[str(name) for name in checkpoint.globals],
        foreign=[str(name) for name in facts.verdict.foreign],
        dangerous=[
            {"what": call.text, "byte": call.offset, "at": call.where}
            for call in safety.evidence(facts.verdict, checkpoint.calls, checkpoint.tree)
        ],
        notes=[*_notes(facts)],
        suggestions=[{"reason": each.reason, "command": each.command} for each in suggested],
    )


def _total_fields(total: Total) -> dict[str, Any]:
    return {"count": total.count, "elements": total.elements, "nbytes": total.nbytes}


def _place_fields(place: Place) -> dict[str, Any]:
    return {
        "at": list(place.at),
        **_total_fields(place.total),
        "stored": place.stored,
        "prefix": place.prefix,
        "wrappers": list(place.wrappers),
    }
