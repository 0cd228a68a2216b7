"""What running a model on one file or two has shown: a verdict, and what it rests on.

A verdict is `identical` only where equality means something. Outputs that are constant, NaN or the
same for every input (a ViT fresh from its constructor has a head of zeros) are equal for any
weights: they are `inconclusive`, and so are equal outputs of modules that differ on the way.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

from ckptool.model.outputs import Difference
from ckptool.model.parting import Setting
from ckptool.records import dataclass, plain
from ckptool.text import visible

if TYPE_CHECKING:
    from ckptool.documents import models

IDENTICAL, DIFFERENT, INCONCLUSIVE = "identical", "different", "inconclusive"
_WORST = (DIFFERENT, INCONCLUSIVE, IDENTICAL)


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
    candidate: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """What was measured on one device.

    `verdict` is None where there is no candidate; `why` says what makes it inconclusive: `nan`,
    `constant`, `independent` (of the input), `inside` (modules differ, outputs do not) or
    `not-deterministic`, where `identical` is None. `bitwise` says whether all bytes of the outputs
    are equal, with or without a tolerance. `first_difference` is the first module in execution
    order whose output differs, by its name in the bare model, an empty text for the model itself;
    `candidate_difference` is its partner in another model. `differing` are all such modules,
    `settings` the hyper-parameters in which two models differ. `seconds` are those of forward
    passes after a first one.
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
    verdict: str | None = None
    why: str = ""
    differing: tuple[str, ...] = ()
    candidate_difference: str | None = None
    settings: tuple[Setting, ...] = ()

    @property
    def same_digests(self) -> bool:
        """Return whether outputs, and what all modules returned, are equal in their bytes."""
        return self.bitwise and not self.differing


@dataclass(frozen=True, slots=True)
class Verification:
    """What was compared, and the result on each device.

    `candidate` is None where one file was run. `left_out` names the modules that are not in both
    files, with `partial`.
    """

    reference: str
    candidate: str | None
    model: str
    inputs: str
    dtype: str
    torch: str
    left_out: tuple[str, ...]
    notes: tuple[str, ...]
    runs: tuple[Run, ...]
    candidate_model: str | None = None

    @property
    def verdict(self) -> str | None:
        """Return the worst verdict of all devices; None where there is no candidate."""
        verdicts = {run.verdict for run in self.runs}
        return next((word for word in _WORST if word in verdicts), None)

    @property
    def identical(self) -> bool:
        """Return whether the outputs are the same on every device, and that says something."""
        return self.verdict == IDENTICAL

    @property
    def same_digests(self) -> bool:
        """Return whether all bytes that any module returned are equal on every device."""
        return all(run.same_digests for run in self.runs)

    def __len__(self) -> int:
        return len(self.runs)

    def __iter__(self) -> Iterator[Run]:
        return iter(self.runs)

    def __repr__(self) -> str:
        files = ", ".join(visible(path) for path in (self.reference, self.candidate) if path)
        devices = ", ".join(run.device for run in self.runs)
        return f"<Verification of {files}: {self.verdict or 'run'} on {devices}>"

    def to_dict(self) -> models.Verify:
        """Return the document `verify/1`; a number that JSON does not have is null."""
        identical = self.identical if self.candidate is not None else None
        head = {"schema": "verify/1", "verdict": self.verdict, "identical": identical}
        return cast("models.Verify", {**head, **plain(self)})
