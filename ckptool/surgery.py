"""Whole-file verbs: read, edit, refuse, write, check, publish.

Everything that can be refused is refused before the first byte is written; the report says what
happened to every entry of the state_dict.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptool import checkpoint as places, edits, fileio, formats, safety
from ckptool.checkpoint import Checkpoint, StateDict
from ckptool.edits import Edit, KeyMap
from ckptool.errors import EditError, NotRepresentable, UnsafePickle, WriteError
from ckptool.fileio import Begin, Layout, Progress, Target
from ckptool.formats import safetensors, torch_zip
from ckptool.tensor import TENSORS, TensorInfo
from ckptool.text import readable
from ckptool.tree import Dict, Node

if TYPE_CHECKING:  # pathlib takes as long to load as half the engine
    from pathlib import Path

MAX_EXPANSION = 4
SMALL_OUTPUT = 1 << 20  # below this, growth is headers and alignment


@dataclass(frozen=True, slots=True)
class Options:
    """What every command that writes can be told."""

    at: str | None = None
    to: str | None = None
    force: bool = False
    in_place: bool = False
    dry_run: bool = False
    tensors_only: bool = False
    untie: bool = False
    allow_expand: bool = False
    sync: bool = True


@dataclass(frozen=True, slots=True)
class Dropped:
    """An entry that was not written, and why; `name` is the key as edits had left it."""

    key: str
    name: str
    reason: str
    shape: tuple[int, ...] | None = None


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


@dataclass(slots=True)
class _Plan:
    """A rewrite on its way: what will be written, and what there is to say of it."""

    checkpoint: Checkpoint
    state: StateDict | None
    key_map: KeyMap
    container: str
    not_carried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    added: int = 0


def no_progress(total: int) -> Progress:
    """Draw nothing."""
    return lambda nbytes: None


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
    checkpoint = opened or formats.read(source)
    target, options = _in_place(source, target, options)
    container = _container(checkpoint, str(target), options.to)
    place = fileio.refuse_target(
        target,
        [checkpoint.path] if not options.in_place else [],
        force=options.force,
        sync=options.sync,
    )
    plan = _plan(checkpoint, steps, container, bare=bare, unwrap=unwrap, options=options)
    if added:
        _add(plan, added, order)
    layout = _lay_out(plan, options)
    _refuse_expansion(checkpoint, layout, options)
    result = _result(plan, str(target), layout, place, options)
    if not options.dry_run:
        fileio.refuse_full(place, layout.nbytes)
        _write(place, layout, plan, progress(layout.job_nbytes))
    return result


def _in_place(
    source: str | Path, target: str | Path | None, options: Options
) -> tuple[str | Path, Options]:
    if options.in_place:
        if target is not None:
            raise EditError("--in-place takes the input alone, without an output")
        return source, replace(options, force=True)
    if target is None:
        raise EditError("no output was named", hint="name one, or use --in-place")
    return target, options


_BY_WORD = {"torch": "torch-zip", "safetensors": "safetensors"}


def _container(checkpoint: Checkpoint, target: str, to: str | None) -> str:
    """Choose the output container: as told, by the suffix, or the input's own."""
    if to is not None:
        return _BY_WORD[to]
    suffix = os.path.splitext(target)[1].lower()
    for each in formats.FORMATS:
        if suffix in each.suffixes:
            return each.name
    own = formats.BY_NAME.get(checkpoint.container)
    return own.name if own is not None and own.writable else "torch-zip"


def _plan(
    checkpoint: Checkpoint,
    steps: Sequence[Edit],
    container: str,
    *,
    bare: bool,
    unwrap: bool,
    options: Options,
) -> _Plan:
    """Edit the tree in memory."""
    bare = bare or container == "safetensors"
    needed = bool(steps) or bare or options.at is not None
    state = places.find(checkpoint, options.at) if needed else places.find_or_none(checkpoint)
    if unwrap and state is not None and not state.at:
        raise EditError(
            f"{checkpoint.path} is a bare state_dict: nothing to unwrap",
            hint="ckptool convert writes it again as it is",
        )
    keys = list(state.entries) if state else _all_keys(checkpoint)
    key_map, edit = edits.apply(steps, keys)
    plan = _Plan(checkpoint, state, key_map, container, notes=list(checkpoint.notes))
    if state is not None:
        plan.notes += state.notes
        _edit_state(plan, state, edit, bare=bare, changed=bool(steps))
    _leave_behind(plan, bare=bare, options=options)
    _judge(plan, bare=bare, options=options)
    return plan


def _all_keys(checkpoint: Checkpoint) -> list[str]:
    return list(dict.fromkeys(places.dotted(path) for path, _ in places.tensors(checkpoint.tree)))


def _edit_state(
    plan: _Plan, state: StateDict, edit: edits.KeyEdit, *, bare: bool, changed: bool
) -> None:
    """Put the edited state_dict where the old one was, or alone."""
    entries = {new: state.entries[old] for old, new in plan.key_map.pairs if new is not None}
    for old in plan.key_map.dropped:
        value = state.entries[old]
        shape = value.shape if isinstance(value, TENSORS) else None
        plan.dropped.append(Dropped(old, *plan.key_map.why[old], shape))
    tree = plan.checkpoint.tree
    metadata = _rekeyed(state.metadata, plan.key_map, edit) if changed else _clean(state.metadata)
    like = places.state_dict_node(tree, state.at)
    node = places.make_state_dict(entries, metadata, like)
    if bare:
        beside = places.beside(tree, state.at)
        plan.not_carried += beside
        plan.checkpoint = replace(plan.checkpoint, tree=node)
        if plan.container == "safetensors" and metadata is not None:
            plan.notes.append("safetensors has no place for `_metadata` (versions of modules)")
    else:
        plan.checkpoint = replace(plan.checkpoint, tree=places.replaced(tree, state.at, node))
        if plan.key_map.dropped and _has_optimizer(tree):
            plan.notes.append(
                "the optimizer counts parameters by index: after dropping some, "
                "its state no longer fits; ckptool unwrap leaves it behind"
            )
    plan.state = StateDict(state.at, entries, metadata)


def _has_optimizer(tree: Node) -> bool:
    return any(key.startswith("optimizer") for key, _ in places.text_items(tree) or [])


def _rekeyed(metadata: Node, key_map: KeyMap, edit: edits.KeyEdit) -> Node:
    """Move the entries of `_metadata` with the keys."""
    pairs = places.text_items(metadata)
    if pairs is None:
        return metadata
    old_entries = dict(pairs)
    moved = edits.rekey_modules(list(old_entries), key_map, edit)
    fresh = Dict([("version", 1)])  # as nn.Module.state_dict writes for nn.DataParallel
    entries = {new: fresh if old is None else old_entries[old] for old, new in moved}
    return _clean(places.make_state_dict(entries, None, metadata))


def _clean(metadata: Node) -> Node:
    """Take out the flag that `load_state_dict(assign=True)` leaves in `_metadata`."""
    pairs = places.text_items(metadata)
    if pairs is None or not any(_flagged(entry) for _, entry in pairs):
        return metadata
    entries = {path: _unflagged(entry) for path, entry in pairs}
    return places.make_state_dict(entries, None, metadata)


_FLAG = "assign_to_params_buffers"


def _flagged(entry: Node) -> bool:
    return isinstance(entry, Dict) and any(key == _FLAG for key, _ in entry.pairs)


def _unflagged(entry: Node) -> Node:
    if not _flagged(entry):
        return entry
    return Dict([pair for pair in entry.pairs if pair[0] != _FLAG])


def _leave_behind(plan: _Plan, *, bare: bool, options: Options) -> None:
    """With --tensors-only, take out what is neither tensor nor plain value; untie on request."""
    if options.tensors_only:
        tree, left = safety.only_plain(plan.checkpoint.tree)
        plan.checkpoint = replace(plan.checkpoint, tree=tree)
        inside = places.dotted(plan.state.at) + "." if plan.state and plan.state.at else ""
        for place in left:
            key = place.removeprefix(inside) if not bare else place
            if plan.state is not None and key in plan.state.entries:
                _drop(plan, key, "neither a tensor nor a plain value")
            else:
                plan.not_carried.append(place)
        if plan.state is not None:
            at = () if bare else plan.state.at
            kept = places.text_items(places.state_dict_node(tree, at)) or []
            plan.state = replace(plan.state, entries=dict(kept))
    if plan.state is not None and plan.container == "safetensors":
        _leave_unfit(plan, options)
    if options.untie and plan.container != "safetensors":
        _untie(plan, bare=bare)


def _leave_unfit(plan: _Plan, options: Options) -> None:
    """Name what safetensors leaves out: ties always, what does not fit with --tensors-only."""
    assert plan.state is not None
    left = safetensors.left_behind(plan.state.entries, untie=options.untie)
    if options.tensors_only:
        for key, reason in left.unfit.items():
            _drop(plan, key, reason)
        entries = {key: value for key, value in plan.state.entries.items() if key not in left.unfit}
        plan.state = replace(plan.state, entries=entries)
    for key, kept in left.ties.items():
        _drop(plan, key, f"tied to {kept}")
    if left.ties:
        plan.notes.append("ties are noted in the file: ckptool convert brings them back")


def _drop(plan: _Plan, new: str, reason: str) -> None:
    """Count an entry as dropped after all; `new` is the name it would have had."""
    old = next(old for old, here in plan.key_map.pairs if here == new)
    pairs = tuple((key, None if key == old else here) for key, here in plan.key_map.pairs)
    plan.key_map = replace(plan.key_map, pairs=pairs)
    value = plan.state.entries.get(new) if plan.state else None
    shape = value.shape if isinstance(value, TENSORS) else None
    plan.dropped.append(Dropped(old, new, reason, shape))


def _untie(plan: _Plan, *, bare: bool) -> None:
    """Give each tensor of the state_dict that shares its storage a copy of its own."""
    assert plan.state is not None or not bare
    if plan.state is None:
        return
    taken = set()
    entries: dict[str, Node] = {}
    for key, value in plan.state.entries.items():
        if isinstance(value, TensorInfo):
            if value.storage in taken:
                value = replace(value, storage=replace(value.storage, key=f"{key} (untied)"))
            taken.add(value.storage)
        entries[key] = value
    at = () if bare else plan.state.at
    tree = plan.checkpoint.tree
    like = places.state_dict_node(tree, at)
    node = places.make_state_dict(entries, plan.state.metadata, like)
    plan.checkpoint = replace(plan.checkpoint, tree=places.replaced(tree, at, node))
    plan.state = replace(plan.state, entries=entries)


def _judge(plan: _Plan, *, bare: bool, options: Options) -> None:
    """Say what is foreign, and refuse to carry on what is dangerous."""
    source = plan.checkpoint
    whole = safety.judge(source.globals)
    carried = whole
    if bare or options.tensors_only:
        carried = safety.judge(safety.names_in(source.tree))
    if plan.container == "safetensors":
        carried = safety.Verdict(safety.Level.PLAIN, {}, {})
    if carried.dangerous:
        raise UnsafePickle(
            f"{source.path} would run code when loaded; nothing was executed or written",
            path=source.path,
            evidence=safety.evidence_lines(carried, source.calls, source.tree, source.pickle_name),
            hint="--tensors-only keeps the tensors and leaves the rest behind",
        )
    if whole.dangerous:
        plan.warnings.append(
            f"{source.path} would run code when loaded; the output does not carry it"
        )
    if carried.foreign:
        plan.notes.append(f"carried as they are: {names(carried)}")


def names(verdict: safety.Verdict, limit: int = 6) -> str:
    """List foreign names in a few words."""
    shown = [str(each) for each in verdict.foreign]
    more = f" and {len(shown) - limit} more" if len(shown) > limit else ""
    return ", ".join(shown[:limit]) + more


def _add(plan: _Plan, added: Mapping[str, Node], order: Sequence[str]) -> None:
    """Put entries from elsewhere into a bare state_dict, all in the order of the target."""
    assert plan.state is not None
    entries = {**plan.state.entries, **added}
    ordered = [key for key in order if key in entries]
    entries = {key: entries[key] for key in dict.fromkeys([*ordered, *entries])}
    node = places.make_state_dict(entries, plan.state.metadata, plan.checkpoint.tree)
    plan.checkpoint = replace(plan.checkpoint, tree=node)
    plan.state = replace(plan.state, entries=entries)
    plan.added = len(added)


def _lay_out(plan: _Plan, options: Options) -> Layout:
    """Plan the bytes of the output."""
    entries = plan.state.entries if plan.state is not None else None
    if plan.container == "safetensors":
        assert entries is not None
        return safetensors.lay_out(plan.checkpoint, entries, untie=options.untie)
    if entries is not None and _subbyte(entries):
        raise NotRepresentable("torch has no dtype for six-bit floats")
    return torch_zip.lay_out(plan.checkpoint)


def _subbyte(entries: dict[str, Node]) -> bool:
    return any(
        isinstance(value, TensorInfo) and not value.dtype.torch_name for value in entries.values()
    )


def _refuse_expansion(checkpoint: Checkpoint, layout: Layout, options: Options) -> None:
    """Refuse an output far larger than the input: a kilobyte can declare terabytes."""
    limit = max(MAX_EXPANSION * checkpoint.nbytes, SMALL_OUTPUT)
    if layout.nbytes > limit and not options.allow_expand:
        raise WriteError(
            f"the output would have {readable(layout.nbytes)}, the input has "
            f"{readable(checkpoint.nbytes)}",
            hint="--allow-expand if that is meant",
        )


def _result(
    plan: _Plan,
    target: str,
    layout: Layout,
    place: Target,
    options: Options,
) -> Rewrite:
    entries = plan.state.entries if plan.state is not None else {}
    infos = [value for value in entries.values() if isinstance(value, TENSORS)]
    if plan.state is None:
        infos = [info for _, info in places.tensors(plan.checkpoint.tree)]
    not_carried = [*plan.not_carried, *plan.checkpoint.unread]
    return Rewrite(
        plan.checkpoint.path,
        target,
        plan.container,
        plan.state.at if plan.state is not None else None,
        plan.key_map.pairs,
        tuple(plan.dropped),
        len(plan.key_map.written) + plan.added,
        layout.nbytes,
        sum(info.nbytes for info in infos),
        tuple(not_carried),
        tuple(plan.notes),
        tuple(plan.warnings),
        options.dry_run,
        fileio.free_space(place),
        plan.added,
    )


def _write(place: Target, layout: Layout, plan: _Plan, progress: Progress) -> None:
    with fileio.atomic_output(place) as (fd, temporary):
        fileio.write_layout(fd, layout, progress, sync=place.sync)
        _verify(temporary, layout, plan)


def _verify(temporary: str, layout: Layout, plan: _Plan) -> None:
    """Read the written file with the strict reader and compare it with what was meant."""
    found = formats.read(temporary)
    meant: list[tuple[tuple[str, ...], Node]]
    if plan.container == "safetensors":
        assert plan.state is not None
        meant = [((key,), value) for key, value in plan.state.entries.items()]
    else:
        meant = [(path, info) for path, info in places.tensors(plan.checkpoint.tree)]
    seen = list(places.tensors(found.tree))
    strided = plan.container != "safetensors"
    same = len(meant) == len(seen) and all(
        one == other and _described(a, strided) == _described(b, strided)
        for (one, a), (other, b) in zip(meant, seen, strict=True)
    )
    if not same or found.nbytes != layout.nbytes:
        raise RuntimeError("the written file does not read back as it was meant")


def _described(info: Node, strided: bool) -> tuple[object, ...]:
    if strided and isinstance(info, TensorInfo):
        layout = (info.stride, info.storage_offset, info.storage.nbytes, info.requires_grad)
        return (info.dtype, info.shape, *layout)
    return (info.dtype, info.shape)
