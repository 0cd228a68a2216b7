"""`ckptool keys`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ckptool import checkpoint as places, edits, formats, report, safety, surgery, talk
from ckptool.checkpoint import Checkpoint, StateDict
from ckptool.commands._options import patterns
from ckptool.report import Entry
from ckptool.tensor import TENSORS


@click.command("keys")
@click.argument("file", metavar="FILE")
@click.option("--at", metavar="NAME", help="Where the state_dict sits (dotted; . is the top).")
@click.option("--all", "every", is_flag=True, help="Every tensor of the file, by its path.")
@click.option("--select", multiple=True, metavar="PATTERN", help="Only the keys selected.")
@click.option("--names", is_flag=True, help="Print keys alone.")
@click.option("--tree", is_flag=True, help="Print modules with count, size and share.")
@click.option("--depth", type=click.IntRange(1), help="With --tree: levels to show.")
@click.option(
    "--sort",
    type=click.Choice(["file", "size", "name"]),
    default="file",
    show_default=True,
    help="Order of the list.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No talk, only errors and warnings.")
def command(
    file: str,
    at: str | None,
    every: bool,
    select: Sequence[str],
    names: bool,
    tree: bool,
    depth: int | None,
    sort: str,
    as_json: bool,
    quiet: bool,
) -> None:
    """List the tensors of a checkpoint: key, dtype, shape, bytes.

    \b
    ckptool keys model_best.pth.tar
    ckptool keys --tree --depth 2 vit.safetensors
    ckptool keys --names --select '*.bias' model.pth
    ckptool keys --all model_best.pth.tar        (optimizer too)

    Off a terminal, lines are separated by tabs and never cut.
    """
    checkpoint = formats.read(file)
    state, entries = _entries(checkpoint, at, every=every, quiet=quiet)
    if select:
        chosen = edits.select(patterns(select), [key for key, _ in entries])
        entries = [(key, info) for key, info in entries if key in chosen]
    if sort == "size":
        entries.sort(key=lambda entry: -entry[1].nbytes)
    elif sort == "name":
        entries.sort(key=lambda entry: entry[0])
    _warn(checkpoint)
    beside = places.beside(checkpoint.tree, state.at) if state else []
    if as_json:
        at_steps = state.at if state else ()
        talk.put([report.keys_document(checkpoint, at_steps, entries, beside)])
    elif tree:
        talk.put(report.tree_table(entries, depth, wide=talk.on_terminal()))
    elif names:
        talk.put([report.visible(key) for key, _ in entries])
    else:
        rows = report.key_table if talk.on_terminal() else report.key_rows
        talk.put(rows(entries))
    talk.say(_summary(checkpoint, state, entries, beside), quiet=quiet)


def _entries(
    checkpoint: Checkpoint, at: str | None, *, every: bool, quiet: bool
) -> tuple[StateDict | None, list[Entry]]:
    """Choose what to list: the state_dict, or every tensor where that is asked or all there is."""
    none = at is None and not places.candidates(checkpoint.tree)
    if every or none:
        whole = [
            (places.dotted(path) or ".", info) for path, info in places.tensors(checkpoint.tree)
        ]
        if whole and not every:
            talk.say(["no state_dict in it: these are all tensors, by their path"], quiet=quiet)
        return None, whole
    state = places.find(checkpoint, at)
    tensors = [(key, value) for key, value in state.entries.items() if isinstance(value, TENSORS)]
    return state, tensors


def _warn(checkpoint: Checkpoint) -> None:
    verdict = safety.judge(checkpoint.globals)
    if verdict.dangerous:
        path = report.visible(checkpoint.path)
        talk.warn([f"{path} would run code when loaded; nothing was executed"])
        lines = surgery.evidence_lines(checkpoint, verdict)
        talk.say(f"    {report.visible(line)}" for line in lines)


def _summary(
    checkpoint: Checkpoint, state: StateDict | None, entries: list[Entry], beside: list[str]
) -> list[str]:
    lines = [report.file_line(checkpoint, state, entries, beside)]
    if state is not None:
        others = len(state.entries) - len(
            [v for v in state.entries.values() if isinstance(v, TENSORS)]
        )
        if others:
            lines.append(f"{others} more entries of the state_dict are not tensors")
        lines += [report.visible(note) for note in state.notes]
        hint = report.prefix_line(checkpoint.path, list(state.entries))
        lines += [hint] if hint else []
    return lines + [report.visible(note) for note in checkpoint.notes]
