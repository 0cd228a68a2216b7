"""`ckptool diff`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, InOrder, answers, edits_in_order, patterns, refuse_idle

DIFFERENT = 1


@click.command("diff", cls=InOrder)
@click.argument("left", metavar="A", type=INPUT)
@click.argument("right", metavar="B", type=INPUT)
@click.option("--at", metavar="NAME", help="Where both state_dicts sit (dotted; . is the top).")
@click.option("--left-at", metavar="NAME", help="Where the state_dict of A sits.")
@click.option("--right-at", metavar="NAME", help="Where the state_dict of B sits.")
@click.option("--all", "every", is_flag=True, help="Compare all tensors, by their path.")
@click.option("--structure", is_flag=True, help="Keys, dtypes and shapes; no values.")
@click.option("--select", multiple=True, metavar="PATTERN", help="Only the keys selected.")
@click.option("--rename", multiple=True, metavar="RULE", help="A's OLD is B's NEW: OLD=NEW.")
@click.option("--map", "rename", multiple=True, hidden=True)
@click.option(
    "--recipe", multiple=True, metavar="FILE", help="Recipe that turns A's tensors into B's."
)
@click.option("--reverse", is_flag=True, help="Apply --recipe backwards.")
@click.option(
    "--ignore-prefix", multiple=True, metavar="P", help="Compare without a prefix, or auto."
)
@click.option("--anywhere", is_flag=True, help="Ignore it inside keys too.")
@click.option("--atol", default=0.0, help="Absolute difference allowed.")
@click.option("--rtol", default=0.0, help="Allowed relative to A's value.")
@click.option(
    "--sort",
    type=click.Choice(["file", "far"]),
    default="file",
    help="Order of what differs; far: the largest change first.",
)
@answers
def command(
    left: str,
    right: str,
    select: Sequence[str],
    atol: float,
    rtol: float,
    sort: str,
    **given: Any,
) -> int:
    """Compare two checkpoints in any containers: keys, dtypes, shapes and values, bit for bit.

    \b
    ckptool diff model_best.pth.tar clean.safetensors --ignore-prefix auto
    ckptool diff --left-at model --right-at model_ema train.pth train.pth
    ckptool diff --rename backbone=encoder --select encoder old.pth new.pth
    ckptool diff --atol 1e-6 cpu.pth gpu.pth
    ckptool diff --sort far pretrained.pth finetuned.pth
    ckptool diff fp16.pth fp32.pth        (equal after rounding?)

    Exit code 0 where they are equal, with nothing on stdout, 1 where they differ. What stands
    beside the state_dicts (epoch, optimizer ...) counts where both files have some, unless --at or
    --select choose a part. Order of keys, ties, strides and requires_grad are reported and do not
    count. With a tolerance, what differs by no more than ATOL + RTOL * |A's value| is equal, and
    so are NaNs of other bits and zeros of either sign. A complex number is compared as its two
    parts, a quantized one as its integer. RELATIVE is the norm of the difference by the norm of A,
    COSINE the cosine similarity, both in double precision and of what is finite. Of two dtypes,
    `equal rounded` says that the wider one rounded to the dtype of the other has the other's bits.
    Recorded checksums are not verified: ckptool check does that.
    """
    refuse_idle(dict.fromkeys(("atol", "rtol", "sort"), "not structure"))
    refuse_idle({"reverse": "recipe", "anywhere": "ignore_prefix"})
    if None not in (given["at"], given["left_at"], given["right_at"]):
        refuse_idle({"at": "not left_at"})
    from ckptool import containers
    from ckptool.cli import report, report_diff
    from ckptool.verbs import compare
    from ckptool.verbs.compare_sides import Asked, tolerance

    asked = Asked(
        tolerance=tolerance(atol, rtol),
        select=patterns(select),
        steps=edits_in_order(given),
        **given,
    )
    first, second = containers.read(left), containers.read(right)
    with talk.Progress(second.path) as progress:
        for checkpoint in (first, second):
            talk.warn_if_any(report.danger_lines(checkpoint))
        found = compare.compared(first, second, asked, progress.begin)
    if sort == "far":
        found = found.farthest_first()
    lines = report_diff.difference_lines(found)
    talk.answer(found, report_diff.differences, lines)
    return 0 if found.equal else DIFFERENT
