"""`ckptool transfer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ckptool import talk
from ckptool.commands._options import Command, Request, patterns, tell, writes
from ckptool.commands.convert import renaming


@click.command("transfer", cls=Command)
@writes
@click.option("--drop", multiple=True, metavar="PATTERN", help="Leave keys out.")
@click.option("--keep", multiple=True, metavar="PATTERN", help="Leave all other keys out.")
@click.option("--rename", multiple=True, metavar="OLD=NEW", help="Move a dotted prefix.")
@click.option("--like", metavar="FILE", help="Keep what FILE has too, in the same shape.")
@click.option("--like-at", metavar="NAME", help="Where the state_dict of --like sits.")
@click.option(
    "--min-match",
    type=click.FloatRange(0, 1),
    default=0.5,
    show_default=True,
    help="Share of the target's parameters that must be filled.",
)
def command(
    request: Request,
    drop: Sequence[str],
    keep: Sequence[str],
    rename: Sequence[str],
    like: str | None,
    like_at: str | None,
    min_match: float,
) -> None:
    """Make pretrained weights of a training checkpoint: what fits, and nothing else.

    \b
    ckptool transfer model_best.pth.tar pretrain.pth --drop classifier
    ckptool transfer resnet50.pth init.pth --like flowers102.safetensors

    Takes the state_dict out, peels wrapper prefixes, drops what is not wanted. Patterns are
    matched against the peeled keys.
    """
    from ckptool import report, transfer

    steps = transfer.first_steps(
        [renaming(text) for text in rename], patterns(drop), patterns(keep)
    )
    target = transfer.reference_of_file(like, like_at) if like else None
    name = request.target or request.source
    with talk.Progress(name, quiet=request.quiet) as progress:
        result, fit = transfer.transfer(
            request.source,
            request.target,
            like=target,
            steps=steps,
            min_match=min_match,
            options=request.options,
            progress=progress.begin,
        )
    more = report.fit_lines(fit) if fit else []
    fields = report.fit_fields(fit) if fit else NO_FIT
    tell(request, result, bare=True, more=more, schema="transfer/1", fields=fields)


NO_FIT: dict[str, Any] = {"matched": None, "mismatched": [], "missing": [], "filled": None}
