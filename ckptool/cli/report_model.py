"""What `verify` found -> text or JSON; returns strings, prints and opens nothing."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from ckptool.model.verify import Class, Run, Verification
from ckptool.text import counted, listed, percent, table, visible

ITSELF = "(the model itself)"
_HEAD = ("DEVICE", "RESULT", "MAX DIFF", "ULP", "FIRST DIFFERENCE")


def run_rows(found: Verification) -> list[str]:
    """List the devices for programs, with tabs between."""
    return ["\t".join(_cells(run)) for run in found.runs]


def run_table(found: Verification) -> list[str]:
    """List the devices for people."""
    return table([_HEAD, *(_cells(run) for run in found.runs)])


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


def verification_lines(found: Verification) -> list[str]:
    """Return what was compared, and on each device what came of it."""
    lines = [
        f"{visible(found.model)} on {visible(found.inputs)}, {found.dtype}; torch {found.torch}"
    ]
    lines += [visible(note) for note in found.notes]
    if found.left_out:
        names = listed(name or ITSELF for name in found.left_out)
        lines.append(
            f"left out, as not in both files: {names}; they got equal values on both sides"
        )
    for run in found.runs:
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
        one, other = (f"{1000 * median(each):.1f} ms" for each in times)
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
    rows = [
        f"{visible(each.path) or 'the output'}: {visible(each.what)}" for each in run.differences
    ]
    lines += [*rows[:3], *([f"and {len(rows) - 3} more outputs"] if len(rows) > 3 else [])]
    if run.top1_agreement is not None:
        lines.append(f"the likeliest class agrees for {percent(run.top1_agreement)}")
    if run.parameters:
        lines.append(
            f"{counted(len(run.parameters), 'tensor')} with other bytes: {listed(run.parameters)}"
        )
    elif not run.identical:
        lines.append("no tensor that both files have differs in its bytes")
    return lines


def _class_lines(run: Run) -> list[str]:
    if not run.top_reference:
        return []
    lines = [f"likeliest classes: {_classes(run.top_reference)}"]
    if [each.index for each in run.top_candidate] != [each.index for each in run.top_reference]:
        lines.append(f"the candidate's: {_classes(run.top_candidate)}")
    return lines


def _classes(found: Sequence[Class]) -> str:
    return ", ".join(f"{visible(each.name)} {percent(each.probability)}" for each in found)
