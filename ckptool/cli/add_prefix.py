"""`ckptool add-prefix`."""

from __future__ import annotations

import click

from ckptool.cli._options import PREFIX, Command, Request, run, writes


@click.command("add-prefix", cls=Command)
@writes
@click.option("--prefix", default=PREFIX, help="The prefix to add.")
def command(request: Request, prefix: str) -> int:
    """Add the DataParallel prefix `module.` to keys.

    \b
    ckptool add-prefix in.pth out.pth
    ckptool add-prefix --prefix backbone in.pth out.pth

    This is what nn.DataParallel(model).load_state_dict expects.
    """
    from ckptool.verbs import api

    return run(request, api.add_prefix, prefix=prefix)
