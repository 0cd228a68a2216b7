"""`ckptool keys`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import _many, talk
from ckptool.cli._options import INPUT, Command, answers, patterns, refuse_idle

if TYPE_CHECKING:
    from ckptool.cli._many import Put
    from ckptool.verbs.listing import Listing


@click.command("keys", cls=Command)
@click.argument("files", metavar="FILE...", nargs=-1, required=True, type=INPUT)
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
    help="Order of the list; the last three need --stats.",
)
@click.option("--stats", is_flag=True, help="Min, max, mean, std ... of the values.")
@click.option("--no-fold", "every_row", is_flag=True, help="A row for each, on a terminal too.")
@answers
def command(files: Sequence[str], select: Sequence[str], sort: str, stats: bool, **how: Any) -> int:
    """List the tensors of a checkpoint: key, dtype, shape, bytes.

    \b
    ckptool keys model_best.pth.tar
    ckptool keys --tree --depth 2 vit.safetensors
    ckptool keys --names --select '*.bias' model.pth
    ckptool keys --all model_best.pth.tar        (optimizer too)
    ckptool keys --stats --sort absmax model.safetensors
    ckptool keys *.safetensors | grep lm_head

    On a terminal, keys that differ in numbers alone are a row: layers.{0-47}.mlp.weight ... x 48.
    Off a terminal, lines are separated by tabs and never cut; those of several files
    begin with the file.
    """
    refuse_idle({"depth": "tree", "at": "not every", "sort": "not tree", "stats": "not tree names"})
    refuse_idle({"every_row": "not names tree stats as_json"})
    if sort in ("absmax", "nan", "std") and not stats:
        raise click.UsageError(f"--sort {sort} needs --stats")
    forms = {"--names": how["names"], "--tree": how["tree"], "--json": talk.speaks_json()}
    wanted = [option for option, given in forms.items() if given]
    if len(wanted) > 1:
        raise click.UsageError(f"{' and '.join(wanted)} do not go together")
    how |= {"select": patterns(select), "sort": sort, "stats": stats}
    show = partial(_show, **how)
    return _many.each(files, show)


def _show(
    file: str,
    put: Put,
    *,
    at: str | None,
    every: bool,
    select: Sequence[str],
    sort: str,
    **how: Any,
) -> None:
    from ckptool import containers
    from ckptool.cli import report
    from ckptool.verbs import listing

    checkpoint = containers.read(file, alone=every)
    found = listing.listing(checkpoint, at, every=every)
    with talk.Progress(checkpoint.path) as progress:
        begin = progress.begin if how["stats"] else None
        cells = talk.on_terminal() and not talk.speaks_json()
        found = listing.chosen(found, select, sort, begin, cells=cells)
    talk.warn_if_any(report.danger_lines(checkpoint))
    put(found.to_dict() if talk.speaks_json() else _lines(found, **how))
    talk.say(report.listing_lines(found, every=every))


def _lines(
    found: Listing, *, tree: bool, depth: int | None, names: bool, stats: bool, every_row: bool
) -> Sequence[str]:
    from ckptool.cli import report

    width = talk.columns()
    if tree:
        return report.tree_table(found.entries, depth, width)
    if names:
        return report.key_names(found.entries)
    if stats:
        from ckptool.cli.report_stats import stat_rows, stat_table

        return stat_table(found, width) if width else stat_rows(found)
    if width:
        return report.key_table(found.entries, width, fold=not every_row)
    return report.key_rows(found.entries)
