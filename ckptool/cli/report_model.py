"""A `Verification` -> lines of text; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ckptool.model.verify import Class, Run, Verification
from ckptool.text import counted, listed, percent, table, visible

ITSELF = "(the model itself)"
_HEAD = ("DEVICE", "RESULT", "MAX DIFF", "ULP", "FIRST DIFFERENCE")


def run_rows(verification: Verification) -> list[str]:
    """List the devices for programs, with tabs between."""
    return ["\t".join(_cells(run)) for run in verification.runs]


def run_table(verification: Verification) -> list[str]:
    """List the devices for people."""
    return table([_HEAD, *(_cells(run) for run in verification.runs)])


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.device,
        _result(run),
        _number(run.max_abs_diff),
        "" if run.max_ulp is None else str(run.max_ulp),
        _module(run.first_difference),
    )


def _result(run: Run) -> str:
    if run.identical is None:
        return "not-deterministic"
    if not run.identical:
        return "different"
    return "identical" if run.bitwise else "within-tolerance"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _module(name: str | None) -> str:
    return "" if name is None else visible(name) or ITSELF


def verification_lines(verification: Verification) -> list[str]:
    """Return what was compared, and the result on each device."""
    model, inputs = visible(verification.model), visible(verification.inputs)
    lines = [f"{model} on {inputs}, {verification.dtype}; torch {verification.torch}"]
    lines += map(visible, verification.notes)
    if verification.left_out:
        names = listed(name or ITSELF for name in verification.left_out)
        lines += [f"left out, as not in both files: {names}; they got equal values on both sides"]
    for run in verification.runs:
        lines += [f"{run.device} ({visible(run.device_name)}): {line}" for line in _run_lines(run)]
    return lines


def _run_lines(run: Run) -> list[str]:
    if run.identical is None:
        return [
            "the reference differs from itself: the model is not deterministic here, "
            "and nothing can be concluded",
            *map(visible, run.notes),
        ]
    lines = [_verdict(run), *_difference_lines(run)]
    if run.accuracy is not None:
        right = f"{percent(run.accuracy.reference)} and {percent(run.accuracy.candidate)}"
        lines.append(f"of {run.accuracy.count} pictures, {right} are right (reference, candidate)")
    lines += _class_lines(run)
    times = [run.seconds_reference, run.seconds_candidate]
    if all(times):
        one, other = (f"{1000 * median(seconds):.1f} ms" for seconds in times)
        lines.append(f"a forward pass took {one} (reference) and {other} (candidate)")
    return [*lines, *map(visible, run.notes)]


def _verdict(run: Run) -> str:
    modules = f", in all of {run.modules} modules" if run.modules else ""
    if run.identical and run.bitwise:
        return f"the outputs are the same, bit for bit{modules}"
    apart = f"at most {_number(run.max_abs_diff)} apart" if run.max_abs_diff is not None else ""
    ulp = f" ({run.max_ulp} ulp)" if run.max_ulp is not None else ""
    nan = f", {run.nan_differs} NaNs differ" if run.nan_differs else ""
    if run.identical:
        return f"the outputs are within the tolerance: {apart}{ulp}{nan}"
    if run.bitwise or not run.differences:
        return "the outputs are the same, what modules give on the way is not"
    return f"the outputs differ{': ' if apart else ''}{apart}{ulp}{nan}"


def _difference_lines(run: Run) -> list[str]:
    if run.bitwise and run.identical:
        named = f"{len(run.parameters)} with other bytes: {listed(run.parameters)}"
        return [f"of the tensors behind them, {named}"] if run.parameters else []
    lines = []
    if run.first_difference is not None:
        lines.append(f"the first module that differs is {_module(run.first_difference)}")
    lines += [
        f"{visible(difference.path) or 'the output'}: {visible(difference.what)}"
        for difference in run.differences[:3]
    ]
    if len(run.differences) > 3:
        lines.append(f"and {len(run.differences) - 3} more outputs")
    if run.top1_agreement is not None:
        lines.append(f"the likeliest class agrees for {percent(run.top1_agreement)}")
    if run.parameters:
        tensors = counted(len(run.parameters), "tensor")
        lines.append(f"{tensors} with other bytes: {listed(run.parameters)}")
    elif not run.identical:
        lines.append("no tensor that both files have differs in its bytes")
    return lines


def _class_lines(run: Run) -> list[str]:
    if not run.top_reference:
        return []
    lines = [f"likeliest classes: {_classes(run.top_reference)}"]
    if _indices(run.top_candidate) != _indices(run.top_reference):
        lines.append(f"the candidate's: {_classes(run.top_candidate)}")
    return lines


def _indices(top: Sequence[Class]) -> list[int]:
    return [likely.index for likely in top]


def _classes(top: Sequence[Class]) -> str:
    return ", ".join(f"{visible(likely.name)} {percent(likely.probability)}" for likely in top)
