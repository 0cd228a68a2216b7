"""Make dataclasses that start fast: no method is compiled before the first object is made.

`dataclasses.dataclass` compiles six for each frozen one, 0.5 ms of every start each time. Here
equality, hash and repr are functions over the names of the fields, and `__init__` is compiled when
it is first looked up: most classes have no object in a run. Type checkers see the one of
`dataclasses`, which has them refuse an assignment to a frozen field; nothing else refuses it.
"""

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dataclasses import dataclass as dataclass
else:
    from operator import attrgetter

    def dataclass(cls=None, /, *, frozen=False, slots=False, eq=True):
        """Return the class as a dataclass, or a decorator that does."""
        if cls is None:
            return lambda cls: dataclass(cls, frozen=frozen, slots=slots, eq=eq)
        own = vars(cls)
        made = dataclasses.dataclass(cls, slots=slots, init=False, eq=False, repr=False)
        if "__init__" not in own:
            made.__init__ = _Init(made)
        if "__repr__" not in own:
            made.__repr__ = _repr
        if eq and "__eq__" not in own:
            names = [field.name for field in dataclasses.fields(made) if field.compare]
            made.__eq__, hashed = _compared(attrgetter(*names) if names else type)
            if own.get("__hash__") is None:
                made.__hash__ = hashed if frozen else None
        return made

    class _Init:
        """The `__init__` of a dataclass, compiled when it is first looked up."""

        def __init__(self, of):
            self.of = of

        def __get__(self, instance, owner):
            fields = {field.name: field for field in dataclasses.fields(self.of)}
            names = ("__module__", "__qualname__", "__doc__", "__post_init__")
            body = {name: getattr(self.of, name) for name in names if hasattr(self.of, name)}
            types = {name: field.type for name, field in fields.items()}
            twin = type(self.of.__name__, (), {**body, **fields, "__annotations__": types})
            self.of.__init__ = dataclasses.dataclass(twin, eq=False, repr=False).__init__
            return self.of.__init__.__get__(instance, owner)

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
