"""Plan the bytes of an output: of a file, of a set of shards, of a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptool import containers
from ckptool.containers import Writer
from ckptool.errors import EditError, NotRepresentable
from ckptool.files.copying import PlannedFile
from ckptool.files.publish import Output
from ckptool.records import dataclass
from ckptool.state import checkpoint as places, module_metadata, replacing, walk
from ckptool.tensors.tensor import AnyTensor
from ckptool.text import counted, readable
from ckptool.verbs.plan import Plan

if TYPE_CHECKING:
    from ckptool.containers.sharding import Names

Tensors = list[tuple[walk.Path, AnyTensor]]


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of a set: its name in the folder, how many entries it holds, its size."""

    name: str
    count: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Form:
    """What is written: a file, a set of shards, or a distributed checkpoint."""

    max_shard_size: int | None = None
    distributed: bool = False


FILE = Form()


def names(container: str) -> Names:
    """Return what the shards of a container are called."""
    from ckptool.containers.sharding import Names

    writer = _writer(container)
    return Names(writer.set_stem, writer.set_suffix)


@dataclass(frozen=True, slots=True)
class Laid:
    """An output, the tensors that it is to read back as, and what is in its shards."""

    output: Output
    tensors: Tensors
    shards: tuple[Shard, ...] = ()


def lay_out(plan: Plan, form: Form) -> Laid:
    """Plan the bytes of the output."""
    if form.distributed:
        return _distributed(plan)
    if form.max_shard_size is not None:
        return _shards(plan, form.max_shard_size)
    return Laid(Output((_file(plan),)), _tensors(plan))


def _tensors(plan: Plan) -> Tensors:
    """List the tensors of a file, or of all shards."""
    if plan.state is not None and not plan.kind.traits.around:
        return [((key,), value) for key, value in plan.state.entries.items()]
    return list(walk.tensors(plan.checkpoint.tree))


def _file(plan: Plan) -> PlannedFile:
    """Plan a file."""
    entries = plan.state.entries if plan.state is not None else None
    return _writer(plan.container).lay_out(plan.checkpoint, entries, plan.options.untie)


def _writer(container: str) -> Writer:
    writer = containers.by_name(container).writer
    assert writer is not None
    return writer


def _distributed(plan: Plan) -> Laid:
    """Plan a distributed checkpoint; note what it has no place for."""
    from ckptool.containers import _dcp_output

    if places.items(plan.checkpoint.tree) is None:
        raise NotRepresentable(
            f"{plan.checkpoint.path} holds no dict: a distributed checkpoint is one",
            option="--unwrap" if plan.state is not None else "",
            hint="writes only the state_dict" if plan.state is not None else "",
        )
    flat = _dcp_output.flatten(plan.checkpoint.tree)
    if flat.unfit and not plan.options.tensors_only:
        raise NotRepresentable(
            f"a distributed checkpoint cannot hold {counted(len(flat.unfit), 'value')}",
            evidence=[f"{place}: {reason}" for place, reason in list(flat.unfit.items())[:8]],
            option="--tensors-only",
            hint="leaves them out",
        )
    plan.not_carried += flat.unfit
    if plan.state is not None:
        at = () if plan.bare else plan.state.at
        for name in module_metadata.carried(places.state_dict_node(plan.checkpoint.tree, at)):
            words = " (module versions)" if name == "_metadata" else ""
            plan.notes.append(f"a distributed checkpoint cannot hold `{name}`{words}")
    plan.notes += flat.notes()
    output = Output(_dcp_output.lay_out(flat.entries), _dcp_output.INDEX, _dcp_output.owns)
    return Laid(output, list(flat.tensors()))


def _shards(plan: Plan, limit: int) -> Laid:
    """Plan the shards of a bare state_dict, and their index where they are several."""
    from ckptool.containers import sharding

    assert plan.state is not None
    if plan.checkpoint.kept:
        raise EditError(
            "shards cannot hold extra records",
            evidence=plan.checkpoint.kept[:8],
            hint="leave out --keep-records, or --max-shard-size",
        )
    named, traits = names(plan.container), plan.kind.traits
    if traits.objects:  # a shard has no place for other attributes of the state_dict
        plan.not_carried += module_metadata.left(plan.checkpoint.tree)
    whole = plan.checkpoint = _part(plan, plan.state.entries).checkpoint
    split = sharding.split(plan.state.entries, limit, storages=traits.strides)
    shards = dict(zip(named.shards(len(split.shards)), split.shards, strict=True))
    if len(shards) > 1 and not traits.objects:  # the index holds it
        plan.state = replace(plan.state, metadata=None)
    files = [replace(_file(_part(plan, keys)), name=name) for name, keys in shards.items()]
    large = sum(file.job_nbytes > limit for file in files)
    if large and len(files) > 1:
        what = "shard is" if large == 1 else "shards are"
        plan.notes.append(f"{large} {what} larger than {readable(limit)}: tensors are not split")
    listed = tuple(
        Shard(file.name, len(keys), file.nbytes)
        for file, keys in zip(files, shards.values(), strict=True)
    )
    if len(files) > 1:
        left_out = () if traits.ties else tied(plan)
        versions = None if traits.objects else places.attribute(whole.tree, "_metadata")
        order = list(plan.state.entries)
        data = sharding.index(order, shards, left_out, split.total_nbytes, versions)
        files.append(PlannedFile(named.index, len(data), [(0, data)]))
    return Laid(Output(tuple(files), named.index, named.owns), _tensors(plan), listed)


def _part(plan: Plan, keys: Iterable[str]) -> Plan:
    """Return the plan of a file with some of the entries, and what the state_dict carries."""
    assert plan.state is not None
    entries = {key: plan.state.entries[key] for key in keys}
    tree = replacing.make_state_dict(entries, plan.state.metadata)
    tree = module_metadata.with_texts(tree, module_metadata.texts(plan.checkpoint.tree))
    return replace(
        plan,
        checkpoint=replace(plan.checkpoint, tree=tree),
        state=replace(plan.state, entries=entries),
    )


def tied(plan: Plan) -> set[str]:
    """Return the entries that are written under another name, to which they are tied."""
    return {each.name for each in plan.dropped if each.reason.startswith("tied to ")}
