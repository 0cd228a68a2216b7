"""The documents of commands that write checkpoints, and of recipes."""

from typing import Annotated as A, Literal, TypedDict

from ckptool.documents.shared import Cast, Container, DTypeName, Key, KeyMap, NoAt, Shape


class Dropped(TypedDict):
    """An entry that was not written."""

    key: Key
    reason: str


class Rule(TypedDict):
    """How many entries a rule changed."""

    step: A[str, "strip-prefix, rename, drop ..."]
    rule: A[str, "as it was given"]
    count: A[int, "number of entries"]
    number: A[int, "number of the step in its recipe, from 1; 0 outside a recipe"]


class Shard(TypedDict):
    """A file of a set."""

    file: str
    count: A[int, "number of tensors"]
    nbytes: A[int, "bytes of the file"]


class Rewritten(TypedDict):
    """What every command that writes a checkpoint did."""

    source: A[str, "file read, the first of several"]
    target: A[str, "file or folder written"]
    container: Container
    at: NoAt
    module: A[str, "class of a whole model that was read as its state_dict; empty for a dict"]
    read: A[int, "number of entries read"]
    kept: A[int, "number of entries written under their own key"]
    renamed: A[int, "number of entries written under another key"]
    written: A[int, "number of entries written"]
    dropped: list[Dropped]
    not_carried: A[list[str], "names outside the state_dict that were not written"]
    map: KeyMap
    rules: list[Rule]
    nbytes: A[int, "bytes written, or that would be"]
    added: A[int, "number of entries written that no file had"]
    notes: list[str]
    dry_run: A[bool, "whether nothing was written"]
    shards: A[list[Shard], "files of a set; empty for one file"]
    casts: list[Cast]


class Rewrite(Rewritten):
    """strip-prefix, add-prefix, unwrap, convert: what was read and written."""

    schema: Literal["rewrite/1"]


class Mismatch(TypedDict):
    """A key of both in different shapes."""

    key: Key
    here: Shape
    there: A[list[int], "shape in the target"]


class Adapted(Mismatch):
    """A tensor that was brought into the target's shape."""

    kind: A[str, "pos-embed, classifier ..."]
    how: A[str, "what was done"]


class Transfer(Rewritten):
    """transfer: as rewrite/1, and how the weights fit their target."""

    schema: Literal["transfer/1"]
    matched: A[int | None, "number of keys that fit; null without --like or --model"]
    mismatched: list[Mismatch]
    missing: A[list[str], "keys of the target that the source does not have"]
    filled: A[float | None, "share of the target's elements that is filled, 0 to 1"]
    adapted: list[Adapted]
    initialised: A[list[str], "keys written with fresh values"]


class FromLast(TypedDict):
    """An entry that is the last file's."""

    key: Key
    what: A[str, "its dtype, or `not tensors`"]


class Average(Rewritten):
    """average: as rewrite/1, and what was averaged."""

    schema: Literal["average/1"]
    sources: A[list[str], "files averaged"]
    weights: A[list[float], "weight of each"]
    averaged: A[list[str], "keys averaged"]
    last: A[list[FromLast], "entries that are the last file's"]
    untied: A[list[list[str]], "[key, key that it was tied to in the first file]"]


class Fact(TypedDict):
    """Dtype and shape."""

    dtype: DTypeName
    shape: Shape


class Differing(TypedDict):
    """A key that does not come out as in --like."""

    key: Key
    here: A[Fact | None, "what comes out; null if the key does not"]
    there: A[Fact | None, "what --like has; null if it has not the key"]


class Recipe(TypedDict):
    """recipe: what a recipe makes of a checkpoint."""

    schema: Literal["recipe/1"]
    recipe: A[str, "file or name of the recipe"]
    source: A[str, "checkpoint it was tried on"]
    reverse: bool
    read: A[int, "number of entries read"]
    made: A[int, "number of entries that come out"]
    steps: A[list[Rule], "rules with the number of entries they changed"]
    notes: list[str]
    unmatched: A[list[str], "keys that no rule changed"]
    map: KeyMap
    like: A[str | None, "checkpoint that the result was compared with"]
    differing: list[Differing]


class Pair(TypedDict):
    """Keys of the same tensor."""

    here: Key
    there: A[str, "key in --like"]
    confidence: Literal["sure"]
    why: str


class Ambiguous(TypedDict):
    """Modules that could be paired in several ways."""

    here: list[str]
    there: list[str]


class Fused(TypedDict):
    """A module that is several on the other side."""

    whole: str
    parts: list[str]
    step: Literal["fuse", "split"]


class Match(TypedDict):
    """match: a recipe from one naming scheme to another."""

    schema: Literal["match/1"]
    source: str
    like: str
    read: A[int, "number of tensors of the source"]
    wanted: A[int, "number of tensors of --like"]
    sure: A[bool, "whether nothing is ambiguous"]
    pairs: list[Pair]
    ambiguous: list[Ambiguous]
    fused: list[Fused]
    left: A[list[str], "keys of the source without a partner"]
    missing: A[list[str], "keys of --like without a partner"]
    recipe: A[str, "the recipe, in TOML"]
