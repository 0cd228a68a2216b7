"""`ckptool strip-prefix`."""

from __future__ import annotations

from typing import Any

import click

from ckptool.cli._options import PREFIX, Command, Request, run, strips, writes


@click.command("strip-prefix", cls=Command)
@writes
@click.option(
    "--prefix",
    multiple=True,
    default=[PREFIX],
    show_default=PREFIX,
    help="Prefix to remove, repeatable; `auto`: all known wrappers that all keys share.",
)
@click.option("--every", is_flag=True, help="Fail unless every key has the prefix.")
@strips
def command(request: Request, **how: Any) -> int:
    """Remove the DataParallel prefix `module.` from keys.

    \b
    ckptool strip-prefix in.pth out.pth
    ckptool strip-prefix --prefix auto compiled.pth out.pth
    ckptool strip-prefix --prefix module --anywhere in.pth out.pth
    ckptool strip-prefix *.pth out_folder/

    A prefix is removed from the start of a key, once. What a wrapper keeps for itself
    (n_averaged, step, initted) goes with it. The rest of the file stays as it is.
    """
    from ckptool.verbs import api

    return run(request, api.strip_prefix, **how)
