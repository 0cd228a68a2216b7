"""Import the libraries of the extra `torch`, or say what to install.

torch, torchvision and safetensors are loaded only when a command needs them. torch and torchvision
are compiled against each other: of two builds that do not fit, torch imports and torchvision fails
with `operator torchvision::nms does not exist`.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from ckptool.errors import MissingExtra

INSTALL = "pip install torch torchvision safetensors numpy"
REINSTALL = "pip install --force-reinstall torch torchvision"


def torch() -> ModuleType:
    """Import torch; raises `MissingExtra`."""
    return _imported("torch")


def torchvision() -> ModuleType:
    """Import torchvision and its models; raises `MissingExtra`."""
    _imported("torchvision.models")
    return _imported("torchvision")


def safetensors() -> ModuleType:
    """Import safetensors and its torch side; raises `MissingExtra`."""
    _imported("safetensors.torch")
    return _imported("safetensors")


def _imported(name: str) -> ModuleType:
    """Turn whatever an import can raise into `MissingExtra`: absent, or broken, and why."""
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        absent = (error.name or name).partition(".")[0]
        raise MissingExtra(f"this needs {absent}, which is not installed", hint=INSTALL) from error
    except Exception as error:  # OSError: a shared library; RuntimeError: builds that do not fit
        raise _broken(name.partition(".")[0], error) from error


def _broken(name: str, error: Exception) -> MissingExtra:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = f"{name} is installed, but cannot be imported"
    if "torchvision::" in str(error):
        reason = "torchvision does not fit the installed torch: they are builds of two versions"
    hint = REINSTALL if name.startswith("torch") else INSTALL
    return MissingExtra(reason, evidence=[lines[0][:200]], hint=hint)
