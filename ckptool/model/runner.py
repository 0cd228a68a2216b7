"""Forward passes: what comes out, how long they take, and what each module returns on the way.

A first pass pays for what torch prepares once (memory, kernels, cuDNN's plans): it is the one
whose modules are watched, and later ones are timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import field
from traceback import walk_tb
from typing import Any

from ckptool.errors import BadInput, CkptoolError, NoDevice
from ckptool.model import devices, libraries, outputs
from ckptool.model.inputs import Batch
from ckptool.model.outputs import Leaf
from ckptool.model.subject import Subject
from ckptool.model.zoo import last_line
from ckptool.records import dataclass

MAX_KEPT = 512 << 20  # bytes of outputs kept to measure differences; beyond, digests only


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


@dataclass(slots=True)
class Kept:
    """Outputs of several batches, with a bound on what is kept of them, and the times taken."""

    outputs: list[Output] = field(default_factory=list)
    nbytes: int = 0
    seconds: tuple[float, ...] = ()

    def add(self, leaves: Sequence[Leaf], seconds: float | None = None) -> None:
        """Keep an output, or its digest, and the seconds of a pass that was timed."""
        tensor = libraries.torch().Tensor
        self.nbytes += sum(value.nbytes for _, value in leaves if isinstance(value, tensor))
        keep = self.nbytes <= MAX_KEPT
        digest = b"" if keep else outputs.digest(dict(leaves))
        scores = outputs.scores(leaves)
        predictions = None if scores is None else scores.argmax(1)
        self.outputs.append(Output(tuple(leaves) if keep else None, digest, predictions))
        self.seconds += () if seconds is None else (seconds,)


def forward(subject: Subject, batch: Batch, place: Place) -> tuple[list[Leaf], float]:
    """Run a model once; return its outputs on the CPU, and the seconds that the pass took.

    Raises `BadInput` for an input that the model cannot take.
    """
    torch = libraries.torch()
    with torch.inference_mode(), explained(subject.bare, batch):
        arguments = [moved(argument, place) for argument in batch.arguments]
        devices.synchronize(place.device)
        started = time.perf_counter()
        output = subject.module(*arguments)
        devices.synchronize(place.device)
        seconds = time.perf_counter() - started
        return list(outputs.leaves(output)), seconds


def moved(argument: Any, place: Place) -> Any:
    """Bring an input to its place."""
    dtype = place.dtype if argument.is_floating_point() else None
    there = argument.to(device=place.device, dtype=dtype)
    if place.memory_format is not None and there.dim() == 4:
        there = there.to(memory_format=place.memory_format)
    return there


@contextmanager
def explained(model: Any, batch: Batch) -> Iterator[None]:
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
            evidence=_innermost(model, error),
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


@dataclass(frozen=True, slots=True)
class Step:
    """What a module returned: its checksum, and the shape of its first tensor.

    `kind` is the name of the module's class, `settings` its plain attributes (`eps`, `padding`).
    """

    name: str
    kind: str
    digest: bytes
    shape: tuple[int, ...]
    settings: tuple[tuple[str, object], ...]


Trace = list[Step]  # in the order in which modules finish


def trace(subject: Subject, batch: Batch, place: Place) -> tuple[list[Leaf], Trace]:
    """Run a model once; return its outputs, and what each of its modules returned."""
    steps: Trace = []
    sequential = libraries.torch().nn.Sequential.forward

    def watch(name: str, settings: tuple[tuple[str, object], ...]) -> Callable[..., None]:
        def note(module: Any, arguments: Any, output: Any) -> None:
            passed_on = type(module).forward is sequential and len(module) and steps
            known = steps[-1].digest if passed_on else _digest(output)
            steps.append(Step(name, type(module).__name__, known, shape(output), settings))

        return note

    hooks = [
        module.register_forward_hook(watch(name, _settings(module)))
        for name, module in subject.bare.named_modules()
    ]
    try:
        leaves, _ = forward(subject, batch, place)
    finally:
        for hook in hooks:
            hook.remove()
    return leaves, steps


def _digest(output: Any) -> bytes:
    try:
        return outputs.digest(output)
    except BadInput:  # an object of the model's own between its modules
        return b""


def shape(output: Any) -> tuple[int, ...]:
    """Return the shape of a tensor, or of the first of several."""
    if isinstance(output, tuple | list) and output:
        output = output[0]
    return tuple(getattr(output, "shape", ()))


def _settings(module: Any) -> tuple[tuple[str, object], ...]:
    """List the hyper-parameters of a module that decide what it returns in eval mode."""
    found = [
        (name, value)
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in ("training", "inplace")
    ]
    return tuple((name, value) for name, value in found if _is_plain(value))


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return isinstance(value, bool | int | float | str | type(None))
