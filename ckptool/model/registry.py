"""The names of torchvision's models and weights, read in its source: importing it takes seconds."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

_MODEL = re.compile(r"^@register_model\((?:name=\"(\w+)\")?\)\n(?:@.*\n)*def (\w+)", re.MULTILINE)
_WEIGHTS = re.compile(r"^class (\w+)\(WeightsEnum\):\n((?:[ \t].*\n|\n)*)", re.MULTILINE)
_MEMBER = re.compile(r"^    (\w+) = Weights\(", re.MULTILINE)


def models() -> list[str]:
    """List what `torchvision.models.list_models` does; nothing where it is not installed."""
    return sorted(
        name or function for text in _sources() for name, function in _MODEL.findall(text)
    )


def weights() -> list[str]:
    """List weights as `ResNet18_Weights.IMAGENET1K_V1`."""
    return sorted(
        f"{enum}.{member}"
        for text in _sources()
        for enum, body in _WEIGHTS.findall(text)
        for member in _MEMBER.findall(body)
    )


def _sources() -> Iterator[str]:
    from importlib.util import find_spec

    found = find_spec("torchvision")
    for top in (found and found.submodule_search_locations) or ():
        for folder, _, names in os.walk(os.path.join(top, "models")):
            for name in names:
                if name.endswith(".py"):
                    with open(os.path.join(folder, name), encoding="utf-8") as file:
                        yield file.read()
