"""Records: dataclasses and named tuples that start fast, as JSON has them, and in groups.

`dataclasses.dataclass` compiles six methods for each frozen class, 0.5 ms of every start each time.
Here equality, hash and repr are functions over the names of the fields, and most classes share
their `__init__` with others, but for the names. Type checkers see the one of `dataclasses`, which
has them refuse an assignment to a frozen field; nothing else refuses it.
"""

import dataclasses
from collections.abc import Iterable
from math import isfinite
from typing import TYPE_CHECKING, Any, TypeVar

Key = TypeVar("Key")
Value = TypeVar("Value")

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
    from typing import NamedTuple as NamedTuple
else:
    from collections import namedtuple
    from operator import attrgetter
    from types import FunctionType

    def dataclass(cls=None, /, *, frozen=False, slots=False, eq=True):
        """Return the class as a dataclass, or a decorator that does."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, slots=slots, eq=eq)
        own = vars(cls)
        given = [own.get(name) for name in own.get("__annotations__", ())]
        alone = cls.__bases__ == (object,) and own.keys().isdisjoint(_INITS)
        ours = alone and len(given) in _SETTERS and all(map(_is_plain, given))
        made = dataclasses.dataclass(cls, slots=slots, eq=False, repr=False, init=not ours)
        if ours:
            made.__init__ = _init(made)
        if "__repr__" not in own:
            made.__repr__ = _repr
        if eq and "__eq__" not in own:
            names = [field.name for field in dataclasses.fields(made) if field.compare]
            made.__eq__, hashed = _compared(attrgetter(*names) if names else type)
            if own.get("__hash__") is None:
                made.__hash__ = hashed if frozen else None
        return made

    _INITS = ("__init__", "__post_init__")

    def _init(made):
        """Return the one of `_SETTERS` for as many fields, with names and defaults of a class."""
        fields = dataclasses.fields(made)
        names = tuple(each.name for each in fields)
        code = _SETTERS[len(names)].__code__.replace(co_names=names, co_varnames=("self", *names))
        given = (each.default for each in fields if each.default is not dataclasses.MISSING)
        init = FunctionType(code, {}, "__init__", tuple(given))
        init.__qualname__ = f"{made.__qualname__}.__init__"
        init.__annotations__ = {each.name: each.type for each in fields} | {"return": None}
        return init

    def _is_plain(default):
        """Return whether a field with this default, if any, is no more than set."""
        if not isinstance(default, dataclasses.Field):
            return True
        return default.init and default.default_factory is dataclasses.MISSING

    def _repr(self):
        fields = (field for field in dataclasses.fields(self) if field.repr)
        values = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields)
        return f"{type(self).__qualname__}({values})"

    def _compared(compared):
        def equal(self, other):
            same = type(self) is type(other)
            return compared(self) == compared(other) if same else NotImplemented

        def hashed(self):
            return hash(compared(self))

        return equal, hashed

    # What is defined here is compiled once, with the package.

    def _1(self, a):
        self.a = a

    def _2(self, a, b):
        self.a, self.b = a, b

    def _3(self, a, b, c):
        self.a, self.b, self.c = a, b, c

    def _4(self, a, b, c, d):
        self.a, self.b, self.c, self.d = a, b, c, d

    def _5(self, a, b, c, d, e):
        self.a, self.b, self.c, self.d, self.e = a, b, c, d, e

    def _6(self, a, b, c, d, e, f):
        self.a, self.b, self.c, self.d, self.e, self.f = a, b, c, d, e, f

    def _7(self, a, b, c, d, e, f, g):
        self.a, self.b, self.c, self.d, self.e, self.f, self.g = a, b, c, d, e, f, g

    def _8(self, a, b, c, d, e, f, g, h):
        self.a, self.b, self.c, self.d, self.e, self.f, self.g, self.h = a, b, c, d, e, f, g, h

    _SETTERS = dict(enumerate((_1, _2, _3, _4, _5, _6, _7, _8), 1))

    class _Named(type):
        """Make a `collections.namedtuple` of a class, and give it what else is in that."""

        def __new__(cls, name, bases, space):
            plain = super().__new__(cls, name, (), space)
            if not bases:
                return plain
            types = plain.__annotations__
            defaults = [space[each] for each in types if each in space]
            made = namedtuple(name, types, defaults=defaults)
            made.__annotations__ = made.__new__.__annotations__ = types
            for each in space.keys() - types.keys():
                setattr(made, each, space[each])
            return made

    class NamedTuple(metaclass=_Named):
        """A tuple with names for its parts: `typing` compiles the type of each, 0.1 ms a class."""


def plain(value: Any) -> Any:
    """Return a record, and what is in it, as JSON has it; a number that JSON lacks is None."""
    if dataclasses.is_dataclass(value):
        names = (field.name for field in dataclasses.fields(value))
        return {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value


def grouped(pairs: Iterable[tuple[Key, Value]]) -> dict[Key, list[Value]]:
    """Return the values of each key, in their order."""
    groups: dict[Key, list[Value]] = {}
    for key, value in pairs:
        groups.setdefault(key, []).append(value)
    return groups
