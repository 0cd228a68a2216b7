"""`ckptool show`."""

from __future__ import annotations

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers


@click.command("show", cls=Command)
@click.argument("file", metavar="FILE", type=INPUT)
@click.argument("key", metavar="KEY")
@click.option("--slice", "index", metavar="INDEX", help="Elements, as torch: '0,:5'.")
@click.option("--at", metavar="NAME", help="Where the state_dict sits (dotted; . is the top).")
@click.option("--all", "every", is_flag=True, help="Up to 1 000 000 values, not 1 000.")
@answers
def command(file: str, key: str, index: str | None, at: str | None, every: bool) -> None:
    """Show values of a tensor as torch prints them, or a plain value of the file.

    \b
    ckptool show model_best.pth.tar module.classifier.bias
    ckptool show model_best.pth.tar epoch
    ckptool show --slice '0,:5' model.safetensors wte.weight

    KEY is a key of the state_dict, or a path that `keys --all` lists, or one of what is beside
    them: args.lr, optimizer.param_groups.0.lr. Nothing is executed.
    """
    from ckptool.cli import report_show
    from ckptool.verbs.showing import show

    shown = show(file, key, at=at, slice=index or "", all=every)
    talk.answer(shown, report_show.value_lines, ())
