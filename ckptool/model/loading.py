"""Checkpoints as real torch tensors, through ckptool's own reader: nothing is unpickled.

`load_matching` does what `load_state_dict(strict=False)` should have done. That one ignores
missing and unexpected keys without a word, loads nothing at all when every key has a prefix, and
still refuses a tensor of another shape (torch/nn/modules/module.py, `load_state_dict`).
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ckptool import containers
from ckptool.errors import BadInput, DoesNotLoad, NoDevice, Unsupported
from ckptool.files.copying import run_jobs
from ckptool.files.jobs import Copy
from ckptool.model import libraries, live, staging
from ckptool.model.devices import is_out_of_memory, memory_of
from ckptool.model.live import CheckpointLike
from ckptool.model.revive import Reviver
from ckptool.pickles.tree import children
from ckptool.records import dataclass, grouped, plain
from ckptool.state import checkpoint as places, edits
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.wrappers import Peeling, peeling
from ckptool.tensors.tensor import Storage
from ckptool.text import percent

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass(frozen=True, slots=True)
class Loaded:
    """A state_dict of real tensors, and its path in the file.

    `left_out` has the reason for each key whose value is neither a tensor nor plain.
    """

    state_dict: OrderedDict[str, Any]
    at: tuple[str, ...]
    left_out: dict[str, str]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A key whose shapes differ: in the file, and in the model."""

    key: str
    here: tuple[int, ...] | None
    there: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Matching:
    """What `load_matching` loaded, by the names of the bare model, and what it did not.

    `missing` are keys of the model that the file does not fill; one that is tied to a filled one
    is in `tied` instead. `filled` is the share of the model's parameter elements that were
    loaded. `left_out` has the reason for each entry that is neither a tensor nor plain;
    `wrappers` are the prefixes taken off the file's keys.
    """

    matched: tuple[str, ...]
    mismatched: tuple[Mismatch, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]
    tied: tuple[str, ...]
    filled: float
    left_out: dict[str, str]
    wrappers: tuple[str, ...]
    at: tuple[str, ...]

    def __repr__(self) -> str:
        counts = f"{len(self.matched)} matched, {len(self.mismatched)} of another shape"
        others = f"{len(self.missing)} missing, {len(self.unexpected)} unexpected"
        return f"<Matching: {counts}, {others}, {percent(self.filled)} filled>"

    def to_dict(self) -> dict[str, object]:
        """Return all of it as what JSON can hold."""
        return {**plain(self)}


def load_state_dict(
    path: str | Path, *, device: str = "cpu", at: str | None = None, check: bool = False
) -> OrderedDict[str, torch.Tensor]:
    """Load a state_dict as torch tensors, mapped from the file where that is possible.

    On a GPU they are in one allocation, which is free again when the last of them is.
    Takes any container that ckptool reads; `at` chooses among several state_dicts. `check` reads
    every byte once and compares the checksums that the file records. A value that is neither a
    tensor nor plain is left out, with a warning that names it. Raises what reading raises,
    `AmbiguousStateDict`, `NoDevice`, `OutOfMemory` and `MissingExtra`.

    >>> state_dict = ckptool.load_state_dict("model_best.pth.tar", device="cpu")
    >>> state_dict["module.classifier.bias"].shape
    torch.Size([10])
    """
    loaded = load(containers.read(path), device, at, check=check)
    for key, reason in loaded.left_out.items():
        warnings.warn(f"{path}: left out {key}: {reason}", stacklevel=2)
    return loaded.state_dict


def load(
    checkpoint: Checkpoint, device: str = "cpu", at: str | None = None, *, check: bool = False
) -> Loaded:
    """Load the state_dict of a checkpoint that has been read."""
    state = places.find(checkpoint, at)
    if check:
        check_sums(state)
    return revive(checkpoint, state, device)


def revive(checkpoint: Checkpoint, state: StateDict, device: str = "cpu") -> Loaded:
    """Make real tensors of a state_dict that has been found."""
    values: OrderedDict[str, Any] = OrderedDict()
    left_out = {}
    with on_device(device), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on dtypes and layouts that it calls unfinished
        make = Reviver(checkpoint.path, device)
        if device.partition(":")[0] == "cuda":
            make.stage(state.entries.values(), staging.of_cuda(device))
        for key, node in state.entries.items():
            try:
                values[key] = make(node)
            except Unsupported as error:
                left_out[key] = error.message
        if state.metadata is not None:
            values._metadata = make(state.metadata)  # type: ignore[attr-defined]
    return Loaded(values, state.at, left_out)


def check_sums(state: StateDict) -> None:
    """Read the state_dict's storages and compare the checksums that the file records."""
    storages: dict[Storage, None] = {}
    seen: set[int] = set()
    stack = list(state.entries.values())
    while stack:
        node = stack.pop()
        if isinstance(node, Storage):
            storages[node] = None
        elif id(node) not in seen:
            seen.add(id(node))
            stack += [node.storage] if hasattr(node, "storage") else children(node)
    run_jobs([Copy(storage, None) for storage in storages], None, lambda nbytes: None)


@contextmanager
def on_device(device: str) -> Iterator[None]:
    """Turn what a device that is absent or full raises into our errors."""
    torch = libraries.torch()
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).partition("\n")[0]
        raise NoDevice(f"there is no device `{device}` here: {first}") from error
    with memory_of(device):
        yield


# Into a model.


def _shape(value: Any) -> tuple[int, ...] | None:
    """Return the shape of a tensor, None for another value or a parameter still to be made."""
    try:
        return tuple(value.shape)
    except (AttributeError, RuntimeError):
        return None


def _ties(model: Any) -> dict[str, tuple[str, ...]]:
    """Map each key of a model to all keys of the same parameter or buffer, itself included."""
    both = model.named_parameters, model.named_buffers
    listed = (each(remove_duplicate=False) for each in both)
    groups = grouped((id(tensor), key) for pairs in listed for key, tensor in pairs)
    return {key: tuple(keys) for keys in groups.values() for key in keys}


def _mismatches(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> list[Mismatch]:
    """List the keys that both have, with different shapes."""
    pairs = [(key, given[key], wanted[key]) for key in given if key in wanted]
    return [
        Mismatch(key, _shape(here), _shape(there))
        for key, here, there in pairs
        if not _is_lazy(there) and _shape(here) != _shape(there)
    ]


def _is_lazy(value: Any) -> bool:
    """Check whether a parameter takes its shape from what is loaded."""
    return type(value).__name__ in ("UninitializedParameter", "UninitializedBuffer")


def load_matching(
    model: nn.Module,
    source: CheckpointLike,
    *,
    drop: str | Sequence[str] = (),
    at: str | None = None,
    keep_bookkeeping: bool = False,
) -> Matching:
    """Load into a model all that fits it, and say what did and what did not.

    `source` is a file, a state_dict or another model. Wrappers in its keys (`module.`,
    `_orig_mod.` ...) are removed; the model may be wrapped itself. What a wrapper keeps for itself
    (`n_averaged`) is in `dropped`, unless `keep_bookkeeping`. `drop` takes a
    pattern or several as `--drop` does, over the keys without prefix; `at` chooses among several
    state_dicts. Tensors of another shape are not loaded, they are listed. Raises what reading
    raises, `AmbiguousStateDict`, `NothingMatched` for a pattern, `BadInput` for a model on the
    meta device and `DoesNotLoad` for what torch refuses.

    >>> from torch import nn
    >>> model = nn.Module()
    >>> model.classifier = nn.Linear(4, 3)  # another head
    >>> model.features = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    >>> ckptool.load_matching(model, "model_best.pth.tar")
    <Matching: 6 matched, 2 of another shape, 0 missing, 0 unexpected, 88.5 % filled>
    """
    with live.opened(source) as checkpoint:
        return _load_matching(model, checkpoint, drop, at, keep_bookkeeping)


def _load_matching(
    model: Any,
    checkpoint: Checkpoint,
    drop: str | Sequence[str],
    at: str | None,
    keep_bookkeeping: bool,
) -> Matching:
    _refuse_meta(model)
    loaded = load(checkpoint, "cpu", at)
    own = peeling(model.state_dict())
    steps = [
        edits.strip_wrappers(required=False, keep_bookkeeping=keep_bookkeeping),
        *([edits.drop(drop)] if drop else []),
    ]
    state, key_map = rekeyed(loaded.state_dict, steps, _as_in(model, own))
    fit = load_fitting(model, state)
    if not fit.matched:
        warnings.warn(f"{checkpoint.path}: nothing in it fits the model", stacklevel=3)

    def bare(keys: Iterable[str]) -> tuple[str, ...]:
        return tuple(map(own.name, keys))

    return Matching(
        matched=bare(fit.matched),
        mismatched=tuple(
            replace(mismatch, key=own.name(mismatch.key)) for mismatch in fit.mismatched
        ),
        missing=bare(fit.missing),
        unexpected=bare(fit.unexpected),
        dropped=tuple(key_map.dropped),
        tied=bare(fit.tied),
        filled=_filled(model, fit.matched),
        left_out=loaded.left_out,
        wrappers=peeling(loaded.state_dict).prefixes,
        at=loaded.at,
    )


def _as_in(model: Any, own: Peeling) -> edits.Edit:
    """Return the edit that names peeled keys as a model does, which may be wrapped, or a part."""
    keys = model.state_dict()
    modules = {own.name(key).rpartition(".")[0]: key.rpartition(".")[0] for key in keys}

    def name(key: str) -> str:
        path, _, last = key.rpartition(".")
        if path not in modules:
            return own.prefix + key
        return f"{modules[path]}.{last}" if modules[path] else last

    return edits.Edit("as in the model", lambda entries: name)


def _refuse_meta(model: Any) -> None:
    """Raise `BadInput` for a model without memory: torch would load into it, and do nothing."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise BadInput(
            "the model is on the meta device and can hold no values",
            hint="model.to_empty(device='cpu') first, or build it without the meta device",
        )


def rekeyed(
    state_dict: Mapping[str, Any], steps: Sequence[edits.Edit], last: edits.Edit | None = None
) -> tuple[OrderedDict[str, Any], edits.KeyMap]:
    """Apply edits to the keys of a loaded state_dict and its `_metadata`.

    The key map is that of the edits without the last.
    """
    key_map, _ = edits.apply(steps, state_dict)
    whole, edit = edits.apply([*steps, last] if last else steps, state_dict)
    moved = OrderedDict((new, state_dict[old]) for old, new in whole.pairs if new is not None)
    metadata = getattr(state_dict, "_metadata", None)
    if metadata is not None:
        paths = edits.rekey_modules(list(metadata), whole, edit)
        fresh = {"version": 1}
        moved._metadata = OrderedDict(  # type: ignore[attr-defined]
            (new, dict(fresh if old is None else metadata[old])) for old, new in paths
        )
    return moved, key_map


@dataclass(frozen=True, slots=True)
class Fit:
    """What of a state_dict was loaded into a model, by the keys of both, and what was not.

    A missing key that is tied to a loaded one is in `tied` instead.
    """

    matched: list[str]
    mismatched: list[Mismatch]
    missing: list[str]
    unexpected: list[str]
    tied: list[str]


def load_fitting(model: Any, state: Mapping[str, Any]) -> Fit:
    """Load the entries whose shapes fit; raises `DoesNotLoad` for what torch refuses."""
    mismatched = _mismatches(model.state_dict(), state)
    unfit = {mismatch.key for mismatch in mismatched}
    fitting = live.chosen(state, (key for key in state if key not in unfit))
    absent, unexpected = into(model, fitting)
    tied, others = tied_to(model, absent, fitting), set(unexpected)
    return Fit(
        matched=[key for key in fitting if key not in others],
        mismatched=mismatched,
        missing=[key for key in absent if key not in unfit and key not in tied],
        unexpected=unexpected,
        tied=tied,
    )


def into(model: Any, state: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Load a state_dict whose shapes fit; return the missing and the unexpected keys.

    Raises `DoesNotLoad` for what torch refuses beyond that.
    """
    try:
        keys = model.load_state_dict(state, strict=False)
    except Exception as error:  # a module's own `_load_from_state_dict` may raise anything
        if is_out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DoesNotLoad(
            f"{type(model).__name__} does not take the state_dict", evidence=lines[-5:]
        ) from error
    return list(keys.missing_keys), list(keys.unexpected_keys)


def tied_to(model: Any, missing: Sequence[str], state: Mapping[str, Any]) -> list[str]:
    """List the missing keys that the model ties to a key that was loaded."""
    groups = _ties(model)
    return [key for key in missing if any(other in state for other in groups.get(key, ()))]


def _filled(model: Any, loaded: Sequence[str]) -> float:
    """Return the share of a model's parameter elements that were loaded; 1 if it has none."""
    known, groups = set(loaded), _ties(model)
    counts = {
        key: 0 if _is_lazy(parameter) else parameter.numel()
        for key, parameter in model.named_parameters()
    }
    have = sum(count for key, count in counts.items() if not known.isdisjoint(groups[key]))
    total = sum(counts.values())
    return have / total if total else 1.0
