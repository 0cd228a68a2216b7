"""One side of a comparison: a file's weights in a model that is ready to run.

The reference is loaded as its author would, in `nn.DataParallel` where every key starts with
`module.`; the candidate must load strictly into the bare model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import field
from typing import Any

from ckptool import text
from ckptool.errors import DoesNotLoad
from ckptool.model import deferred, devices, libraries, live, loading, native, zoo
from ckptool.model.loading import Fit, Mismatch
from ckptool.model.native import Source
from ckptool.model.zoo import ModelLike, argument, named
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, edits
from ckptool.state.walk import dotted
from ckptool.state.wrappers import BOOKKEEPING, Peeling, peeling
from ckptool.tensors.tensor import shapes_of
from ckptool.text import listed, quoted

SHOWN = 6


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make the model of a side, or of both.

    `common` are the keys to load, None for all; `initial` collects what all other keys get on
    both sides: the values that they had in the first model made.
    """

    spec: ModelLike
    args: Mapping[str, Any]
    seed: int = 0
    dtype: Any = None
    memory_format: Any = None
    common: frozenset[str] | None = None
    initial: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to run: `module` may be a wrapper of `bare`, whose names are the model's own.

    `state` is what was loaded, as it is in the file.
    """

    module: Any
    bare: Any
    state: Mapping[str, Any]
    loader: str
    notes: tuple[str, ...]


def wrapped(source: Source) -> Peeling:
    """Find the wrappers that keys of a state_dict have."""
    return peeling(source.state.entries)


def make(recipe: Recipe, source: Source, device: Any, *, reference: bool) -> Subject:
    """Make the model, load one side's weights into it, and bring it to a device."""
    devices.seed_everything(recipe.seed)
    loaded = native.load(source)
    with deferred.initial_values():
        model = zoo.build(recipe.spec, recipe.args, "cpu").eval()
        parallel, notes = _into(model, loaded, recipe, source, reference)
    model = model.to(device=device, dtype=recipe.dtype, memory_format=recipe.memory_format)
    module = _parallel(model, device) if parallel else model
    return Subject(module, model, loaded.state_dict, loaded.loader, tuple(notes))


def _into(
    model: Any, loaded: native.Native, recipe: Recipe, source: Source, reference: bool
) -> tuple[bool, list[str]]:
    """Load weights into a model; return whether it goes in a wrapper, and what to note."""
    notes = list(loaded.notes)
    state, outer = loaded.state_dict, wrapped(source) if reference else Peeling()
    parallel = outer.only_default and not outer.bookkeeping and recipe.common is None
    if outer and not parallel:
        state, done = loading.rekeyed(state, [edits.strip_wrappers()])
        notes += [f"{line} of the reference" for line in done.said]
        notes += [f"not loaded ({BOOKKEEPING}): {listed(done.dropped)}"] if done.dropped else []
    if recipe.common is not None:
        _partly(model, state, recipe)
        return parallel, notes
    fit = loading.load_fitting(_parallel(model) if parallel else model, state)
    if fit.missing or fit.unexpected or fit.mismatched:
        raise _does_not_load(recipe, source, reference, fit)
    return parallel, notes


def _parallel(model: Any, device: Any = None) -> Any:
    """Wrap a model in `nn.DataParallel` on the one device that it is on.

    On a machine with GPUs its constructor would move the model there; without one it does
    as below (torch/nn/parallel/data_parallel.py, `__init__`).
    """
    torch = libraries.torch()
    if device is not None and device.type == "cuda":
        return torch.nn.DataParallel(model, device_ids=[device.index]).eval()
    wrapper = torch.nn.DataParallel.__new__(torch.nn.DataParallel)
    torch.nn.Module.__init__(wrapper)
    wrapper.module, wrapper.device_ids = model, []
    return wrapper.eval()


def _partly(model: Any, state: Mapping[str, Any], recipe: Recipe) -> None:
    """Load the keys that both sides have; give all others the same values on both sides."""
    common = recipe.common or frozenset()
    chosen = live.chosen(state, (key for key in state if key in common))
    if not recipe.initial:
        tensor = libraries.torch().Tensor
        tied = set(loading.tied_to(model, list(model.state_dict()), chosen))
        recipe.initial.update(
            (key, value.clone())
            for key, value in model.state_dict().items()
            if key not in common and key not in tied and isinstance(value, tensor)
        )
    loading.into(model, chosen)
    loading.into(model, recipe.initial)


# What fits.


def common_keys(recipe: Recipe, reference: Source, candidate: Source) -> frozenset[str]:
    """Find the model's keys that both files fill, with the model's shapes.

    Raises `DoesNotLoad` where there are none.
    """
    wanted = zoo.shapes(recipe.spec, recipe.args)
    outer = wrapped(reference)
    left = {outer.name(key): sizes for key, sizes in shapes_of(reference.state.entries).items()}
    right = shapes_of(candidate.state.entries)
    common = frozenset(
        key for key, sizes in wanted.items() if left.get(key) == sizes == right.get(key)
    )
    if not common:
        raise DoesNotLoad(
            f"{reference.path}, {candidate.path} and `{named(recipe.spec)}` "
            "have no tensor in common",
            evidence=_named("the model's", wanted) + _named("the candidate's", right),
            hint=_peeling(candidate),
        )
    return common


def left_out(recipe: Recipe, common: frozenset[str]) -> list[str]:
    """Name the modules of which not every tensor is loaded on both sides."""
    keys = (key for key in zoo.shapes(recipe.spec, recipe.args) if key not in common)
    return list(dict.fromkeys(key.rpartition(".")[0] for key in keys))


def _does_not_load(recipe: Recipe, source: Source, reference: bool, fit: Fit) -> DoesNotLoad:
    unfit = fit.mismatched
    shapes = [
        f"{mismatch.key}: file {_size(mismatch.here)}, model {_size(mismatch.there)}"
        for mismatch in unfit
    ]
    lists = [
        ("missing", "missing", fit.missing),
        ("unexpected", "unexpected", fit.unexpected),
        ("of another shape", "shape differs", shapes),
    ]
    counts = ", ".join(f"{len(lines)} {what}" for what, _, lines in lists if lines)
    role = "reference" if reference else "candidate"
    option, hint = _own_classes(unfit) if reference else ("", _mending(recipe, source, unfit))
    return DoesNotLoad(
        f"the {role} {source.path} does not load into `{named(recipe.spec)}`: {counts}",
        evidence=[line for _, what, lines in lists for line in _named(what, lines)],
        hint=hint,
        option=option,
    )


def _size(sizes: tuple[int, ...] | None) -> str:
    return str(list(sizes)) if sizes is not None else "no tensor"


def _named(what: str, keys: Iterable[str]) -> list[str]:
    listed = list(keys)
    lines = [f"{what}: {key}" for key in listed[:SHOWN]]
    more = len(listed) - SHOWN
    return [*lines, f"{what}: {more} more"] if more > 0 else lines


def _own_classes(unfit: Sequence[Mismatch]) -> tuple[str, str]:
    """Guess from a head of another size how many classes the model should have."""
    counts = {mismatch.here[0] if mismatch.here and mismatch.there else None for mismatch in unfit}
    if len(counts) == 1 and None not in counts:
        option = f"--model-arg num_classes={counts.pop()}"
        return option, "makes the model with that many classes"
    return "--partial", "compares what both files have and the model takes"


def _peeling(source: Source) -> str:
    outer = wrapped(source)
    if not outer and not any(key.startswith(edits.DEFAULT_PREFIX) for key in source.state.entries):
        return ""
    extra = " --prefix auto" if outer and not outer.only_default else ""
    several = len(places.candidates(source.checkpoint.tree)) > 1
    at = f" --at {quoted(dotted(source.state.at))}" if several else ""
    return f"ckptool strip-prefix {text.argument(source.path)} OUT{extra}{at}"


def _mending(recipe: Recipe, source: Source, unfit: Sequence[Mismatch]) -> str:
    peeling = _peeling(source)
    if peeling and not unfit:
        return peeling
    if not isinstance(recipe.spec, str):
        return "with partial=True, what both have is compared"
    given = "".join(f" --model-arg {quoted(argument(*pair))}" for pair in recipe.args.items())
    model = f"--model {quoted(recipe.spec)}{given}"
    mend = f"ckptool transfer {text.argument(source.path)} OUT {model} --init-missing"
    return f"{mend}   (or verify with --partial, which compares what both have)"
