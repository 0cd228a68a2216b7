"""Do two files give the same outputs? The same inputs, both weights, compared bit for bit.

The first input runs with a hook on every module: where outputs part, and what differs on the way
though outputs do not, is known from the same pass. Another input shows whether outputs depend on
it at all; the candidate, where all was equal until then, would only repeat the reference, and is
spared it. Both sides start with other seeds, so that a model that draws numbers differs; where
anything does, the reference runs once more: a model that differs from itself proves nothing. One
model is in memory at a time; layout, TF32 and cuDNN's choice of algorithm are fixed before, since
they change the last bits of a convolution on their own.

With `partial`, what is not in both files gets the same values on both sides, so that everything
that follows it can be compared as well.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import field, replace
from itertools import islice
from typing import Any

from ckptool.errors import BadInput
from ckptool.model import devices, inputs, libraries, native, outputs, parting, runner, subject
from ckptool.model.inputs import Batch, Inputs
from ckptool.model.live import CheckpointLike
from ckptool.model.native import Source
from ckptool.model.outputs import Difference, Leaf
from ckptool.model.runner import Kept, Place
from ckptool.model.subject import Recipe
from ckptool.model.verification import (
    DIFFERENT,
    IDENTICAL,
    INCONCLUSIVE,
    Accuracy,
    Class,
    Run,
    Verification,
)
from ckptool.model.zoo import ModelLike, named
from ckptool.records import dataclass
from ckptool.text import several

TOP = 5
Progress = Callable[[str, int, int], None]  # what is run, batches done, batches in all


@dataclass(frozen=True, slots=True)
class Options:
    """How to compare; devices are `auto`, `cpu`, `cuda`, `cuda:N`, `mps`.

    The candidate's model is that of the reference, but for what names another one; arguments
    alone are added to those of the reference.
    """

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
    candidate_model: ModelLike | None = None
    candidate_args: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to compare: both recipes are one where both sides are one model."""

    reference: Source
    candidate: Source | None
    recipe: Recipe
    other: Recipe
    inputs: Inputs
    options: Options
    progress: Progress

    @property
    def tolerant(self) -> bool:
        return bool(self.options.atol or self.options.rtol)


def no_progress(what: str, done: int, total: int) -> None:
    """Ignore progress."""


def verify(
    reference: CheckpointLike,
    candidate: CheckpointLike | None,
    model: ModelLike,
    model_args: Mapping[str, Any] | None = None,
    options: Options | None = None,
    progress: Progress = no_progress,
) -> Verification:
    """Run a model on the weights of two files and compare the outputs; or on one, and look.

    Raises `DoesNotLoad` where a file does not load strictly (or, with `partial`, where nothing
    fits), `NoDevice`, `OutOfMemory`, `NoSuchModel`, `BadInput`, and what reading a file can raise.
    """
    options = options or Options()
    chosen = list(dict.fromkeys(devices.resolve(name) for name in several(options.devices)))
    _refuse(options, alone=candidate is None)
    with ExitStack() as files:
        one = files.enter_context(native.opened(reference, options.at, "--at"))
        other = None
        if candidate is not None:
            opened = native.opened(candidate, options.candidate_at, "--candidate-at")
            other = files.enter_context(opened)
        return _verified(_plan(one, other, model, model_args or {}, options, progress), chosen)


def _refuse(options: Options, *, alone: bool) -> None:
    """Raise `BadInput` for options that do not go together."""
    if min(options.atol, options.rtol) < 0:
        raise BadInput("a tolerance is not negative")
    two = options.candidate_model is not None or options.candidate_args is not None
    if two and options.partial:
        raise BadInput("--partial compares within one model", hint="leave out --candidate-model")
    if alone and options.inputs.picture is None and options.inputs.folder is None:
        raise BadInput(
            "there is nothing to compare the file with",
            hint="name a CANDIDATE, or look at one file with --input PICTURE or --data FOLDER",
        )


def _verified(plan: _Plan, places: Sequence[Any]) -> Verification:
    """Run on each device."""
    common = plan.recipe.common
    runs = tuple(_run(plan, device) for device in places)
    torch = libraries.torch()
    shared = [note for note in runs[0].notes if all(note in run.notes for run in runs)]
    return Verification(
        reference=plan.reference.path,
        candidate=plan.candidate.path if plan.candidate else None,
        model=named(plan.recipe.spec),
        candidate_model=None if plan.other is plan.recipe else named(plan.other.spec),
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
    right: Source | None,
    model: ModelLike,
    model_args: Mapping[str, Any],
    options: Options,
    progress: Progress,
) -> _Plan:
    channels_last = libraries.torch().channels_last if options.channels_last else None
    recipe = other = Recipe(
        model, model_args, options.inputs.seed, inputs.dtype(options.dtype), channels_last
    )
    if options.partial and right is not None:
        recipe = other = replace(recipe, common=subject.common_keys(recipe, left, right))
    if options.candidate_model is not None:
        other = replace(recipe, spec=options.candidate_model, args=options.candidate_args or {})
    elif options.candidate_args is not None:
        other = replace(recipe, args={**model_args, **options.candidate_args})
    made = inputs.make(model, options.inputs, model_args)
    return _Plan(left, right, recipe, other, made, options, progress)


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


@dataclass(slots=True)
class _Side:
    """What one side gave: outputs of all batches, of all modules for the first one; its weights."""

    kept: Kept
    trace: runner.Trace
    state: Mapping[str, Any]
    unequal: tuple[str, ...] | None = None  # keys of those that differ from the left side's


class _Comparison:
    """The passes on one device, and what they show."""

    def __init__(self, plan: _Plan, device: Any) -> None:
        self._plan = plan
        self._device = device
        self._place = Place(device, plan.recipe.dtype, plan.recipe.memory_format)
        self._notes: list[str] = []
        self._labels: list[Any] = []
        self.last: Callable[[], Any] = lambda: None

    def run(self) -> Run:
        """Run both sides and compare; where they differ, run the reference again."""
        plan = self._plan
        run = Run(str(self._device), devices.describe(self._device), None, False)
        left = self._pass(plan.reference, plan.recipe)
        if plan.candidate is None:
            return replace(run, **self._looked(left), notes=tuple(self._notes))
        right = self._pass(plan.candidate, plan.other, left)
        run = self._compared(run, left, right)
        if not run.same_digests:
            again = self._repeated(left)
            if again is None:
                blank = Run(run.device, run.device_name, None, False, notes=tuple(self._notes))
                return replace(blank, verdict=INCONCLUSIVE, why="not-deterministic")
            run = replace(run, deterministic=again)
        if run.verdict == DIFFERENT and not run.differing:
            run = _named(run, self._located(left, right))
        return run

    def _pass(self, source: Source, recipe: Recipe, left: _Side | None = None) -> _Side:
        """Run all batches on one side; on the right one, all that the left one has not shown."""
        plan, model = self._plan, self._model(source, recipe)
        side = _Side(Kept(), [], model.state)
        devices.seed_everything(recipe.seed + (1 if left else 0))
        for index, batch in enumerate(plan.inputs):
            if index == 0:
                leaves, side.trace = runner.trace(model, batch, self._place)
                side.kept.add(leaves)
            elif not (left and index == plan.inputs.count and self._repeats(left, side)):
                side.kept.add(*runner.forward(model, batch, self._place))
            if not left:
                self._labels.append(batch.labels)
            done = plan.inputs.total + index + 1 if left else index + 1
            sides = 1 if plan.candidate is None else 2
            plan.progress(source.path, done, sides * plan.inputs.total)
        return side

    def _repeats(self, left: _Side, right: _Side) -> bool:
        """Check whether the right side is the left one over again: its weights, and all so far."""
        pairs = zip(left.kept.outputs, right.kept.outputs, strict=False)
        return (
            self._plan.other is self._plan.recipe
            and left.trace == right.trace
            and not any(self._apart(*pair) for pair in pairs)
            and not self._unequal(left, right)
        )

    def _unequal(self, left: _Side, right: _Side) -> tuple[str, ...]:
        """Return the keys of weights that differ."""
        if right.unequal is None:
            found = _parameters(self._plan.reference, left.state, right.state)
            right.unequal = tuple(found)
        return right.unequal

    def _model(self, source: Source, recipe: Recipe) -> subject.Subject:
        """Make one side's model, after the memory of the other side's was released."""
        devices.free(self._device, self.last)
        reference = source is self._plan.reference
        made = subject.make(recipe, source, self._device, reference=reference)
        self.last = weakref.ref(made.bare)
        self._notes += [note for note in made.notes if note not in self._notes]
        return made

    def _repeated(self, left: _Side) -> bool | None:
        """Run the reference again; return whether all bytes are the same.

        None where it differs from itself, within the tolerance if there is one.
        """
        plan, again = self._plan, Kept()
        leaves, steps = self._traced(plan.reference, plan.recipe, plan.inputs.first(), 2)
        again.add(leaves)
        apart = self._apart(left.kept.outputs[0], again.outputs[0])
        same = not apart and not parting.differing(left.trace, steps)
        if not same:
            self._notes.append("the reference gave two outputs for one input")
        beyond = any(each.beyond for each in apart) or not (same or plan.tolerant)
        return None if beyond else same

    def _apart(self, one: runner.Output, other: runner.Output) -> list[Difference]:
        if one.leaves is None or other.leaves is None:
            same = one.digest == other.digest
            return [] if same else [Difference("", "the bytes differ; too large to say how far")]
        options = self._plan.options
        return outputs.differences(one.leaves, other.leaves, options.atol, options.rtol)

    def _compared(self, run: Run, left: _Side, right: _Side) -> Run:
        pairs = list(zip(left.kept.outputs, right.kept.outputs, strict=False))
        apart = [difference for pair in pairs for difference in self._apart(*pair)]
        gaps = [difference.max_abs for difference in apart if difference.max_abs is not None]
        ulps = [difference.ulp for difference in apart if difference.ulp is not None]
        run = replace(
            run,
            deterministic=True,
            bitwise=not apart,
            max_abs_diff=max(gaps, default=None) if apart else 0.0,
            max_ulp=max(ulps, default=None) if apart else 0,
            nan_differs=sum(difference.nan for difference in apart),
            differences=tuple({each.path: each for each in reversed(apart)}.values())[::-1],
            # Listed even where the outputs agree: a difference may be too small to reach them.
            parameters=self._unequal(left, right),
            top1_agreement=_agreement(pairs),
            top_candidate=self._top(right.kept),
            seconds_candidate=right.kept.seconds,
            **self._looked(left, right),
            notes=tuple(self._notes),
        )
        return self._judged(run, left, right, any(difference.beyond for difference in apart))

    def _judged(self, run: Run, left: _Side, right: _Side, beyond: bool) -> Run:
        """Add the verdict, and the modules that differ."""
        two = self._plan.other is not self._plan.recipe
        if two:
            run = replace(run, settings=parting.settings(left.trace, right.trace))
        # Another model may do on the way what it likes, and within a tolerance all may differ.
        if beyond or not (two or self._plan.tolerant):
            run = _named(run, parting.differing(left.trace, right.trace))
        why = _indifference(left.kept.outputs) or ("inside" if run.differing else "")
        verdict = DIFFERENT if beyond else INCONCLUSIVE if why else IDENTICAL
        why = why if verdict == INCONCLUSIVE else ""
        return replace(run, verdict=verdict, why=why, identical=verdict == IDENTICAL)

    def _looked(self, left: _Side, right: _Side | None = None) -> dict[str, Any]:
        """Return what one file is enough for: classes, accuracy, time."""
        sides = [side.kept.outputs for side in (left, right) if side is not None]
        return {
            "modules": len({step.name for step in left.trace}),
            "top_reference": self._top(left.kept),
            "accuracy": _accuracy(sides, self._labels),
            "seconds_reference": left.kept.seconds,
        }

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

    def _located(self, left: _Side, right: _Side) -> list[tuple[str, str]]:
        """Find the modules that differ, on the first batch whose outputs do."""
        plan = self._plan
        assert plan.candidate is not None
        pairs = zip(left.kept.outputs, right.kept.outputs, strict=False)
        wanted = next(index for index, pair in enumerate(pairs) if self._apart(*pair))
        batch: Batch = next(islice(plan.inputs, wanted, None))
        _, one = self._traced(plan.reference, plan.recipe, batch)
        _, other = self._traced(plan.candidate, plan.other, batch)
        return parting.differing(one, other)

    def _traced(
        self, source: Source, recipe: Recipe, batch: Batch, later: int = 0
    ) -> tuple[list[Leaf], runner.Trace]:
        """Run one side on one batch, with the seed of the recipe or a later one."""
        model = self._model(source, recipe)
        devices.seed_everything(recipe.seed + later)
        return runner.trace(model, batch, self._place)


def _named(run: Run, pairs: Sequence[tuple[str, str]]) -> Run:
    """Name the modules whose outputs differ, the first of them apart."""
    if not pairs:
        return run
    (first, partner), names = pairs[0], tuple(dict.fromkeys(left for left, _ in pairs))
    return replace(run, differing=names, first_difference=first, candidate_difference=partner)


def _indifference(kept: Sequence[runner.Output]) -> str:
    """Return why outputs for several inputs say nothing, or an empty text."""
    first, *others = kept
    whys = []
    for other in others:
        if first.leaves is None or other.leaves is None:
            whys.append("" if first.digest != other.digest else "independent")
        else:
            whys.append(outputs.indifference(first.leaves, other.leaves))
        if not whys[-1]:
            return ""
    return whys[0]


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


def _accuracy(sides: Sequence[Sequence[runner.Output]], labels: Sequence[Any]) -> Accuracy | None:
    """Return the share of each side's predictions that is right, where the truth is known."""
    known = [index for index, truth in enumerate(labels) if truth is not None]
    total = sum(labels[index].numel() for index in known)
    if not total or any(side[index].predictions is None for side in sides for index in known):
        return None
    shares = [
        sum(int((side[index].predictions == labels[index]).sum()) for index in known) / total
        for side in sides
    ]
    return Accuracy(total, shares[0], shares[1] if len(shares) > 1 else None)


def _parameters(
    source: Source, reference: Mapping[str, Any], right: Mapping[str, Any]
) -> list[str]:
    """List the keys whose values differ in their bytes between the two files."""
    tensor = libraries.torch().Tensor
    outer = subject.wrapped(source)
    left = {outer.name(key): value for key, value in reference.items()}
    pairs = [(key, value, right.get(key)) for key, value in left.items()]
    return [
        key
        for key, *pair in pairs
        if all(isinstance(value, tensor) for value in pair)
        and not outputs.same_bytes(*(next(outputs.leaves(each, copy=False))[1] for each in pair))
    ]
