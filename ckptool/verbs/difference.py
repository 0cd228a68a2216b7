"""What `diff` found: two checkpoints, what one has alone, and what differs under a key of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import field, replace
from typing import TYPE_CHECKING

from ckptool.records import dataclass, plain
from ckptool.state.walk import Path
from ckptool.tensors.summaries import Values
from ckptool.text import counted, visible
from ckptool.verbs.compare_sides import Asked

if TYPE_CHECKING:
    from ckptool.documents import looking


@dataclass(frozen=True, slots=True)
class Change:
    """What differs under a key that both sides have.

    `what` is `dtype`, `shape`, `layout`, `quantizer`, `attributes` (what Python keeps on a tensor),
    `value` (of what is no tensor) or `values`; `left` and `right` say it in text, `values` in
    numbers; `first` is the index of the first element that differs. Of two dtypes, `values` count
    what differs where the tensor of one is rounded to the other.
    """

    key: str
    what: str
    left: str = ""
    right: str = ""
    values: Values | None = None
    first: tuple[int, ...] | None = None

    @property
    def relative(self) -> float | None:
        """Return the norm of the difference by that of the left tensor, None where unknown."""
        return self.values.distance.relative if self.values else None

    @property
    def cosine(self) -> float | None:
        """Return the cosine similarity of both tensors, None where unknown."""
        return self.values.distance.cosine if self.values else None

    @property
    def equal_after_rounding(self) -> bool | None:
        """Return whether one tensor rounded to the dtype of the other is that; None if unknown."""
        return not self.values.count if self.what == "dtype" and self.values else None

    def to_dict(self) -> looking.Change:
        """Return an entry of the `changed` of `diff/1`."""
        fields: looking.Change = {"key": self.key, "what": self.what}
        values = self.values
        if self.what != "values":
            fields["left"], fields["right"] = self.left, self.right
        if self.what == "dtype":
            fields["equal_after_rounding"] = self.equal_after_rounding
        if values is not None:
            fields["relative"] = plain(self.relative)
            fields["cosine"] = self.cosine
            fields["count"] = values.count
            fields["of"] = values.of
            fields["within"] = values.within
            fields["first"] = plain(self.first)
            fields["max_abs"] = plain(values.max_abs)
            fields["max_ulp"] = values.max_ulp
            fields["nan_payloads"] = values.nan_payloads
            fields["nan_one_side"] = values.nan_one_side
            fields["zero_signs"] = values.zero_signs
            fields["infinities"] = values.infinities
        return fields


def _order(change: Change) -> float:
    return 1.0 if change.relative is None else -change.relative


@dataclass(slots=True)
class Found:
    """What differs in a part of two checkpoints; `within` differs and is within the tolerance.

    `only_left` and `only_right` say of each key in a few words what it is.
    """

    only_left: dict[str, str] = field(default_factory=dict)
    only_right: dict[str, str] = field(default_factory=dict)
    changed: list[Change] = field(default_factory=list)
    within: list[Change] = field(default_factory=list)

    @property
    def nothing(self) -> bool:
        """Return whether all is equal."""
        return not (self.only_left or self.only_right or self.changed)

    def to_dict(self) -> looking.Found:
        """Return the fields of `diff/1` for this part."""
        return {
            "only_left": list(self.only_left),
            "only_right": list(self.only_right),
            "changed": [change.to_dict() for change in self.changed],
            "within_tolerance": [change.to_dict() for change in self.within],
        }


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two files; `at` is None where its tensors were compared by their paths."""

    path: str
    container: str
    at: Path | None

    def to_dict(self) -> looking.DiffSide:
        """Return the fields of `diff/1` for this file."""
        return {"file": self.path, "container": self.container, "at": plain(self.at)}


@dataclass(frozen=True, slots=True)
class Difference:
    """How two checkpoints differ: in the state_dict, and in what is beside it.

    `tensors` of `nbytes` in all were compared. Iterates over what changed under a key of both.
    """

    left: Side
    right: Side
    asked: Asked
    state: Found
    beside: Found
    tensors: int
    nbytes: int
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Change]:
        return iter((*self.state.changed, *self.beside.changed))

    @property
    def equal(self) -> bool:
        """Return whether nothing differs that decides."""
        return self.state.nothing and self.beside.nothing

    @property
    def whole(self) -> bool:
        """Return whether all tensors were compared, by their path."""
        return self.left.at is None

    def farthest_first(self) -> Difference:
        """Return it with what changed most, relative to the left, before the rest."""
        state, beside = (
            replace(found, changed=sorted(found.changed, key=_order))
            for found in (self.state, self.beside)
        )
        return replace(self, state=state, beside=beside)

    def __repr__(self) -> str:
        word = "equal" if self.equal else "different"
        sides = f"{visible(self.left.path)}, {visible(self.right.path)}"
        return f"<Difference of {sides}: {word}, {counted(self.tensors, 'tensor')} compared>"

    def to_dict(self) -> looking.Diff:
        """Return the document `diff/1`."""
        return {
            "schema": "diff/1",
            "equal": self.equal,
            "left": self.left.to_dict(),
            "right": self.right.to_dict(),
            **self.state.to_dict(),
            "beside": self.beside.to_dict(),
            "tensors": self.tensors,
            "nbytes": self.nbytes,
            "structure": self.asked.structure,
            "atol": self.asked.tolerance.atol,
            "rtol": self.asked.tolerance.rtol,
            "notes": list(self.notes),
        }
