"""What others say of files: torch, safetensors, picklescan; each file in a process of its own.

As a program it reads a JSON list of paths from stdin and writes one line of JSON for each:
`python tests/opinions.py torch|picklescan`. A file that crashes or hangs its reader ends a fork.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

SECONDS = 20
MEMORY = 24 << 30  # address space, of which torch takes a good deal to begin with


def of_torch(path: str) -> dict[str, Any]:
    """Load a file as strictly as its library can; give every tensor by its path."""
    import torch
    from safetensors.torch import load_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if path.endswith(".safetensors"):
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, weights_only=True, map_location="cpu")
        return {"tensors": [[place, *described(each)] for place, each in tensors(loaded)]}


def tensors(tree: Any) -> Iterator[tuple[str, Any]]:
    """Yield every tensor with its path, each container once."""
    import torch

    seen: set[int] = set()

    def walk(path: tuple[str, ...], node: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(node, torch.Tensor):
            yield ".".join(path) or ".", node
            return
        if not isinstance(node, dict | list | tuple | set) or id(node) in seen:
            return
        seen.add(id(node))
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in pairs:
            label = str(key) if type(key) in (str, int) else "?"
            yield from walk((*path, label), value)

    yield from walk((), tree)


def described(tensor: Any) -> tuple[str, list[int], str]:
    """Give dtype, shape, and a hash of the bytes where they are plain."""
    import torch

    dtype = str(tensor.dtype).removeprefix("torch.")
    plain = tensor.layout is torch.strided and not tensor.is_quantized and not tensor.is_meta
    if not plain or tensor.is_nested or tensor.itemsize > 8:  # complex128: ckptool only copies it
        return dtype, list(tensor.shape), ""
    resolved = tensor.detach().resolve_conj().resolve_neg()
    data = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(resolved).reshape(-1)
    raw = bytes(data.view(torch.uint8).numpy()) if data.numel() else b""
    return dtype, list(tensor.shape), hashlib.sha256(raw).hexdigest()


def of_picklescan(path: str) -> dict[str, Any]:
    """Scan a file."""
    from picklescan import scanner

    found = scanner.scan_file_path(path)
    names = {f"{each.module}.{each.name}": each.safety.value for each in found.globals}
    return {"names": names, "failed": bool(found.scan_err), "infected": found.infected_files > 0}


def alone(opinion: Callable[[str], dict[str, Any]], path: str) -> dict[str, Any]:
    """Ask in a fork, with bounds on time and memory."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.close(reading)
            signal.alarm(SECONDS)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            try:
                told = opinion(path)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                told = {"refused": f"{type(error).__name__}: {first[:300]}"}
            with os.fdopen(writing, "w") as file:
                json.dump(told, file)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        said = file.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    return json.loads(said) if said else {"refused": f"ended by signal {-code}"}


if __name__ == "__main__":
    if sys.argv[1] == "torch":
        import safetensors.torch  # noqa: F401  (loaded once, before the forks)
        import torch

        torch.set_num_threads(1)
        opinion = of_torch
    else:
        opinion = of_picklescan
    null = os.open(os.devnull, os.O_WRONLY)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(null, 1)  # what the readers print
    for path in json.load(sys.stdin):
        out.write(json.dumps({"path": path, **alone(opinion, path)}) + "\n")
        out.flush()
