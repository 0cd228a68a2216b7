"""A state_dict loaded the way its author would: by torch or by the safetensors library.

`torch.load(weights_only=True)` has had memory errors of its own, so that a file goes there only
after ckptool's strict reader found it sound, and plain in all that it names. What torch refuses,
and what is not plain, ckptool reads itself, and says so.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ckptool import containers
from ckptool.files import fileio
from ckptool.model import libraries, live, loading
from ckptool.model.devices import is_out_of_memory
from ckptool.model.live import CheckpointLike
from ckptool.model.zoo import last_line
from ckptool.pickles import safety
from ckptool.pickles.names import Level
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, walk
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.tensors.tensor import Packing, TensorInfo, ties


@dataclass(frozen=True, slots=True)
class Source:
    """A file that was read as data, and its state_dict; `file` is its path on the disk."""

    file: str
    checkpoint: Checkpoint
    state: StateDict

    @property
    def path(self) -> str:
        """Return the name for messages."""
        return self.checkpoint.path


@dataclass(frozen=True, slots=True)
class Native:
    """A loaded state_dict; `loader` is `torch.load`, `safetensors` or `ckptool`."""

    state_dict: Mapping[str, Any]
    loader: str
    notes: tuple[str, ...] = ()


class _Refused(Exception):
    """A library does not load the file, or not what ckptool reads in it."""


@contextmanager
def opened(given: CheckpointLike, at: str | None = None, option: str = "--at") -> Iterator[Source]:
    """Read a file, or what is in memory, and find its state_dict, which `option` chooses."""
    with live.opened(given) as checkpoint:
        is_file = isinstance(given, str | os.PathLike)
        file = checkpoint.files[0][0]
        if is_file and file != checkpoint.path:  # of an archive, or a folder
            file = checkpoint.path
        yield Source(file, checkpoint, places.find(checkpoint, at, option))


def load(source: Source) -> Native:
    """Load a state_dict on the CPU, by its author's library where that is possible."""
    container = containers.by_name(source.checkpoint.container)
    try:
        loader = {"torch": _by_torch, "safetensors": _by_safetensors}.get(container.library)
        if loader is None:
            raise _Refused(f"torch.load does not read a {container.title}")
        return loader(source)
    except _Refused as refused:
        loaded = loading.revive(source.checkpoint, source.state)
        left = [f"left out {key}: {reason}" for key, reason in loaded.left_out.items()]
        note = f"{source.path} was loaded by ckptool's own reader: {refused}"
        return Native(loaded.state_dict, "ckptool", (note, *left))


def _by_torch(source: Source) -> Native:
    verdict = safety.judge_file(source.checkpoint)
    if verdict.level is not Level.PLAIN:
        names = [*map(str, (*verdict.dangerous, *verdict.foreign))]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise _Refused(f"it names {', '.join(names[:3])}{more}, not given to torch.load")
    torch = libraries.torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            whole = torch.load(
                fileio.opened_again(source.file),
                map_location="cpu",
                weights_only=True,
                mmap=_can_map(source),
            )
        return Native(_taken_out(whole, source), "torch.load")
    except _Refused:
        raise
    except Exception as error:  # an unpickler may raise anything
        if is_out_of_memory(error):
            raise
        raise _Refused(f"torch.load refuses it ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    """Return what torch reports as wrong, without its advice to turn safety off."""
    match = re.search(r"WeightsUnpickler error:\s*([^\n]+)", str(error))
    text = match[1] if match else last_line(error)
    return re.split(r"Please |Re-running|In PyTorch 2\.6", text)[0].strip().rstrip(".")[:160]


def _can_map(source: Source) -> bool:
    """Check whether torch can map the file: a zip file without deflated records."""
    tensors = (tensor for _, tensor in walk.tensors(source.checkpoint.tree))
    return containers.by_name(source.checkpoint.container).traits.memory_mapped and all(
        tensor.storage.packing is Packing.PLAIN
        for tensor in tensors
        if isinstance(tensor, TensorInfo)
    )


def _taken_out(whole: Any, source: Source) -> Mapping[str, Any]:
    part, state = whole, source.state
    for step in state.at:
        part = part[step]
    if list(part) != list(state.entries):
        part = _with_versions(_joined(part), source)
    if not isinstance(part, Mapping) or set(part) != set(state.entries):
        raise _Refused("torch.load gives other keys")
    return part


def _with_versions(entries: Mapping[str, Any], source: Source) -> Mapping[str, Any]:
    """Return entries with the `_metadata` that ckptool read: the library knows of none."""
    versions = replace(source.state, entries={})
    whole = loading.revive(source.checkpoint, versions).state_dict
    whole.update(entries)
    return whole


def _joined(parts: Mapping[str, Any]) -> Mapping[str, Any]:
    """Join a dict of dicts by dots, as `--at` does."""
    flat: dict[str, Any] = {}
    for name, part in parts.items():
        if isinstance(part, Mapping):
            flat.update({f"{name}.{key}": value for key, value in part.items()})
        else:
            flat[name] = part
    return flat


def _by_safetensors(source: Source) -> Native:
    library = libraries.safetensors()
    try:
        loaded = library.torch.load_file(fileio.opened_again(source.file), device="cpu")
    except Exception as error:  # SafetensorError, and whatever torch raises for a dtype
        if is_out_of_memory(error):
            raise
        raise _Refused(f"safetensors refuses it ({last_line(error)[:160]})") from error
    tied = _both_ways(source.state)
    for alias, kept in tied.items():
        if alias not in loaded and kept in loaded:
            loaded[alias] = loaded[kept]
    if set(loaded) != set(source.state.entries):
        raise _Refused("safetensors gives other keys")
    ordered = _with_versions({key: loaded[key] for key in source.state.entries}, source)
    note = f"{source.path} ties {', '.join(list(tied)[:3])}: restored from ckptool's note in it"
    return Native(ordered, "safetensors", (note,) if tied else ())


def _both_ways(state: StateDict) -> dict[str, str]:
    """Map each key that shares its exact view with another to that one."""
    found = ties(state.entries)
    return found | {kept: key for key, kept in found.items()}
