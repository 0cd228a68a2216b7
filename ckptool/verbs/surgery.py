"""Whole-file verbs: read, edit, refuse, write, check, publish.

Everything that can be refused is refused before the first byte is written; the report says what
happened to every entry of the state_dict.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.errors import EditError, FormatError, WriteError
from ckptool.files import atomic, copying, fileio
from ckptool.files.atomic import Target
from ckptool.files.copying import Begin, Layout, Progress, no_progress
from ckptool.pickles.tree import Node
from ckptool.state import walk
from ckptool.state.checkpoint import Checkpoint
from ckptool.state.edits import Edit
from ckptool.tensors.tensor import TENSORS, Packing, TensorInfo
from ckptool.text import quoted, readable, visible
from ckptool.verbs.plan import Dropped, Options, Plan, add_entries, make_plan

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

__all__ = ["Dropped", "Options", "Rewrite", "rewrite"]

MAX_EXPANSION = 4
MAX_INFLATION = 16  # times that: each view of a deflated storage inflates it anew
SMALL_OUTPUT = 1 << 20  # below this, growth is headers and alignment


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a set: its name in the folder, how many entries it holds, its size."""

    name: str
    count: int
    nbytes: int


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
    module: str = ""
    shards: tuple[Shard, ...] = ()

    @property
    def read(self) -> int:
        """Count the entries that were read."""
        return len(self.map)

    @property
    def renamed(self) -> int:
        """Count the entries that are written under another name."""
        return sum(1 for old, new in self.map if new is not None and new != old)

    @property
    def kept(self) -> int:
        """Count the entries that are written under their own name."""
        return sum(1 for old, new in self.map if new == old)

    def __repr__(self) -> str:
        verb = "would write" if self.dry_run else "written"
        files = f"{visible(self.source)} -> {visible(self.target)}"
        return f"<Rewrite {files}: read {self.read}, {verb} {self.written}>"

    def to_dict(self) -> dict[str, object]:
        """Return the document `rewrite/1`."""
        return {
            "schema": "rewrite/1",
            "source": self.source,
            "target": self.target,
            "container": self.container,
            "at": None if self.at is None else list(self.at),
            "module": self.module,
            "read": self.read,
            "kept": self.kept,
            "renamed": self.renamed,
            "written": self.written,
            "dropped": [{"key": each.key, "reason": each.reason} for each in self.dropped],
            "not_carried": list(self.not_carried),
            "map": [[old, new] for old, new in self.map],
            "nbytes": self.nbytes,
            "added": self.added,
            "notes": [*self.warnings, *self.notes],
            "dry_run": self.dry_run,
            "shards": [
                {"file": each.name, "count": each.count, "nbytes": each.nbytes}
                for each in self.shards
            ],
        }


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
) -> Rewrite:
    """Write a checkpoint again with its keys edited.

    `bare` writes the state_dict alone; `unwrap` also refuses one that is bare already. `opened`
    is the source where it was read before; `added` are entries from elsewhere to write with the
    others, in the `order` given. Raises a `CkptoolError`; the target is then as it was.
    """
    options = options or Options()
    checkpoint = opened or containers.read(source)
    target, options = _in_place(checkpoint, source, target, options)
    _refuse_member(str(target))
    container = _container(checkpoint, str(target), options)
    place = atomic.refuse_target(
        target,
        [path for path, _ in checkpoint.files] if not options.in_place else [],
        force=options.force,
        sync=options.sync,
    )
    plan = make_plan(checkpoint, steps, container, bare=bare, unwrap=unwrap, options=options)
    plan.notes += _suffix_notes(str(target), container, options)
    if added:
        add_entries(plan, added, order)
    layout = lay_out(plan, options)
    refuse_expansion(checkpoint, layout, options)
    result = result_of(plan, str(target), layout, place, options)
    atomic.refuse_full(place, layout.nbytes)
    if not options.dry_run:
        _write(place, layout, plan, progress(layout.job_nbytes))
    return result


def _refuse_member(target: str) -> None:
    archive = containers.member_of(target)
    if archive:
        raise WriteError(
            f"{target} is in the archive {archive}: its members are read, never written",
            hint="name an output of its own",
        )


def _in_place(
    checkpoint: Checkpoint, source: str | Path, target: str | Path | None, options: Options
) -> tuple[str | Path, Options]:
    if options.in_place:
        if target is not None:
            raise EditError("--in-place takes the input alone, without an output")
        if len(checkpoint.files) > 1 or os.path.isdir(source):
            what = "a folder" if os.path.isdir(source) else f"{len(checkpoint.files)} files"
            raise EditError(
                f"{source} is {what}: --in-place replaces one file", hint="name an output"
            )
        return source, replace(options, force=True)
    if target is None:
        raise EditError("no output was named", hint="name one, or use --in-place")
    return target, options


def suffix(target: str) -> str:
    """Give the suffix of a name, in lower case."""
    return os.path.splitext(target)[1].lower()


def _container(checkpoint: Checkpoint, target: str, options: Options) -> str:
    """Choose the output container: as told, by the suffix, or the input's own (in place too)."""
    if options.to == "dcp":
        raise EditError(
            "only convert writes a distributed checkpoint, and it takes edits as options",
            hint=f"ckptool convert {quoted(checkpoint.path)} {quoted(target)} --to dcp "
            "--strip-prefix auto --drop PATTERN ...",
        )
    if options.to is not None:
        return containers.by_word(options.to).name
    named = containers.by_suffix(suffix(target))
    if named is not None and not options.in_place:
        return named.name
    own = containers.by_name(checkpoint.container)
    return own.name if own.writer else own.written_as


def _suffix_notes(target: str, container: str, options: Options) -> list[str]:
    """Note a suffix that says nothing of the container, where nobody chose, or another one."""
    what = f"{target} is a {containers.by_name(container).title} file: its suffix"
    named = containers.by_suffix(suffix(target))
    if named is not None:
        return [] if named.name == container else [f"{what} says {named.word}"]
    chosen = options.to is not None or options.in_place
    return [] if chosen else [f"{what} does not say; --to chooses"]


def lay_out(plan: Plan, options: Options) -> Layout:
    """Plan the bytes of the output."""
    entries = plan.state.entries if plan.state is not None else None
    writer = containers.by_name(plan.container).writer
    assert writer is not None
    return writer.lay_out(plan.checkpoint, entries, options.untie)


def refuse_expansion(checkpoint: Checkpoint, layout: Layout, options: Options) -> None:
    """Refuse an output far larger than the input: a kilobyte can declare terabytes."""
    limit = max(MAX_EXPANSION * checkpoint.nbytes, SMALL_OUTPUT)
    inflated = sum(
        job.storage.nbytes for job in layout.jobs if job.storage.packing is not Packing.PLAIN
    )
    if inflated > MAX_INFLATION * limit and not options.allow_expand:
        raise WriteError(
            f"{readable(inflated)} would be inflated from {readable(checkpoint.nbytes)}",
            option="--allow-expand",
            hint="if that is meant",
        )
    if layout.nbytes > limit and not options.allow_expand:
        raise WriteError(
            f"the output would have {readable(layout.nbytes)}, the input has "
            f"{readable(checkpoint.nbytes)}",
            option="--allow-expand",
            hint="if that is meant",
        )


def result_of(
    plan: Plan,
    target: str,
    layout: Layout,
    place: Target,
    options: Options,
) -> Rewrite:
    """Say what a plan does."""
    entries = plan.state.entries if plan.state is not None else {}
    again = tied(plan)
    infos = [
        value for key, value in entries.items() if isinstance(value, TENSORS) and key not in again
    ]
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
        dropped=tuple(plan.dropped),
        written=len(plan.key_map.written) + plan.added,
        added=plan.added,
        nbytes=layout.nbytes,
        tensors=len(infos),
        tensor_nbytes=sum(info.nbytes for info in infos),
        not_carried=tuple(not_carried),
        notes=tuple(plan.notes),
        warnings=tuple(plan.warnings),
        bare=plan.bare,
        dry_run=options.dry_run,
        free=atomic.free_space(place),
    )


def tied(plan: Plan) -> set[str]:
    """Name the entries that are written under another name, to which they are tied."""
    return {each.name for each in plan.dropped if each.reason.startswith("tied to ")}


def _write(place: Target, layout: Layout, plan: Plan, progress: Progress) -> None:
    with atomic.atomic_output(place) as (fd, temporary):
        copying.write_layout(fd, layout, progress, sync=place.sync)
        for path, stamp in plan.checkpoint.files:
            fileio.refuse_changed(path, stamp)
        verify(temporary, place, layout.nbytes, plan)


def verify(temporary: str, place: Target, nbytes: int, plan: Plan) -> None:
    """Read the written file with the strict reader and compare it with what was meant."""
    try:
        found = containers.read(temporary)
    except FormatError as error:
        raise WriteError(
            f"{place.path} cannot be written: what was written does not read back; nothing was "
            "kept",
            evidence=[error.message],
            hint="look whether the disk is sound",
        ) from error
    meant: list[tuple[tuple[str, ...], Node]]
    traits = containers.by_name(plan.container).traits
    if traits.around:
        meant = [(path, info) for path, info in walk.tensors(plan.checkpoint.tree)]
    else:
        assert plan.state is not None
        meant = [((key,), value) for key, value in plan.state.entries.items()]
    seen = list(walk.tensors(found.tree))
    same = len(meant) == len(seen) and all(
        one == other and _described(a, traits.strides) == _described(b, traits.strides)
        for (one, a), (other, b) in zip(meant, seen, strict=True)
    )
    if not same or found.nbytes != nbytes:
        raise RuntimeError("the written file does not read back as it was meant")


def _described(info: Node, strided: bool) -> tuple[object, ...]:
    if strided and isinstance(info, TensorInfo):
        layout = (info.stride, info.storage_offset, info.storage.nbytes, info.requires_grad)
        return (info.dtype, info.shape, *layout)
    return (info.dtype, info.shape)
