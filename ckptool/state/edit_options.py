"""The edits that commands have options for; `--help` reads this, and none of the engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ckptool.errors import EditError

if TYPE_CHECKING:
    from ckptool.state.edits import Edit


AUTO = "auto"  # the prefix that is every known wrapper


@dataclass(frozen=True, slots=True)
class EditSpec:
    """An edit as an option; `parse` takes the texts that were given, and `flags` as keywords.

    With `selects`, those are patterns, and a text `@file` is replaced by the patterns in it. With
    `together`, options that follow each other make one edit.
    """

    option: str
    metavar: str
    help: str
    parse: Callable[..., Edit]
    selects: bool = False
    together: bool = False
    flags: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name it as a keyword."""
        return self.option.removeprefix("--").replace("-", "_")


def renaming(text: str, option: str = "--rename") -> tuple[str, str]:
    """Read `OLD=NEW`; without OLD, NEW is put before all keys."""
    old, sign, new = text.partition("=")
    if not sign or old == new:
        raise EditError(f"`{text}` is not OLD=NEW", hint=f"{option} classifier=head")
    return old, new


def stripping(texts: Sequence[str], *, every: bool = False, **flags: bool) -> Edit:
    """Make the edit of a prefix, or of `auto`."""
    from ckptool.state import edits

    if texts[0] != AUTO:
        return edits.strip_prefix(texts[0], every=every, **flags)
    if every:
        raise EditError("--prefix auto takes no --every: it removes what all keys share")
    return edits.strip_wrappers(**flags)


def _add_prefix(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.add_prefix(texts[0])


def _rename(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.rename(*renaming(texts[0]))


def _drop(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.drop(texts)


def _keep(texts: Sequence[str]) -> Edit:
    from ckptool.state import edits

    return edits.keep(texts)


STRIP_FLAGS = ("anywhere", "keep_bookkeeping")
EDITS = (
    EditSpec(
        "--strip-prefix", "P", "Take a prefix off keys, or auto.", stripping, flags=STRIP_FLAGS
    ),
    EditSpec("--add-prefix", "P", "Put a prefix before keys.", _add_prefix),
    EditSpec("--rename", "OLD=NEW", "Move a dotted prefix.", _rename),
    EditSpec("--drop", "PATTERN", "Leave keys out.", _drop, selects=True),
    EditSpec("--keep", "PATTERN", "Leave all other keys out.", _keep, selects=True, together=True),
)
