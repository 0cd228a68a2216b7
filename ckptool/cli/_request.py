"""What was asked of a command that writes, and what is said of what it did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptool.cli import talk
from ckptool.records import dataclass
from ckptool.text import visible

if TYPE_CHECKING:
    from ckptool.verbs.surgery import Rewrite


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked of a command that writes.

    Outputs go into a `folder` by the names of inputs; each may be a set of files itself.
    """

    sources: Sequence[str]
    target: str | None
    options: dict[str, Any]
    silent: bool = False  # another process says it all
    folder: bool = False
    is_set: bool = False


@dataclass(frozen=True, slots=True)
class Told:
    """What a verb did, and what else there is to say: other counts and another document, too."""

    result: Rewrite
    more: Sequence[str] = ()
    document: Mapping[str, object] | None = None
    counts: str = ""


def tell(request: Request, told: Told) -> None:
    """Print the document, the plan or the talk of a rewrite."""
    from ckptool.cli import report

    result, counts = told.result, told.counts
    for line in result.warnings:
        talk.warn(visible(line))
    if talk.speaks_json():
        talk.put_document(told.document or result.to_dict())
    elif result.dry_run:
        from ckptool.cli import report_plan

        talk.put(report_plan.plan_lines(result, counts, talk.columns()))
    what = report.rewrite_lines(result, fold=talk.folds())
    written = report.written_lines(result, counts)
    planned = result.dry_run and not talk.speaks_json()  # the plan counts too
    talk.say([*what, *told.more, *([] if planned else written)])
