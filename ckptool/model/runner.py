"""Forward passes: what comes out, how long they take, and what each module returns on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from traceback import walk_tb
from typing import Any

from ckptool.errors import BadInput, CkptoolError, NoDevice
from ckptool.model import devices, libraries, outputs
from ckptool.model.inputs import Batch
from ckptool.model.outputs import Leaf
from ckptool.model.subject import Subject
from ckptool.model.zoo import last_line

MAX_KEPT = 512 << 20  # bytes of outputs kept to measure differences; beyond, digests only
Trace = list[tuple[str, bytes]]  # module names in the order in which they finish, and digests


@dataclass(frozen=True, slots=True)
class Place:
    """Where inputs go, and as what."""

    device: Any
    dtype: Any = None
    memory_format: Any = None


@dataclass(frozen=True, slots=True)
class Output:
    """The output of one forward pass: all of it, or its digest where it was too much to keep."""

    leaves: tuple[Leaf, ...] | None
    digest: bytes
    predictions: Any  # the likeliest class of each element of a batch, where there are classes
    seconds: float


@dataclass(slots=True)
class Kept:
    """Outputs of several batches, with a bound on what is kept of them."""

    outputs: list[Output] = field(default_factory=list)
    nbytes: int = 0

    def add(self, leaves: Sequence[Leaf], seconds: float) -> None:
        """Keep an output, or its digest."""
        tensor = libraries.torch().Tensor
        self.nbytes += sum(value.nbytes for _, value in leaves if isinstance(value, tensor))
        keep = self.nbytes <= MAX_KEPT
        digest = b"" if keep else outputs.digest(dict(leaves))
        scores = outputs.scores(leaves)
        predictions = None if scores is None else scores.argmax(1)
        self.outputs.append(Output(tuple(leaves) if keep else None, digest, predictions, seconds))


def forward(subject: Subject, batch: Batch, place: Place) -> tuple[list[Leaf], float]:
    """Run a model once; return its outputs on the CPU, and the seconds that the pass took.

    Raises `BadInput` for an input that the model cannot take.
    """
    torch = libraries.torch()
    with torch.inference_mode(), _explained(subject, batch):
        arguments = [_moved(torch, argument, place) for argument in batch.arguments]
        devices.synchronize(place.device)
        started = time.perf_counter()
        output = subject.module(*arguments)
        devices.synchronize(place.device)
        seconds = time.perf_counter() - started
        return list(outputs.leaves(output)), seconds


def _moved(torch: Any, argument: Any, place: Place) -> Any:
    dtype = place.dtype if argument.is_floating_point() else None
    moved = argument.to(device=place.device, dtype=dtype)
    if place.memory_format is not None and moved.dim() == 4:
        moved = moved.to(memory_format=place.memory_format)
    return moved


@contextmanager
def _explained(subject: Subject, batch: Batch) -> Iterator[None]:
    """Turn whatever a model raises into one line, and the module where it happened."""
    try:
        yield
    except CkptoolError:
        raise
    except Exception as error:
        if devices.is_out_of_memory(error):
            raise
        if type(error).__name__ == "AcceleratorError" or "CUDA error" in str(error):
            raise NoDevice(f"the device failed: {last_line(error)}") from error
        shapes = ", ".join(str(list(argument.shape)) for argument in batch.arguments)
        raise BadInput(
            f"the model cannot run on an input of shape {shapes}: {last_line(error)}",
            evidence=_innermost(subject.bare, error),
            hint="--input-shape gives another one, --dtype and --device another place",
        ) from error


def _innermost(model: Any, error: BaseException) -> list[str]:
    """Name the innermost module that was running."""
    names = {id(module): name for name, module in model.named_modules()}
    frames = (frame for frame, _ in walk_tb(error.__traceback__))
    running = [frame.f_locals.get("self") for frame in frames]
    lines = [
        f"in {names[id(owner)]} ({type(owner).__name__})"
        for owner in running
        if names.get(id(owner))
    ]
    return lines[-1:]


def trace(subject: Subject, batch: Batch, place: Place) -> Trace:
    """Run a model once; return the digest of what each of its modules returns."""
    digests: Trace = []

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, arguments: Any, output: Any) -> None:
            try:
                digests.append((name, outputs.digest(output)))
            except BadInput:  # an object of the model's own between its modules
                digests.append((name, b""))

        return note

    hooks = [
        module.register_forward_hook(watch(name)) for name, module in subject.bare.named_modules()
    ]
    try:
        forward(subject, batch, place)
    finally:
        for hook in hooks:
            hook.remove()
    return digests


def first_difference(reference: Trace, candidate: Trace) -> str | None:
    """Name the first module whose output differs; the model itself is an empty name."""
    pairs = zip_longest(reference, candidate)
    return next(((left or right)[0] for left, right in pairs if left != right), None)
