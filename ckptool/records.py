"""Records: dataclasses and named tuples that start fast, as JSON has them, and in groups.

Of the methods of a dataclass only `__init__` is compiled for each class.
`dataclasses.dataclass` compiles six for each frozen one, 0.5 ms of every start each time. Here
equality, hash and repr are functions over the names of the fields. Type checkers see the one of
`dataclasses`, which has them refuse an assignment to a frozen field; nothing else refuses it.
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

    def dataclass(cls=None, /, *, frozen=False, slots=False, eq=True):
        """Return the class as a dataclass, or a decorator that does."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, slots=slots, eq=eq)
        own = vars(cls)
        made = dataclasses.dataclass(cls, slots=slots, eq=False, repr=False)
        if "__repr__" not in own:
            made.__repr__ = _repr
        if eq and "__eq__" not in own:
            names = [field.name for field in dataclasses.fields(made) if field.compare]
            made.__eq__, hashed = _compared(attrgetter(*names) if names else type)
            if own.get("__hash__") is None:
                made.__hash__ = hashed if frozen else None
        return made

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
