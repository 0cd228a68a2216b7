"""What a pretrained file lacks: as the model itself initialises it, or as `torch.nn.init` does."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ckptool.errors import EditError
from ckptool.model import libraries, live, zoo
from ckptool.pickles.tree import Node
from ckptool.records import dataclass
from ckptool.state import checkpoint as places
from ckptool.state.selecting import select
from ckptool.state.wrappers import peeling

# Return entries for keys that a source lacks, for as long as the context lasts.
Fill = Callable[[Sequence[str]], AbstractContextManager[Mapping[str, Node]]]

_FAN = ("a", "mode", "nonlinearity")
FUNCTIONS = {  # of torch.nn.init, without the last underscore: what they take
    "xavier_uniform": ("gain",),
    "xavier_normal": ("gain",),
    "kaiming_uniform": _FAN,
    "kaiming_normal": _FAN,
    "trunc_normal": ("mean", "std", "a", "b"),
    "normal": ("mean", "std"),
    "uniform": ("a", "b"),
    "orthogonal": ("gain",),
    "constant": ("val",),
    "zeros": (),
    "ones": (),
}
_RULE = re.compile(rf"(.+)=({'|'.join(FUNCTIONS)})(?::(.*))?", re.DOTALL)
_WORDS = ("mode", "nonlinearity")


@dataclass(frozen=True, slots=True)
class Rule:
    """Which keys are initialised by which function, with what."""

    text: str
    pattern: str
    function: str
    given: Mapping[str, float | str]


def read_rule(text: str) -> Rule:
    """Read `PATTERN=normal:std=0.01`; raises `EditError`."""
    found = _RULE.fullmatch(text)
    if not found:
        named = f"--init PATTERN=HOW, where HOW is {', '.join(FUNCTIONS)}"
        raise EditError(f"--init {text}: it does not end in =HOW", hint=named)
    pattern, function, rest = found.groups()
    known, given = FUNCTIONS[function], dict[str, float | str]()
    for each in (rest or "").split(",") if rest else ():
        name, sign, value = each.rpartition("=")
        name = name.strip() if sign else next(iter(known), "")
        if name not in known:
            takes = f"takes {', '.join(known)}" if known else "takes nothing"
            raise EditError(f"--init {text}: {function} {takes}, not `{each}`")
        given[name] = value if name in _WORDS else _number(text, value)
    if function == "constant" and not given:
        raise EditError(f"--init {text}: which constant is not said", hint="constant:0.5")
    return Rule(text, pattern, function, given)


def _number(text: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise EditError(f"--init {text}: `{value}` is not a number") from None


def ruled_values(
    rules: Sequence[Rule], shapes: zoo.Shapes, dtypes: Mapping[str, str], seed: int
) -> Fill:
    """Return a source of entries by rules, of which the first that selects a key has it.

    One generator is seeded, and keys are filled in the order of the target.
    """

    @contextmanager
    def fill(keys: Sequence[str]) -> Iterator[Mapping[str, Node]]:
        chosen = _chosen(rules, [key for key in shapes if key in {*keys}])
        torch = libraries.torch()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values = {
                key: _filled(key, torch.empty(shapes[key], dtype=getattr(torch, dtypes[key])), rule)
                for key, rule in chosen.items()
            }
        with _saved(values) as entries:
            yield entries

    return fill


def _chosen(rules: Iterable[Rule], keys: Sequence[str]) -> dict[str, Rule]:
    """Return the rules of keys, in their order; raises `NothingMatched` for one without any."""
    found: dict[str, Rule] = {}
    for rule in rules:
        try:
            selected = select([rule.pattern], keys)
        except EditError as error:
            raise error.within(f"--init {rule.text}, of {len(keys)} keys to fill") from None
        found |= {key: rule for key in selected if key not in found}
    return {key: found[key] for key in keys if key in found}


def _filled(key: str, tensor: Any, rule: Rule) -> Any:
    try:
        return getattr(libraries.torch().nn.init, f"{rule.function}_")(tensor, **rule.given)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        shape = list(tensor.shape)
        raise EditError(
            f"--init {rule.text}: {key} {shape}: {zoo.last_line(error)}",
            hint="put another rule before it: --init '*.bias=zeros'",
        ) from error


def initial_values(spec: zoo.ModelLike, args: Mapping[str, Any], seed: int) -> Fill:
    """Return a source of entries: keys of the model -> the values it starts with, seeded."""

    @contextmanager
    def fill(keys: Sequence[str]) -> Iterator[Mapping[str, Node]]:
        torch = libraries.torch()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            values = zoo.build(spec, args, "cpu").state_dict()
        for anywhere in (False, True):  # keys are those of a model that is not wrapped
            name = peeling(values, anywhere=anywhere).name
            values |= {name(key): value for key, value in values.items()}
        with _saved({key: values.pop(key).contiguous() for key in keys}) as entries:
            yield entries

    return fill


@contextmanager
def _saved(values: Mapping[str, Any]) -> Iterator[Mapping[str, Node]]:
    """Return the entries of tensors from a temporary file, which lives as long as the context."""
    with live.opened(values) as checkpoint:
        yield dict(places.text_items(checkpoint.tree) or [])


def one_after_other(first: Fill, second: Fill) -> Fill:
    """Return what fills by one source, and what that leaves by another."""

    @contextmanager
    def fill(keys: Sequence[str]) -> Iterator[Mapping[str, Node]]:
        with first(keys) as some, second([key for key in keys if key not in some]) as others:
            yield {**some, **others}

    return fill
