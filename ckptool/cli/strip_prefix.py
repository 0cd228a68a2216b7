"""`ckptool strip-prefix`."""

from __future__ import annotations

import click

from ckptool.cli._options import PREFIX, Command, Request, run, writes


@click.command("strip-prefix", cls=Command)
@writes
@click.option(
    "--prefix",
    default=PREFIX,
    show_default=True,
    help="What to take off; `auto` peels every known wrapper that all keys share.",
)
@click.option("--every", is_flag=True, help="Insist that every key has the prefix.")
@click.option("--anywhere", is_flag=True, help="Also inside keys, as whole dotted components.")
def command(request: Request, prefix: str, every: bool, anywhere: bool) -> None:
    """Take the DataParallel prefix `module.` off keys.

    \b
    ckptool strip-prefix in.pth out.pth
    ckptool strip-prefix --prefix auto compiled.pth out.pth
    ckptool strip-prefix --prefix module --anywhere in.pth out.pth

    The prefix is taken off the start of a key, once. The rest of the file stays as it is.
    """
    from ckptool.verbs import api

    run(request, api.strip_prefix, prefix=prefix, every=every, anywhere=anywhere)
