"""`ckptool convert`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from ckptool.cli._options import (
    InOrder,
    Request,
    Told,
    edits,
    edits_in_order,
    patterns,
    refuse_idle,
    run,
    strips,
    writes,
)
from ckptool.state.edit_options import STRIP_FLAGS
from ckptool.text import quoted

if TYPE_CHECKING:
    from ckptool.verbs.surgery import Rewrite

_CAST = ("dtype", "dtype_only", "dtype_except", "overflow")


@click.command("convert", cls=InOrder)
@writes
@click.option("--unwrap", is_flag=True, help="Write only the state_dict.")
@edits()
@strips
@click.option("--reverse", is_flag=True, help="Apply --recipe backwards.")
@click.option("--dtype", metavar="WORD", help="Round floats to bf16, f16, f32, f8_e4m3 ..., last.")
@click.option("--dtype-only", multiple=True, metavar="PATTERN", help="Round only these.")
@click.option("--dtype-except", multiple=True, metavar="PATTERN", help="Round all but these.")
@click.option(
    "--overflow",
    type=click.Choice(["refuse", "inf", "clamp"]),
    default="refuse",
    help="What --dtype does with values beyond its largest number.",
)
@click.option(
    "--values",
    type=click.Choice(["module"]),
    help="Of DeepSpeed ZeRO: weights in the training dtype, not the float32 masters.",
)
@click.option("--max-shard-size", metavar="SIZE", help="Write shards into the folder OUT: 5GB.")
@click.option("--distributed", is_flag=True, help="Write with all ranks that torchrun started.")
def command(request: Request, **given: Any) -> int:
    """Convert torch <-> safetensors <-> distributed checkpoint, with edits on the way.

    \b
    ckptool convert in.pth out.safetensors
    ckptool convert in.safetensors out.pth
    ckptool convert --strip-prefix module --drop classifier in.pth out.safetensors
    ckptool convert --dtype bf16 --dtype-except '*norm*' in.pth out.safetensors
    ckptool convert --max-shard-size 5GB in.pth out_folder
    ckptool convert --to dcp in.pth out_dir      (for a cluster)
    ckptool convert --to safetensors *.pth out_folder/

    Edits are applied in the order given. To safetensors the state_dict is taken out; what
    else is in the file is not written, and named.
    """
    needs = dict.fromkeys(STRIP_FLAGS, "strip_prefix") | dict.fromkeys(_CAST[1:], "dtype")
    refuse_idle({**needs, "reverse": "recipe"})
    if not given["distributed"]:
        return _convert(request, given)
    from ckptool.model import ranks

    words = click.get_current_context().meta["ckptool.given"]
    with ranks.joined(" ".join(["-m ckptool convert", *map(quoted, words)])) as group:
        return _convert(replace(request, silent=group.rank > 0), given)


def _convert(request: Request, given: dict[str, Any]) -> int:
    from ckptool.verbs import api

    steps = edits_in_order(given)
    cast = {name: given[name] for name in _CAST}
    for name in ("dtype_only", "dtype_except"):
        cast[name] = patterns(cast[name])
    form = {name: given[name] for name in ("unwrap", "max_shard_size", "distributed")}
    form["values"] = given["values"] or ""

    def told(result: Rewrite) -> Told:
        bare = form["unwrap"] and result.at == () and not result.not_carried
        return Told(result, ["the state_dict is bare already: nothing to unwrap"] if bare else ())

    return run(request, api.convert, told, steps=steps, **cast, **form)
