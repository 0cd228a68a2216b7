"""What casts lose: counted while they are written, refused before that is published, reported."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, field, replace
from typing import TYPE_CHECKING

from ckptool.errors import FormatError, Overflow
from ckptool.files.copying import Progress
from ckptool.files.jobs import Copy
from ckptool.records import dataclass, plain
from ckptool.state import checkpoint as places, walk
from ckptool.state.casting import OVERFLOW, Casting, cast as cast_entries
from ckptool.state.checkpoint import Checkpoint
from ckptool.tensors import numbers
from ckptool.tensors.casting import Rounding, growth
from ckptool.tensors.counts import Losses
from ckptool.tensors.dtype import DType
from ckptool.tensors.tensor import Storage, TensorInfo, is_contiguous
from ckptool.text import at_most, counted, listed
from ckptool.verbs.finite import count_in

if TYPE_CHECKING:
    from ckptool.documents import shared

SHOWN = 8
_WIDER = {DType.BF16: DType.F32, DType.F32: DType.F64}  # of any other, BF16


@dataclass(frozen=True, slots=True)
class Cast:
    """A cast as it is reported: how many tensors, and what the others are.

    `losses` are those of each tensor that has any, `total` counts tied ones once; None where no
    value was read. `skipped` are views that overlap so often that to count in them would take for
    ever.
    """

    to: str
    overflow: str
    tensors: int
    kept: dict[str, int]
    quantized: int
    scales: int
    losses: dict[str, Losses] = field(default_factory=dict)
    total: Losses | None = None
    skipped: tuple[str, ...] = ()

    @property
    def overflows(self) -> bool:
        """Check whether a number would become infinite."""
        return bool(self.total and self.total.overflow)

    def lines(self) -> list[str]:
        """Count in words what each tensor loses, those that overflow first."""
        rows = sorted(self.losses.items(), key=lambda row: -row[1].overflow)
        counts = ((key, asdict(each).items()) for key, each in rows)
        return [
            f"{key} as {self.to}: {', '.join(f'{count} {what}' for what, count in each if count)}"
            for key, each in counts
        ]

    def lost(self, verb: str) -> str:
        """Count in words the values that became, or would become, another kind of number."""
        total = self.total or Losses()
        kind = "the largest number" if self.overflow == "clamp" else "infinite"
        counts = {kind: total.overflow, "zero": total.zero, "subnormal": total.subnormal}
        found = [(count, what) for what, count in counts.items() if count]
        if not found:
            return ""
        (count, what), *others = found
        overflowed = [key for key, each in self.losses.items() if each.overflow]
        where = f" ({listed(overflowed, 4)})" if overflowed else ""
        first = f"{counted(count, 'value')} {verb} {what}{where}"
        return ", ".join([first, *(f"{count} {what}" for count, what in others)])

    def to_dict(self) -> shared.Cast:
        """Return the fields of a document."""
        return {
            "to": self.to,
            "overflow": self.overflow,
            "tensors": self.tensors,
            "kept": self.kept,
            "quantized": self.quantized,
            "scales": self.scales,
            "total": plain(self.total),
            "losses": [{"key": key} | plain(each) for key, each in self.losses.items()],
            "not_counted": list(self.skipped),
        }


def planned(casting: Casting) -> Cast:
    """Describe a cast of which no value was read."""
    label, count, kept = casting.target.label, len(casting.tensors), dict(casting.kept)
    return Cast(label, casting.overflow, count, kept, casting.quantized, casting.scales)


def of_checkpoint(checkpoint: Checkpoint, target: DType) -> Casting | None:
    """Return the cast of the one state_dict, of all tensors where there is not one.

    None where none can be found, which other checks say.
    """
    try:
        state = places.find_or_none(checkpoint)
        entries = state.entries if state else dict(walk.named(checkpoint.tree))
    except FormatError:
        return None
    return cast_entries(entries, target, entries.keys(), OVERFLOW[0])


def losses(casting: Casting, progress: Progress) -> Cast:
    """Describe what a cast would lose, by reading all that it is made of."""
    before = {key: pair[0] for key, pair in casting.tensors.items()}
    return _described(casting, *_counted(before, casting.target, progress))


def written(casting: Casting) -> Cast:
    """Describe a cast whose jobs are done; raises `Overflow` where that is refused.

    What is one view of a storage was counted with it, if each element was computed once. Of others,
    those that lost anything are read again, or where that would take for ever, count for the whole.
    """
    nothing = Losses()
    lossy: dict[str, Rounding] = {}
    for key, (_, after) in casting.tensors.items():
        kernel = after.storage.computed.kernel if after.storage.computed else None
        if isinstance(kernel, Rounding) and kernel.losses != nothing:
            lossy[key] = kernel
    views: dict[Storage, set[tuple[object, ...]]] = {}
    for _, after in casting.tensors.values() if lossy else ():
        views.setdefault(after.storage, set()).add(after.view)
    known: dict[str, Losses] = {}
    again: dict[str, TensorInfo] = {}
    all_of: dict[str, Losses] = {}
    for key, kernel in lossy.items():
        before, after = casting.tensors[key]
        once = kernel.count == after.numel and len(views[after.storage]) == 1
        if once and _is_whole(after) and key not in casting.remade:
            known[key] = kernel.losses
        else:
            again[key], all_of[key] = before, kernel.losses
    found, skipped = _counted(again, casting.target, lambda nbytes: None)
    known |= {key: all_of[key] for key in skipped}
    cast = _described(casting, {**known, **found}, skipped)
    if casting.overflow == "refuse":
        _refuse(casting, cast)
    return cast


def _is_whole(value: TensorInfo) -> bool:
    """Check whether a view has each element of its storage once, in any order of dimensions."""
    dims = sorted(zip(value.stride, value.shape, strict=True), reverse=True)
    stride, shape = ([pair[at] for pair in dims] for at in (0, 1))
    return value.nbytes == value.storage.nbytes and is_contiguous(shape, stride)


def _counted(
    tensors: Mapping[str, TensorInfo], target: DType, progress: Progress
) -> tuple[dict[str, Losses], tuple[str, ...]]:
    def count(block: memoryview, dtype: DType) -> Losses:
        made = bytearray(len(block) // dtype.itemsize * target.itemsize)
        return numbers.cast(made, block, dtype, target)

    return count_in(tensors.items(), count, Losses(), progress)


def _described(casting: Casting, counts: Mapping[str, Losses], skipped: tuple[str, ...]) -> Cast:
    lost = {key: counts[key] for key in casting.tensors if counts.get(key, Losses()) != Losses()}
    by_view = {casting.tensors[key][0].view: each for key, each in lost.items()}
    total = sum(by_view.values(), start=Losses())
    return replace(planned(casting), losses=lost, total=total, skipped=skipped)


def _refuse(casting: Casting, cast: Cast) -> None:
    """Raise `Overflow` where a finite number would become infinite."""
    lost = {key: each.overflow for key, each in cast.losses.items() if each.overflow}
    if not lost:
        return
    label, total = cast.to, cast.total.overflow if cast.total else 0
    largest = numbers.largest(casting.target)
    rows = [
        f"{key}: {number} of {casting.tensors[key][0].numel}"
        for key, number in sorted(lost.items(), key=lambda pair: -pair[1])
    ]
    wider = _WIDER.get(casting.target, DType.BF16).label.lower()
    inf = "" if casting.target is DType.F8_E4M3 else ", inf infinite"
    clamp = "overflow = 'clamp'" if casting.where else "clamp"
    raise Overflow(
        f"{counted(total, 'value')} in {counted(len(lost), 'tensor')} would be beyond the largest "
        f"{label}, {largest:g}; nothing was written",
        evidence=at_most(rows, SHOWN),
        option="" if casting.where else "--overflow clamp",
        hint=f"{clamp} makes them that{inf}; {wider} holds them",
    ).within(casting.where)


def saved(jobs: Iterable[Copy]) -> int:
    """Count the bytes that casts save in what jobs write; less than none, where they add some."""
    sizes = ((job.nbytes, growth(job.storage)) for job in jobs if job.target is not None)
    return sum(round(nbytes * times) - nbytes for nbytes, times in sizes)
