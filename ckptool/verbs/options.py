"""What every verb that writes takes, with the words of the command line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypedDict

from ckptool.records import dataclass

MIN_MATCH = 0.5  # as the command line says too, which loads no verb for its help
Container = Literal["torch", "safetensors", "dcp"]


class WriteOptions(TypedDict, total=False):
    """The keywords of every verb that writes, as on the command line.

    `at` chooses among several state_dicts, `to` the container; `drop_beside` (a pattern or
    several) leaves out what is beside the state_dict, `keep_records` keeps further records of a
    torch zip; `force` replaces the target, `in_place` the source, `parents` makes the folders that
    the target is in; `dry_run` plans alone;
    `tensors_only` leaves behind what is neither a tensor nor plain, `untie` writes tied tensors as
    copies, `allow_expand` allows an output of more than 4 times the input; `map_location` tags
    every storage of a torch file with a device; without `sync` the flush to disk is left to the
    system.
    """

    at: str | None
    to: Container | None
    drop_beside: str | Sequence[str]
    keep_records: bool
    force: bool
    in_place: bool
    parents: bool
    dry_run: bool
    tensors_only: bool
    untie: bool
    allow_expand: bool
    map_location: str | None
    sync: bool


@dataclass(frozen=True, slots=True)
class Options:
    """The same, with what holds where nothing is said."""

    at: str | None = None
    to: Container | None = None
    drop_beside: str | Sequence[str] = ()
    keep_records: bool = False
    force: bool = False
    in_place: bool = False
    parents: bool = False
    dry_run: bool = False
    tensors_only: bool = False
    untie: bool = False
    allow_expand: bool = False
    map_location: str | None = None
    sync: bool = True
