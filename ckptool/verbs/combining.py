"""One checkpoint made from several: the weighted sum of their floats."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import closing
from dataclasses import field, replace
from functools import cache
from math import fsum, isfinite
from typing import TYPE_CHECKING, Unpack

from ckptool import containers
from ckptool.errors import EditError, NoSuchKey, Overflow, SameFile
from ckptool.files.blocks import blocks
from ckptool.files.copying import Begin, no_progress
from ckptool.files.fileio import Readers
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.records import dataclass
from ckptool.state import averaging, checkpoint as places
from ckptool.state.averaging import Averaging
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.edits import Change, Edit, Entries
from ckptool.tensors import numbers, values
from ckptool.tensors.averaging import Mean
from ckptool.text import at_most, counted, listed, visible
from ckptool.verbs import surgery
from ckptool.verbs.options import Options, WriteOptions
from ckptool.verbs.surgery import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

    from ckptool.documents import editing

SHOWN = 8


@dataclass(frozen=True, slots=True)
class Averaged:
    """What an average wrote: which `keys` were averaged, and which are as the `last` file has them.

    These are by what they are (`I64`, `not tensors`); `apart` are the keys that were tied in the
    first file and are not in all, with the key that each was tied to.
    """

    rewrite: Rewrite
    sources: tuple[str, ...]
    weights: tuple[float, ...]
    keys: tuple[str, ...]
    last: dict[str, tuple[str, ...]] = field(default_factory=dict)
    apart: dict[str, str] = field(default_factory=dict)

    @property
    def from_last(self) -> int:
        """Count the entries that are as the last file has them."""
        return sum(map(len, self.last.values()))

    def __repr__(self) -> str:
        verb = "would write" if self.rewrite.dry_run else "written"
        counts = f"averaged {len(self.keys)}, {verb} {self.rewrite.written}"
        return f"<Averaged {len(self.sources)} -> {visible(self.rewrite.target)}: {counts}>"

    def to_dict(self) -> editing.Average:
        """Return the document `average/1`."""
        return {
            **self.rewrite.to_dict(),
            "schema": "average/1",
            "sources": list(self.sources),
            "weights": list(self.weights),
            "averaged": list(self.keys),
            "last": [
                {"key": key, "what": what} for what, keys in self.last.items() for key in keys
            ],
            "untied": [[key, first] for key, first in self.apart.items()],
        }


def average(
    sources: str | Path | Sequence[str | Path],
    target: str | Path,
    *,
    weights: Sequence[float] | None = None,
    progress: Begin = no_progress,
    **options: Unpack[WriteOptions],
) -> Averaged:
    """Write the mean of the floats of several checkpoints, or a sum with `weights`.

    Keys, order and dtypes are the first's, integers and what else cannot be averaged the last's;
    wrapper prefixes do not count when keys are matched. Raises `EditError` where keys or shapes
    differ, `Overflow` where finite numbers would become infinite, `FormatError` for the sources
    and `WriteError` for the target.

    >>> ckptool.average(["data_parallel.pth", "plain.pth"], "mean.pth")
    <Averaged 2 -> mean.pth: averaged 7, written 8>
    """
    sources = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    how = Options(**options)
    factors = _factors(weights, len(sources))
    if how.in_place:
        raise EditError("--in-place replaces one file, and an average has several: name an output")
    read = cache(containers.read)  # a file that is named twice is read once
    inputs = [read(os.fspath(source)) for source in sources]
    names = tuple(each.path for each in inputs)
    _, *others = (_found(each, how.at) for each in inputs)
    done: list[Averaging] = []

    def change(entries: Entries) -> Change:
        made = averaging.average(names, [entries, *(each.entries for each in others)], factors)
        done.append(made)
        return Change([((key,), key, value) for key, value in made.entries.items()])

    try:
        result = surgery.rewrite(
            sources[0],
            target,
            [Edit("average", change=change)],
            bare=True,
            options=how,
            progress=progress,
            opened=_opened(inputs),
            form=surgery.Form(distributed=True) if how.to == "dcp" else surgery.FILE,
            accept=lambda: _refuse_overflow(done[-1]),
        )
    except SameFile as error:
        raise SameFile(f"{target} is one of the inputs", hint="name another output") from error
    made = done[-1]
    result = replace(
        result,
        warnings=(*result.warnings, *_warnings(inputs[1:], others)),
        notes=(*result.notes, *_notes(names, made)),
    )
    last = {what: tuple(keys) for what, keys in made.last.items()}
    return Averaged(result, names, factors, tuple(made.sums), last, made.apart)


def _found(checkpoint: Checkpoint, at: str | None) -> StateDict:
    """Return the state_dict at a place, which must be the same in all files."""
    try:
        return places.find(checkpoint, at)
    except NoSuchKey as error:
        raise NoSuchKey(
            error.message,
            evidence=error.evidence,
            hint="--at is for all inputs: ckptool unwrap --at NAME IN OUT   takes it out of one",
        ) from error


def _factors(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    """Return a weight for each input; raises `EditError`."""
    if not count:
        raise EditError("no checkpoint to average was named")
    if weights is None:
        return (1 / count,) * count
    try:
        factors = tuple(map(float, weights))
    except (TypeError, ValueError, OverflowError):
        raise EditError(f"weights are numbers, not {weights!r}") from None
    if odd := [each for each in factors if not isfinite(each)]:
        raise EditError(f"{odd[0]} is not a weight: weights are finite numbers")
    if len(factors) != count:
        raise EditError(
            f"{counted(len(factors), 'weight')} for {counted(count, 'checkpoint')}",
            hint="--weights takes one for each input, in their order: --weights 0.5,0.5",
        )
    return factors


def _opened(inputs: Sequence[Checkpoint]) -> Checkpoint:
    """Return the first checkpoint as one whose bytes are in the files of all."""
    return replace(
        inputs[0],
        nbytes=sum(each.nbytes for each in inputs),
        files=tuple(dict.fromkeys(file for each in inputs for file in each.files)),
        held=tuple(held for each in inputs for held in each.held),
    )


def _warnings(inputs: Sequence[Checkpoint], states: Sequence[StateDict]) -> list[str]:
    """Warn of what is dangerous or missing in all inputs but the first."""
    dangerous = [
        f"{each.path} would run code when loaded; the output does not carry it"
        for each in inputs
        if safety.judge_file(each).level is Level.DANGEROUS
    ]
    pairs = zip(inputs, states, strict=True)
    missing = [f"{each.path}: {line}" for each, state in pairs for line in state.missing]
    return list(dict.fromkeys([*dangerous, *missing]))


def _notes(names: Sequence[str], made: Averaging) -> list[str]:
    """Note what a user may not expect."""
    notes = []
    if not numbers.sums_to_one(made.weights):
        notes.append(f"the weights sum to {fsum(made.weights):g}, not to 1")
    for number, count in made.others.items():
        tensors = counted(count, "tensor")
        notes.append(f"{names[number]} has {tensors} in another dtype; written as in {names[0]}")
    if made.apart:
        pairs = [f"{key} = {first}" for key, first in made.apart.items()]
        notes.append(f"tied in {names[0]} and not in all, so not in the output: {listed(pairs)}")
    if made.stripped:
        notes.append(f"not written, attributes of averaged tensors: {listed(made.stripped, 4)}")
    if made.statistics and len(names) > 1:
        notes.append(
            f"{counted(len(made.statistics), 'running statistic')} of BatchNorm averaged: "
            "torch.optim.swa_utils.update_bn computes better ones from data"
        )
    return notes


def _refuse_overflow(made: Averaging) -> None:
    """Raise `Overflow` where sums of finite numbers were not finite; they are computed again.

    A storage may hold more than what its views show.
    """
    lost: dict[str, int] = {}
    with closing(Readers()) as readers:
        for key, (args, value) in made.sums.items():
            kernel = value.storage.computed.kernel if value.storage.computed else None
            if isinstance(kernel, Mean) and kernel.overflow:
                again = Mean(kernel.dtypes, kernel.weights)
                for _ in blocks(values.computed(again, args, value.dtype), readers):
                    pass
                lost |= {key: again.overflow} if again.overflow else {}
    if not lost:
        return
    rows = [f"{key} ({made.sums[key][1].dtype.label}): {count}" for key, count in lost.items()]
    raise Overflow(
        f"{counted(sum(lost.values()), 'value')} in {counted(len(lost), 'tensor')} would be beyond "
        "the largest number of the dtype; nothing was written",
        evidence=at_most(rows, SHOWN),
        hint="use smaller --weights, or name an input first whose dtype is wider: the output has "
        "the dtypes of the first",
    )
