"""ckptool: look into PyTorch checkpoints and edit them, without running what is in them.

The public names are loaded when they are first used (PEP 562); importing ckptool imports no
torch, no numpy and no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "CkptoolError": "ckptool.errors",
    "read": "ckptool.formats",
    "rewrite": "ckptool.surgery",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
