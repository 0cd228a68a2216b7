"""Check a recipe against a checkpoint, and against what it should become; nothing is written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.records import dataclass, plain
from ckptool.state import checkpoint as places, edits
from ckptool.state.edits import Count
from ckptool.state.recipes import Fact, Recipe, differing, facts
from ckptool.text import counted, visible

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.documents import editing


@dataclass(frozen=True, slots=True)
class Tried:
    """What a recipe does to a checkpoint.

    `counts` say how many entries, or groups of them, each rule of each step takes; `notes` are what
    there is to know of that, `unmatched` the keys that none takes. `differing` are keys with what
    they are here and in `like`, where that was given, None for a key that is missing.
    """

    recipe: str
    source: str
    reverse: bool
    counts: tuple[Count, ...]
    read: int
    made: int
    notes: tuple[str, ...]
    unmatched: tuple[str, ...]
    map: tuple[tuple[str, str | None], ...]
    like: str | None = None
    differing: tuple[tuple[str, Fact | None, Fact | None], ...] = ()

    @property
    def fits(self) -> bool:
        """Check whether the result is as `like`, if that was given."""
        return not self.differing

    def __repr__(self) -> str:
        files = f"{visible(self.recipe)} on {visible(self.source)}"
        return f"<Tried {files}: {counted(self.read, 'entry')} -> {self.made}>"

    def to_dict(self) -> editing.Recipe:
        """Return the document `recipe/1`."""
        return {
            "schema": "recipe/1",
            "recipe": self.recipe,
            "source": self.source,
            "reverse": self.reverse,
            "read": self.read,
            "made": self.made,
            "steps": plain(self.counts),
            "notes": list(self.notes),
            "unmatched": list(self.unmatched),
            "map": plain(self.map),
            "like": self.like,
            "differing": [
                {"key": key, "here": _fact(here), "there": _fact(there)}
                for key, here, there in self.differing
            ],
        }


def _fact(fact: Fact | None) -> editing.Fact | None:
    return None if fact is None else {"dtype": fact[0], "shape": list(fact[1])}


def tried(
    recipe: Recipe,
    source: str | Path,
    *,
    at: str | None = None,
    like: str | Path | None = None,
    like_at: str | None = None,
    reverse: bool = False,
) -> Tried:
    """Apply a recipe to the keys and shapes of a checkpoint, and compare them with another's.

    Raises what reading raises, `BadRecipe`, and what the steps raise.
    """
    edit = recipe.edit(reverse=reverse)
    checkpoint = containers.read(source)
    state = places.find(checkpoint, at)
    key_map, _ = edits.apply([edit], state.entries)
    there = None
    if like is not None:
        there = facts(places.find(containers.read(like), like_at, "--like-at").entries)
    return Tried(
        recipe=recipe.name,
        source=checkpoint.path,
        reverse=reverse,
        counts=key_map.counts,
        read=len(state.entries),
        made=len(key_map.entries),
        notes=key_map.notes,
        unmatched=key_map.unmatched,
        map=key_map.pairs,
        like=None if like is None else str(like),
        differing=() if there is None else tuple(differing(facts(key_map.entries), there)),
    )
