"""Forward passes: what comes out, how long they take, and what each module gives on the way."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
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
    """What one forward pass gave: all of it, or its digest where it was too much to keep."""

    leaves: tuple[Leaf, ...] | None
    digest: bytes
    predictions: Any
    seconds: float


@dataclass(slots=True)
class Kept:
    """Outputs of several batches, with a bound on what is kept of them."""

    outputs: list[Output] = field(default_factory=list)
    nbytes: int = 0

    def add(self, leaves: Sequence[Leaf], seconds: float) -> None:
        """Keep an output, or its digest."""
        self.nbytes += _nbytes(leaves)
        keep = self.nbytes <= MAX_KEPT
        digest = b"" if keep else outputs.digest(dict(leaves))
        kept = tuple(leaves) if keep else None
        self.outputs.append(Output(kept, digest, predictions(leaves), seconds))


def _nbytes(leaves: Sequence[Leaf]) -> int:
    tensor = libraries.torch().Tensor
    return sum(value.nbytes for _, value in leaves if isinstance(value, tensor))


def predictions(leaves: Sequence[Leaf]) -> Any:
    """Give the most likely class of each element of a batch, None where there are no classes."""
    found = outputs.scores(leaves)
    return None if found is None else found.argmax(1)


def forward(subject: Subject, batch: Batch, place: Place) -> tuple[list[Leaf], float]:
    """Run a model once; give its outputs on the CPU, and the seconds that the pass took.

    Raises `BadInput` for an input that the model cannot take.
    """
    torch = libraries.torch()
    with torch.inference_mode(), _explained(subject, batch):
        arguments = [_moved(torch, each, place) for each in batch.arguments]
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
        shapes = ", ".join(str(list(each.shape)) for each in batch.arguments)
        raise BadInput(
            f"the model cannot run on an input of shape {shapes}: {last_line(error)}",
            evidence=_innermost(subject.bare, error),
            hint="--input-shape gives another one, --dtype and --device another place",
        ) from error


def _innermost(model: Any, error: BaseException) -> list[str]:
    """Name the innermost module that was running."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    trace = error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_locals.get("self")
        if id(module) in names and names[id(module)]:
            found = f"in {names[id(module)]} ({type(module).__name__})"
        trace = trace.tb_next
    return [found] if found else []


def trace(subject: Subject, batch: Batch, place: Place) -> Trace:
    """Run a model once and note what each of its modules gives."""
    found: Trace = []

    def watch(name: str) -> Callable[[Any, Any, Any], None]:
        def note(module: Any, arguments: Any, output: Any) -> None:
            try:
                found.append((name, outputs.digest(output)))
            except BadInput:  # an object of the model's own between its modules
                found.append((name, b""))

        return note

    hooks = [
        module.register_forward_hook(watch(name)) for name, module in subject.bare.named_modules()
    ]
    try:
        forward(subject, batch, place)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def first_difference(reference: Trace, candidate: Trace) -> str | None:
    """Name the first module whose output differs; the model itself is an empty name."""
    for (left, one), (right, other) in zip(reference, candidate, strict=False):
        if (left, one) != (right, other):
            return left
    longer = max(reference, candidate, key=len)
    shorter = min(len(reference), len(candidate))
    return longer[shorter][0] if len(longer) > shorter else None
