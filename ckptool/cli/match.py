"""`ckptool match`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers, refuse_idle

AMBIGUOUS = 1


@click.command("match", cls=Command)
@click.argument("source", metavar="A", type=INPUT)
@click.option(
    "--like", metavar="B", type=INPUT, help="The target names: a checkpoint, or a file of its keys."
)
@click.option("--model", metavar="SPEC", help="Or a model: resnet18, timm:NAME, file.py:factory.")
@click.option("--model-arg", multiple=True, metavar="NAME=VALUE", help="For the model's factory.")
@click.option("-o", "--output", "target", metavar="FILE", help="Recipe file to write.")
@click.option("--force", is_flag=True, help="Replace an existing FILE (otherwise an error).")
@click.option("--at", metavar="NAME", help="Where the state_dict of A sits (dotted).")
@click.option("--like-at", metavar="NAME", help="Where the state_dict of B sits.")
@answers
def command(
    source: str, model_arg: Sequence[str], target: str | None, force: bool, **how: Any
) -> int:
    """Map the names of one checkpoint to those of another, as a recipe to review.

    \b
    ckptool match vit_b_16.pth --like timm_vit.safetensors -o map.toml
    ckptool match resnet50.pth --model timm:resnet50 -o map.toml
    ckptool match ours.pth --like theirs.json -o map.toml

    Modules are paired by names, numbers in order, and the modules around them; what these do not
    tell apart is a comment in the recipe, with a line for each choice. B may also be what `ckptool
    keys --json` printed. No weights are read or written: `ckptool convert --recipe map.toml A OUT`
    does that. Exit code 1 where something is ambiguous, 2 where nothing is alike.
    """
    from ckptool.cli import report_match
    from ckptool.model import zoo
    from ckptool.verbs import match as verb

    refuse_idle({"like_at": "like", "model_arg": "model", "force": "target"})
    if (how["like"] is None) == (how["model"] is None):
        raise click.UsageError("give --like B or --model SPEC")
    found = verb.match(source, model_args=zoo.arguments(model_arg), **how)
    if not found.anything:
        raise report_match.nothing_alike(found)
    if target is not None:
        verb.write(found, target, [*filter(None, (source, how["like"]))], force=force)
    if talk.speaks_json():
        talk.put_document(found.to_dict())
    elif target is None:
        talk.put(report_match.shown(found.text, talk.columns()))
    talk.say(report_match.lines(found, target))
    return 0 if found.sure else AMBIGUOUS
