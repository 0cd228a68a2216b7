"""What `check` found: what a file is, in the words of the command line, and what that rests on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import TYPE_CHECKING

from ckptool.pickles.safety import Call
from ckptool.records import dataclass, plain
from ckptool.state.parts import Part
from ckptool.tensors.counts import Tally
from ckptool.text import visible
from ckptool.verbs.casting import Cast

if TYPE_CHECKING:
    from ckptool.documents import looking

BYTES_UNSEEN = "whether bytes of tensors changed"  # what `not_checked` says then


class Status(Enum):
    """What a file is, in the words of the command line."""

    OK = "ok"
    DAMAGED = "damaged"
    UNSAFE = "unsafe"
    NOT_A_CHECKPOINT = "not-a-checkpoint"
    UNSUPPORTED = "unsupported"
    TOO_LARGE = "too-large"

    @property
    def exit_code(self) -> int:
        """Return the exit code that goes with it; over several files the highest counts."""
        return {"ok": 0, "damaged": 1, "too-large": 1, "unsafe": 4}.get(self.value, 3)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was found in one file.

    `safety` is empty where no name was read, `imports` what `torch.load(weights_only=True)` needs
    before it accepts the file, `versions` where torch's versions differ; `globals` are the names
    beyond the plain ones and `calls` the dangerous ones of them; `not_finite` are tensors with NaN
    or infinity, by path; `cast` is what one would lose;
    `checked` and `not_checked` say in words what was looked at.
    """

    file: str
    status: Status
    detail: str
    container: str = ""
    safety: str = ""
    imports: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    globals: tuple[str, ...] = ()
    calls: tuple[Call, ...] = ()
    pickle_name: str = ""
    sha256: str = ""
    not_finite: tuple[tuple[str, Tally], ...] = ()
    cast: Cast | None = None
    part: Part | None = None
    hint: str = ""
    notes: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    not_checked: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<Checked {visible(self.file)}: {self.status.value}; {visible(self.detail)}>"

    def to_dict(self) -> looking.Check:
        """Return the document `check/1` of this file alone."""
        return document([self])


def document(
    results: Sequence[Checked], others: Sequence[Checked] = (), unseen: Mapping[str, str] = {}
) -> looking.Check:
    """Return the document `check/1` of many files.

    `others` are files of folders that are no checkpoints, `unseen` what was not looked at and why.
    """
    return {
        "schema": "check/1",
        "files": [_fields(result) for result in results],
        "not_checkpoints": [{"file": each.file, "detail": each.detail} for each in others],
        "not_looked_at": [{"file": path, "reason": why} for path, why in unseen.items()],
    }


def _fields(result: Checked) -> looking.CheckedFile:
    return {
        "file": result.file,
        "status": result.status.value,
        "detail": result.detail,
        "container": result.container or None,
        "safety": result.safety or None,
        "imports": list(result.imports),
        "versions": list(result.versions),
        "globals": list(result.globals),
        "calls": [
            {
                "module": call.named.module,
                "name": call.named.name,
                "arguments": None if call.arguments is None else list(call.arguments),
                "pickle": result.pickle_name,
                "offset": call.offset,
                "at": call.where,
                "text": call.text,
            }
            for call in result.calls
        ],
        "part": plain(result.part),
        "sha256": result.sha256 or None,
        "not_finite": [
            {"key": key, "nan": tally.nan, "inf": tally.inf} for key, tally in result.not_finite
        ],
        "cast": result.cast.to_dict() if result.cast else None,
        "notes": list(result.notes),
        "checked": list(result.checked),
        "not_checked": list(result.not_checked),
    }
