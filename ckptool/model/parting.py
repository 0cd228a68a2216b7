"""Where two runs part: the first pair of modules whose outputs differ, and why that may be.

Modules of one model are paired by the order in which they ran. Those of two models have other
names, and one may have modules that the other does by a function: outputs that are equal are
paired first, and in the gaps between them the first two of one shape are where the runs part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from difflib import SequenceMatcher
from itertools import groupby

from ckptool.model.runner import Step, Trace
from ckptool.records import dataclass

Pair = tuple[Step, Step]


@dataclass(frozen=True, slots=True)
class Setting:
    """A hyper-parameter that differs between modules of two models, and the pairs where it does."""

    name: str
    reference: object
    candidate: object
    modules: tuple[tuple[str, str], ...]


def differing(reference: Trace, candidate: Trace) -> list[tuple[str, str]]:
    """List the pairs of modules whose outputs differ, by their names, in the order of execution."""
    if _names(reference) == _names(candidate):
        pairs = [pair for pair in zip(reference, candidate, strict=True) if _part(*pair)]
    else:
        pairs = [*_in_gaps(_leaves(reference), _leaves(candidate))]
        if not pairs and reference and candidate and _part(reference[-1], candidate[-1]):
            pairs = [(reference[-1], candidate[-1])]
    return list(dict.fromkeys((left.name, right.name) for left, right in pairs))


def _names(trace: Trace) -> list[str]:
    return [step.name for step in trace]


def _part(left: Step, right: Step) -> bool:
    return left.digest != right.digest


def _leaves(trace: Trace) -> Trace:
    """Return the steps that made something new: a container returns what its last part did."""
    fresh = [next(steps) for _, steps in groupby(trace, lambda step: step.digest)]
    parents = {name.rpartition(".")[0] for name in _names(trace)}
    return [step for step in fresh if step.name not in parents]


def _in_gaps(left: Trace, right: Trace) -> Iterator[Pair]:
    """Yield modules alike in work or shape from the gaps between equal outputs."""
    for what, *ends in _aligned([s.digest for s in left], [s.digest for s in right]):
        if what == "equal":
            continue
        start, end, other, last = ends
        gap, opposite = left[start:end], right[other:last]
        pairs = [*_first_alike(gap, opposite, _work)]
        yield from pairs or _first_alike(gap, opposite, lambda step: step.shape)


def _first_alike(
    left: Sequence[Step], right: Sequence[Step], what: Callable[[Step], object]
) -> Iterator[Pair]:
    """Pair each step with the next one of the other side that is alike, in order."""
    ahead = list(right)
    for step in left:
        kinds = [what(other) for other in ahead]
        if what(step) in kinds:
            place = kinds.index(what(step))
            yield step, ahead[place]
            del ahead[: place + 1]


def _aligned(
    left: Sequence[object], right: Sequence[object]
) -> Sequence[tuple[str, int, int, int, int]]:
    return SequenceMatcher(None, left, right, autojunk=False).get_opcodes()


# Hyper-parameters.


def settings(reference: Trace, candidate: Trace) -> tuple[Setting, ...]:
    """List the hyper-parameters that differ between modules that do the same work."""
    found: dict[tuple[str, object, object], list[tuple[str, str]]] = {}
    for left, right in _alike(reference, candidate):
        for name, one, other in _unequal(left, right):
            pairs = found.setdefault((name, one, other), [])
            if (left.name, right.name) not in pairs:
                pairs.append((left.name, right.name))
    return tuple(Setting(*what, tuple(pairs)) for what, pairs in found.items())


def _alike(reference: Trace, candidate: Trace) -> Iterator[Pair]:
    """Pair modules of one kind and shape in the order of execution."""
    if _names(reference) == _names(candidate):
        yield from zip(reference, candidate, strict=True)
        return
    left, right = _leaves(reference), _leaves(candidate)
    works = ([_work(step) for step in left], [_work(step) for step in right])
    for what, start, end, other, _ in _aligned(*works):
        if what == "equal":
            yield from zip(left[start:end], right[other:], strict=False)


def _work(step: Step) -> tuple[str, tuple[int, ...]]:
    """Return what a module does, whatever its class is called, and the shape that comes out."""
    kind = step.kind.lower()
    known = (word for word in ("conv", "norm", "linear", "pool") if word in kind)
    return next(known, "activation" if is_activation(step.kind) else kind), step.shape


def is_activation(kind: str) -> bool:
    """Check whether a class is one of torch's activation functions."""
    from ckptool.model import libraries

    return kind in libraries.torch().nn.modules.activation.__all__ and "Attention" not in kind


def _unequal(left: Step, right: Step) -> Iterator[tuple[str, object, object]]:
    if left.kind != right.kind and is_activation(left.kind) and is_activation(right.kind):
        yield "activation", left.kind, right.kind
        return
    if "drop" in left.kind.lower():  # it does nothing in eval mode
        return
    others = dict(right.settings)
    for name, value in left.settings:
        if name in others and _same_for_all(value) != _same_for_all(others[name]):
            yield name, value, others[name]


def _same_for_all(value: object) -> object:
    """Return the number for a tuple of it: torch takes `3` for `(3, 3)`."""
    return value[0] if isinstance(value, tuple) and len(set(value)) == 1 else value
