"""Whole-file verbs: read, edit, refuse, write, check, publish.

Everything that can be refused is refused before the first byte is written; the report says what
happened to every entry of the state_dict.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import EditError, FormatError, OutputExists, WriteError
from ckptool.files import budget, fileio, paths, publish, sites
from ckptool.files.copying import Begin, Done, Moved, Progress, no_progress
from ckptool.files.group import ALONE, Group
from ckptool.files.publish import Output, Target
from ckptool.files.stream import Pipe
from ckptool.pickles.tree import Node
from ckptool.records import dataclass, plain
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.edits import Count, Edit, KeyMap
from ckptool.tensors import numbers, values
from ckptool.tensors.tensor import AnyTensor, Packing, Storage, TensorInfo, tensors_of
from ckptool.text import counted, listed, readable, visible
from ckptool.verbs import casting, destination
from ckptool.verbs.casting import Cast
from ckptool.verbs.layout import (
    FILE as FILE,
    Form as Form,
    Laid,
    Shard as Shard,
    lay_out,
    tied,
)
from ckptool.verbs.options import Options
from ckptool.verbs.plan import Dropped, Plan, add_entries, make_plan

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

    from ckptool.documents import editing


__all__ = ["Dropped", "Options", "Rewrite", "rewrite"]

MAX_EXPANSION = 4
MAX_INFLATION = 16  # times that: each view of a deflated storage inflates it anew
Check = Callable[[str, Moved], None]
SMALL_OUTPUT = 1 << 20  # below this, growth is headers and alignment


@dataclass(frozen=True, slots=True)
class Rewrite:
    """What a rewrite did, or would do: the source of every report."""

    source: str
    target: str
    container: str
    at: tuple[str, ...] | None
    map: tuple[tuple[str, str | None], ...]
    dropped: tuple[Dropped, ...]
    written: int
    nbytes: int
    tensor_nbytes: int
    not_carried: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    dry_run: bool = False
    free: int | None = None
    added: int = 0
    bare: bool = False
    tensors: int = 0
    said: tuple[str, ...] = ()
    counts: tuple[Count, ...] = ()
    remade: tuple[str, ...] = ()
    module: str = ""
    shards: tuple[Shard, ...] = ()
    casts: tuple[Cast, ...] = ()
    files: tuple[str, ...] = ()  # that it is read from

    @property
    def read(self) -> int:
        """Count the entries that were read."""
        return len({old for old, _ in self.map})

    @property
    def renamed(self) -> int:
        """Count the entries that are written under another name alone."""
        own = {old for old, new in self.map if new == old}
        return len({old for old, new in self.map if new is not None} - own)

    @property
    def kept(self) -> int:
        """Count the entries that are written under their own name."""
        return sum(1 for old, new in self.map if new == old)

    def __repr__(self) -> str:
        verb = "would write" if self.dry_run else "written"
        files = f"{visible(self.source)} -> {visible(self.target)}"
        return f"<Rewrite {files}: read {self.read}, {verb} {self.written}>"

    def to_dict(self) -> editing.Rewrite:
        """Return the document `rewrite/1`."""
        return {
            "schema": "rewrite/1",
            "source": self.source,
            "target": self.target,
            "container": self.container,
            "at": plain(self.at),
            "module": self.module,
            "read": self.read,
            "kept": self.kept,
            "renamed": self.renamed,
            "written": self.written,
            "dropped": [{"key": each.key, "reason": each.reason} for each in self.dropped],
            "not_carried": list(self.not_carried),
            "map": plain(self.map),
            "rules": plain(self.counts),
            "nbytes": self.nbytes,
            "added": self.added,
            "notes": [*self.warnings, *self.notes],
            "dry_run": self.dry_run,
            "shards": [
                {"file": each.name, "count": each.count, "nbytes": each.nbytes}
                for each in self.shards
            ],
            "casts": [each.to_dict() for each in self.casts],
        }


@containers.without_collection()
def rewrite(
    source: str | Path,
    target: str | Path | None,
    steps: Sequence[Edit] = (),
    *,
    bare: bool = False,
    unwrap: bool = False,
    options: Options | None = None,
    progress: Begin = no_progress,
    opened: Checkpoint | None = None,
    added: Mapping[str, Node] | None = None,
    order: Sequence[str] = (),
    form: Form = FILE,
    accept: Callable[[], None] = lambda: None,
    group: Group = ALONE,
) -> Rewrite:
    """Write a checkpoint again with its keys edited.

    `bare` writes the state_dict alone; `unwrap` also refuses one that is bare already. `opened`
    is the source where it was read before; `added` are entries from elsewhere to write with the
    others, in the `order` given; `accept` may raise an error once all is written and before it is
    published. All ranks of a `group` write, and rank 0 alone counts what casts lose. Raises a
    `CkptoolError`; the target is then as it was.
    """
    options = options or Options()
    target = None if target is None else sites.of(target)
    if form is not FILE:
        destination.refuse_no_folder(target, form, options)
    checkpoint = opened or containers.read(source)
    if form is FILE:
        target, options = destination.in_place(checkpoint, source, target, options)
        destination.refuse_member(str(target))
    target = target if isinstance(target, paths.Url | Pipe) else str(target)
    container = destination.container_of(checkpoint, target, form, options)
    place = destination.place_of(checkpoint, target, container, form, options)
    bare = bare or form.max_shard_size is not None
    plan = make_plan(checkpoint, steps, container, bare=bare, unwrap=unwrap, options=options)
    if form is FILE and place.pipe is None:
        plan.notes += destination.suffix_notes(target, container, options)
    if added:
        add_entries(plan, added, order)
    if options.map_location is not None:
        _tag(plan, options.map_location, form)
    laid = lay_out(plan, form)
    _refuse_expansion(checkpoint, laid.output, options)
    result = _result(plan, target, laid, place)
    publish.refuse_full(place, laid.output.nbytes)
    if group.size > 1:
        from ckptool.verbs import agreement

        agreement.refuse_others(group, plan.checkpoint, place, laid.output)
    if options.dry_run:
        for file, _ in checkpoint.files:  # an interruption of a finalizer is lost
            fileio.close(file)
        return result
    if any(values.has_numbers(job.storage) for job in laid.output.jobs):
        numbers.load()
    judge = partial(_accept, plan, accept, place)
    check = partial(_check, plan, judge, place, _meant(plan, laid), laid.output.nbytes)
    outputs = [laid.output]
    if place.pipe is not None:
        late = _pipe(place.pipe, laid.output, progress, judge)
    else:
        begun = progress(laid.output.job_nbytes)
        del laid, checkpoint  # the plan has what is still needed of both
        plan.let_go()
        send = _send if place.url else publish.publish
        late = send(place, outputs.pop(), begun, check, group)  # the only one to keep its jobs
    publish.PUBLISHED[:] = [place.path]
    return replace(result, warnings=(*result.warnings, *late), casts=tuple(plan.casts))


DEVICES = r"cpu|mps|(cuda|xpu|hpu)(:\d{1,3})?"  # that torch.load restores


def _tag(plan: Plan, location: str, form: Form) -> None:
    """Have all storages tagged with a device; refuse where the output has no tags."""
    if not re.fullmatch(DEVICES, location, re.ASCII):
        raise EditError(f"`{location}` is not a device", hint="--map-location cpu, or cuda:0")
    container = plan.kind
    if form.distributed or not container.traits.device_tags:
        raise EditError(
            f"{container.title} has no device tags: --map-location is for torch files",
            hint="leave it out: what loads the file chooses the device",
        )
    location = "cuda:0" if location == "cuda" else location
    stored = (each for _, info in walk.tensors(plan.checkpoint.tree) for each in _storages(info))
    found = {storage for storage in stored if storage.location != location}
    tags = Counter(storage.location for storage in found)
    were = [f"{counted(count, 'storage')} of {tag}" for tag, count in tags.items()]
    plan.notes.append(f"tagged {location}: {listed(were) if were else 'all storages were'}")
    plan.checkpoint = replace(plan.checkpoint, location=location)


def _send(
    place: Target, output: Output, progress: Progress, check: Check, group: Group
) -> list[str]:
    from ckptool.files import uploads

    if group is not ALONE:
        raise EditError(
            f"{place.path} is in a store: all ranks write to one file system",
            hint="name a folder as the output",
        )
    return uploads.publish(place, output, progress, check)


def _pipe(pipe: Pipe, output: Output, progress: Begin, accept: Callable[[], None]) -> list[str]:
    from ckptool.files import piping

    (file,) = output.files
    times = 2 if piping.is_read_twice(file) else 1
    piping.publish(pipe, file, progress(times * output.job_nbytes), accept)
    return []


def _refuse_expansion(checkpoint: Checkpoint, output: Output, options: Options) -> None:
    """Refuse an output far larger than the input: a kilobyte can declare terabytes."""
    if options.allow_expand:
        return
    limit = max(MAX_EXPANSION * checkpoint.nbytes, SMALL_OUTPUT)
    packed = (job.storage for job in output.jobs if job.storage.packing is not Packing.PLAIN)
    read = (each for storage in packed for each in {*values.stored(storage)})
    inflated = sum(each.nbytes for each in read if each.packing is not Packing.PLAIN)
    available = readable(checkpoint.nbytes)
    nbytes = output.nbytes + casting.saved(output.jobs)
    if inflated > MAX_INFLATION * limit:
        message = f"{readable(inflated)} would be inflated from {available}"
    elif nbytes > limit:
        message = f"the output would have {readable(nbytes)}, the input has {available}"
    else:
        return
    raise WriteError(message, option="--allow-expand", hint="if that is intended")


def _result(plan: Plan, target: str, laid: Laid, place: Target) -> Rewrite:
    """Return what a plan does."""
    entries = plan.state.entries if plan.state is not None else {}
    again = tied(plan)
    infos = [value for key, value in tensors_of(entries).items() if key not in again]
    if plan.state is None:
        infos = [info for _, info in walk.tensors(plan.checkpoint.tree)]
    not_carried = [*plan.not_carried, *plan.checkpoint.unread]
    return Rewrite(
        source=plan.checkpoint.path,
        target=target,
        container=plan.container,
        at=plan.state.at if plan.state is not None else None,
        module=plan.state.module if plan.state is not None else "",
        map=plan.key_map.pairs,
        said=plan.key_map.said,
        counts=plan.key_map.counts,
        remade=_rearranged(plan.key_map),
        dropped=tuple(plan.dropped),
        written=len(plan.key_map.written) + plan.added,
        added=plan.added,
        nbytes=laid.output.nbytes,
        tensors=len(infos),
        tensor_nbytes=sum(info.nbytes for info in infos),
        not_carried=tuple(not_carried),
        notes=tuple(plan.notes),
        warnings=tuple(plan.warnings),
        bare=plan.bare,
        dry_run=plan.options.dry_run,
        free=publish.free_space(place),
        shards=laid.shards,
        casts=tuple(map(casting.planned, plan.key_map.casts)),
        files=tuple(str(path) for path, _ in plan.checkpoint.files),
    )


def _rearranged(key_map: KeyMap) -> tuple[str, ...]:
    """Return the keys that hold their tensor with its elements in another order or shape."""
    same = (old for old, new in key_map.pairs if old == new)
    return tuple(old for old in same if old in key_map.remade)


def _accept(plan: Plan, accept: Callable[[], None], place: Target) -> None:
    """Raise what is wrong with what was read, once all of it was: `Overflow`, for one."""
    accept()
    plan.casts += map(casting.written, plan.key_map.casts)
    for source, _ in plan.checkpoint.files:
        fileio.refuse_changed(source)
        if plan.options.in_place and isinstance(source, fileio.OpenFile) and source.replaced():
            raise OutputExists(
                f"{place.path} was replaced by another process meanwhile; it was not changed",
                hint="run it again",
            )


def _check(
    plan: Plan,
    accept: Callable[[], None],
    place: Target,
    meant: Meant,
    nbytes: int,
    path: str,
    moved: Moved,
) -> None:
    """Read the output with the strict reader and compare it with what was meant."""
    accept()
    try:
        with budget.run(budget.UNBOUNDED):  # the run has it in memory already
            written = containers.read(path)
    except FormatError as error:
        raise WriteError(
            f"{place.path} cannot be written: what was written does not read back; nothing was "
            "kept",
            evidence=[error.message],
            hint="check the disk",
        ) from error
    kept = plan.checkpoint.kept == (written.unread if plan.checkpoint.kept else ())
    if not (kept and written.nbytes == nbytes and _is_meant(written.tree, meant, moved)):
        raise RuntimeError("the written file does not read back as written")
    for file, _ in (*plan.checkpoint.files, *written.files):
        fileio.close(file)  # Windows replaces no file that is open


@dataclass(frozen=True, slots=True)
class Meant:
    """The tensors that an output is to read back as: the path of each, and what there is of it.

    With `strided`, that is also how it is in its storage.
    """

    tensors: list[tuple[walk.Path, tuple[object, ...]]]
    strided: bool


def _meant(plan: Plan, laid: Laid) -> Meant:
    traits = plan.kind.traits
    strided = traits.strides and not traits.beside_files  # each entry there has its own storage
    known: dict[tuple[object, ...], tuple[object, ...]] = {}
    described = ((path, _described(info, strided)) for path, info in laid.tensors)
    return Meant([(path, known.setdefault(each, each)) for path, each in described], strided)


def _is_meant(tree: Node, meant: Meant, moved: Moved) -> bool:
    """Return whether a tree has the tensors that were meant, with the bytes that jobs wrote."""
    expected, files = iter(meant.tensors), dict[str, dict[int, Done]]()
    for path, info in walk.tensors(tree):
        if next(expected, None) != (path, _described(info, meant.strided)):
            return False
        for storage in _storages(info):
            file = files.get(storage.path)
            if file is None:
                file = files[storage.path] = moved.get(os.path.basename(storage.path), {})
            if storage.nbytes and not _is_moved(storage, file.get(storage.start)):
                return False
    return next(expected, None) is None


def _is_moved(storage: Storage, done: Done | None) -> bool:
    """Return whether a job has written these bytes, with the checksum that the file records."""
    return (
        done is not None and done.nbytes == storage.nbytes and storage.crc32 in (None, done.crc32)
    )


def _storages(tensor: AnyTensor) -> Iterable[Storage]:
    """Iterate over the storages that a tensor is in, those of chunks for a chunked one."""
    if isinstance(tensor, TensorInfo):
        return values.stored(tensor.storage)
    return (each for part in tensor.parts for each in values.stored(part.storage))


def _described(info: AnyTensor, strided: bool) -> tuple[object, ...]:
    if strided and isinstance(info, TensorInfo):
        layout = (info.stride, info.storage_offset, info.storage.nbytes, info.requires_grad)
        return (info.dtype, info.shape, *layout)
    return (info.dtype, info.shape)
