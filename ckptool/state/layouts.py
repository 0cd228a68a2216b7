"""What a state_dict holds, without its values: of a file, or of a model that was not run."""

from __future__ import annotations

from collections.abc import Mapping

from ckptool.records import NamedTuple
from ckptool.tensors.tensor import shapes_of, tensors_of, ties

Shapes = dict[str, tuple[int, ...]]


class Layout(NamedTuple):
    """Shapes, torch's names of dtypes, and which keys are tied to which, each by key."""

    shapes: Shapes
    dtypes: dict[str, str]
    ties: dict[str, str]


def layout_of(entries: Mapping[str, object]) -> Layout:
    """Return the layout of the entries that are tensors."""
    dtypes = {key: value.dtype.torch_name for key, value in tensors_of(entries).items()}
    return Layout(shapes_of(entries), dtypes, ties(entries))
