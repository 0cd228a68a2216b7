"""Judge checkpoints of DeepSpeed that real ranks wrote: `python zero_matrix.py FOLDER...`.

Each folder holds checkpoints with the truth beside them, `expected.pth`, as the engine gathers it.
Compared are the keys, dtypes, shapes, bits, ties, and the order and `_metadata` of the module, of
the output to torch and to safetensors; and `--values module` where the module is whole. Files are
unpickled: give it only what you wrote yourself, in an environment with deepspeed or without.
"""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class _Inert(pickle.Unpickler):
    """Give a class of its own for each name that is not installed."""

    def find_class(self, module: str, name: str) -> Any:
        """Find a class of torch; any other is made up."""
        if module.partition(".")[0] == "deepspeed":
            return type(name, (), {"__init__": lambda self, *args: None})
        return super().find_class(module, name)


class _Pickle:
    Unpickler = _Inert
    load = staticmethod(pickle.load)


def convert(source: Path, target: Path, *options: str) -> str:
    """Convert with the command line; return what was wrong."""
    command = [sys.executable, "-m", "ckptool", "convert", "-q", *options, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stderr.strip()


def differences(found: Mapping[str, Any], meant: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is not the same of two state_dicts, without their order."""
    if found.keys() != meant.keys():
        yield f"keys {sorted(found.keys() ^ meant.keys())}"
        return
    for key, value in meant.items():
        other = found[key]
        if (value.dtype, value.shape) != (other.dtype, other.shape):
            yield f"{key}: {other.dtype} {tuple(other.shape)}"
        elif bits(value) != bits(other):
            yield f"{key}: other values"


def bits(value: torch.Tensor) -> bytes:
    """Return the bytes of the elements."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def judge(folder: Path, scratch: Path) -> Iterator[str]:
    """Yield what is wrong with the outputs for one checkpoint."""
    truth = torch.load(folder / "expected.pth", weights_only=True)
    step = folder / (folder / "latest").read_text().strip()
    states = sorted(step.glob("*model_states.pt"), key=lambda path: "rank_0_" not in path.name)[0]
    model = torch.load(states, weights_only=False, pickle_module=_Pickle)
    module = model["module"]
    files = {suffix: scratch / f"out{suffix}" for suffix in (".pth", ".safetensors")}
    for target in files.values():
        if problem := convert(folder, target, "--force"):
            yield problem
            return
    found = torch.load(files[".pth"], weights_only=True)
    yield from differences(found, truth)
    if list(found) != list(module):
        yield f"order {list(found)}"
    if dict(found._metadata) != dict(module._metadata):
        yield "_metadata"
    for tied, key in model["shared_params"].items():
        if found[tied].data_ptr() != found[key].data_ptr():
            yield f"{tied} is not tied to {key}"
    safe = load_file(files[".safetensors"])
    untied = {key: value for key, value in truth.items() if key in safe}
    yield from (f"safetensors: {each}" for each in differences(safe, untied))
    if set(truth) - set(safe) != set(model["shared_params"]):
        yield f"safetensors: {sorted(set(truth) ^ set(safe))}"
    problem = convert(folder, files[".pth"], "--force", "--values", "module")
    if any(value.numel() == 0 for value in module.values()):
        if "--values" not in problem:
            yield f"--values module: {problem or 'written'}"
    elif problem:
        yield problem
    else:
        found = torch.load(files[".pth"], weights_only=True)
        yield from (f"module: {each}" for each in differences(found, module))


def main() -> None:
    """Print a line for each checkpoint; exit 1 where one is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", type=Path, nargs="+")
    given = parser.parse_args()
    paths = [path.parent for folder in given.folders for path in folder.rglob("expected.pth")]
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        for path in sorted(paths):
            problems = list(judge(path, Path(scratch)))
            wrong += bool(problems)
            print(f"{path.name}: {'; '.join(problems) or 'equal'}", flush=True)
    print(f"{len(paths) - wrong} of {len(paths)} equal")
    sys.exit(wrong > 0 or not paths)


if __name__ == "__main__":
    main()
