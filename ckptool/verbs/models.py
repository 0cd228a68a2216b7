"""The verbs that build and run a model, as functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # each verb loads what it alone needs
    from ckptool.model.live import CheckpointLike
    from ckptool.model.verification import Verification
    from ckptool.model.verify import Progress
    from ckptool.model.zoo import ModelLike


def verify(
    reference: CheckpointLike,
    candidate: CheckpointLike | None,
    model: ModelLike,
    *,
    model_args: Mapping[str, object] | None = None,
    candidate_model: ModelLike | None = None,
    candidate_args: Mapping[str, object] | None = None,
    devices: str | Sequence[str] = "auto",
    input_shapes: str | Sequence[str] = (),
    batch_size: int | None = None,
    input: str | None = None,
    data: str | None = None,
    dtype: str | None = None,
    channels_last: bool = False,
    seed: int = 0,
    atol: float = 0.0,
    rtol: float = 0.0,
    allow_tf32: bool = False,
    partial: bool = False,
    at: str | None = None,
    candidate_at: str | None = None,
    progress: Progress | None = None,
) -> Verification:
    """Run a model on the weights of two checkpoints and compare the outputs, bit for bit.

    Each is a file, a state_dict or an `nn.Module`; `model` is a spec (`resnet18`,
    `file.py:factory`) made with `model_args`, or an `nn.Module`. It runs on each of `devices`
    (`auto`, `cpu`, `cuda`, `cuda:N`, `mps`), on random inputs of `input_shapes` (`1,3,224,224`,
    `1,16:int64`; one for each argument), on the picture `input` or the folder `data`. `partial`
    compares what both have and the model takes; `at` and `candidate_at` choose among several
    state_dicts. The candidate may have a model or arguments of its own. Without a candidate (None)
    the reference is run on the picture or folder: likeliest classes, accuracy, time. Raises
    `DoesNotLoad`, `NoDevice`, `NoSuchModel`, `BadInput`, `MissingExtra`, `OutOfMemory`, and what
    reading raises.

    >>> from torch import nn
    >>> one, other = nn.Linear(4, 2), nn.Linear(4, 2)
    >>> ckptool.verify(one, other, one, devices="cpu", input_shapes="3,4")
    <Verification of (Linear), (Linear): different on cpu>
    """
    from ckptool.model import inputs, verify as room

    options = room.Options(
        devices=devices,
        inputs=inputs.Options(
            shapes=input_shapes, batch_size=batch_size, picture=input, folder=data, seed=seed
        ),
        dtype=dtype,
        channels_last=channels_last,
        partial=partial,
        atol=atol,
        rtol=rtol,
        allow_tf32=allow_tf32,
        at=at,
        candidate_at=candidate_at,
        candidate_model=candidate_model,
        candidate_args=candidate_args,
    )
    return room.verify(
        reference, candidate, model, model_args, options, progress or room.no_progress
    )
