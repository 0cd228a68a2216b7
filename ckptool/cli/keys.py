"""`ckptool keys`."""

from __future__ import annotations

from collections.abc import Sequence

import click

from ckptool.cli import talk
from ckptool.cli._options import Command, patterns, refuse_idle


@click.command("keys", cls=Command)
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
    from ckptool import containers
    from ckptool.cli import report
    from ckptool.verbs import listing

    refuse_idle({"depth": "tree", "at": "not every", "sort": "not tree"})
    forms = {"--names": names, "--tree": tree, "--json": as_json}
    wanted = [option for option, given in forms.items() if given]
    if len(wanted) > 1:
        what = f"{' and '.join(wanted)} do not go together"
        raise click.UsageError(what, click.get_current_context())
    checkpoint = containers.read(file, alone=every)
    found = listing.chosen(listing.listing(checkpoint, at, every=every), patterns(select), sort)
    warning, *evidence = report.danger_lines(checkpoint) or [""]
    if warning:
        talk.warn([warning])
        talk.say(evidence)
    if as_json:
        talk.put([report.document(found.to_dict())])
    elif tree:
        talk.put(report.tree_table(found.entries, depth, wide=talk.on_terminal()))
    elif names:
        talk.put(report.key_names(found.entries))
    else:
        rows = report.key_table if talk.on_terminal() else report.key_rows
        talk.put(rows(found.entries))
    talk.say(report.listing_lines(found, every=every), quiet=quiet)
