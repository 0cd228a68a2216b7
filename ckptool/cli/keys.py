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
@click.option("--names", is_flag=True, help="Print only the keys.")
@click.option("--tree", is_flag=True, help="Print modules with count, size and share.")
@click.option("--depth", type=click.IntRange(1), help="With --tree: levels to show.")
@click.option(
    "--sort",
    type=click.Choice(["file", "size", "name", "absmax", "nan", "std"]),
    default="file",
    show_default=True,
    help="Order of the list; the last three need --stats.",
)
@click.option("--stats", is_flag=True, help="Min, max, mean, std ... of the values.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="Only data, errors and warnings.")
def command(
    file: str,
    at: str | None,
    every: bool,
    select: Sequence[str],
    names: bool,
    tree: bool,
    depth: int | None,
    sort: str,
    stats: bool,
    as_json: bool,
    quiet: bool,
) -> None:
    """List the tensors of a checkpoint: key, dtype, shape, bytes.

    \b
    ckptool keys model_best.pth.tar
    ckptool keys --tree --depth 2 vit.safetensors
    ckptool keys --names --select '*.bias' model.pth
    ckptool keys --all model_best.pth.tar        (optimizer too)
    ckptool keys --stats --sort absmax model.safetensors

    Off a terminal, lines are separated by tabs and never cut.
    """
    from ckptool import containers
    from ckptool.cli import report
    from ckptool.verbs import listing

    refuse_idle({"depth": "tree", "at": "not every", "sort": "not tree", "stats": "not tree names"})
    if sort in ("absmax", "nan", "std") and not stats:
        raise click.UsageError(f"--sort {sort} needs --stats", click.get_current_context())
    forms = {"--names": names, "--tree": tree, "--json": as_json}
    wanted = [option for option, given in forms.items() if given]
    if len(wanted) > 1:
        what = f"{' and '.join(wanted)} do not go together"
        raise click.UsageError(what, click.get_current_context())
    checkpoint = containers.read(file, alone=every)
    found = listing.listing(checkpoint, at, every=every)
    with talk.Progress(checkpoint.path, quiet=quiet) as progress:
        begin = progress.begin if stats else None
        found = listing.chosen(
            found, patterns(select), sort, begin, cells=talk.on_terminal() and not as_json
        )
    if lines := report.danger_lines(checkpoint):
        talk.warn(*lines)
    if as_json:
        talk.put_document(found.to_dict())
    elif tree:
        talk.put(report.tree_table(found.entries, depth, wide=talk.on_terminal()))
    elif names:
        talk.put(report.key_names(found.entries))
    elif stats:
        from ckptool.cli.report_stats import stat_rows, stat_table

        talk.put((stat_table if talk.on_terminal() else stat_rows)(found))
    else:
        rows = report.key_table if talk.on_terminal() else report.key_rows
        talk.put(rows(found.entries))
    talk.say(report.listing_lines(found, every=every), quiet=quiet)
