"""Measure `load_state_dict(device="cuda")` against torch and safetensors, on a machine with a GPU.

All read a file that is in the page cache and end with its tensors on the GPU. They take turns, in
one process; a ratio is the median over rounds.

usage: python gpu.py [GIB [ROUNDS]]      (4 9)
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import safetensors.torch
import torch

import ckptool

GIB = 1 << 30
LAYER = (4096, 4096)  # 64 MiB
LEAST = 3.0  # times as fast as safetensors


def main(size: str = "4", rounds: str = "9") -> None:
    """Print GiB/s of each, and the ratios; exit with 1 below the bound."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    count = int(float(size) * GIB) // (4 * LAYER[0] * LAYER[1])
    state = {f"layers.{at}.weight": torch.randn(LAYER) for at in range(count)}
    nbytes = sum(value.nbytes for value in state.values())
    with tempfile.TemporaryDirectory() as folder:
        zipped, flat = str(Path(folder, "a.pth")), str(Path(folder, "a.safetensors"))
        torch.save(state, zipped)
        safetensors.torch.save_file(state, flat)
        loaders: dict[str, Callable[[], Any]] = {
            "ckptool .safetensors": lambda: ckptool.load_state_dict(flat, device="cuda"),
            "ckptool .pth": lambda: ckptool.load_state_dict(zipped, device="cuda"),
            "safetensors": lambda: safetensors.torch.load_file(flat, device="cuda"),
            "torch.load": lambda: torch.load(zipped, map_location="cuda", weights_only=True),
        }
        for load in loaders.values():  # context, page cache, kernels; and they are right
            loaded = load()
            assert all(torch.equal(loaded[key].cpu(), value) for key, value in state.items())
            del loaded
        times = {name: [] for name in loaders}
        for _ in range(int(rounds)):
            for name, load in loaders.items():
                times[name].append(timed(load))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {nbytes / GIB:.1f} GiB")
    for name, taken in times.items():
        print(f"{name:22} {nbytes / GIB / median(taken):6.1f} GiB/s")
    pairs = zip(times["safetensors"], times["ckptool .safetensors"], strict=True)
    ratio = median(theirs / ours for theirs, ours in pairs)
    print(f"{ratio:.2f} times as fast as safetensors, at least {LEAST:g}")
    sys.exit(0 if ratio >= LEAST else 1)


def timed(load: Callable[[], Any]) -> float:
    """Return the seconds until all is on the GPU, whose memory is free again then."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.synchronize()
    start = time.perf_counter()
    loaded = load()
    torch.cuda.synchronize()
    taken = time.perf_counter() - start
    del loaded
    return taken


if __name__ == "__main__":
    main(*sys.argv[1:])
