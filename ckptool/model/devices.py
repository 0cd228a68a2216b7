"""Devices by name, settings that make their arithmetic repeatable, and their memory."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from ckptool.errors import BadInput, NoDevice, OutOfMemory
from ckptool.model import libraries

# Set before the first call of cuBLAS; without it, deterministic algorithms refuse matrix products
# (docs.nvidia.com/cuda/cublas, "Results reproducibility").
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_LESS = "a smaller --batch-size, --device cpu or --dtype half needs less"


def resolve(name: str) -> Any:
    """Return the `torch.device` of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    `auto` is CUDA, else MPS, else the CPU. Raises `NoDevice` for one that is absent: another one
    never takes its place.
    """
    torch = libraries.torch()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise BadInput(f"`{name}` is not a device", hint="auto, cpu, cuda, cuda:N or mps")
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if cuda else "mps" if mps else "cpu"
    if name.startswith("cuda"):
        return _cuda(torch, name, cuda)
    if name == "mps" and not mps:
        raise NoDevice(
            f"there is no device `mps` here: torch {torch.__version__} finds no Apple GPU",
            hint="--device cpu",
        )
    return torch.device(name)


def _cuda(torch: Any, name: str, available: bool) -> Any:
    if not available:
        built = torch.backends.cuda.is_built()
        reason = "finds no GPU or no driver" if built else "is built without CUDA"
        raise NoDevice(
            f"there is no device `{name}` here: torch {torch.__version__} {reason}",
            hint="--device cpu",
        )
    index, count = int(name.partition(":")[2] or 0), torch.cuda.device_count()
    if index >= count:
        raise NoDevice(
            f"there is no device `{name}` here",
            evidence=[f"cuda:{i} is {torch.cuda.get_device_name(i)}" for i in range(count)],
        )
    return torch.device("cuda", index)


def describe(device: Any) -> str:
    """Return the name of a device's model."""
    if device.type == "cuda":
        return str(libraries.torch().cuda.get_device_name(device))
    import platform

    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: Any) -> None:
    """Wait until a device has finished its work."""
    if device.type in ("cuda", "mps"):
        getattr(libraries.torch(), device.type).synchronize()


def free(device: Any, last: Callable[[], Any] = lambda: None) -> None:
    """Release a device's unused memory; `last` is a weak reference to the model that used it.

    A model in a reference cycle is collected; that takes long, and most models are in none.
    """
    if last() is not None:
        gc.collect()
    torch = libraries.torch()
    if device.type == "cuda":
        # cuBLAS keeps a workspace for each stream, which counts as allocated.
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).empty_cache()


def is_out_of_memory(error: BaseException | None) -> bool:
    """Check whether an exception, or what caused it, says that memory ran out, on any device."""
    known = (MemoryError, libraries.torch().OutOfMemoryError)
    words = ("can't allocate memory", "not enough memory", "out of memory")
    while error is not None:
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, known) or any(word in text for word in words):
            return True
        error = error.__cause__
    return False


@contextmanager
def memory_of(device: Any) -> Iterator[None]:
    """Turn what a full device raises into `OutOfMemory`."""
    try:
        yield
    except OutOfMemory:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise OutOfMemory(f"{device} has too little memory for this", hint=_LESS) from error
        raise


@contextmanager
def repeatable(seed: int, *, allow_tf32: bool = False) -> Iterator[None]:
    """Fix seeds and settings so that equal work gives equal bits; restore them afterwards.

    An operator without a deterministic version runs and warns: whether a model repeats itself is
    found out by running it twice.
    """
    import numpy

    torch = libraries.torch()
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(used), ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        undo.callback(numpy.random.set_state, numpy.random.get_state())
        undo.callback(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)
        name, value = _WORKSPACE
        if name not in os.environ:
            os.environ[name] = value
            undo.callback(os.environ.pop, name, None)
        if not _uses_fp32_precision(torch):
            # Last of all: the two `allow_tf32` change it.
            undo.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        for owner, name, setting in _settings(torch, allow_tf32):
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, setting)
        seed_everything(seed)
        yield


def seed_everything(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    import numpy

    libraries.torch().manual_seed(seed)
    random.seed(seed)
    numpy.random.seed(seed % 2**32)


def _settings(torch: Any, allow_tf32: bool) -> list[tuple[Any, str, object]]:
    """List owner, name and value of the attributes that decide how arithmetic is done.

    The precision of float32 goes through the older settings, which a model's own code may read:
    that raises where only the newer ones are set. A program that used the newer ones gets those.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    float32: list[tuple[Any, str, object]] = [
        (cudnn, "allow_tf32", allow_tf32),
        (matmul, "allow_tf32", allow_tf32),
    ]
    if _uses_fp32_precision(torch):
        precision = "tf32" if allow_tf32 else "ieee"
        float32 = [(owner, "fp32_precision", precision) for owner in (matmul, cudnn.conv)]
    return [
        (cudnn, "benchmark", False),
        (cudnn, "deterministic", True),
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
        *float32,
    ]


def _uses_fp32_precision(torch: Any) -> bool:
    """Check whether a program has set the newer precisions, so that the older cannot be read."""
    try:
        torch.get_float32_matmul_precision()
        _ = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return True
    return False
