"""Map one naming scheme to another: the recipe that makes a checkpoint's keys those of a target."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

from ckptool.containers import _json
from ckptool.errors import EditError, LimitExceeded
from ckptool.files import publish
from ckptool.records import dataclass
from ckptool.state import matching, matching_recipe
from ckptool.state.matching import Matching
from ckptool.state.matching_recipe import Draft
from ckptool.state.matching_units import Node
from ckptool.tensors.tensor import shapes_of
from ckptool.text import counted, length, listed, visible

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.documents import editing
    from ckptool.model.live import CheckpointLike
    from ckptool.model.zoo import ModelLike

Shapes = Mapping[str, tuple[int, ...]]
MAX_NBYTES = 64 << 20  # of a list of keys
SHOWN = 200  # keys that are left, in a comment of the recipe


@dataclass(frozen=True, slots=True)
class Side:
    """A naming scheme: keys with shapes, and what it is called in messages."""

    name: str
    shapes: Shapes


@dataclass(frozen=True, slots=True)
class Matched:
    """A map between two naming schemes, `text` as a recipe of it.

    `left` and `missing` are the keys of the source and of the target that have no partner.
    """

    source: Side
    like: Side
    found: Matching
    draft: Draft
    left: tuple[str, ...]
    missing: tuple[str, ...]

    @property
    def sure(self) -> bool:
        """Check that something is paired, and that nothing is left to be chosen."""
        return bool(self.draft.wanted) and self.draft.sure

    @property
    def anything(self) -> bool:
        """Check that something is paired, or may be."""
        return bool(self.draft.wanted or self.draft.choices or self.draft.cuts)

    @property
    def paired(self) -> int:
        """Count the keys of the target that are filled for sure."""
        return len(self.like.shapes.keys() & set(self.draft.wanted.values()))

    @property
    def unsettled(self) -> int:
        """Count the keys of the source that are ambiguous."""
        return len(self.source.shapes) - len(self.draft.wanted) - len(self.left)

    @property
    def text(self) -> str:
        """Return the recipe."""
        title = [
            f"From the names of {self.source.name} to those of {self.like.name}, by ckptool match.",
            f"{counted(self.paired, 'key')} of {len(self.source.shapes)} are sure, "
            f"{self.unsettled} are ambiguous; {self.like.name} has {len(self.like.shapes)}.",
        ]
        left = [
            f"Without a partner in {side.name}, {counted(len(keys), 'key')}: {listed(keys, SHOWN)}"
            for side, keys in ((self.source, self.left), (self.like, self.missing))
            if keys
        ]
        whole = self.sure and not self.left
        return matching_recipe.text(self.draft, title, left, whole=whole)

    def __repr__(self) -> str:
        names = f"{visible(self.source.name)} -> {visible(self.like.name)}"
        return f"<Matched {names}: {self.paired} sure, {self.unsettled} ambiguous>"

    def to_dict(self) -> editing.Match:
        """Return the document `match/1`."""
        draft = self.draft
        return {
            "schema": "match/1",
            "source": self.source.name,
            "like": self.like.name,
            "read": len(self.source.shapes),
            "wanted": len(self.like.shapes),
            "sure": self.sure,
            "pairs": [
                {"here": key, "there": new, "confidence": "sure", "why": draft.why[key]}
                for key, new in draft.wanted.items()
                if new in self.like.shapes
            ],
            "ambiguous": [
                {"here": _paths(each.here), "there": _paths(each.there)}
                for each in self.found.ambiguous
            ],
            "fused": [
                {
                    "whole": ".".join(each.whole.path),
                    "parts": [".".join(part.path) for part in each.parts],
                    "step": "fuse" if each.back else "split",
                }
                for each in self.found.fused
            ],
            "left": list(self.left),
            "missing": list(self.missing),
            "recipe": self.text,
        }


def _paths(nodes: Sequence[Node]) -> list[str]:
    return [".".join(node.path) for node in nodes]


def match(
    source: CheckpointLike,
    like: CheckpointLike | None = None,
    *,
    at: str | None = None,
    like_at: str | None = None,
    model: ModelLike | None = None,
    model_args: Mapping[str, object] | None = None,
) -> Matched:
    """Pair the keys of a checkpoint with those of another, or of a model: a recipe to review.

    Each is a file, what `ckptool keys --json` printed (`.json`), a state_dict or an `nn.Module`;
    `model` is a spec made with `model_args`. Reads no weights. Raises what reading raises.

    >>> found = ckptool.match("data_parallel.pth", like="plain.pth")
    >>> found.sure, found.paired
    (True, 8)
    """
    if (like is None) == (model is None):
        raise EditError("a match has one target: --like or --model")
    if model is None and model_args:
        raise EditError("--model-arg needs --model")
    if like is None and like_at is not None:
        raise EditError("--like-at needs --like")
    if model is not None:
        target = _model_side(model, model_args or {})
    elif like is not None:
        target = _side_of(like, like_at, "--like-at")
    return matched(_side_of(source, at, "--at"), target)


def _side_of(given: CheckpointLike, at: str | None, option: str) -> Side:
    """Return the keys and shapes of what a match is of."""
    from ckptool.model import live
    from ckptool.state import checkpoint as places

    if not isinstance(given, str | PathLike | Mapping):  # a model, which may have no values
        return _model_side(given, {})
    if isinstance(given, str | PathLike) and (rows := listed_keys(given)) is not None:
        return Side(str(given), rows)
    with live.opened(given) as checkpoint:
        return Side(checkpoint.path, shapes_of(places.find(checkpoint, at, option).entries))


def _model_side(spec: ModelLike, args: Mapping[str, object]) -> Side:
    from ckptool.model import zoo

    return Side(zoo.named(spec), zoo.layout(spec, args)[0])


def listed_keys(path: str | Path) -> Shapes | None:
    """Read a document of `ckptool keys --json`; None where a file is not one.

    Raises `Malformed` for JSON that breaks its rules.
    """
    if not str(path).endswith(".json"):
        return None
    with open(path, "rb") as opened:
        data = opened.read(MAX_NBYTES + 1)
    if len(data) > MAX_NBYTES:
        raise LimitExceeded(f"{path} has more than 64 MiB")
    rows: Any = _json.load(data, str(path)).get("tensors")
    try:
        return {row["key"]: tuple(_size(size) for size in row["shape"]) for row in rows}
    except (KeyError, TypeError):
        return None


def _size(stated: object) -> int:
    size = length(stated)
    if size is None:
        raise TypeError(f"{stated!r} is not a size")
    return size


def matched(source: Side, like: Side) -> Matched:
    """Pair the keys of two sides, and write down how."""
    found = matching.match(source.shapes, like.shapes)
    draft = matching_recipe.draft(found, source.shapes, like.shapes)
    units = [unit for each in found.fused for unit in (each.whole, *each.parts)]
    for each in found.ambiguous:
        units += [unit for node in (*each.here, *each.there) for unit in node.all_units]
    open_keys = {key for unit in units for key in unit.keys.values()}
    filled = {*draft.wanted.values()}
    return Matched(
        source,
        like,
        found,
        draft,
        tuple(key for key in source.shapes if key not in draft.wanted and key not in open_keys),
        tuple(key for key in like.shapes if key not in filled and key not in open_keys),
    )


def write(done: Matched, target: str | Path, sources: Sequence[str], *, force: bool) -> None:
    """Write the recipe to a file.

    Raises `SameFile`, `OutputExists` or `WriteError`.
    """
    place = publish.refuse_target(target, sources, force=force, sync=True)
    publish.write(place, done.text.encode())
