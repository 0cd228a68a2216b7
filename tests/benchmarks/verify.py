"""Measure `verify` against doing it by hand, and `load_state_dict` against `torch.load(mmap=True)`.

By hand is two models, two loads and three forward passes: the least that shows that a model repeats
itself and that other weights give the same. `verify` also looks at what every module returns, and
whether outputs depend on the input. Both sides alternate, in one process, so that what else the
machine does hits them alike; a ratio is the median over pairs, the bound that of all architectures
together: their sum of seconds.

usage: python verify.py [MODELS [BATCH_SIZE [ROUNDS]]]      (ten of them, 1, 5)
"""

import gc
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torchvision

from ckptool.model import inputs, loading, verify

GIB = 1 << 30
LAYER = (1024, 1024)
MOST = 0.6  # of the time that it takes by hand
MODELS = (
    "resnet50,vgg16,vit_b_16,mobilenet_v2,convnext_base,densenet121,efficientnet_b0,swin_t,"
    "regnet_y_400mf,mnasnet1_0"
)


def main(names: str = MODELS, batch_size: str = "1", rounds: str = "5") -> None:
    """Print both measurements; exit with 1 where one is beyond its bound."""
    with tempfile.TemporaryDirectory() as folder:
        pairs = [
            measure_verify(Path(folder), name, int(batch_size), int(rounds))
            for name in names.split(",")
        ]
        ours, theirs = map(sum, zip(*pairs, strict=True))
        middle = median(one / other for one, other in pairs)
        print(f"verify, all: {ours:.2f} s, by hand {theirs:.2f} s, ratio {ours / theirs:.3f}")
        print(f"verify, median of the ratios: {middle:.3f}", flush=True)
        loading = measure_load(Path(folder), 2 * GIB, int(rounds))
    sys.exit(0 if ours / theirs <= MOST and loading <= 1.0 else 1)


def measure_verify(folder: Path, name: str, batch_size: int, rounds: int) -> tuple[float, float]:
    """Compare a DataParallel checkpoint and its clean weights, both ways; give both seconds."""
    model = torchvision.models.get_model(name, weights=None)
    reference, candidate = str(folder / "trained.pth"), str(folder / "clean.pth")
    wrapped = torch.nn.DataParallel(model)
    torch.save({"state_dict": wrapped.state_dict()}, reference)
    torch.save(model.state_dict(), candidate)
    size = inputs.default_shape(name)
    pictures = torch.randn(batch_size, *size[1:])
    options = verify.Options(devices=["cpu"], inputs=inputs.Options(batch_size=batch_size))

    def ours() -> None:
        assert verify.verify(reference, candidate, name, options=options).same_digests

    def theirs() -> None:
        outputs = []
        for path, passes in ((reference, 2), (candidate, 1)):
            model = torchvision.models.get_model(name, weights=None).eval()
            loaded = torch.load(path, map_location="cpu", weights_only=True)
            wrapped = torch.nn.DataParallel(model) if path == reference else model
            wrapped.load_state_dict(loaded.get("state_dict", loaded))
            with torch.inference_mode():
                outputs += [wrapped(pictures) for _ in range(passes)]
        assert all(torch.equal(outputs[0], other) for other in outputs[1:])

    return compare(f"verify {name}, batch of {batch_size}", ours, "by hand", theirs, rounds)


def measure_load(folder: Path, nbytes: int, rounds: int) -> float:
    """Load one large file, both ways; then load it and read every byte."""
    path = str(folder / "large.pth")
    count = nbytes // (4 * LAYER[0] * LAYER[1])
    layer = torch.randn(LAYER)
    torch.save({f"layer.{index}.weight": layer + index for index in range(count)}, path)

    def ours() -> Any:
        return loading.load_state_dict(path)

    def theirs() -> Any:
        return torch.load(path, mmap=True, weights_only=True)

    def read(load: Callable[[], Any]) -> Callable[[], Any]:
        return lambda: sum(float(each.sum()) for each in load().values())

    what = f"load_state_dict of {count} tensors, {nbytes / GIB:.0f} GiB"
    ours_took, theirs_took = compare(what, ours, "torch.load(mmap=True)", theirs, 3 * rounds)
    compare(f"{what}, all bytes read", read(ours), "torch.load(mmap=True)", read(theirs), rounds)
    return ours_took / theirs_took


def compare(
    what: str, ours: Callable[[], Any], other: str, theirs: Callable[[], Any], rounds: int
) -> tuple[float, float]:
    """Run both in turns, print seconds and their ratio, and give the medians of both."""
    ours(), theirs()
    pairs = []
    for index in range(rounds):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        seconds = {run: timed(run) for run in order}
        pairs.append((seconds[ours], seconds[theirs]))
    ratio = median(one / two for one, two in pairs)
    left, right = (median(side) for side in zip(*pairs, strict=True))
    print(f"{what}: {left:.3f} s, {other} {right:.3f} s, ratio {ratio:.3f}", flush=True)
    return left, right


def timed(run: Callable[[], Any]) -> float:
    """Give the seconds that a call takes."""
    gc.collect()
    start = time.perf_counter()
    kept = run()
    seconds = time.perf_counter() - start
    del kept
    return seconds


if __name__ == "__main__":
    main(*sys.argv[1:])
