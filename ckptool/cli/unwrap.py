"""`ckptool unwrap`."""

from __future__ import annotations

import click

from ckptool.cli._options import Command, Request, run, writes


@click.command("unwrap", cls=Command)
@writes
def command(request: Request) -> int:
    """Take the state_dict out of a training checkpoint.

    \b
    ckptool unwrap model_best.pth.tar weights.pth
    ckptool unwrap dino.pth weights.pth --at teacher

    What else is in the file (epoch, optimizer, args ...) is not written, and named.
    """
    from ckptool.verbs import api

    return run(request, api.unwrap)
