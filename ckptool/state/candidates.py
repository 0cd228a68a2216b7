"""What in a tree may be the state_dict: dicts of tensors, and modules that have one.

A dict of dicts of tensors is one under a known name (Megatron's `model`, with a dict for each
part), or where it is asked for: its keys are those of the parts, joined by dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from fnmatch import translate
from math import prod

from ckptool.errors import FormatError, KeyCollision, LimitExceeded, Malformed
from ckptool.pickles.subclasses import as_tensor
from ckptool.pickles.tree import Dict, Node, Object, Pairs, items
from ckptool.records import dataclass, grouped
from ckptool.state import modules
from ckptool.state.walk import Path, dotted, labelled
from ckptool.state.wrappers import peeling
from ckptool.tensors.tensor import TENSORS, AnyTensor, tensors_of

MAX_CANDIDATE_DEPTH = 4
MAX_LISTED = 100  # items of a list that are named one by one; a longer one is data
KNOWN_NAMES = frozenset(
    (
        "state_dict model_state_dict model net network params weights module generator "
        "state_dict_ema model_ema ema ema_state_dict params_ema"
    ).split()
)
NOT_STATE_DICTS = (
    *("optimizer*", "*scheduler*", "callbacks", "rng*", "loops", "scaler"),
    "*_extra_state",  # an entry of a state_dict (torch/nn/modules/module.py, get_extra_state)
)
_NO_STATE_DICT = re.compile("|".join(map(translate, NOT_STATE_DICTS)))
_NO_MODELS = ("hyper_parameters", "hparams")  # copies of modules to be trained
# What a copy may lack: an average of the parameters leaves out the buffers of norms.
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A dict that may be the state_dict, or a module that has one; `module` names its class.

    `also` are the other places of the same dict, or of one with the very same tensors.
    """

    at: Path
    count: int
    nbytes: int
    prefix: str
    module: str = ""
    also: tuple[Path, ...] = ()


def common_prefix(keys: Sequence[str]) -> str:
    """Return the dotted prefix that all keys share, with its final dot; often empty."""
    if not keys:
        return ""
    low, high = min(keys), max(keys)
    size = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), len(low))
    return low[: low.rfind(".", 0, size) + 1]


@dataclass(slots=True)
class _Found:
    """A node that may be the state_dict, with its tensors; `paths` are all that lead to it."""

    paths: dict[Path, None]
    tensors: dict[str, AnyTensor]
    module: str = ""

    @property
    def known(self) -> bool:
        return any(map(_is_known, self.paths))

    @property
    def at(self) -> Path:
        return next(filter(_is_known, self.paths), next(iter(self.paths)))

    def same(self) -> object:
        """Return what is equal for those with the very same tensors under the same keys."""
        views = ((key, getattr(value, "view", id(value))) for key, value in self.tensors.items())
        return id(self) if self.module else frozenset(views)

    def shapes(self, *, exact: bool = False) -> object:
        """Return what is equal for copies: keys without wrappers, and shapes.

        A copy may have counters of its own (`decay`), another prefix of all keys, or keys without
        dots (LitEma of latent-diffusion): unless `exact`, none of these count.
        """
        peel = peeling(self.tensors)
        shapes = {
            peel.name(key): tuple(value.shape)
            for key, value in self.tensors.items()
            if peel(key) and not key.endswith(_BUFFERS)
        }
        if exact:
            return frozenset(shapes.items())
        shapes = {key: shape for key, shape in shapes.items() if prod(shape) != 1} or shapes
        size = len(common_prefix(list(shapes)))
        return frozenset((key[size:].replace(".", ""), shape) for key, shape in shapes.items())


def _is_known(path: Path) -> bool:
    return bool(path) and path[-1] in KNOWN_NAMES


def candidates(tree: Node) -> list[Candidate]:
    """Find the dicts and modules that may be the state_dict.

    Those under known names hide all others but copies of themselves.
    """
    looked = search(tree)
    found = _merged(looked.found, looked.nested) or _merged(list(looked.of_arrays.values()), [])
    known = [each for each in found if each.known]
    hiding = known or [each for each in found if each.module]
    inner = {path[:depth] for each in hiding for path in each.paths for depth in range(len(path))}
    chosen = [each for each in found if each.at not in inner]
    if known and len(chosen) > len(known):
        copied = {each.shapes() for each in known}
        chosen = [each for each in chosen if each.known or each.shapes() in copied]
    return [
        Candidate(
            at := each.at,
            len(each.tensors),
            sum(info.nbytes for info in each.tensors.values()),
            common_prefix(list(each.tensors)),
            each.module,
            tuple(path for path in each.paths if path != at),
        )
        for each in chosen
    ]


def _merged(found: list[_Found], nested: Sequence[tuple[Path, Node]]) -> list[_Found]:
    """Join the parts of a dict under a known name, and places with the very same tensors."""
    under = grouped(
        (each.at[:depth], each)
        for each in (found if nested else ())
        for depth in range(1, len(each.at) + 1)
    )
    parts_of_others: set[int] = set()
    for path, node in nested:
        try:
            joined = Joined(node)
        except (KeyCollision, LimitExceeded):
            continue
        parts = joined.parts()
        below = under.get(path, [])
        whole = not any(each.known or each.module for each in (*parts, *below))
        if whole and len({each.shapes(exact=True) for each in parts}) == len(parts) > 1:
            parts_of_others.update(map(id, below))
            found.append(_Found({path: None}, tensors_of(joined.entries)))
    found = [each for each in found if id(each) not in parts_of_others]
    if len(found) < 2:
        return found
    merged: dict[object, _Found] = {}
    for each in found:
        first = merged.setdefault(each.same(), each)
        first.paths |= each.paths
    return list(merged.values())


def whole_models(tree: Node) -> list[Path]:
    """List where modules are that may be candidates, those under unknown names too."""
    return [each.at for each in search(tree).found if each.module]


def search(tree: Node) -> Search:
    """Look through a tree for all that may be a state_dict."""
    found = Search()
    try:
        found.visit(tree, ())
    except LimitExceeded as error:
        found.problem = error
    return found


class Search:
    """Looks for dicts of tensors by the keys of dicts, for modules in lists and objects too.

    `problem` says why a module has no state_dict: it contains itself, or repeats without end.
    `nested` are dicts under known names that hold no tensor themselves; `of_arrays` are dicts of
    arrays of numpy alone, which count where nothing else is found.
    """

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.effort = modules.Effort()
        self.by_node: dict[int, _Found] = {}
        self.of_arrays: dict[int, _Found] = {}
        self.nested: list[tuple[Path, Node]] = []
        self.problem: FormatError | None = None

    @property
    def found(self) -> list[_Found]:
        """List what was found, in the order of the file."""
        return list(self.by_node.values())

    def visit(self, node: Node, path: Path, *, dicts: bool = True, models: bool = True) -> None:
        """Look at a node: for dicts of tensors, for modules, or both."""
        if not isinstance(node, WAYS):
            return
        if _looked(node, dicts, models) in self.seen:
            found = self.by_node.get(id(node)) or self.of_arrays.get(id(node))
            if found and (dicts or found.module):
                inside = any(path[:depth] in found.paths for depth in range(len(path) + 1))
                found.paths |= {} if inside else {path: None}
            return
        self.seen.add(_looked(node, dicts, models))
        if isinstance(node, Object) and modules.is_module(node, self.effort):
            if models and _looked(node, not dicts, True) not in self.seen:
                self.module(node, path)
            return
        pairs = items(node)
        if pairs and {"state", "param_groups"} <= {key for key, _ in pairs if type(key) is str}:
            dicts = False  # an optimizer's, whatever its name
        if dicts and pairs:
            self.dict_of(node, path, pairs)
        if len(path) < MAX_CANDIDATE_DEPTH:
            self.inside(node, path, dicts=dicts, models=models)

    def dict_of(self, node: Node, path: Path, pairs: Pairs) -> None:
        """Look at a dict that may be a state_dict."""
        texts = {key: value for key, value in pairs if isinstance(key, str)}
        if _holds_tensors(texts.values()):
            self.add(self.by_node, node, path, dict(labelled(pairs)))
            return
        if tensors_of(with_arrays(texts)):
            self.add(self.of_arrays, node, path, dict(labelled(pairs)))
        if _is_known(path):
            self.nested.append((path, node))

    def inside(self, node: Node, path: Path, *, dicts: bool, models: bool) -> None:
        """Look at what is inside a node."""
        listed = isinstance(node, list | tuple)
        dicts = dicts and (_lists_dicts(node) if listed else bool(items(node)))
        for key, value in ways(node, self.effort):
            if not _holds_any(value):
                continue
            deeper = dicts and not (_only_numbers(value) if listed else is_no_state_dict(key))
            also = models and (listed or not (key in _NO_MODELS or is_no_state_dict(key)))
            if deeper or also:
                self.visit(value, (*path, key), dicts=deeper, models=also)

    def module(self, node: Object, path: Path) -> None:
        """Look at a module, whose state_dict is collected."""
        try:
            state = modules.state_of(node, self.effort)
        except Malformed as error:
            self.problem = error
            return
        if _holds_tensors(state.entries.values()):
            self.add(self.by_node, node, path, state.entries, state.class_name)

    def add(
        self,
        found: dict[int, _Found],
        node: Node,
        path: Path,
        entries: Mapping[str, Node],
        module: str = "",
    ) -> None:
        """Note what was found at a node, which may have been met under another name."""
        new = _Found({}, tensors_of(with_arrays(entries)), module)
        found.setdefault(id(node), new).paths[path] = None


def _looked(node: Node, dicts: bool, models: bool) -> int:
    """Return one number for a node and what was looked for in it."""
    return id(node) << 2 | dicts << 1 | models


def _holds_any(node: Node) -> bool:
    """Check for a node that others may be in: lists of a million empty ones cost nothing."""
    if type(node) is Dict:
        return bool(node.pairs)
    return isinstance(node, WAYS) and node not in ([], ())


def is_no_state_dict(name: str) -> bool:
    """Return whether what has this name holds tensors that are no weights."""
    return _NO_STATE_DICT.match(name) is not None


def _lists_dicts(node: Sequence[Node]) -> bool:
    """Check for a list that may hold state_dicts: a long one, or one of tensors too, is data."""
    return len(node) <= MAX_LISTED and not any(isinstance(each, TENSORS) for each in node)


def _only_numbers(node: Node) -> bool:
    """Check for a record of numbers, as a list of losses has them."""
    tensors = tensors_of(dict(labelled(items(node) or [])))
    return bool(tensors) and not any(value.shape for value in tensors.values())


def _holds_tensors(nodes: Iterable[Node]) -> bool:
    return any(isinstance(node, TENSORS) for node in nodes)


def with_arrays(entries: Mapping[str, Node]) -> dict[str, Node]:
    """Return entries with arrays of numpy as the tensors that they are in a state_dict."""
    arrays = {key: as_tensor(value) for key, value in entries.items() if type(value) is Object}
    return {**entries, **arrays}


WAYS = (Dict, Object, list, tuple)


def ways(node: Node, effort: modules.Effort) -> Iterator[tuple[str, Node]]:
    """Yield the steps that a path may take from a node.

    Keys of dicts, indexes of lists, modules in modules, attributes of other objects.
    """
    if isinstance(node, list | tuple):
        yield from ((str(index), value) for index, value in enumerate(node))
        return
    pairs = members(node)
    if pairs:
        yield from pairs
        return
    held = modules.parts(node, effort)
    if held is not None:
        yield from held.modules
        return
    pairs = modules.attributes(node) or []
    effort.pay(pairs, len(pairs))
    yield from ((key, value) for key, value in pairs if isinstance(key, str))


def members(node: Node) -> list[tuple[str, Node]]:
    """Name what is in a dict or a list; nothing is in any other node."""
    if isinstance(node, list | tuple):
        return [(str(index), value) for index, value in enumerate(node)]
    return labelled(items(node) or [])


@dataclass
class Joined:
    """The entries of a node: what it holds, or where that is no tensor, what dicts inside hold.

    `inner` are those dicts, by their joined names. Raises `KeyCollision` where two entries would
    get the same name, `LimitExceeded` for dicts that repeat each other without end.
    """

    node: Node
    entries: dict[str, Node] = field(default_factory=dict)
    inner: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._holds: dict[int, bool] = {}
        self._around: set[int] = set()  # the dicts that are being joined
        self._effort = modules.Effort()
        self._join(self.node, ())

    def _join(self, node: Node, path: Path) -> None:
        pairs = dict(members(node))
        self._effort.pay(node, len(pairs) + 1)
        joins = not _holds_tensors(pairs.values())
        if not joins and not path:
            self.entries |= pairs
            return
        self._around.add(id(node))
        for key, value in pairs.items():
            name = dotted((*path, key)) if path else key
            if joins and id(value) not in self._around and self._joins(key, value):
                self.inner[name] = value
                self._join(value, (*path, key))
            elif name in self.entries:
                raise KeyCollision(f"two tensors would both be {name}, with their keys joined")
            else:
                self.entries[name] = value
        self._around.discard(id(node))

    def parts(self) -> list[_Found]:
        """List the dicts inside that hold tensors themselves."""
        held = ((name, tensors_of(dict(members(node)))) for name, node in self.inner.items())
        return [_Found({tuple(name.split(".")): None}, each) for name, each in held if each]

    def _joins(self, key: str, node: Node) -> bool:
        """Return whether a value is a dict with tensors in it, at any depth, but no optimizer."""
        if items(node) is None or is_no_state_dict(key):
            return False
        if id(node) not in self._holds:
            self._holds[id(node)] = False  # a dict inside itself
            self._holds[id(node)] = any(
                isinstance(value, TENSORS) or self._joins(name, value)
                for name, value in members(node)
            )
        return self._holds[id(node)]
