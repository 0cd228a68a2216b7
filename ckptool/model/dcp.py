"""Write a distributed checkpoint through `torch.distributed.checkpoint` itself, in one process.

What torch flattens is what it can shard: dicts, and lists that hold tensors or dicts. Any other
value is an entry of its own, pickled (torch/distributed/checkpoint/_traverse.py). Names of keys
are texts there, a dict without entries leaves no trace, and attributes (`_metadata`) are lost:
what is lost is said. The tensors are ckptool's own, mapped from the file: nothing is unpickled.

torch writes where it is, when it is and a random number into the index (`storage_meta`); it reads
an index without, and so the same input gives the same bytes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptool import containers
from ckptool.errors import EditError, KeyCollision, MissingExtra, NotRepresentable, Unsupported
from ckptool.files import atomic, fileio
from ckptool.files.atomic import Target
from ckptool.files.copying import Begin, Copy, Layout, Progress, no_progress, run_jobs
from ckptool.model import libraries, loading
from ckptool.model.outputs import as_bytes
from ckptool.model.revive import Reviver
from ckptool.pickles.tree import Node
from ckptool.state import checkpoint as places, walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.edits import Edit
from ckptool.tensors.tensor import TensorInfo
from ckptool.text import counted, listed
from ckptool.verbs import surgery
from ckptool.verbs.plan import Options, Plan, make_plan
from ckptool.verbs.surgery import Rewrite

if TYPE_CHECKING:
    from pathlib import Path

CONTAINER = "torch-dcp"
OURS = (".metadata", "__*.distcp", "__*.metadata")
BESIDE_A_TENSOR = 2048  # bytes of the archive around it, at most


def convert(
    source: str | Path,
    target: str | Path | None,
    steps: Sequence[Edit] = (),
    *,
    unwrap: bool = False,
    options: Options,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write a checkpoint as the folder of a distributed one, with its keys edited.

    Raises what `surgery.rewrite` raises, and `MissingExtra`; the folder is then as it was.
    """
    _saver()
    if target is None or options.in_place:
        raise EditError("a distributed checkpoint is a folder: name one as the output")
    checkpoint = containers.read(source)
    sources = [path for path, _ in checkpoint.files]
    place = atomic.refuse_folder(target, sources, force=options.force, sync=options.sync, ours=OURS)
    plan = make_plan(checkpoint, steps, CONTAINER, bare=unwrap, unwrap=False, options=options)
    with loading.on_device("cpu"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, on dtypes and classes that it will take away
        content = _content(plan, options)
        flat, meant = _flat(content)
        plan.notes += content.notes()
        nbytes = sum(_nbytes(value) for value in flat.values())
        surgery.refuse_expansion(checkpoint, Layout(nbytes, [], []), options)
        result = surgery.result_of(plan, str(target), Layout(nbytes, [], []), place, options)
        atomic.refuse_full(place, nbytes)
        if options.dry_run:
            return result
        return replace(result, nbytes=_write(place, plan, content, meant, progress))


def _saver() -> Any:
    libraries.torch()
    try:
        from torch.distributed.checkpoint import state_dict_saver
    except Exception as error:  # a build of torch without torch.distributed
        raise MissingExtra(
            "this build of torch has no torch.distributed", hint=libraries.INSTALL
        ) from error
    return state_dict_saver


# What is written: real values of the plain part of the tree.


@dataclass(slots=True)
class _Content:
    """Values as torch takes them, and what there is to say of them.

    `tensors` are those that are entries of their own, by the path that torch gives them;
    `unfit` gives the reason for each place whose value cannot be written.
    """

    make: Reviver
    values: dict[Any, Any] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    unfit: dict[str, str] = field(default_factory=dict)
    empty: list[str] = field(default_factory=list)
    numbered: list[str] = field(default_factory=list)
    parameters: list[str] = field(default_factory=list)
    around: list[int] = field(default_factory=list)

    def notes(self) -> Iterator[str]:
        """Say what a distributed checkpoint has no place for."""
        if self.empty:
            yield f"an empty dict leaves no trace in it: {listed(self.empty, 4)}"
        if self.numbered:
            yield f"keys that are no text become text: {listed(self.numbered, 4)}"
        if self.parameters:
            yield f"Parameters become plain tensors: {listed(self.parameters, 4)}"
        storages = [info.storage for info in self.tensors.values()]
        shared = len(storages) - len(set(storages))
        if shared:
            more = "1 copy" if shared == 1 else f"{shared} copies"
            yield f"tensors that share storage are written one by one: {more} more"


def _content(plan: Plan, options: Options) -> _Content:
    tree = plan.checkpoint.tree
    content = _Content(Reviver(plan.checkpoint.path))
    if places.items(tree) is None:
        raise NotRepresentable(
            f"{plan.checkpoint.path} holds no dict: a distributed checkpoint is one",
            option="--unwrap" if plan.state is not None else "",
            hint="writes the state_dict alone" if plan.state is not None else "",
        )
    content.values = _value(content, tree, ())
    if content.unfit and not options.tensors_only:
        shown = [f"{place}: {reason}" for place, reason in list(content.unfit.items())[:8]]
        count = counted(len(content.unfit), "value")
        raise NotRepresentable(
            f"a distributed checkpoint has no place for {count}",
            evidence=shown,
            option="--tensors-only",
            hint="leaves them behind",
        )
    plan.not_carried += content.unfit
    if plan.state is not None and plan.state.metadata is not None:
        plan.notes.append(
            "a distributed checkpoint has no place for `_metadata` (versions of modules)"
        )
    return content


_LEFT = object()


def _value(content: _Content, node: Node, path: tuple[str, ...]) -> Any:
    """Make the value of a node; what cannot be made is noted and left out."""
    pairs = places.items(node)
    inner: list[tuple[Any, Node]]
    if pairs is not None:
        inner = pairs
    elif isinstance(node, list) and any(places.items(each) is not None for each in node):
        inner = list(enumerate(node))
    else:
        return _leaf(content, node, path)
    if id(node) in content.around:
        content.unfit[walk.dotted(path)] = "a value that holds itself"
        return _LEFT
    if not inner and path:
        content.empty.append(walk.dotted(path))
    content.around.append(id(node))
    made = {}
    for key, each in inner:
        here = (*path, str(key))
        if pairs is not None and not isinstance(key, str):
            content.numbered.append(walk.dotted(here))
        value = _value(content, each, here)
        if value is not _LEFT:
            made[content.make(key)] = value
    content.around.pop()
    if pairs is not None:
        return made
    return list(made.values()) if len(made) == len(inner) else _LEFT


def _leaf(content: _Content, node: Node, path: tuple[str, ...]) -> Any:
    place = walk.dotted(path)
    try:
        value = content.make(node)
    except Unsupported as error:
        content.unfit[place] = error.message
        return _LEFT
    torch = libraries.torch()
    if not isinstance(value, torch.Tensor):
        return value
    if not isinstance(node, TensorInfo) or value.is_quantized or not _has_size(value.dtype):
        content.unfit[place] = "no plain tensor"
        return _LEFT
    content.tensors[place] = node
    if node.requires_grad:
        content.parameters.append(place)
    return value.detach().resolve_conj().resolve_neg()


def _has_size(dtype: Any) -> bool:
    """Tell whether torch's planner can size a dtype (torch/_utils.py, `_element_size`)."""
    torch = libraries.torch()
    if dtype.is_floating_point or dtype.is_complex or dtype is torch.bool:
        return True
    try:
        return bool(torch.iinfo(dtype))
    except TypeError:
        return False


def _flat(content: _Content) -> tuple[dict[str, Any], Any]:
    """Let torch flatten the values; give the entries, and what they are when nested again.

    Raises `KeyCollision` where two get one name.
    """
    from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict

    try:
        flat, paths = flatten_state_dict(content.values)
    except ValueError as error:
        raise KeyCollision(
            f"with their keys joined by dots, two entries would have one name: {error}"
        ) from None
    return flat, unflatten_state_dict(flat, paths)


def _nbytes(value: Any) -> int:
    return BESIDE_A_TENSOR + int(getattr(value, "nbytes", 0))


# Writing.


def _write(place: Target, plan: Plan, content: _Content, meant: Any, progress: Begin) -> int:
    """Check the source's checksums, write, read back, publish; give the bytes of the folder."""
    storages = dict.fromkeys(info.storage for info in content.tensors.values())
    jobs = [Copy(storage, None) for storage in storages]
    written = sum(info.nbytes for info in content.tensors.values())
    step = progress(sum(job.nbytes for job in jobs) + written)
    run_jobs(list(jobs), None, step)
    with atomic.atomic_folder(place) as folder:
        _save(folder, content.values, step)
        for path, stamp in plan.checkpoint.files:
            fileio.refuse_changed(path, stamp)
        found = containers.read(folder)
        _verify(found, meant)
        return found.nbytes


def _save(folder: str, values: dict[Any, Any], step: Progress) -> None:
    """Let torch write the folder; raises what stopped it, which torch wraps."""
    saver = _saver()
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    class Writer(FileSystemWriter):
        def storage_meta(self) -> None:
            return None

    class Planner(DefaultSavePlanner):
        def resolve_data(self, write_item: Any) -> Any:
            data = super().resolve_data(write_item)
            step(getattr(data, "nbytes", 0))
            return data

    try:
        writer = Writer(folder, sync_files=False)
        saver._save_state_dict(values, writer, no_dist=True, planner=Planner())
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: Any) -> BaseException:
    """Find what stopped torch: an error of the system, if one is behind it."""
    first: BaseException = next(iter(error.failures.values()))[0]
    chain, each = [], first
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__  # type: ignore[assignment]
    return next((each for each in chain if isinstance(each, OSError)), first)


# Reading back.


def _verify(written: Checkpoint, meant: Any) -> None:
    """Compare what our reader finds in the folder with what was meant, to the byte."""
    if not _same(written.path, written.tree, meant):
        raise RuntimeError("the written folder does not read back as it was meant")


def _same(folder: str, node: Node, meant: Any) -> bool:
    """Compare one value after the other: what lies at an odd byte is copied to be looked at."""
    match meant:
        case dict():
            pairs = places.items(node) or []
            same = [key for key, _ in pairs] == [*meant]
            return same and all(_same(folder, each, meant[key]) for key, each in pairs)
        case list() if isinstance(node, list) and len(node) == len(meant):
            return all(_same(folder, one, other) for one, other in zip(node, meant, strict=True))
    value = Reviver(folder)(node)
    if not isinstance(node, TensorInfo):
        return repr(value) == repr(meant)
    alike = (value.dtype, value.shape) == (meant.dtype, meant.shape)
    return alike and bool(libraries.torch().equal(as_bytes(value), as_bytes(meant)))
