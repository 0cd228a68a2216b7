"""A module in the tree: the state_dict that `model.state_dict()` would give, without its code.

`torch.save(model)` pickles a module as its class and its `__dict__`, in which `_parameters`,
`_buffers` and `_modules` hold what `nn.Module.state_dict` collects, in this order
(torch/nn/modules/module.py, `_save_to_state_dict`). What a class does in code of its own
(`get_extra_state`, hooks, packed weights) is not in a file; nor is `_metadata`, whose versions are
attributes of classes. A module that is under several names is repeated under each, as torch
does; a small file can repeat without end, so that repeats are bounded.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import field, replace

from ckptool.errors import LimitExceeded, Malformed
from ckptool.pickles.tree import (
    MAX_NESTING,
    Dict,
    Global,
    Node,
    Object,
    Pairs,
    Set,
    items,
    named_items,
    text_items,
)
from ckptool.records import dataclass
from ckptool.tensors.tensor import TENSORS, TensorInfo

MAX_REPEATS = 50_000
LONG_KEY = 256  # characters; longer ones cost more than one repeat

Entries = list[tuple[str, Node]]

# Calls that make an object of a class, their first argument (CPython, Lib/copyreg.py).
_MAKERS = ("_reconstructor", "__newobj__", "__newobj_ex__")
# Modules that are rebuilt by a call: torch/fx/graph_module.py, torch/_dynamo/eval_frame.py.
# StyleGAN's modules: one argument, a dict with their source text, class and `__dict__` as `state`.
_PERSISTENT = Global("torch_utils.persistence", "_reconstruct_persistent_obj")
_GRAPH_MODULE = Global("torch.fx.graph_module", "reduce_graph_module")
_COMPILED = Global("torch._dynamo.eval_frame", "OptimizedModule")
# Classes of torch with an own `_save_to_state_dict`, whose entries are packed or plain numbers.
_PACKED = (
    r"torch\.(ao\.)?nn\.(intrinsic\.)?(sparse\.)?quantized\..*"
    r"\.(\w*Linear\w*|\w*Conv\w*|Embedding\w*|QFunctional|PackedParameter|LSTM|GRU|\w*RNN\w*)"
)
# A hook of torch that adds to `_metadata` alone (torch/nn/utils/spectral_norm.py).
_KEEPS_KEYS = "SpectralNormStateDictHook"
_HOOKS = ("_state_dict_pre_hooks", "_state_dict_hooks")
_MAX_NAMED = 3


@dataclass(frozen=True, slots=True)
class Parts:
    """What a module holds, by name; buffers that are not persistent and None are left out.

    `hooks` are those that state_dict() would run, `cost` is the work of reading all this.
    """

    tensors: Entries
    modules: Entries
    hooks: tuple[Node, ...]
    cost: int


@dataclass(slots=True)
class Effort:
    """What has been looked at: each node of a file once is free, the rest is bounded."""

    seen: set[int] = field(default_factory=set)
    fresh: int = 0
    repeated: int = 0

    def pay(self, node: Node, count: int, *, named: int = 0, key_length: int = 0) -> None:
        """Count `count` things in a node, and `named` keys that are longer than so many characters.

        Raises `LimitExceeded` for a tree of mere repeats.
        """
        if id(node) in self.seen:
            self.repeated += count
        else:
            self.seen.add(id(node))
            self.fresh += count
        self.repeated += named * (key_length // LONG_KEY)
        if self.repeated > MAX_REPEATS + 16 * self.fresh:
            raise LimitExceeded("modules that repeat each other without end")


@dataclass(frozen=True, slots=True)
class ModuleState:
    """The state_dict of a module.

    `classes` counts the modules of each class; `missing` says which entries only the classes' code
    could name, `notes` what their code may do to the others.
    """

    class_name: str
    entries: dict[str, Node]
    classes: dict[str, int]
    missing: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def class_name(node: Object) -> str:
    """Name the class of an object, dotted."""
    return _dotted(_class(node))


def _class(node: Object) -> Global | None:
    """Return the class of an object, None where its file makes that too (dill, cloudpickle)."""
    callee = node.callee
    if callee == _GRAPH_MODULE:
        return Global("torch.fx.graph_module", "GraphModule")
    if isinstance(callee, Global) and callee.name in _MAKERS and node.args:
        callee = node.args[0]
    return callee if isinstance(callee, Global) else None


def _dotted(named: Global | None) -> str:
    return "a class without a name" if named is None else str(named)


def is_module(node: Node, effort: Effort) -> bool:
    """Return whether a node is a module."""
    return parts(node, effort) is not None


def parts(node: Node, effort: Effort) -> Parts | None:
    """Return what a module holds, None for anything else."""
    pairs = attributes(node)
    if pairs is None:
        if isinstance(node, Object) and node.callee == _COMPILED and node.args:
            return Parts([], [("_orig_mod", node.args[0])], (), 1)
        return None
    effort.pay(pairs, len(pairs))
    found = {key: value for key, value in pairs if isinstance(key, str) and key[:1] == "_"}
    held = []
    for name in ("_parameters", "_buffers", "_modules"):
        inner = text_items(found.get(name))
        if inner is None:
            return None
        effort.pay(found[name], len(inner))
        held.append([(key, value) for key, value in dict(inner).items() if value is not None])
    parameters, buffers, modules = held
    transient = _texts(found.get("_non_persistent_buffers_set"), effort)
    persistent = [(key, value) for key, value in buffers if key not in transient]
    hooks = []
    for name in _HOOKS:
        inner = items(found.get(name)) or []
        effort.pay(found.get(name), len(inner))
        hooks += [hook for _, hook in inner]
    return Parts([*parameters, *persistent], modules, tuple(hooks), 1 + sum(map(len, held)))


def attributes(node: Node) -> Pairs | None:
    """Return the `__dict__` that an object gets back, None for what gets none."""
    if not isinstance(node, Object):
        return None
    state = node.args[0] if node.callee == _GRAPH_MODULE and node.args else node.state
    if node.callee == _PERSISTENT and node.args:
        state = next((value for key, value in named_items(node.args[0]) if key == "state"), None)
    if isinstance(state, tuple) and len(state) == 2:  # of a class with __slots__
        state = state[0]
    return state.pairs if isinstance(state, Dict) else None


def _texts(node: Node, effort: Effort) -> set[str]:
    """Read a set of names; protocol 2 has no opcode for it and calls `set` on a list."""
    if isinstance(node, Object) and node.args:
        node = node.args[0]
    names = node.items if isinstance(node, Set) else node
    if not isinstance(names, list):
        return set()
    effort.pay(names, len(names))
    return {each for each in names if isinstance(each, str)}


def state_of(node: Object, effort: Effort | None = None) -> ModuleState:
    """Collect the state_dict of a module.

    Raises `Malformed` for a module that contains itself, or names two entries alike;
    `LimitExceeded` for one that is too deep, or repeats itself without end.
    """
    collector = _Collector(effort or Effort())
    collector.visit(node, "")
    return ModuleState(
        class_name(node),
        collector.entries,
        {_dotted(each): count for each, count in collector.classes.items()},
        collector.missing.shown(),
        collector.notes.shown(),
    )


@dataclass(slots=True)
class _Lines:
    """The first few of many lines, and how many there are."""

    lines: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, where: str, named: Global | None, text: str) -> None:
        self.count += 1
        if self.count <= _MAX_NAMED:
            self.lines.append(f"{where[:100]} ({_dotted(named)[:100]}) {text}")

    def shown(self) -> tuple[str, ...]:
        more = self.count - len(self.lines)
        return (*self.lines, f"and {more} more modules like these") if more else (*self.lines,)


class _Collector:
    """Walks modules as `nn.Module.state_dict` does."""

    def __init__(self, effort: Effort) -> None:
        self.effort = effort
        self.entries: dict[str, Node] = {}
        self.classes: Counter[Global | None] = Counter()
        self.packed: dict[Global | None, bool] = {}
        self.missing = _Lines()
        self.notes = _Lines()
        self.above: list[int] = []

    def visit(self, node: Node, prefix: str) -> None:
        """Collect the entries of a module, then those of the modules in it."""
        where = prefix[:-1] or "the model"
        if id(node) in self.above:
            raise Malformed(f"the module at {where} contains itself")
        if len(self.above) >= MAX_NESTING:
            raise LimitExceeded(f"modules nested more than {MAX_NESTING} deep")
        named = _class(node) if isinstance(node, Object) else None
        held = parts(node, self.effort)
        if held is None or self.is_packed(named):
            self.missing.add(where, named, "packs its entries: not all are listed")
        if held is None:
            self.effort.pay(node, 1, named=1, key_length=len(prefix))
            return
        # What it holds was paid for with the dicts that hold it: modules may share them.
        self.effort.pay(node, 1, named=held.cost, key_length=len(prefix))
        self.classes[named] += 1
        for hook in held.hooks:
            kind = _class(hook) if isinstance(hook, Object) else hook
            if not (isinstance(kind, Global) and kind.name == _KEEPS_KEYS):
                self.notes.add(where, named, "runs code on its state_dict, which may change keys")
        for name, value in held.tensors:
            if prefix + name in self.entries:
                raise Malformed(f"two entries of the model would both be {prefix + name}")
            self.entries[prefix + name] = detached(value)
        self.above.append(id(node))
        for name, module in held.modules:
            self.visit(module, f"{prefix}{name}.")
        self.above.pop()

    def is_packed(self, named: Global | None) -> bool:
        if named not in self.packed:
            self.packed[named] = bool(re.fullmatch(_PACKED, _dotted(named)))
        return self.packed[named]


def detached(value: Node) -> Node:
    """Return a tensor as `Tensor.detach` does: no Parameter, gradient or attributes of its own.

    What is not a tensor (a parameter that a lazy module has not made yet) is given as it is.
    """
    while isinstance(value, TENSORS):
        inner = _wrapped(value.origin)
        if inner is None:
            break
        value = inner
    if not isinstance(value, TensorInfo):
        return value
    kept = _kept(value.origin)
    if isinstance(kept, Object) and not (value.lazy or value.dtype.quantized or _is_class(kept)):
        kept = None
    return replace(value, requires_grad=False, origin=kept)


def _wrapped(origin: Node) -> Node:
    """Return the tensor inside a Parameter or Variable; of old ones their state holds it."""
    if not isinstance(origin, Object):
        return None
    state = origin.state
    for first in (*origin.args[:1], *(state[:1] if isinstance(state, tuple) else ())):
        if isinstance(first, TENSORS):
            return first
    return None


def _kept(origin: Node) -> Node:
    """Take Python attributes off the call that rebuilds a tensor (function, class, args, state)."""
    match origin:
        case Object(
            args=(Global() as function, Global(name="Tensor" | "Parameter"), tuple() as args, _)
        ):
            return replace(origin, callee=function, args=args, steps=[])
    return origin


def _is_class(origin: Object) -> bool:
    """Return whether a tensor is of a class of its own, which outlives `detach`."""
    return isinstance(origin.args[0] if origin.args else None, Global)
