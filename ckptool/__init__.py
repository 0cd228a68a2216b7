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
    "Options": "ckptool.verbs.plan",
    "add_prefix": "ckptool.verbs.api",
    "check": "ckptool.verbs.api",
    "convert": "ckptool.verbs.api",
    "diff": "ckptool.verbs.api",
    "download": "ckptool.verbs.api",
    "edits": "ckptool.state.edits",
    "info": "ckptool.verbs.api",
    "keys": "ckptool.verbs.api",
    "load_matching": "ckptool.model.loading",
    "load_state_dict": "ckptool.model.loading",
    "read": "ckptool.containers",
    "strip_prefix": "ckptool.verbs.api",
    "transfer": "ckptool.verbs.api",
    "unwrap": "ckptool.verbs.api",
    "verify": "ckptool.verbs.api",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_PUBLIC[name])
    return module if _PUBLIC[name] == f"ckptool.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return sorted(__all__)
