"""What a pretrained file lacks, from the model's own initialisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from ckptool.model import libraries, live, zoo
from ckptool.pickles.tree import Node
from ckptool.state import checkpoint as places
from ckptool.state.wrappers import peeling

# Return the entries for keys that a source lacks, for as long as the context lasts.
Fill = Callable[[Sequence[str]], AbstractContextManager[Mapping[str, Node]]]


def initial_values(spec: zoo.ModelLike, args: Mapping[str, Any], seed: int) -> Fill:
    """Return a source of entries: keys of the model -> the values it starts with, seeded.

    The entries are in a temporary file, which exists as long as the context lasts.
    """

    @contextmanager
    def fill(keys: Sequence[str]) -> Iterator[Mapping[str, Node]]:
        torch = libraries.torch()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            values = zoo.build(spec, args, "cpu").state_dict()
        for anywhere in (False, True):  # keys are those of a model that is not wrapped
            name = peeling(values, anywhere=anywhere).name
            values |= {name(key): value for key, value in values.items()}
        with live.opened({key: values[key].contiguous() for key in keys}) as checkpoint:
            del values
            yield dict(places.text_items(checkpoint.tree) or [])

    return fill
