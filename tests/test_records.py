"""Dataclasses that start fast behave as those of the standard library do, but for assignment."""

import copy
import dataclasses
import inspect
import pickle
import typing

import pytest

from ckptool.records import NamedTuple, dataclass as ours


def made(dataclass):
    @dataclass(frozen=True, slots=True)
    class Point:
        x: int
        y: int = 0
        note: str = dataclasses.field(default="", compare=False, repr=False)

    @dataclass(slots=True)
    class Bag:
        items: list[int] = dataclasses.field(default_factory=list)

    @dataclass(frozen=True)
    class Nothing:
        pass

    @dataclass(frozen=True, slots=True, eq=False)
    class Same:
        x: int

    @dataclass(frozen=True)
    class Own:
        x: int

        def __repr__(self):
            return "mine"

        def __eq__(self, other):
            return True

        def __hash__(self):
            return 7

    @dataclass(slots=True)
    class With:
        x: int
        doubled: int = dataclasses.field(init=False)
        seen: list[int] = dataclasses.field(init=False, default_factory=list)
        known: int = dataclasses.field(init=False, default=3)

        def __post_init__(self):
            self.doubled = 2 * self.x

    return Point, Bag, Nothing, Same, Own, With


def shown(dataclass):
    """Return what can be seen of objects of each class."""
    Point, Bag, Nothing, Same, Own, With = made(dataclass)
    a, b, c = Point(1), Point(1, 0, "n"), Point(1, 2)
    same = Same(1)
    with pytest.raises(TypeError):
        hash(Bag())
    with pytest.raises(TypeError, match=r"Point.__init__\(\) missing .* argument: 'x'"):
        Point()
    return [
        (a == b, a == c, a != c, a == 1, hash(a) == hash(b), len({a, b, c})),
        [repr(each).replace("shown", "") for each in (a, c, Bag([1]), Nothing(), Own(1))],
        (
            Bag() == Bag(),
            Bag([1]) == Bag(),
            Nothing() == Nothing(),
            hash(Nothing()) == hash(Nothing()),
        ),
        (same == same, same == Same(1), Own(1) == 5, hash(Own(1))),
        (dataclasses.asdict(c), dataclasses.replace(c, y=5) == Point(1, 5), Point.__match_args__),
        [str(inspect.signature(each)) for each in (Point, Bag, Nothing, Same, Own, With)],
        (With(2).doubled, With(2).seen, With(2).known, With(2) == With(2)),
        (copy.copy(c) == c, copy.deepcopy(Bag([1])) == Bag([1])),
    ]


def test_they_are_as_those_of_dataclasses():
    theirs = [str(each).replace("made.<locals>.", "") for each in shown(dataclasses.dataclass)]
    assert [str(each).replace("made.<locals>.", "") for each in shown(ours)] == theirs


@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("count", range(12))
def test_any_number_of_fields_is_set(count, slots):
    fields = [(f"field_{number}", int) for number in range(count)]
    if count > 2:
        fields[-1] = ("last", int, 5)
    names = [name for name, *_ in fields]

    def seen(dataclass):
        space = {"__annotations__": dict(each[:2] for each in fields)}
        space |= {each[0]: each[2] for each in fields[2:] if len(each) > 2}
        made = dataclass(slots=slots)(type("Made", (), space | {"__module__": __name__}))
        values = [[*range(count)], {name: at for at, name in enumerate(names)}]
        few = [*range(count - (count > 2))]
        found = [made(*values[0]), made(**values[1]), made(*few)]
        said = [
            str(inspect.signature(made)),
            [getattr(each, name) for each in found for name in names],
        ]
        for wrong in ((), range(count + 1)):
            if len(wrong) not in range(len(few), count + 1):
                with pytest.raises(TypeError) as caught:
                    made(*wrong)
                said.append(str(caught.value))
        return said

    assert seen(ours) == seen(dataclasses.dataclass)


@ours(frozen=True, slots=True)
class Pickled:
    x: int
    y: tuple[int, ...] = ()


def test_they_can_be_pickled():
    assert pickle.loads(pickle.dumps(Pickled(1, (2,)))) == Pickled(1, (2,))


def named(base):
    class Span(base):
        start: int
        end: int = 7
        note: str = ""

        @property
        def length(self):
            return self.end - self.start

        def moved(self, by):
            return Span(self.start + by, self.end + by)

    return Span


def of_named(Span):
    """Return what can be seen of tuples of a class."""
    a = Span(1)
    with pytest.raises(TypeError, match=r"missing 1 required positional argument: 'start'"):
        Span()
    with pytest.raises(AttributeError):
        a.start = 2
    return [
        (a == (1, 7, ""), hash(a) == hash((1, 7, "")), [*a], a[0], a.length, a.moved(2)),
        (a._replace(note="n"), a._asdict(), Span._make([1, 2, "m"])),
        (Span._fields, Span._field_defaults, Span.__match_args__, Span.__doc__, Span.__module__),
        (str(inspect.signature(Span)), Span.__name__, Span.__qualname__, repr(copy.copy(a))),
    ]


def test_named_tuples_are_as_those_of_typing():
    theirs = str(of_named(named(typing.NamedTuple)))
    assert str(of_named(named(NamedTuple))) == theirs


class PickledTuple(NamedTuple):
    x: int
    y: tuple[int, ...] = ()


def test_named_tuples_can_be_pickled():
    assert pickle.loads(pickle.dumps(PickledTuple(1, (2,)))) == PickledTuple(1, (2,))
