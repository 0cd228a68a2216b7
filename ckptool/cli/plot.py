"""`ckptool plot`."""

from __future__ import annotations

import os
from collections.abc import Sequence

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers, patterns, refuse_idle

SIDES = (400, 10_000)  # pixels


class _Size(click.ParamType):  # type: ignore[type-arg]  # click 8.1 has none
    """Two numbers of pixels: `1920x1200`."""

    name = "size"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        """Read it; what is no such size is a usage error."""
        from ckptool.text import length

        sides = [length(each, 10) or 0 for each in str(value).lower().split("x")]
        if len(sides) != 2 or not all(SIDES[0] <= each <= SIDES[1] for each in sides):
            self.fail(
                f"{value} is not WIDTHxHEIGHT, of {SIDES[0]} to {SIDES[1]} pixels", param, ctx
            )
        return sides[0], sides[1]


@click.command("plot", cls=Command)
@click.argument("file", metavar="FILE", type=INPUT)
@click.argument("other", metavar="[B]", required=False, type=INPUT)
@click.option(
    "-o", "--output", "target", required=True, metavar="PICTURE", help="Where to: .svg, .png, .pdf."
)
@click.option("--stats", is_flag=True, help="Draw how values are distributed.")
@click.option(
    "--by",
    type=click.Choice(["bytes", "parameters"]),
    default="bytes",
    help="What the areas of sizes are.",
)
@click.option("--depth", type=click.IntRange(1), metavar="N", help="Fold modules deeper than N.")
@click.option("--select", multiple=True, metavar="PATTERN", help="Only the keys selected.")
@click.option("--at", metavar="NAME", help="Where the state_dict sits (dotted; . is the top).")
@click.option(
    "--size",
    type=_Size(),
    default="1920x1200",
    metavar="WxH",
    help="Pixels of a PNG, 160 to an inch.",
)
@click.option("--force", is_flag=True, help="Replace an existing PICTURE (otherwise an error).")
@answers
def command(
    file: str,
    other: str | None,
    target: str,
    stats: bool,
    by: str,
    depth: int | None,
    select: Sequence[str],
    at: str | None,
    size: tuple[int, int],
    force: bool,
) -> None:
    """Draw the sizes of modules, their values, or how far each moved from another checkpoint.

    \b
    ckptool plot model.safetensors -o sizes.svg
    ckptool plot --depth 2 --by parameters model.safetensors -o sizes.png
    ckptool plot --stats model.safetensors -o values.png
    ckptool plot pretrained.pth finetuned.pth -o change.png

    Needs matplotlib: pip install 'ckptool[plot]'.
    """
    refuse_idle({"stats": "not other", "by": "not other stats"})
    from ckptool import containers
    from ckptool.cli import charts, pictures, report
    from ckptool.errors import EditError
    from ckptool.files import publish
    from ckptool.verbs import listing, plotting

    form = os.path.splitext(target)[1].lower().removeprefix(".")
    if form not in pictures.FORMATS:
        raise EditError(
            f"{target} ends in none of {', '.join(f'.{each}' for each in pictures.FORMATS)}",
            hint="the suffix of -o says what it becomes",
        )
    files = [file] if other is None else [file, other]
    place = publish.refuse_target(target, files, force=force, sync=True)
    sources = [containers.read(path) for path in files]
    for checkpoint in sources:
        talk.warn_if_any(report.danger_lines(checkpoint))
    with pictures.drawing():
        pass  # or refuse before values are read
    with talk.Progress(target) as progress:
        begin = progress.begin
        chosen = patterns(select)
        if other is not None:
            plot = plotting.change(*sources, at=at, select=chosen, depth=depth, progress=begin)
        else:
            found = listing.listing(sources[0], at)
            found = listing.chosen(found, chosen, "file", begin if stats else None, cells=True)
            plot = plotting.of_one(found, depth, stats=stats, every=bool(chosen))
    publish.write(place, charts.picture(plot, form, size, by=by))
    if talk.speaks_json():
        talk.put_document({**plot.to_dict(), "target": target})
    talk.say(report.plot_lines(plot, target))
