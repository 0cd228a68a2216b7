"""`ckptool add-prefix`."""

from __future__ import annotations

import click

from ckptool.cli._options import PREFIX, Command, Request, run, writes


@click.command("add-prefix", cls=Command)
@writes
@click.option("--prefix", default=PREFIX, show_default=True, help="What to put before keys.")
def command(request: Request, prefix: str) -> int:
    """Put the DataParallel prefix `module.` before keys.

    \b
    ckptool add-prefix in.pth out.pth
    ckptool add-prefix --prefix backbone in.pth out.pth

    This is what nn.DataParallel(model).load_state_dict expects.
    """
    from ckptool.verbs import api

    return run(request, api.add_prefix, prefix=prefix)
