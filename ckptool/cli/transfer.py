"""`ckptool transfer`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli import talk
from ckptool.cli._options import (
    INPUT,
    InOrder,
    Request,
    Told,
    edits,
    edits_in_order,
    refuse_idle,
    run,
    strips,
    writes,
)

if TYPE_CHECKING:
    from ckptool.verbs.fitting import Transferred


@click.command("transfer", cls=InOrder)
@writes
@edits("--drop", "--keep", "--rename", "--recipe")
@click.option("--reverse", is_flag=True, help="Apply --recipe backwards.")
@strips
@click.option(
    "--like", metavar="FILE", type=INPUT, help="Keep what FILE also has, in the same shape."
)
@click.option("--like-at", metavar="NAME", help="Where the state_dict of --like sits.")
@click.option("--model", metavar="SPEC", help="Keep what a model takes: resnet18, file.py:factory.")
@click.option("--model-arg", multiple=True, metavar="NAME=VALUE", help="For the model's factory.")
@click.option(
    "--adapt",
    multiple=True,
    metavar="WHAT",
    help="Adapt shapes: pos-embed, in-chans, classes, vocab, KEY, KEY=KIND.",
)
@click.option("--classes", metavar="FILE", help="For --adapt: a row or name for each class.")
@click.option("--class-names", metavar="FILE", help="Names of the rows for --classes.")
@click.option("--pos-grid", metavar="HxW", help="Grid of the target, or OLD:NEW.")
@click.option("--pos-prefix", type=click.IntRange(0), metavar="N", help="Tokens before the grid.")
@click.option(
    "--init",
    multiple=True,
    metavar="PATTERN=HOW",
    help="Fill new keys: '*.bias=zeros', fc=normal:std=0.01, xavier_uniform ...",
)
@click.option("--init-missing", is_flag=True, help="Fill the rest as the model initialises it.")
@click.option("--seed", default=0, help="For --init and --init-missing.")
@click.option(
    "--min-match",
    type=click.FloatRange(0, 1),
    default=0.5,
    help="Share of the target's parameters that must be filled.",
)
def command(
    request: Request, model_arg: Sequence[str], class_names: str | None, **given: Any
) -> int:
    """Extract weights to fine-tune from: the state_dict without wrapper prefixes, what fits.

    \b
    ckptool transfer model_best.pth.tar pretrain.pth --drop classifier
    ckptool transfer resnet50.pth init.pth --like flowers102.safetensors
    ckptool transfer resnet18.pth init.pth --model resnet18 --model-arg num_classes=10
    ckptool transfer https://example.org/resnet18.pth init.pth --drop fc

    Takes the state_dict out, peels wrapper prefixes, drops what is not wanted. Edits are applied
    to the peeled keys, in the order given.
    """
    refuse_idle(
        {
            "like_at": "like",
            "seed": "init init_missing",
            "min_match": "like model",
            "model_arg": "model",
        }
        | {"reverse": "recipe", "adapt": "like model", "init": "like model", "classes": "adapt"}
        | {"class_names": "classes", "pos_grid": "adapt", "pos_prefix": "adapt"}
    )
    from ckptool.cli import report
    from ckptool.model import zoo
    from ckptool.verbs.transfer import transfer

    steps = edits_in_order(given)

    def told(done: Transferred) -> Told:
        lines = []
        if done.fit:
            flags = {"ruled": bool(given["init"]), "model": given["model"] is not None}
            width = talk.columns(sys.stderr)
            lines = report.fit_lines(done.fit, added=done.initialised, width=width, **flags)
        return Told(done.rewrite, lines, done.to_dict())

    return run(
        request,
        transfer,
        told,
        steps=steps,
        model_args=zoo.arguments(model_arg),
        class_names=class_names or (),
        **given,
    )
