"""A `Verification` -> lines of text; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ckptool.cli import screen
from ckptool.model.parting import Setting
from ckptool.model.verification import IDENTICAL, INCONCLUSIVE, Class, Run, Verification
from ckptool.text import counted, listed, percent, visible

ITSELF = "(the model itself)"
_HEAD = ("VERDICT", "DEVICE", "MAX DIFF", "ULP", "FIRST DIFFERENCE")
_TOP_HEAD = ("DEVICE", "CLASS", "NAME", "PROBABILITY")
_RIGHT_HEAD = ("DEVICE", "PICTURES", "RIGHT")
_WHY = {
    "nan": "the outputs are NaN, and say nothing about the weights",
    "constant": "the outputs are constant, and say nothing about the weights",
    "independent": "the outputs are the same for every input, and say nothing about the weights",
    "inside": "the outputs are the same, what modules return on the way is not",
    "not-deterministic": "the reference differs from itself: the model is not deterministic here, "
    "and nothing can be concluded",
}


def rows(verification: Verification, width: int | None) -> list[str]:
    """List the verdict on each device, or what one file gives: as a table, or with tabs between."""
    compared = (_HEAD, [_cells(run) for run in verification.runs])
    head, cells = compared if verification.candidate else _look(verification.runs)
    return screen.listed(head, cells, width)


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.verdict or "",
        run.device,
        _number(run.max_abs_diff),
        "" if run.max_ulp is None else str(run.max_ulp),
        _pair(run),
    )


def _look(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return the likeliest classes of a picture, or the share of a folder that is right."""
    found = [(run.device, run.accuracy) for run in runs]
    right = [
        (device, str(accuracy.count), percent(accuracy.reference))
        for device, accuracy in found
        if accuracy is not None
    ]
    top = [
        (run.device, str(likely.index), visible(likely.name), percent(likely.probability))
        for run in runs
        for likely in run.top_reference
    ]
    return (_RIGHT_HEAD, [*right]) if right else (_TOP_HEAD, [*top])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _pair(run: Run) -> str:
    names = (run.first_difference, run.candidate_difference)
    return " / ".join(dict.fromkeys(visible(name) or ITSELF for name in names if name is not None))


def verification_lines(verification: Verification) -> list[str]:
    """Return the result on each device, then what was compared."""
    lines = []
    for run in verification.runs:
        first, *more = _run_lines(run)
        where = f"{run.device} ({visible(run.device_name)})"
        lines.append(f"{run.verdict}: {where}: {first}" if run.verdict else f"{where}: {first}")
        lines += [f"{run.device}: {line}" for line in more]
    model, inputs = visible(verification.model), visible(verification.inputs)
    if verification.candidate_model is not None:
        model += f" and {visible(verification.candidate_model)}"
    lines.append(f"{model} on {inputs}, {verification.dtype}; torch {verification.torch}")
    if verification.left_out:
        names = listed(name or ITSELF for name in verification.left_out)
        lines += [f"{names}: not in both files; set to the same values on both sides"]
    return [*lines, *map(visible, verification.notes)]


def _run_lines(run: Run) -> list[str]:
    lines = [_verdict(run), *_difference_lines(run)] if run.verdict else []
    if run.accuracy is not None:
        right = percent(run.accuracy.reference)
        if run.accuracy.candidate is not None:
            right += f" (reference) and {percent(run.accuracy.candidate)} (candidate)"
        lines.append(f"{right} of {run.accuracy.count} pictures are right")
    return [*lines, *_class_lines(run), *_time_lines(run), *map(visible, run.notes)]


def _verdict(run: Run) -> str:
    """Write the first line: what was found, and which tensors differ where outputs do not."""
    if run.why:
        found = [_WHY[run.why]]
        if run.why != "not-deterministic":
            inside = f"modules differ: {listed(name or ITSELF for name in run.differing)}"
            found.append(inside if run.differing else f"all {run.modules} modules are the same")
    elif run.bitwise:
        found = [f"the outputs are the same, bit for bit, in all of {run.modules} modules"]
    elif run.verdict == IDENTICAL:
        found = [f"the outputs are within the tolerance: {_apart(run)}"]
    else:
        found = [f"the outputs differ{': ' if _apart(run) else ''}{_apart(run)}"]
    return "; ".join([*found, *(_tensors(run) if run.bitwise else [])])


def _apart(run: Run) -> str:
    apart = f"at most {_number(run.max_abs_diff)} apart" if run.max_abs_diff is not None else ""
    ulp = f" ({run.max_ulp} ulp)" if run.max_ulp is not None else ""
    return f"{apart}{ulp}" + (f", {run.nan_differs} NaNs differ" if run.nan_differs else "")


def _tensors(run: Run) -> list[str]:
    """Name the tensors that differ between the files."""
    if not run.parameters:
        return []
    verb = "differs" if len(run.parameters) == 1 else "differ"
    return [f"{counted(len(run.parameters), 'tensor')} {verb}: {listed(run.parameters)}"]


def _difference_lines(run: Run) -> list[str]:
    """Write where outputs part: hyper-parameters of two models first, then weights."""
    lines = [_setting(setting) for setting in run.settings]
    if run.bitwise:
        return lines
    if run.first_difference is not None:
        lines.append(f"the first module that differs is {_pair(run)}")
    lines += [
        f"{visible(difference.path) or 'the output'}: {visible(difference.what)}"
        for difference in run.differences[:3]
    ]
    if len(run.differences) > 3:
        lines.append(f"and {len(run.differences) - 3} more outputs")
    if run.top1_agreement is not None:
        lines.append(f"the likeliest class agrees for {percent(run.top1_agreement)}")
    if run.verdict == INCONCLUSIVE:
        return lines
    return [*lines, *(_tensors(run) or ["no tensor that both files have differs in its bytes"])]


def _setting(setting: Setting) -> str:
    """Write a hyper-parameter that differs, and where."""
    pairs = [" / ".join(dict.fromkeys(pair)) for pair in setting.modules]
    values = f"{visible(str(setting.reference))} against {visible(str(setting.candidate))}"
    return f"{visible(setting.name)} is {values} in {listed(pairs, 3)}"


def _class_lines(run: Run) -> list[str]:
    if not run.top_reference or run.verdict is None:
        return []
    lines = [f"likeliest classes: {_classes(run.top_reference)}"]
    if _indices(run.top_candidate) != _indices(run.top_reference):
        lines.append(f"the candidate's: {_classes(run.top_candidate)}")
    return lines


def _indices(top: Sequence[Class]) -> list[int]:
    return [likely.index for likely in top]


def _classes(top: Sequence[Class]) -> str:
    return ", ".join(f"{visible(likely.name)} {percent(likely.probability)}" for likely in top)


def _time_lines(run: Run) -> list[str]:
    """Write how long a forward pass takes, after a first one."""
    sides = [("reference", run.seconds_reference), ("candidate", run.seconds_candidate)]
    times = [f"{1000 * median(seconds):.1f} ms ({side})" for side, seconds in sides if seconds]
    if run.verdict is None:
        times = [time.partition(" (")[0] for time in times]
    return [f"a forward pass took {' and '.join(times)}"] if times else []
