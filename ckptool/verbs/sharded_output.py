"""Write a checkpoint as a set of shards: the second way out of a plan.

The set is always a bare state_dict. Each shard is planned, written and checked like a file of its
own; then the whole set is read back through its index and compared with what was meant.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.containers import sharding
from ckptool.containers.sharding import Names, Split
from ckptool.errors import EditError
from ckptool.files import atomic, atomic_set, copying, fileio
from ckptool.files.atomic import Target
from ckptool.files.copying import Begin, Layout, Progress, no_progress
from ckptool.state import checkpoint as places, replacing
from ckptool.state.edits import Edit
from ckptool.text import readable
from ckptool.verbs import surgery
from ckptool.verbs.plan import Options, Plan, make_plan
from ckptool.verbs.surgery import Rewrite, Shard

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class _File:
    """A shard on its way."""

    name: str
    keys: list[str]
    layout: Layout


def rewrite_sharded(
    source: str | Path,
    target: str | Path | None,
    steps: Sequence[Edit] = (),
    *,
    max_shard_size: int,
    options: Options | None = None,
    progress: Begin = no_progress,
) -> Rewrite:
    """Write the state_dict of a checkpoint into a folder, in shards of at most so many bytes.

    A set of one shard is a single file without an index. The container is safetensors where
    `options` do not say `torch`. Raises a `CkptoolError`; the folder is then as it was.
    """
    options = options or Options()
    if options.in_place or target is None:
        raise EditError("--max-shard-size writes a folder", hint="name it as the output")
    if surgery.suffix(str(target)) in containers.suffixes(written=True):
        raise EditError(
            f"--max-shard-size writes a folder, and {target} is the name of a file",
            hint="name a folder as the output",
        )
    checkpoint = containers.read(source)
    container = containers.by_word(options.to or "safetensors")
    names = _names(container.name)
    sources = [path for path, _ in checkpoint.files]
    place = atomic_set.refuse_set(
        target, sources, names.owns, force=options.force, sync=options.sync
    )
    plan = make_plan(checkpoint, steps, container.name, bare=True, unwrap=False, options=options)
    plan = _bare(plan)
    assert plan.state is not None
    split = sharding.split(plan.state.entries, max_shard_size, storages=container.traits.strides)
    files = _files(plan, split, options)
    index = _index(plan, split, files) if len(files) > 1 else b""
    _note_large(plan, files, max_shard_size)
    whole = Layout(
        len(index) + sum(each.layout.nbytes for each in files),
        [job for each in files for job in each.layout.jobs],
        [],
    )
    surgery.refuse_expansion(checkpoint, whole, options)
    shards = tuple(Shard(each.name, len(each.keys), each.layout.nbytes) for each in files)
    result = replace(surgery.result_of(plan, str(target), whole, place, options), shards=shards)
    atomic.refuse_full(place, whole.nbytes)
    if not options.dry_run:
        _write(place, files, index, plan, progress(whole.job_nbytes))
    return result


def _names(container: str) -> Names:
    writer = containers.by_name(container).writer
    assert writer is not None
    return Names(writer.set_stem, writer.set_suffix)


def _bare(plan: Plan) -> Plan:
    """Leave the attributes of the state_dict behind that a shard has no place for."""
    assert plan.state is not None
    state = getattr(plan.checkpoint.tree, "state", None)
    attributes = [name for name, _ in places.named_items(state)]
    plan.not_carried += [name for name in attributes if name != "_metadata"]
    return _part(plan, list(plan.state.entries))


def _part(plan: Plan, keys: Sequence[str]) -> Plan:
    """Give the plan of a file with some of the entries, and the versions of all modules."""
    assert plan.state is not None
    entries = {key: plan.state.entries[key] for key in keys}
    tree = replacing.make_state_dict(entries, plan.state.metadata)
    return replace(
        plan,
        checkpoint=replace(plan.checkpoint, tree=tree),
        state=replace(plan.state, entries=entries),
    )


def _files(plan: Plan, split: Split, options: Options) -> list[_File]:
    names = _names(plan.container).shards(len(split.shards))
    return [
        _File(name, keys, surgery.lay_out(_part(plan, keys), options))
        for name, keys in zip(names, split.shards, strict=True)
    ]


def _index(plan: Plan, split: Split, files: Sequence[_File]) -> bytes:
    assert plan.state is not None
    ties = containers.by_name(plan.container).traits.ties
    tied = set() if ties else surgery.tied(plan)
    shards = {each.name: each.keys for each in files}
    return sharding.index(list(plan.state.entries), shards, tied, split.total_nbytes)


def _note_large(plan: Plan, files: Sequence[_File], limit: int) -> None:
    large = [each for each in files if each.layout.job_nbytes > limit and len(files) > 1]
    if large:
        what = "shard is" if len(large) == 1 else "shards are"
        plan.notes.append(
            f"{len(large)} {what} larger than {readable(limit)}: tensors are not cut in pieces"
        )


def _write(
    place: Target, files: Sequence[_File], index: bytes, plan: Plan, progress: Progress
) -> None:
    names = _names(plan.container)
    with atomic_set.atomic_set(place, names.owns, names.index) as folder:
        for each in files:
            path = os.path.join(folder, each.name)
            with atomic_set.new_file(path, sync=place.sync) as fd:
                copying.write_layout(fd, each.layout, progress, sync=place.sync)
        if index:
            path = os.path.join(folder, names.index)
            with atomic_set.new_file(path, sync=place.sync) as fd:
                fileio.write_at(fd, index, 0)
        for path, stamp in plan.checkpoint.files:
            fileio.refuse_changed(path, stamp)
        nbytes = len(index) + sum(each.layout.nbytes for each in files)
        read = os.path.join(folder, names.index if index else files[0].name)
        surgery.verify(read, place, nbytes, plan)
