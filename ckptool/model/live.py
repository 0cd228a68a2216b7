"""A state_dict or a model in memory where a file may be named: saved, then read like any other."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ckptool import containers
from ckptool.errors import BadInput
from ckptool.files.spool import Spool
from ckptool.files.temporary import temporary_folder
from ckptool.model import libraries, zoo
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.module_metadata import ATTRIBUTES

if TYPE_CHECKING:
    from torch import nn

CheckpointLike: TypeAlias = "str | Path | nn.Module | Mapping[str, object]"


@contextmanager
def opened(given: CheckpointLike) -> Iterator[Checkpoint]:
    """Read a file, or what is in memory, from a temporary file that lives as long as the context.

    Raises what reading raises, and `BadInput` for values that torch cannot save.
    """
    if isinstance(given, str | os.PathLike):
        yield containers.read(given)
        return
    name, state_dict = _state_dict(given)
    with temporary_folder() as folder:
        path = os.path.join(folder, "state_dict.pth")
        try:
            libraries.torch().save(state_dict, path)
        except Exception as error:  # pickle refuses with many types
            Spool([bytes(1 << 16)])  # raises where the disk is full: torch does not say so
            raise BadInput(f"{name} cannot be saved: {zoo.last_line(error)}") from error
        yield replace(containers.read(path), path=name)


def _state_dict(given: nn.Module | Mapping[str, object]) -> tuple[str, Mapping[str, object]]:
    """Return a name for messages, and a dict as torch itself would save it."""
    if not isinstance(given, Mapping):
        return f"({zoo.named(given)})", given.state_dict()
    return "(state_dict)", chosen(given, given)


def chosen(state_dict: Mapping[str, Any], keys: Iterable[str]) -> OrderedDict[str, Any]:
    """Return some entries of a state_dict, with the attributes that are kept on it."""
    entries = OrderedDict((key, state_dict[key]) for key in keys)
    for name in ATTRIBUTES:
        if hasattr(state_dict, name):
            setattr(entries, name, getattr(state_dict, name))
    return entries
