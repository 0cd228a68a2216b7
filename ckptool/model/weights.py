"""torchvision's registry of weights: names, and where their files are.

The registry says a size in MiB with three digits behind the point, so sizes are near, not exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ckptool.errors import NoSuchModel
from ckptool.files import filehash, filename
from ckptool.model import libraries


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
        """Give every name that means these weights."""
        enum = self.member.partition(".")[0]
        defaults = (self.model, f"{self.model}:DEFAULT", f"{enum}.DEFAULT", enum)
        return (self.name, self.member, *(defaults if self.default else ()))


def listing(pattern: str | None = None) -> list[Weights]:
    """List the registry: names that hold `pattern`, or match it where it holds `*`, `?` or `[`.

    Raises `MissingExtra`.
    """
    found = _registry()
    if pattern is None:
        return found
    return [each for each in found if any(_matches(name, pattern) for name in each.names)]


def resolve(name: str) -> Weights:
    """Find weights: `resnet18` (its default), `resnet50:IMAGENET1K_V1`, `ResNet50_Weights.DEFAULT`.

    Raises `NoSuchModel` or `MissingExtra`.
    """
    found = _registry()
    by_name = {each_name.lower(): each for each in found for each_name in each.names}
    if name.lower() not in by_name:
        raise _no_such_weights(name, found)
    return by_name[name.lower()]


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
    return Weights(
        name=f"{model}:{member.name}",
        model=model,
        member=f"{type(member).__name__}.{member.name}",
        default=default,
        url=member.url,
        file=file,
        sha256_prefix=filehash.hash_of_registry(file),
        nbytes=None if size is None else round(size * 2**20),
        parameters=meta.get("num_params"),
        top1=_top1(meta.get("_metrics", {})),
    )


def _top1(metrics: dict[str, dict[str, float]]) -> float | None:
    return next((found["acc@1"] for found in metrics.values() if "acc@1" in found), None)


def _matches(name: str, pattern: str) -> bool:
    from fnmatch import fnmatchcase

    name, pattern = name.lower(), pattern.lower()
    return fnmatchcase(name, pattern) if any(sign in pattern for sign in "*?[") else pattern in name


def _no_such_weights(name: str, known: list[Weights]) -> NoSuchModel:
    from difflib import get_close_matches

    pool = {text.lower(): text for each in known for text in each.names}
    close = [pool[text] for text in get_close_matches(name.lower(), pool, n=3, cutoff=0.6)]
    hint = f"did you mean {' or '.join(close)}?" if close else "ckptool download --list shows all"
    if not close and ("/" in name or "." in name):
        hint = "a URL starts with https://"
    return NoSuchModel(f"torchvision has no weights named `{name}`", hint=hint)
