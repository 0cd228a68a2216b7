"""torchvision's registry of weights: names, and where their files are.

The registry says a size in MiB with three digits behind the point, so sizes are near, not exact.
"""

from __future__ import annotations

from typing import Any

from ckptool.errors import NoSuchModel
from ckptool.files import filename
from ckptool.model import libraries
from ckptool.records import dataclass


@dataclass(frozen=True, slots=True)
class Weights:
    """An entry of the registry; `top1` in percent, `sha256_prefix` out of the file's name."""

    name: str
    model: str
    member: str
    default: bool
    url: str
    file: str
    sha256_prefix: str | None
    nbytes: int | None
    parameters: int | None
    top1: float | None

    @property
    def names(self) -> tuple[str, ...]:
        """Return every name that means these weights."""
        enum = self.member.partition(".")[0]
        defaults = (self.model, f"{self.model}:DEFAULT", f"{enum}.DEFAULT", enum)
        return (self.name, self.member, *(defaults if self.default else ()))


def listing(pattern: str | None = None) -> list[Weights]:
    """List the registry: names that hold `pattern`, or match it where it holds `*`, `?` or `[`.

    Raises `MissingExtra`.
    """
    from fnmatch import fnmatchcase

    pattern = (pattern or "").lower()
    if not any(sign in pattern for sign in "*?["):
        pattern = f"*{pattern}*"
    return [
        entry
        for entry in _registry()
        if any(fnmatchcase(name.lower(), pattern) for name in entry.names)
    ]


def resolve(name: str) -> Weights:
    """Find weights: `resnet18` (its default), `resnet50:IMAGENET1K_V1`, `ResNet50_Weights.DEFAULT`.

    Raises `NoSuchModel` or `MissingExtra`.
    """
    entries = {text: entry for entry in _registry() for text in entry.names}
    spelled = {text.lower(): text for text in entries}
    if name.lower() not in spelled:
        raise _no_such_weights(name, spelled)
    return entries[spelled[name.lower()]]


def _registry() -> list[Weights]:
    models = libraries.torchvision().models
    entries = []
    for model in models.list_models():
        members = models.get_model_weights(model)
        default = getattr(members, "DEFAULT", None)
        entries += [_entry(model, member, member is default) for member in members]
    return entries


def _entry(model: str, member: Any, default: bool) -> Weights:
    meta = member.meta
    file = filename.of_url(member.url)
    size = meta.get("_file_size")
    metrics = meta.get("_metrics", {}).values()
    return Weights(
        name=f"{model}:{member.name}",
        model=model,
        member=f"{type(member).__name__}.{member.name}",
        default=default,
        url=member.url,
        file=file,
        sha256_prefix=filename.hash_of_registry(file),
        nbytes=None if size is None else round(size * 2**20),
        parameters=meta.get("num_params"),
        top1=next((values["acc@1"] for values in metrics if "acc@1" in values), None),
    )


def _no_such_weights(name: str, spelled: dict[str, str]) -> NoSuchModel:
    from difflib import get_close_matches

    close = [spelled[text] for text in get_close_matches(name.lower(), spelled, n=3, cutoff=0.6)]
    if close:
        hint = f"did you mean {' or '.join(close)}?"
    elif "/" in name or "." in name:
        hint = "a URL starts with https://"
    else:
        hint = "ckptool download --list shows all"
    return NoSuchModel(f"torchvision has no weights named `{name}`", hint=hint)
