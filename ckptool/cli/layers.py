"""`ckptool layers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers, refuse_idle


@click.command("layers", cls=Command)
@click.argument("file", metavar="[FILE]", required=False, type=INPUT)
@click.option(
    "--model", required=True, metavar="SPEC", help="resnet18, file.py:factory, package:factory."
)
@click.option("--model-arg", multiple=True, metavar="NAME=VALUE", help="For the model's factory.")
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="SHAPE",
    help="1,3,224,224, or 1,16:int64; once for each argument of the model.",
)
@click.option("--depth", type=click.IntRange(0), metavar="N", help="Fold modules deeper than N.")
@click.option("--at", metavar="NAME", help="Where the state_dict of FILE sits (dotted).")
@answers
def command(file: str | None, model_arg: Sequence[str], **how: Any) -> int:
    """List the layers of a model in the order in which they run.

    \b
    ckptool layers --model resnet50
    ckptool layers --model resnet50 --depth 1
    ckptool layers --model net.py:Net --input-shape 1,3,32,32
    ckptool layers --model resnet50 model_best.pth.tar

    Class, kernel shape (inputs before outputs), output shape, parameters, multiply-adds (products
    of convolutions and matrices, for the whole input) and dtype. With FILE also how many of a
    layer's keys it fills, wrappers removed, and the keys that no layer has. The model runs without
    memory for its values where it can.
    """
    from ckptool.cli import report_layers
    from ckptool.model import layers, zoo

    refuse_idle({"at": "file"})
    found = layers.layers(file=file, model_args=zoo.arguments(model_arg), **how)
    lines = report_layers.lines(found)
    talk.answer(found, report_layers.rows, lines)
    return 0
