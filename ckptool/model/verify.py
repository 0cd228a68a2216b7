"""Do two files give the same outputs? One model, one set of inputs, both weights, bit for bit.

The reference runs twice first: a model that differs from itself proves nothing. One model is in
memory at a time. Where outputs differ, both run once more with a hook on every module, and the
first module whose output differs is the place to look; layout, TF32 and cuDNN's choice of
algorithm are fixed before, since they change the last bits of a convolution on their own.

With `partial`, what is not in both files gets the same values on both sides, so that everything
behind it can be compared as well.
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

from ckptool.errors import BadInput
from ckptool.model import devices, inputs, libraries, native, outputs, runner, subject
from ckptool.model.inputs import Batch, Inputs
from ckptool.model.live import CheckpointLike
from ckptool.model.native import Source
from ckptool.model.outputs import Difference
from ckptool.model.runner import Kept, Place
from ckptool.model.subject import Recipe
from ckptool.model.zoo import ModelLike, named
from ckptool.text import several, visible

TOP = 5
Progress = Callable[[str, int, int], None]  # what is run, batches done, batches in all


@dataclass(frozen=True, slots=True)
class Options:
    """How to compare; devices are `auto`, `cpu`, `cuda`, `cuda:N`, `mps`."""

    devices: str | Sequence[str] = ("auto",)
    inputs: inputs.Options = field(default_factory=inputs.Options)
    dtype: str | None = None
    channels_last: bool = False
    partial: bool = False
    atol: float = 0.0
    rtol: float = 0.0
    allow_tf32: bool = False
    at: str | None = None
    candidate_at: str | None = None


@dataclass(frozen=True, slots=True)
class Class:
    """One of the likeliest classes of a picture."""

    index: int
    name: str
    probability: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Predictions over a folder: the share that is right, by either file."""

    count: int
    reference: float
    candidate: float


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured on one device.

    `identical` is None where the reference differs from itself. `bitwise` says whether all bytes
    are equal, with or without a tolerance. `first_difference` is the first module in execution
    order whose output differs, by its name in the bare model, an empty text for the model itself.
    `seconds` are those of the forward passes.
    """

    device: str
    device_name: str
    identical: bool | None
    deterministic: bool
    bitwise: bool = False
    max_abs_diff: float | None = None
    max_ulp: int | None = None
    nan_differs: int = 0
    first_difference: str | None = None
    differences: tuple[Difference, ...] = ()
    parameters: tuple[str, ...] = ()
    top1_agreement: float | None = None
    top_reference: tuple[Class, ...] = ()
    top_candidate: tuple[Class, ...] = ()
    accuracy: Accuracy | None = None
    modules: int = 0
    seconds_reference: tuple[float, ...] = ()
    seconds_candidate: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and the result on each device.

    `left_out` names the modules that are not in both files, with `partial`.
    """

    reference: str
    candidate: str
    model: str
    inputs: str
    dtype: str
    torch: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    runs: tuple[Run, ...]

    @property
    def identical(self) -> bool:
        """Return whether the outputs are the same on every device."""
        return all(run.identical is True for run in self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __repr__(self) -> str:
        files = f"{visible(self.reference)}, {visible(self.candidate)}"
        word = "identical" if self.identical else "not identical"
        return f"<Verification of {files}: {word} on {', '.join(run.device for run in self.runs)}>"

    def to_dict(self) -> dict[str, object]:
        """Return the document `verify/1`; a number that JSON does not have is null."""
        fields = _finite(asdict(self))
        return {"schema": "verify/1", "identical": self.identical, **fields}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True, slots=True)
class _Plan:
    reference: Source
    candidate: Source
    recipe: Recipe
    inputs: Inputs
    options: Options
    progress: Progress


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


def verify(
    reference: CheckpointLike,
    candidate: CheckpointLike,
    model: ModelLike,
    model_args: Mapping[str, Any] | None = None,
    options: Options | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Run a model on the weights of two files and compare the outputs.

    Raises `DoesNotLoad` where a file does not load strictly (or, with `partial`, where nothing
    fits), `NoDevice`, `OutOfMemory`, `NoSuchModel`, `BadInput`, and what reading a file can raise.
    """
    options = options or Options()
    chosen = list(dict.fromkeys(devices.resolve(name) for name in several(options.devices)))
    if min(options.atol, options.rtol) < 0:
        raise BadInput("a tolerance is not negative")
    with (
        native.opened(reference, options.at, "--at") as one,
        native.opened(candidate, options.candidate_at, "--candidate-at") as other,
    ):
        return _verified(_plan(one, other, model, model_args or {}, options, progress), chosen)


def _verified(plan: _Plan, places: Sequence[Any]) -> Verification:
    """Run on each device."""
    common = plan.recipe.common
    runs = tuple(_run(plan, device) for device in places)
    torch = libraries.torch()
    shared = [note for note in runs[0].notes if all(note in run.notes for run in runs)]
    return Verification(
        reference=plan.reference.path,
        candidate=plan.candidate.path,
        model=named(plan.recipe.spec),
        inputs=plan.inputs.what,
        dtype=str(plan.recipe.dtype or torch.float32).removeprefix("torch."),
        torch=str(torch.__version__),
        runs=tuple(
            replace(run, notes=tuple(note for note in run.notes if note not in shared))
            for run in runs
        ),
        left_out=() if common is None else tuple(subject.left_out(plan.recipe, common)),
        notes=tuple(shared),
    )


def _plan(
    left: Source,
    right: Source,
    model: ModelLike,
    model_args: Mapping[str, Any],
    options: Options,
    progress: Progress,
) -> _Plan:
    channels_last = libraries.torch().channels_last if options.channels_last else None
    recipe = Recipe(
        model, model_args, options.inputs.seed, inputs.dtype(options.dtype), channels_last
    )
    if options.partial:
        recipe = replace(recipe, common=subject.common_keys(recipe, left, right))
    return _Plan(left, right, recipe, inputs.make(model, options.inputs), options, progress)


def _run(plan: _Plan, device: Any) -> Run:
    """Compare on one device, and leave its memory and all settings as they were."""
    seed, tf32 = plan.options.inputs.seed, plan.options.allow_tf32
    plan.recipe.initial.clear()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        comparison = _Comparison(plan, device)
        try:
            with devices.memory_of(device), devices.repeatable(seed, allow_tf32=tf32):
                run = comparison.run()
        finally:
            devices.free(device, comparison.last)
    lines = dict.fromkeys(str(warning.message).partition("\n")[0] for warning in warned)
    notes = [line for line in lines if "deterministic" in line]
    return replace(run, notes=(*run.notes, *notes[:3]))


class _Comparison:
    """The passes on one device, and what they show."""

    def __init__(self, plan: _Plan, device: Any) -> None:
        self._plan = plan
        self._device = device
        self._place = Place(device, plan.recipe.dtype, plan.recipe.memory_format)
        self._notes: list[str] = []
        self._labels: list[Any] = []
        self._traces: list[runner.Trace] = []
        self._deterministic = True
        self.last: Callable[[], Any] = lambda: None

    def run(self) -> Run:
        """Run the reference twice and the candidate once, and compare."""
        blank = Run(str(self._device), devices.describe(self._device), None, False)
        left = self._pass(self._plan.reference, reference=True)
        if left is None:
            return replace(blank, notes=tuple(self._notes))
        right = self._pass(self._plan.candidate, reference=False)
        assert right is not None
        run = self._compared(replace(blank, deterministic=self._deterministic), left, right)
        if self._traces and not (self._plan.options.atol or self._plan.options.rtol):
            first = runner.first_difference(*self._traces)
            if first is not None:
                run = replace(run, identical=False, bitwise=False, first_difference=first)
        elif not run.identical:
            run = replace(run, first_difference=self._located(left, right))
        return run

    def _pass(self, source: Source, *, reference: bool) -> Kept | None:
        """Run all batches on one side; None where the reference differs from itself."""
        kept, first = Kept(), None
        model = self._model(source, reference)
        devices.seed_everything(self._plan.recipe.seed)
        for index, batch in enumerate(self._plan.inputs):
            kept.add(*runner.forward(model, batch, self._place))
            if reference and index == 0 and not self._repeats(model, batch, kept):
                return None
            if reference:
                self._labels.append(batch.labels)
            first = first or batch
            done = index + 1 if reference else self._plan.inputs.count + index + 1
            self._plan.progress(source.path, done, 2 * self._plan.inputs.count)
        if self._plan.recipe.common is not None and first is not None:
            self._traces.append(runner.trace(model, first, self._place))
        return kept

    def _model(self, source: Source, reference: bool) -> subject.Subject:
        """Make one side's model, after the memory of the other side's was released."""
        devices.free(self._device, self.last)
        made = subject.make(self._plan.recipe, source, self._device, reference=reference)
        self.last = weakref.ref(made.bare)
        self._notes += [note for note in made.notes if note not in self._notes]
        return made

    def _repeats(self, model: subject.Subject, batch: Batch, kept: Kept) -> bool:
        """Run the first batch again; return whether its output is the same within the tolerance."""
        again = Kept()
        again.add(*runner.forward(model, batch, self._place))
        one, other = kept.outputs[0], again.outputs[0]
        kept.outputs[0] = replace(one, seconds=min(one.seconds, other.seconds))
        apart = self._apart(one, other)
        self._deterministic = not apart
        if apart:
            self._notes.append("the reference gave two outputs for one input")
        return not any(difference.beyond for difference in apart)

    def _apart(self, one: runner.Output, other: runner.Output) -> list[Difference]:
        if one.leaves is None or other.leaves is None:
            same = one.digest == other.digest
            return [] if same else [Difference("", "the bytes differ; too large to say how far")]
        options = self._plan.options
        return outputs.differences(one.leaves, other.leaves, options.atol, options.rtol)

    def _compared(self, run: Run, left: Kept, right: Kept) -> Run:
        pairs = list(zip(left.outputs, right.outputs, strict=True))
        apart = [difference for pair in pairs for difference in self._apart(*pair)]
        gaps = [difference.max_abs for difference in apart if difference.max_abs is not None]
        ulps = [difference.ulp for difference in apart if difference.ulp is not None]
        same = not apart
        return replace(
            run,
            identical=not any(difference.beyond for difference in apart),
            bitwise=same,
            max_abs_diff=0.0 if same else max(gaps, default=None),
            max_ulp=0 if same else max(ulps, default=None),
            nan_differs=sum(difference.nan for difference in apart),
            differences=tuple(apart),
            # Listed even where the outputs agree: a difference may be too small to reach them.
            parameters=tuple(_parameters(self._plan)),
            modules=len(dict(self._traces[0])) if self._traces else 0,
            top1_agreement=_agreement(pairs),
            top_reference=self._top(left),
            top_candidate=self._top(right),
            accuracy=_accuracy(pairs, self._labels),
            seconds_reference=tuple(output.seconds for output in left.outputs),
            seconds_candidate=tuple(output.seconds for output in right.outputs),
            notes=tuple(self._notes),
        )

    def _top(self, kept: Kept) -> tuple[Class, ...]:
        leaves = kept.outputs[0].leaves
        scores = outputs.scores(leaves) if leaves and self._plan.inputs.kind == "picture" else None
        if scores is None:
            return ()
        classes = self._plan.inputs.classes
        names = classes if len(classes) == scores.shape[1] else ()
        chances, indices = scores[0].float().softmax(0).topk(min(TOP, scores.shape[1]))
        return tuple(
            Class(index, names[index] if names else str(index), chance)
            for index, chance in zip(indices.tolist(), chances.tolist(), strict=True)
        )

    def _located(self, left: Kept, right: Kept) -> str | None:
        """Find the first module that differs, on the first batch whose outputs do."""
        pairs = zip(left.outputs, right.outputs, strict=True)
        wanted = next(index for index, pair in enumerate(pairs) if self._apart(*pair))
        batch = next(islice(self._plan.inputs, wanted, None))
        traces = []
        for source, reference in ((self._plan.reference, True), (self._plan.candidate, False)):
            model = self._model(source, reference)
            devices.seed_everything(self._plan.recipe.seed)
            traces.append(runner.trace(model, batch, self._place))
            del model
        return runner.first_difference(*traces)


def _agreement(pairs: Sequence[tuple[runner.Output, runner.Output]]) -> float | None:
    """Return the share of elements for which both sides predict the same class."""
    same = total = 0
    for one, other in pairs:
        left, right = one.predictions, other.predictions
        if left is None or right is None or left.shape != right.shape:
            return None
        same += int((left == right).sum())
        total += left.numel()
    return same / total if total else None


def _accuracy(
    pairs: Sequence[tuple[runner.Output, runner.Output]], labels: Sequence[Any]
) -> Accuracy | None:
    right = [0, 0]
    total = 0
    for pair, truth in zip(pairs, labels, strict=True):
        if truth is None or any(output.predictions is None for output in pair):
            return None
        total += truth.numel()
        for side, output in enumerate(pair):
            right[side] += int((output.predictions == truth).sum())
    return Accuracy(total, right[0] / total, right[1] / total) if total else None


def _parameters(plan: _Plan) -> list[str]:
    """List the keys whose values differ in their bytes between the two files."""
    tensor = libraries.torch().Tensor
    outer = subject.wrapped(plan.reference)
    left = {outer.name(key): value for key, value in native.load(plan.reference).state_dict.items()}
    right = native.load(plan.candidate).state_dict
    pairs = [(key, value, right.get(key)) for key, value in left.items()]
    return [
        key
        for key, *pair in pairs
        if all(isinstance(value, tensor) for value in pair)
        and not outputs.same_bytes(*(next(outputs.leaves(value))[1] for value in pair))
    ]
