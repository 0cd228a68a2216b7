"""`ckptool average`."""

from __future__ import annotations

import click

from ckptool.cli import talk
from ckptool.cli._options import Command, Request, Told, combines, tell


@click.command("average", cls=Command)
@combines
@click.option(
    "--weights", metavar="W,W,...", help="A weight for each IN, as they are.  [default: 1/n each]"
)
def command(request: Request, weights: str | None) -> None:
    """Average checkpoints: soups, SWA, EMA, task arithmetic.

    \b
    ckptool average epoch8.pth epoch9.pth epoch10.pth soup.pth
    ckptool average --weights 0.999,0.001 ema.pth model.pth ema2.pth
    ckptool average --weights 1,1,-1 base.pth tuned.pth base_of_tuned.pth added.pth

    All have the same keys and shapes, in any order and format; wrapper prefixes do not count.
    Sums are computed in float64 and written in the dtype, order and keys of the first. Integers,
    booleans and what else cannot be averaged are those of the last, and named.
    """
    from ckptool.cli import report
    from ckptool.verbs import combining

    with talk.Progress(request.target or "") as progress:
        done = combining.average(
            request.sources,
            request.target or "",
            weights=None if weights is None else _numbers(weights),
            progress=progress.begin,
            **request.options,
        )
    lines, counts = report.average_lines(done), report.average_counts(done)
    tell(request, Told(done.rewrite, lines, done.to_dict(), counts))


def _numbers(text: str) -> list[float]:
    """Read weights with commas or spaces between them."""
    words = text.split(",") if "," in text else text.split()
    numbers = []
    for word in words:
        try:
            numbers.append(float(word))
        except ValueError:
            from ckptool.errors import EditError

            raise EditError(f"`{word}` is not a number", hint="--weights 0.5,0.25,0.25") from None
    return numbers
