"""Run `verify` on every classifier of torchvision, with equal weights and with flipped bits.

    python tests/gpu.py                                    (CUDA, three dtypes)
    python tests/gpu.py --device cpu --dtypes float32 --every 10 --size 64
    python tests/gpu.py --models resnet18,vit_b_16 --device cpu

Weights are seeded. For equal weights, through a DataParallel checkpoint, the verdict is identical
or, where outputs say nothing, inconclusive with equal digests; the ViTs, whose heads start as
zeros, must be inconclusive. With a flipped bit (the sign of the largest value of a tensor, which
float16 sees too) it is different and names the module, or inconclusive, or names the tensor that
differs: plain `identical` never. `--every N` flips in each Nth tensor, otherwise in one of them.
Prints a line for each model that fails, and the README's row; exit status 1 where one fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torchvision
from torchvision.models import list_models

import ckptool
from ckptool.errors import BadInput

ZERO_HEADS = ("vit_b_16", "vit_b_32", "vit_h_14", "vit_l_16", "vit_l_32")


def main() -> int:
    """Run the matrix, print what failed and the row; return the exit status."""
    asked = arguments()
    names = asked.models.split(",") if asked.models else list_models(module=torchvision.models)
    counts, failed, started = Counter[str](), list[str](), time.monotonic()
    for name in names:
        before = time.monotonic()
        failed += tried(name, asked, counts)
        print(f"{name}: {time.monotonic() - before:.1f} s, {dict(counts)}", flush=True)
    for line in failed:
        print(f"FAILED {line}")
    device = torch.cuda.get_device_name() if asked.device == "cuda" else asked.device
    found = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
    versions = f"{torch.__version__}, torchvision {torchvision.__version__}"
    took = f"{len(names)} classifiers in {asked.dtypes}, {time.monotonic() - started:.0f} s"
    print(f"| {device} | {versions} | {took}: {found}; {len(failed)} failed |")
    return 1 if failed else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtypes", default="float32,float16,bfloat16")
    parser.add_argument("--models", default="")
    parser.add_argument("--every", type=int, default=0)
    parser.add_argument("--size", type=int, default=0)
    return parser.parse_args()


def tried(name: str, asked: argparse.Namespace, counts: Counter[str]) -> list[str]:
    """Compare one model's weights with themselves, and with flipped ones; list what is wrong."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None)
    state = model.state_dict()  # its values are flipped in place
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        reference = Path(folder) / "trained.pth"
        torch.save({"state_dict": torch.nn.DataParallel(model).state_dict()}, reference)
        for dtype in asked.dtypes.split(","):
            found = verified(reference, state, name, dtype, asked)
            counts[f"equal: {found.verdict}"] += 1
            wanted = ("inconclusive",) if name in ZERO_HEADS else ("identical", "inconclusive")
            if found.verdict not in wanted or not found.same_digests:
                wrong.append(f"{name} {dtype}: equal weights are {found.verdict}")
            for key in chosen(state, asked.every):
                result = judged(flipped(state, key, reference, name, dtype, asked), key)
                counts[f"flipped: {result}"] += 1
                if result == "plain identical" or result == "another module":
                    wrong.append(f"{name} {dtype}: {key} flipped: {result}")
    return wrong


def chosen(state: dict[str, Any], every: int) -> list[str]:
    """Return each Nth tensor, or a weight in the middle."""
    keys = list(state)
    weights = [key for key in keys if state[key].dim() == 4] or keys
    return keys[::every] if every else weights[len(weights) // 2 :][:1]


def flipped(
    state: dict[str, Any], key: str, reference: Path, name: str, dtype: str, asked: Any
) -> ckptool.Verification:
    """Verify with the sign of a tensor's largest value flipped, and flip it back."""
    flat = state[key].view(-1)
    place = flat.abs().argmax()
    kept = flat[place].clone()
    flat[place] = -kept if kept else kept + 1
    try:
        return verified(reference, state, name, dtype, asked)
    finally:
        flat[place] = kept


def verified(
    reference: Path, state: dict[str, Any], name: str, dtype: str, asked: Any
) -> ckptool.Verification:
    """Verify at the size asked for, or at that of training where the model takes no other."""
    how: dict[str, Any] = {"devices": asked.device, "dtype": dtype}
    if asked.size and not name.startswith(("vit", "maxvit")):
        try:
            shape = f"1,3,{asked.size},{asked.size}"
            return ckptool.verify(reference, state, name, input_shapes=shape, **how)
        except BadInput:
            pass
    return ckptool.verify(reference, state, name, **how)


def judged(found: ckptool.Verification, key: str) -> str:
    (run,) = found.runs
    if found.verdict == "different":
        # A parameter of a module whose parts run later shows in its parts first.
        first, module = run.first_difference or "", key.rpartition(".")[0]
        near = first == module or first.startswith(module) or module.startswith(first)
        return "different" if near else "another module"
    if found.verdict == "identical":
        return "tensor named" if key in run.parameters else "plain identical"
    return str(found.verdict)


if __name__ == "__main__":
    sys.exit(main())
