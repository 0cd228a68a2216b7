"""`ckptool verify`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from ckptool.cli import talk
from ckptool.cli._options import INPUT, Command, answers, refuse_idle
from ckptool.errors import CkptoolError

DIFFERENT = 1


@click.command("verify", cls=Command)
@click.argument("reference", metavar="REFERENCE", type=INPUT)
@click.argument("candidate", metavar="[CANDIDATE]", required=False, type=INPUT)
@click.option(
    "--model", required=True, metavar="SPEC", help="resnet18, file.py:factory, package:factory."
)
@click.option("--model-arg", multiple=True, metavar="NAME=VALUE", help="For the model's factory.")
@click.option("--candidate-model", metavar="SPEC", help="Of CANDIDATE, if it is another model.")
@click.option(
    "--candidate-arg", multiple=True, metavar="NAME=VALUE", help="For the candidate's factory."
)
@click.option(
    "--device",
    "devices",
    multiple=True,
    default=["auto"],
    metavar="NAME",
    help="auto, cpu, cuda, cuda:N or mps; may be repeated.",
)
@click.option(
    "--input-shape",
    "input_shapes",
    multiple=True,
    metavar="SHAPE",
    help="Of random inputs: 1,3,224,224, or 1,16:int64; once for each argument of the model.",
)
@click.option(
    "--batch-size", type=click.IntRange(1), help="Replace the first size of the input shape."
)
@click.option("--input", metavar="PICTURE", help="Run on a picture instead.")
@click.option("--data", metavar="FOLDER", help="Run on folders of pictures by class.")
@click.option("--dtype", metavar="NAME", help="f32, f16, bf16 or f64 (float32 ... too).")
@click.option("--channels-last", is_flag=True, help="Use torch's channels_last memory format.")
@click.option("--seed", default=0, help="Seed of the inputs and of all randomness.")
@click.option("--atol", default=0.0, help="Absolute difference allowed.")
@click.option("--rtol", default=0.0, help="Relative difference allowed.")
@click.option("--allow-tf32", is_flag=True, help="Let a GPU use TF32 for float32 products.")
@click.option(
    "--allow-inconclusive",
    is_flag=True,
    help="Exit 0 for `inconclusive` if all modules return equal bytes.",
)
@click.option(
    "--partial", is_flag=True, help="Compare only what both files have and the model takes."
)
@click.option("--at", metavar="NAME", help="Where the reference's state_dict sits.")
@click.option("--candidate-at", metavar="NAME", help="Where the candidate's state_dict sits.")
@answers
def command(
    reference: str,
    candidate: str | None,
    model: str,
    model_arg: Sequence[str],
    candidate_arg: Sequence[str],
    allow_inconclusive: bool,
    **how: Any,
) -> int:
    """Run a model on the weights of two files, and compare the outputs bit for bit.

    \b
    ckptool verify --model resnet18 model_best.pth.tar clean.pth
    ckptool verify --model ghost_net.py:ghost_net --device cpu --device cuda old.pth new.pth
    ckptool verify --model resnet18 --input dog.jpg model_best.pth.tar
    ckptool verify --model resnet18 --model-arg num_classes=10 --partial old.pth init.pth
    ckptool verify --model vit_b_16 --candidate-model timm:vit_base_patch16_224 a.pth b.pth

    The reference is loaded as its author would, the candidate must load strictly. `identical`
    (exit 0): outputs, and what every module returns, are equal in all bytes, and outputs depend on
    the input. `different` (exit 1): outputs differ; the first module that does is named.
    `inconclusive` (exit 1): outputs are constant, NaN or the same for every input, modules differ
    on the way, or the reference differs from itself. One file alone is run on a picture or folder.
    """
    of_candidate = ("candidate_at", "candidate_model", "candidate_arg", "allow_inconclusive")
    refuse_idle(dict.fromkeys(of_candidate, "candidate"))
    for path in filter(None, (reference, candidate)):
        _warn(path)
    from ckptool.cli import report_model
    from ckptool.model import zoo
    from ckptool.model.verification import IDENTICAL, INCONCLUSIVE
    from ckptool.verbs import models

    with talk.Progress("", unit="batch") as bar:

        def progress(what: str, done: int, total: int) -> None:
            if total > 4:  # a batch and a random one on each side are no progress
                bar.reached(done, total, what)

        verification = models.verify(
            reference,
            candidate,
            model,
            model_args=zoo.arguments(model_arg),
            candidate_args=zoo.arguments(candidate_arg) if candidate_arg else None,
            progress=progress,
            **how,
        )
    lines = report_model.verification_lines(verification)
    talk.answer(verification, report_model.rows, lines)
    allowed = verification.verdict == INCONCLUSIVE and verification.same_digests
    done = verification.verdict in (None, IDENTICAL) or (allow_inconclusive and allowed)
    return 0 if done else DIFFERENT


def _warn(path: str) -> None:
    """Warn of a file that would run code; one that cannot be read is refused later."""
    from ckptool import containers
    from ckptool.cli import report
    from ckptool.files import budget

    with suppress(CkptoolError), budget.run(anew=True):
        talk.warn_if_any(report.danger_lines(containers.read(path)))
