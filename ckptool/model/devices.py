"""Devices by name, settings that make their arithmetic repeatable, and memory given back."""

from __future__ import annotations

import gc
import os
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ckptool.errors import BadInput, NoDevice, OutOfMemory
from ckptool.model import libraries

# Set before the first call of cuBLAS; without it, deterministic algorithms refuse matrix products
# (docs.nvidia.com/cuda/cublas, "Results reproducibility").
_WORKSPACE = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
_LESS = "a smaller --batch-size, --device cpu or --dtype half needs less"


def resolve(name: str) -> Any:
    """Give the `torch.device` of `auto`, `cpu`, `cuda`, `cuda:N` or `mps`.

    `auto` is CUDA, else MPS, else the CPU. Raises `NoDevice` for one that is not here: never is
    another one taken instead.
    """
    torch = libraries.torch()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", name):
        raise BadInput(f"`{name}` is no device", hint="auto, cpu, cuda, cuda:N or mps")
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
            evidence=[
                f"cuda:{each} is {torch.cuda.get_device_name(each)}" for each in range(count)
            ],
        )
    return torch.device("cuda", index)


def describe(device: Any) -> str:
    """Name a device's model."""
    if device.type == "cuda":
        return str(libraries.torch().cuda.get_device_name(device))
    import platform

    return _cpu_name() or platform.processor() or platform.machine()


def _cpu_name() -> str:
    with suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return ""


def synchronize(device: Any) -> None:
    """Wait until a device has done what it was given."""
    torch = libraries.torch()
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()


def free(device: Any, last: Callable[[], Any] = lambda: None) -> None:
    """Give a device's memory back; `last` is a weak reference to the model that held it.

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
    """Tell whether an exception, or what caused it, says that memory ran out, on any device."""
    known = (MemoryError, libraries.torch().OutOfMemoryError)
    words = ("can't allocate memory", "not enough memory", "out of memory")
    while error is not None:
        text = str(error).lower() if isinstance(error, RuntimeError) else ""
        if isinstance(error, known) or any(each in text for each in words):
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
    with _random_states(), _algorithms(), _float32(allow_tf32):
        sow(seed)
        yield


def sow(seed: int) -> None:
    """Seed every generator that a model may draw from."""
    torch = libraries.torch()
    torch.manual_seed(seed)
    random.seed(seed)
    with suppress(ImportError):
        import numpy

        numpy.random.seed(seed % 2**32)


@contextmanager
def _random_states() -> Iterator[None]:
    torch = libraries.torch()
    used = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    state, numpy_random = random.getstate(), None
    with suppress(ImportError):
        import numpy

        numpy_random = numpy.random
    numpy_state = numpy_random.get_state() if numpy_random else None
    try:
        with torch.random.fork_rng(used):
            yield
    finally:
        random.setstate(state)
        if numpy_random and numpy_state is not None:
            numpy_random.set_state(numpy_state)


@contextmanager
def _algorithms() -> Iterator[None]:
    torch = libraries.torch()
    was = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn, filling = torch.backends.cudnn, torch.utils.deterministic
    name, value = _WORKSPACE
    absent = name not in os.environ
    os.environ.setdefault(name, value)
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with (
            _setting(cudnn, "benchmark", False),
            _setting(cudnn, "deterministic", True),
            _setting(filling, "fill_uninitialized_memory", False),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        if absent:
            os.environ.pop(name, None)


@contextmanager
def _float32(allow_tf32: bool) -> Iterator[None]:
    """Fix the precision of float32 arithmetic.

    Through the older settings, which a model's own code may read: that raises where only the
    newer ones are set. A program that used the newer ones gets those.
    """
    torch = libraries.torch()
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if _is_mixed(torch):
        value, name = "tf32" if allow_tf32 else "ieee", "fp32_precision"
        with _setting(matmul, name, value), _setting(cudnn.conv, name, value):
            yield
        return
    before = torch.get_float32_matmul_precision()
    try:
        with _setting(cudnn, "allow_tf32", allow_tf32), _setting(matmul, "allow_tf32", allow_tf32):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _is_mixed(torch: Any) -> bool:
    """Tell whether a program has set the newer precisions, so that the older cannot be read."""
    try:
        torch.get_float32_matmul_precision()
        _ = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    except RuntimeError:
        return True
    return False


@contextmanager
def _setting(place: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(place, name)
    setattr(place, name, value)
    try:
        yield
    finally:
        setattr(place, name, before)
