"""What an edit is, what one step makes of all entries, and what several did."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field

from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.state.casting import Casting
from ckptool.state.selecting import select as select

KeyEdit = Callable[[str], str | None]
Value = Node  # a tensor, or what else is in a state_dict
Entries = Mapping[str, Value]
Maker = Callable[[Entries], KeyEdit]  # all entries -> the edit of one key
Move = tuple[tuple[str, ...], str, Value]  # the keys it is made of, the new key, the value
PARAMETER = "\0some parameter\0"  # stands for "some parameter" where a module path is edited


@dataclass(frozen=True, slots=True)
class Count:
    """How many entries a rule of a step took; `rule` is as the user wrote it.

    `number` is that of the step in its recipe, from 1 on.
    """

    step: str
    rule: str
    count: int
    number: int = 0


@dataclass(frozen=True, slots=True)
class Change:
    """What a step makes of all entries, in the order of the output.

    A key without a move is dropped, `why` tells under which name and for which reason. `edit`
    moves the paths of modules, `remade` are new keys of tensors that were cut, joined or
    rearranged, `matched` the keys that a rule took, changed or not, and the rule. `said` tells
    what it did, `notes` what there is to know of that.
    """

    moves: Sequence[Move]
    said: Sequence[str] = ()
    edit: KeyEdit = lambda key: key
    why: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    remade: Collection[str] = ()
    matched: Mapping[str, str] = field(default_factory=dict)
    counts: Sequence[Count] = ()
    casts: Sequence[Casting] = ()
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class KeyMap:
    """What edits did, in order: pairs of old key and new key, None for dropped ones.

    `why` gives for each dropped key the name it had when it was dropped, and the reason; `said`
    tells in words what each step did, `counts` in numbers, `notes` what there is to know of it. An
    entry that was split has several pairs, and one that was joined is the new key of several;
    `remade` are the old keys of those, and `unmatched` those that no rule took. `entries` are the
    values under the new keys, `casts` what was cast.
    """

    pairs: tuple[tuple[str, str | None], ...]
    why: dict[str, tuple[str, str]]
    said: tuple[str, ...] = ()
    entries: dict[str, Value] = field(default_factory=dict, compare=False, repr=False)
    remade: frozenset[str] = frozenset()
    unmatched: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()
    casts: tuple[Casting, ...] = field(default=(), compare=False, repr=False)
    notes: tuple[str, ...] = ()

    @property
    def renamed(self) -> list[tuple[str, str]]:
        """List the keys that are kept under another name."""
        return [(old, new) for old, new in self.pairs if new is not None and new != old]

    @property
    def dropped(self) -> list[str]:
        """List the keys that are not kept."""
        return [old for old, new in self.pairs if new is None]

    @property
    def written(self) -> list[str]:
        """List the new keys in order."""
        return list(dict.fromkeys(new for _, new in self.pairs if new is not None))


@dataclass(frozen=True, slots=True)
class Edit:
    """One step of an edit, as the user asked for it: `reason` is what a dropped key is told.

    `make` makes an edit of keys, `change`, where there is one, that of values and keys. `where`
    names the step in errors, where it is one of several, and `number` says which it is; `rule` is
    what one without a `change` counts as.
    """

    name: str
    make: Maker = lambda keys: lambda key: key
    reason: str = ""
    change: Callable[[Entries], Change] | None = None
    where: str = ""
    number: int = 0
    rule: str = ""
