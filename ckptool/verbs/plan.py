"""What a rewrite would write: the tree edited in memory, what stays behind, what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import field, replace

from ckptool import containers, text
from ckptool.containers import Container, Left
from ckptool.errors import EditError, NothingMatched
from ckptool.pickles.subclasses import as_pickled, class_of, tensors_in
from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.state import (
    checkpoint as places,
    edits,
    module_metadata,
    optimizers,
    replacing,
    surroundings,
    tensor_facts,
    walk,
    wrappers,
)
from ckptool.state.checkpoint import Checkpoint, StateDict
from ckptool.state.edits import Edit, KeyMap
from ckptool.tensors import values
from ckptool.tensors.tensor import TENSORS, TensorInfo
from ckptool.text import counted, listed, quoted
from ckptool.verbs import carrying
from ckptool.verbs.casting import Cast
from ckptool.verbs.options import Options

CONSTANTS = "constants of the code"  # where a frozen module has its weights


@dataclass(frozen=True, slots=True)
class Dropped:
    """An entry that was not written, and why; `name` is the key as edits had left it."""

    key: str
    name: str
    reason: str
    shape: tuple[int, ...] | None = None


@dataclass(slots=True)
class Plan:
    """A rewrite on its way: what will be written, and what there is to say of it."""

    checkpoint: Checkpoint
    state: StateDict | None
    key_map: KeyMap
    container: str
    options: Options
    not_carried: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    added: int = 0
    bare: bool = False
    edit: edits.KeyEdit = field(default=lambda key: key)
    casts: list[Cast] = field(default_factory=list)  # once they are written

    @property
    def kind(self) -> Container:
        """Return the container that is written."""
        return containers.by_name(self.container)

    def let_go(self) -> None:
        """Keep no tensors: to read the output back takes as much memory again."""
        self.checkpoint = replace(self.checkpoint, tree=None, records={})
        self.key_map = replace(self.key_map, entries={})
        self.state = None


def make_plan(
    checkpoint: Checkpoint,
    steps: Sequence[Edit],
    container: str,
    *,
    bare: bool,
    unwrap: bool,
    options: Options,
) -> Plan:
    """Edit the tree in memory."""
    plan = Plan(checkpoint, None, edits.KeyMap((), {}), container, options)
    plan.bare = bare or not plan.kind.traits.around or bool(checkpoint.program)
    try:
        _find_and_edit(plan, steps, unwrap=unwrap)
    except EditError:
        _refuse_unsafe(plan)
        raise
    state = plan.state
    _keep_records(plan)
    if options.drop_beside:
        assert state is not None
        tree, gone = surroundings.without(checkpoint.tree, state.at, options.drop_beside)
        plan.checkpoint, plan.not_carried = replace(plan.checkpoint, tree=tree), gone
    if options.tensors_only and not plan.bare:
        _leave_classes(plan)
    if checkpoint.program:
        plan.notes.insert(0, f"took the state_dict out of a {checkpoint.program}")
    if state is not None:
        plan.notes += state.notes
        plan.warnings += state.missing
        if plan.bare or not state.module or options.tensors_only:
            _edit_state(plan, state, changed=bool(steps))
    if plan.key_map.pairs and not plan.key_map.written:
        plan.warnings.append(f"nothing is left of {len(plan.key_map.pairs)} keys")
    _leave_behind(plan)
    _refuse_empty(plan, checkpoint)
    _judge(plan)
    if plan.state is not None and not any(step.name.startswith("add ") for step in steps):
        worn = wrappers.worn(plan.state.entries)
        removable = wrappers.worn(plan.state.entries, removable=True) if worn else []
        for line in worn:
            remedy = "; `ckptool transfer` removes it" if line in removable else ""
            plan.notes.append(f"in the output, {line}{remedy}")
    return plan


def _refuse_unsafe(plan: Plan) -> None:
    """Raise `UnsafePickle` where an output would run code, as far as it is known what it holds."""
    if plan.options.tensors_only or (plan.bare and plan.state is None):
        return
    if plan.bare and plan.state is not None:
        plan.checkpoint = replace(plan.checkpoint, tree=list(plan.state.entries.values()))
    _judge(plan)


def _find_and_edit(plan: Plan, steps: Sequence[Edit], *, unwrap: bool) -> None:
    """Find the state_dict and edit its keys and values; nothing is put into the tree yet."""
    checkpoint, options = plan.checkpoint, plan.options
    needed = bool(steps) or plan.bare or options.at is not None or bool(options.drop_beside)
    state = places.locate(checkpoint, options.at) if needed else places.find_or_none(checkpoint)
    places.refuse_part(checkpoint, state)
    plan.state = state
    if checkpoint.program and options.in_place:
        raise EditError(
            f"{checkpoint.path} is a {checkpoint.program}; its state_dict cannot take its place",
            hint="name an output instead of --in-place",
        )
    in_list = isinstance(checkpoint.tree, list | tuple)  # tensors in a list get names
    alone = state is not None and not (state.at or state.module or checkpoint.program)
    if unwrap and alone and not in_list and not (state and state.inner):
        raise EditError(
            f"{checkpoint.path} is a bare state_dict: nothing to unwrap",
            hint="`ckptool convert` writes it again as it is",
        )
    if state is not None and state.module and not plan.bare:
        _refuse_attributes(plan, state, changed=bool(steps))
    keys = state.entries if state else dict.fromkeys(_all_keys(checkpoint))
    plan.key_map, plan.edit = edits.apply(steps, keys, argument(checkpoint, options))
    plan.notes = [*checkpoint.notes, *plan.key_map.notes]
    lost = [key for cast in plan.key_map.casts for key in cast.stripped]
    if lost:
        plan.notes.append(f"not written, attributes of tensors that are cast: {listed(lost, 4)}")


def _keep_records(plan: Plan) -> None:
    """Keep further records of a torch zip if asked to; refuse to lose them in place."""
    source = plan.checkpoint
    found = [name for name in source.unread if not name.startswith("data/")]
    if not containers.by_name(source.container).traits.records or not found:
        return
    if plan.options.keep_records:
        if not plan.kind.traits.records:
            raise EditError(
                "only a torch zip can hold extra records",
                evidence=found[:8],
                hint="leave out --keep-records, or write a torch file: --to torch",
            )
        unread = tuple(name for name in source.unread if name not in found)
        plan.checkpoint = replace(source, unread=unread, kept=tuple(found))
    elif plan.options.in_place:
        raise EditError(
            f"{source.path} holds {counted(len(found), 'extra record')} that --in-place would lose",
            evidence=found[:8],
            option="--keep-records",
            hint="keeps them",
        )


def argument(checkpoint: Checkpoint, options: Options) -> str:
    """Write the input as a command takes it, with the place that was chosen."""
    at = f"--at {quoted(options.at)} " if options.at is not None else ""
    return f"{at}{text.argument(checkpoint.path)}"


def _all_keys(checkpoint: Checkpoint) -> list[str]:
    return [name for name, _ in walk.named(checkpoint.tree)]


def _refuse_attributes(plan: Plan, state: StateDict, *, changed: bool) -> None:
    """Refuse to rename what are attributes of Python objects."""
    checkpoint, options = plan.checkpoint, plan.options
    if not changed and not options.untie and not options.tensors_only:
        return
    at = f" at `{walk.dotted(state.at)}`" if state.at else ""
    if not options.tensors_only:
        raise EditError(
            f"{checkpoint.path} holds a whole model, {state.module}{at}: its keys are attributes "
            "of objects and stay as they are",
            option="--tensors-only",
            hint="writes its state_dict in its place",
        )
    if state.at not in places.whole_models(checkpoint.tree):
        raise EditError(
            f"{checkpoint.path} holds {state.module}{at} inside a model: it can be taken out, "
            "not edited there",
            hint=f"ckptool convert --unwrap --at {quoted(walk.dotted(state.at))} "
            f"{text.argument(checkpoint.path)} OUT",
        )


def _leave_classes(plan: Plan) -> None:
    """Put the state_dict of each whole model in its place."""
    tree = plan.checkpoint.tree
    for at in places.whole_models(tree):
        state = places.state_dict_at(plan.checkpoint, at)
        node = replacing.make_state_dict(state.entries, None)
        tree = replacing.replaced(tree, at, node)
        plan.not_carried.append(_class_left(state))
    plan.checkpoint = replace(plan.checkpoint, tree=tree)


def _class_left(state: StateDict) -> str:
    return f"the class {state.module} and its attributes"


def _edit_state(plan: Plan, state: StateDict, *, changed: bool) -> None:
    """Put the edited state_dict where the old one was, or alone."""
    entries = dict(plan.key_map.entries)
    if plan.options.tensors_only or not plan.kind.traits.objects:
        arrays = {key for key, value in entries.items() if as_pickled(value) is not value}
        entries |= {key: replace(entries[key], origin=None) for key in arrays}
    for old in plan.key_map.dropped:
        shape = getattr(state.entries[old], "shape", None)
        plan.dropped.append(Dropped(old, *plan.key_map.why[old], shape))
    tree = plan.checkpoint.tree
    metadata = module_metadata.cleaned(state.metadata)
    if changed:
        metadata = module_metadata.rekeyed(metadata, plan.key_map, plan.edit)
    original = places.state_dict_node(tree, state.at)
    edited = replace(state, entries=entries, metadata=metadata)
    if plan.bare:
        _take_out(plan, edited, original)
    else:
        # What nobody edits stays the very node: it may be, or refer to itself, elsewhere.
        whole = state.inner or _is_whole(original, entries)
        if changed or metadata is not state.metadata or not whole:
            _put_in(plan, edited)
        if changed:
            plan.notes += [f"`{walk.dotted(other)}` keeps its keys" for other in state.also]
            beside = places.beside(tree, state.at) if plan.key_map.casts else []
            plan.notes += [f"also contains, not cast: {listed(beside)}"] if beside else []
            tree = plan.checkpoint.tree
            moved, said = optimizers.followed(tree, state.at, plan.key_map)
            plan.checkpoint = replace(plan.checkpoint, tree=moved)
            plan.notes += said
    plan.state = edited


def _take_out(plan: Plan, state: StateDict, original: Node) -> None:
    """Make the edited state_dict the whole, and name what is not written."""
    tree, container = plan.checkpoint.tree, plan.kind
    if state.module:
        plan.not_carried.append(_class_left(state))
        plan.notes += _no_part(original, plan.state or state)  # as it was before edits
    plan.not_carried += places.beside(tree, state.at)
    like = None if state.module or isinstance(original, list | tuple) else original
    node = replacing.make_state_dict(state.entries, state.metadata, like)
    plan.checkpoint = replace(plan.checkpoint, tree=node)
    if not container.traits.objects:
        named = dict(places.named_items(node))
        odd = [key for key in state.entries if key not in named]
        if odd:
            plan.notes.append(f"keys that are not text are written as text: {listed(odd)}")
        plan.not_carried += module_metadata.left(node)
        plan.notes += tensor_facts.lost(state.entries.items())
    if state.metadata is not None and not container.traits.module_metadata:
        plan.notes.append(f"{container.title} cannot hold `_metadata` (module versions)")


def _put_in(plan: Plan, state: StateDict) -> None:
    """Put the entries of a state_dict where it is in the tree of a plan, nested as they were."""
    at = () if plan.bare else state.at
    tree = plan.checkpoint.tree
    original = places.state_dict_node(tree, at)
    inner = places.state_dict_at(plan.checkpoint, at).inner
    if inner and not plan.bare:
        node = replacing.put_back(original, inner, state.entries, state.metadata)
    else:
        like = None if state.module else original
        node = replacing.make_state_dict(state.entries, state.metadata, like)
    plan.checkpoint = replace(plan.checkpoint, tree=replacing.replaced(tree, at, node))


def _no_part(model: Node, state: StateDict) -> list[str]:
    """Count the tensors of a model that state_dict() leaves out."""
    inside = {value.view for value in state.entries.values() if isinstance(value, TensorInfo)}
    others = {
        info.view
        for _, info in walk.tensors(model)
        if isinstance(info, TensorInfo) and info.view not in inside
    }
    if not others:
        return []
    packed = "what its modules pack, " if state.missing else ""
    return [
        f"{counted(len(others), 'tensor')} of the model not in its state_dict "
        f"({packed}buffers that are not persistent, other attributes)"
    ]


def _is_whole(node: Node, entries: dict[str, Node]) -> bool:
    """Return whether entries are those of a node as they stand, none joined and none twice."""
    pairs = places.text_items(node) or []
    return len(pairs) == len(entries) and all(
        as_pickled(entries.get(key)) is value for key, value in pairs
    )


def _leave_behind(plan: Plan) -> None:
    """With --tensors-only, take out what is neither tensor nor plain value; untie on request."""
    if plan.options.tensors_only:
        from ckptool.pickles import pruning

        tree, left, flattened = pruning.only_plain(plan.checkpoint.tree)
        if flattened:
            classes = listed(f"{name} x {count}" for name, count in flattened.items())
            plan.notes.append(f"written as plain dicts, without their class: {classes}")
        plan.checkpoint = replace(plan.checkpoint, tree=tree)
        if plan.state is None:
            plan.not_carried += left
            here = set(_all_keys(plan.checkpoint))
            gone = [key for key in plan.key_map.written if key not in here]
            _drop(plan, dict.fromkeys(gone, "needs what is not plain"))
        else:
            _leave_entries(plan, left)
    writer, untie = plan.kind.writer, plan.options.untie
    if plan.state is not None and writer and writer.unfit:
        _leave_unfit(plan, writer.unfit(plan.state.entries, untie))
    if untie and plan.kind.traits.ties:
        _untie(plan)


def _leave_entries(plan: Plan, left: list[str]) -> None:
    """Count the entries that pruning took out of the state_dict, and name what else it took."""
    assert plan.state is not None
    at = () if plan.bare else plan.state.at
    try:
        kept = places.state_dict_at(plan.checkpoint, at).entries
    except KeyError:
        raise NothingMatched("--tensors-only would leave nothing of the state_dict") from None
    gone = {key: _why_left(value) for key, value in plan.state.entries.items() if key not in kept}
    _drop(plan, gone)
    inside = {walk.dotted((*at, key)) for key in gone}
    plan.not_carried += [place for place in left if place not in inside]
    plan.state = replace(plan.state, entries=kept)


def _refuse_empty(plan: Plan, source: Checkpoint) -> None:
    """Raise `NothingMatched` where no tensor would be written, and none was dropped by an edit."""
    state = plan.state
    held = state.entries.values() if state else walk.tensors(plan.checkpoint.tree)
    if any(not state or isinstance(value, TENSORS) for value in held) or plan.key_map.why:
        return
    lost = [f"{each.key}   {each.reason}" for each in plan.dropped]
    fixed = [note for note in source.notes if note.endswith(CONSTANTS)]
    why = [*(state.missing if state else ()), *lost, *fixed]
    if not why and (state or not any(walk.tensors(source.tree))):
        return
    hint = "a module has them before torch.jit.freeze: save that" if fixed else ""
    if any(walk.tensors(source.tree)):
        hint = f"ckptool keys --all {text.argument(source.path)}   lists all tensors by their path"
    raise NothingMatched(
        f"{source.path}: none of the weights would be written", evidence=why[:8], hint=hint
    )


def _why_left(value: Node) -> str:
    if isinstance(value, TENSORS):
        return f"needs its class, {class_of(value) or 'that of its quantizer'}"
    holds = any(tensors_in(value))
    return "holds tensors in an object" if holds else "neither a tensor nor a plain value"


def _leave_unfit(plan: Plan, left: Left) -> None:
    """Name what the container leaves out: ties always, what does not fit with --tensors-only."""
    assert plan.state is not None
    if plan.options.tensors_only:
        _drop(plan, left.unfit)
        entries = {key: value for key, value in plan.state.entries.items() if key not in left.unfit}
        plan.state = replace(plan.state, entries=entries)
    _drop(plan, {key: f"tied to {kept}" for key, kept in left.ties.items()})
    if left.ties:
        plan.notes.append("ties are noted in the file: `ckptool convert` restores them")


def _drop(plan: Plan, reasons: Mapping[str, str]) -> None:
    """Count entries as dropped after all; `reasons` are by the names that they would have had."""
    old = {here: key for key, here in plan.key_map.pairs}
    pairs = tuple((key, None if here in reasons else here) for key, here in plan.key_map.pairs)
    plan.key_map = replace(plan.key_map, pairs=pairs)
    for new, reason in reasons.items():
        value = plan.state.entries.get(new) if plan.state else None
        plan.dropped.append(Dropped(old[new], new, reason, getattr(value, "shape", None)))


def _untie(plan: Plan) -> None:
    """Copy each tensor of the state_dict that shares its storage."""
    if plan.state is None:
        return
    taken = set()
    entries: dict[str, Node] = {}
    for key, value in plan.state.entries.items():
        if isinstance(value, TensorInfo):
            if value.storage in taken:
                value = values.cut(value, f"{key} (untied)")
            taken.add(value.storage)
        entries[key] = value
    if all(entries[key] is value for key, value in plan.state.entries.items()):
        return  # nothing was tied: the very node stays, which may refer to itself
    plan.state = replace(plan.state, entries=entries)
    _put_in(plan, plan.state)


def _judge(plan: Plan) -> None:
    """Note what is foreign, and refuse to carry on what is dangerous."""
    named = plan.checkpoint, plan.container
    warnings, notes = carrying.judge(*named, plan.options, bare=plan.bare)
    plan.warnings += warnings
    plan.notes += notes


def add_entries(plan: Plan, added: Mapping[str, Node], order: Sequence[str]) -> None:
    """Put entries from elsewhere into a bare state_dict, all in the order of the target."""
    assert plan.state is not None
    entries = {**plan.state.entries, **added}
    ordered = [key for key in order if key in entries]
    entries = {key: entries[key] for key in dict.fromkeys([*ordered, *entries])}
    node = replacing.make_state_dict(entries, plan.state.metadata, plan.checkpoint.tree)
    plan.checkpoint = replace(plan.checkpoint, tree=node)
    plan.state = replace(plan.state, entries=entries)
    plan.added = len(added)
