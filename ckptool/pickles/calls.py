"""Calls that are dangerous by their shape, whatever they name: names cannot be listed to the end.

What is called is the result of a call; or a function of a third-party package is given text, which
may be source, a path or a URL; or an object gets more after its state, with which pickles end:
the state may have set the methods that are called then (CPython's Lib/pickle.py, `load_build` and
`load_appends` look `__setstate__` and `extend` up on the object).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptool.pickles.names import RECONSTRUCTORS, is_listed, is_third_party, python3_name
from ckptool.pickles.tree import (
    ByteArray,
    Dict,
    Global,
    Node,
    Object,
    OldString,
    PersistentId,
    children,
)

# Cython's `__pyx_unpickle_NAME` makes an object of the class that is given, which C checks to be
# one, and sets its fields (Cython/Compiler/ParseTreeTransforms.py, `_inject_pickle_methods`).
_OF_CYTHON = "__pyx_unpickle_"
_PARTIAL = Global("functools", "partial")
# Classes inside classes of torch, which protocols below 4 name by a call (Lib/pickle.py,
# `save_global`): that of ShardedTensor is an empty dataclass, which BUILD fills.
_NESTED = {("torch.distributed._shard.sharded_tensor.api", "ShardedTensor", "ProcessGroupState")}
# Nodes that are searched again for a function; after that, whatever may call one has one.
_PATIENCE = 1_000_000
# They return what others use too: no pickler gives that a state.
_SHARED = {("logging", "getLogger"), ("torch.nn.backends.thnn", "_get_thnn_function_backend")}
_MADE_OF_NUMBERS = {("builtins", name) for name in ("bytes", "bytearray", "str")}
# How an `Object` is made that is an instance and no result: its state is that of its class.
_INSTANCES = ("newobj", "newobj_ex")
# What no pickler does to a name or a tensor (`pickle_reader`): the method that would be called.
METHODS = {"build": "__setstate__", "append": "extend", "setitem": "update", "additems": "update"}


def dangerous(calls: Iterable[Object]) -> Iterator[tuple[Object, Node]]:
    """Yield the calls that are dangerous by their shape, each with what it would call."""
    shapes = Shapes()
    for call in calls:
        called = shapes.called(call)
        if called is not None:
            yield call, called


def only_nested(calls: Iterable[Object], tree: Node) -> tuple[set[Global], list[Object]]:
    """Return the names of `getattr` that do nothing but name nested classes, and the other calls.

    `calls` are all of a pickle. No name where one of them is used in any other way: that is a call,
    or an argument, or a value in the tree.
    """
    calls = list(calls)
    kept, named = list[Object](), set[Global]()
    for call in calls:
        if _names_nested(call):
            named.add(call.callee)
        elif not _makes_nested(call):
            kept.append(call)
    if any(each in named for each in _names_in([*kept, tree])):
        return set(), calls
    return named, kept


def _names_nested(node: Node) -> bool:
    """Check for a call of `getattr` that gives a known class inside another."""
    if not isinstance(node, Object) or node.how != "reduce" or node.steps or node.kwargs:
        return False
    match node.callee, node.args:
        case Global() as callee, (Global() as holder, str(name)):
            is_getattr = python3_name(callee) == ("builtins", "getattr")
            return is_getattr and (holder.module, holder.name, name) in _NESTED
    return False


def _makes_nested(call: Object) -> bool:
    """Check for a new object of such a class, without arguments, and with plain attributes."""
    kinds = [kind for kind, _ in call.steps]
    plain = kinds in ([], ["build"]) and isinstance(call.state, Dict | None)
    pairs = call.state.pairs if isinstance(call.state, Dict) else []
    plain &= all(type(key) is str and type(value) is int for key, value in pairs)
    made = call.how == "newobj" and not call.args and call.kwargs is None
    return plain and made and _names_nested(call.callee)


def _names_in(nodes: list[Node]) -> Iterator[Global]:
    """Yield the names in nodes, but for those in calls that give a nested class."""
    seen: set[int] = set()
    while nodes:
        node = nodes.pop()
        if isinstance(node, Global):
            yield node
        elif not isinstance(node, str | int | float | bytes | None) and id(node) not in seen:
            seen.add(id(node))
            nodes += () if _names_nested(node) else children(node)


def calls_argument(callee: Node) -> bool:
    """Check for a name that calls one of its arguments."""
    return isinstance(callee, Global) and (callee.module, callee.name) in RECONSTRUCTORS


def innermost(node: Node) -> Global | None:
    """Return the name at the start of calls of results of calls."""
    while isinstance(node, Object):
        node = node.callee
    return node if isinstance(node, Global) else None


class Shapes:
    """What is known so far of names, and of nodes that hold no text: each is searched once."""

    def __init__(self) -> None:
        self.functions: dict[Global, bool] = {}
        self.places: dict[Global, tuple[int, ...] | None] = {}
        self.given: dict[int, Global | None] = {}
        self.clear: set[int] = set()
        self.inert: set[int] = set()  # nodes in which there is no function
        self.patience = _PATIENCE
        self.kept: list[Object] = []  # what is known by its id must not be freed

    def called(self, call: Object) -> Node | None:
        """Return what a dangerous call would call, None for any other call."""
        callee, args = call.callee, call.args
        if not isinstance(callee, Global) or call.how in METHODS:
            return callee
        if call.steps and (_goes_on(call) or python3_name(callee) in _SHARED):
            return callee
        places = self._places(callee)
        if places is None:
            return None
        for place in places:
            if place < len(args) and (isinstance(args[place], Object) or args[place] == _PARTIAL):
                return args[place]
        if callee == _PARTIAL:
            call = self._bound(call)
            if _is_result(call.callee):
                return call.callee
        function = self._function(call)
        return function if function is not None and self._has_text(call) else None

    def _places(self, callee: Global) -> tuple[int, ...] | None:
        """Return which arguments a name would call; None for a name that calls none of them."""
        if callee not in self.places:
            unknown = None if is_listed(callee) else ()
            self.places[callee] = RECONSTRUCTORS.get(python3_name(callee), unknown)
        return self.places[callee]

    def _bound(self, call: Object) -> Object:
        """Return the call that a `functools.partial` stands for; its state is said at last.

        Its function, arguments and keywords; one that is itself made by a call may hide them.
        """
        made = Object(call.args[0] if call.args else None, call.args[1:], kwargs=call.kwargs)
        match call.state:
            case None:
                pass
            case (function, tuple() as more, Dict() | None as keywords, *_):
                made = Object(function, (*made.args, more), kwargs=keywords)
            case _:
                made.callee = _PARTIAL
        self.kept.append(made)
        return made

    def _function(self, call: Object) -> Global | None:
        """Return the function that a call would run: it is called, or given to what may call it."""
        callee = call.callee
        if self._is_function(callee):
            return callee  # type: ignore[no-any-return]
        if call.how in _INSTANCES or not isinstance(callee, Global) or self._places(callee) is None:
            return None
        if id(call.args) not in self.given or call.kwargs is not None:
            given = self._given(call) if self.patience > 0 else callee
            self.given[id(call.args)] = given
        return self.given[id(call.args)]

    def _given(self, call: Object) -> Global | None:
        """Return the first function in what is given: in a partial, in an attribute of an object.

        Who copies an object calls its `__reduce_ex__`, and then what that returns (copy.py).
        """
        seen: set[int] = set()
        stack: list[Node] = [call.kwargs, call.args]
        looks = 0
        while stack:
            node = stack.pop()
            looks += 1
            if self._is_function(node):
                self.patience -= looks
                return node  # type: ignore[no-any-return]
            if isinstance(node, _NO_TEXT) or id(node) in seen or id(node) in self.inert:
                continue
            seen.add(id(node))
            inside = children(node)
            if isinstance(node, Object):
                next(inside)  # what it calls itself is judged by itself
            stack += inside
        self.inert |= seen
        return None

    def _is_function(self, node: Node) -> bool:
        if not isinstance(node, Global):
            return False
        if node not in self.functions:
            self.functions[node] = _is_function(node)
        return self.functions[node]

    def _has_text(self, call: Object) -> bool:
        """Search what a call is given; what a function returned may be text, too."""
        seen: set[int] = set()
        stack: list[Node] = [call.args]
        keywords = call.kwargs
        stack += (
            [value for _, value in keywords.pairs] if isinstance(keywords, Dict) else [keywords]
        )
        callee = python3_name(call.callee)
        if call.how not in _INSTANCES and callee[0] != "copyreg":
            stack += [payload for _, payload in call.steps]
        while stack:
            node = stack.pop()
            if isinstance(node, str | bytes | ByteArray | OldString):
                return True
            if isinstance(node, _NO_TEXT) or id(node) in seen or id(node) in self.clear:
                continue
            if isinstance(node, Object) and self._may_be_text(node.callee):
                return True
            seen.add(id(node))
            stack += children(node)
        self.clear |= seen
        return False

    def _may_be_text(self, callee: Node) -> bool:
        if not isinstance(callee, Global) or self._is_function(callee):
            return True
        return python3_name(callee) in _MADE_OF_NUMBERS


def _is_result(function: Node) -> bool:
    """Check for a function that `functools.partial` gets of no pickler: what a call returned.

    Python makes one partial of several; an instance of a class may be called.
    """
    if isinstance(function, Object):
        return function.how not in _INSTANCES or function.callee == _PARTIAL
    return bool(function == _PARTIAL)


_NO_TEXT = (int, float, type(None), Global, PersistentId)


def _is_function(named: Global) -> bool:
    """Check for a function of a third-party package, but for those that are known to be inert.

    By custom, classes begin with a capital; what a name is, its code alone can tell.
    """
    inert = (named.module, named.name) in RECONSTRUCTORS or named.name.startswith(_OF_CYTHON)
    a_class = named.name[:1].isupper()
    return not (inert or a_class or named.followed) and is_third_party(named.module)


def _goes_on(call: Object) -> bool:
    """Check for anything after the state of an object."""
    return any(kind == "build" for kind, _ in call.steps[:-1])
