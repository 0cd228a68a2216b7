"""Make the benchmark's files with torch, and do with torch what ckptool does without it.

run.py starts this as a process of its own, so that torch is never in the memory of the process
that measures. All but those that make files leave the seconds of their work, without the
import of torch, in the SECONDS_FILE.

usage: python with_torch.py make FILE NBYTES | keys FILE COUNT | experts FILE COUNT
       python with_torch.py matrices FILE NBYTES ROWS COLUMNS
       python with_torch.py strip IN OUT SECONDS_FILE | convert IN OUT SECONDS_FILE
       python with_torch.py cast IN OUT SECONDS_FILE DTYPE
       python with_torch.py statistics SECONDS_FILE IN | distance SECONDS_FILE A B
       python with_torch.py load SECONDS_FILE IN ... | average SECONDS_FILE OUT IN ...
"""

import sys
import time
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

Shapes = dict[str, tuple[int, ...]]

BLOCKS = {"layer1": 3, "layer2": 4, "layer3": 6, "layer4": 3}
EXPANSION = 4
POOL = 2**24


def resnet50(width: int, classes: int) -> Shapes:
    """Name the 320 entries of a ResNet-50 as wide as asked (64 is the real one)."""
    shapes = conv_and_norm("conv1", "bn1", (width, 3, 7, 7))
    inputs = width
    for stage, (layer, blocks) in enumerate(BLOCKS.items()):
        planes = width * 2**stage
        for block in range(blocks):
            shapes |= bottleneck(f"{layer}.{block}", inputs, planes, shortcut=block == 0)
            inputs = planes * EXPANSION
    return shapes | {"fc.weight": (classes, inputs), "fc.bias": (classes,)}


def bottleneck(name: str, inputs: int, planes: int, *, shortcut: bool) -> Shapes:
    """Name the entries of one residual block."""
    outputs = planes * EXPANSION
    shapes = (
        conv_and_norm(f"{name}.conv1", f"{name}.bn1", (planes, inputs, 1, 1))
        | conv_and_norm(f"{name}.conv2", f"{name}.bn2", (planes, planes, 3, 3))
        | conv_and_norm(f"{name}.conv3", f"{name}.bn3", (outputs, planes, 1, 1))
    )
    if shortcut:
        down = f"{name}.downsample"
        shapes |= conv_and_norm(f"{down}.0", f"{down}.1", (outputs, inputs, 1, 1))
    return shapes


def conv_and_norm(conv: str, norm: str, shape: tuple[int, ...]) -> Shapes:
    """Name the entries of a convolution and of the batch norm after it."""
    return {f"{conv}.weight": shape} | batch_norm(norm, shape[0])


def batch_norm(norm: str, channels: int) -> Shapes:
    """Name the five entries of a batch norm; the count of batches is a scalar."""
    names = ("weight", "bias", "running_mean", "running_var")
    return {f"{norm}.{name}": (channels,) for name in names} | {f"{norm}.num_batches_tracked": ()}


def size(shapes: Shapes) -> int:
    """Return the bytes of the tensors."""
    return sum(
        torch.Size(shape).numel() * (4 if shape else 8)  # the scalar is an int64
        for shape in shapes.values()
    )


def shapes_of_size(nbytes: int) -> Shapes:
    """Widen a ResNet-50 to the size asked for, and fill the rest with classes."""
    width = 1
    while size(resnet50(width + 1, 1000)) <= nbytes:
        width += 1
    per_class = size(resnet50(width, 2)) - size(resnet50(width, 1))
    rest = nbytes - size(resnet50(width, 1000))
    return resnet50(width, max(1, 1000 + rest // per_class))


def many_norms(count: int) -> Shapes:
    """Name `count` entries of small batch norms, fifty norms to a layer."""
    shapes: Shapes = {}
    for number in range(count // 5):
        shapes |= batch_norm(f"layer{number // 50}.{number % 50}.bn1", 16)
    return shapes


def many_experts(count: int) -> Shapes:
    """Name `count` small matrices as a mixture of experts has them, a hundred to a layer."""
    names = (f"layers.{number // 100}.experts.{number % 100}" for number in range(count))
    return {f"{name}.weight": (4, 4) for name in names}


def tensors(shapes: Shapes) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield DataParallel's keys and normal floats, cut from one pool: drawing all is slow."""
    pool = torch.randn(POOL, generator=torch.Generator().manual_seed(0))
    for number, (name, shape) in enumerate(shapes.items()):
        if not shape:
            yield f"module.{name}", torch.tensor(450_000)
            continue
        tensor = torch.empty(shape)
        flat, start = tensor.view(-1), number * 4099 % POOL
        for at in range(0, flat.numel(), POOL):
            part = flat[at : at + POOL]
            head = min(part.numel(), POOL - start)
            part[:head] = pool[start : start + head]
            part[head:] = pool[: part.numel() - head]
        yield f"module.{name}", tensor


def make(shapes: Shapes, target: Path) -> None:
    """Save a training checkpoint as torch's ImageNet example does; needs its size in memory, once.

    The optimizer has taken no step and so has no momentum: convert leaves the optimizer behind,
    and with momentum it would write half of what `cp` writes.
    """
    state_dict = OrderedDict(tensors(shapes))
    modules = dict.fromkeys(key.rpartition(".")[0] for key in state_dict)
    state_dict._metadata = OrderedDict((name, {"version": 2}) for name in ("", "module", *modules))  # type: ignore[attr-defined]
    learnt = [torch.zeros(1) for key in state_dict if key.endswith(("weight", "bias"))]
    optimizer = torch.optim.SGD(learnt, lr=0.1, momentum=0.9, weight_decay=1e-4)
    checkpoint = {
        "epoch": 90,
        "arch": "resnet50",
        "state_dict": state_dict,
        "best_acc1": torch.tensor(76.13),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(checkpoint, target)


def matrices(nbytes: int, rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Return so many bytes of matrices, four to a layer: memory that nothing was written to."""
    layers = max(1, nbytes // (16 * rows * columns))
    names = [f"layers.{layer}.{number}.weight" for layer in range(layers) for number in range(4)]
    return {name: torch.empty(rows, columns) for name in names}


def strip(source: str, target: str) -> None:
    """Strip `module.` as a script does."""
    checkpoint = torch.load(source, weights_only=True, map_location="cpu")
    checkpoint["state_dict"] = stripped(checkpoint)
    torch.save(checkpoint, target)


def convert(source: str, target: str) -> None:
    """Write the stripped state_dict as safetensors, as a script does."""
    checkpoint = torch.load(source, weights_only=True, map_location="cpu")
    save_file(stripped(checkpoint), target)


def cast(source: str, target: str, dtype: torch.dtype) -> None:
    """Round the floats of the state_dict to another dtype as a script does."""
    checkpoint = torch.load(source, weights_only=True, map_location="cpu")
    checkpoint["state_dict"] = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in checkpoint["state_dict"].items()
    }
    torch.save(checkpoint, target)


def load(sources: list[str]) -> None:
    """Read checkpoints, one after the other."""
    for source in sources:
        torch.load(source, weights_only=True, map_location="cpu")


def average(sources: list[str], target: str) -> None:
    """Write the mean of state_dicts as a script does, one file in memory beside the sum."""
    first, *others = sources
    checkpoint = torch.load(first, weights_only=True, map_location="cpu")
    state = checkpoint["state_dict"]
    for source in others:
        other = torch.load(source, weights_only=True, map_location="cpu")["state_dict"]
        for key, value in state.items():
            if value.is_floating_point():
                value += other[key]
    for value in state.values():
        if value.is_floating_point():
            value /= len(sources)
    torch.save(state, target)


def statistics(source: str) -> None:
    """Compute what values are on the whole, as `keys --stats` does."""
    checkpoint = torch.load(source, weights_only=True, map_location="cpu")
    for value in checkpoint["state_dict"].values():
        wide = value.double()
        torch.aminmax(wide)
        torch.std_mean(wide, correction=0)
        torch.count_nonzero(wide)


def distance(source: str, other: str) -> None:
    """Compute how far two state_dicts are, as `diff` does."""
    left = torch.load(source, weights_only=True, map_location="cpu")["state_dict"]
    right = torch.load(other, weights_only=True, map_location="cpu")
    for key, value in left.items():
        one, two = value.double().flatten(), right[key].double().flatten()
        apart = one - two
        (apart.norm(), one.norm(), two.norm(), one.dot(two), apart.abs().max())


def stripped(checkpoint: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Return the state_dict with `module.` taken off its keys."""
    return {key.removeprefix("module."): value for key, value in checkpoint["state_dict"].items()}


def main(arguments: list[str]) -> None:
    """Do the one thing asked for."""
    match arguments:
        case ["make", target, nbytes]:
            make(shapes_of_size(int(nbytes)), Path(target))
        case ["keys", target, count]:
            make(many_norms(int(count)), Path(target))
        case ["experts", target, count]:
            torch.save({"state_dict": OrderedDict(tensors(many_experts(int(count))))}, target)
        case ["matrices", target, *numbers]:
            torch.save(matrices(*map(int, numbers)), target)
        case ["strip" | "convert" as verb, source, target, seconds]:
            start = time.perf_counter()
            (strip if verb == "strip" else convert)(source, target)
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case ["cast", source, target, seconds, dtype]:
            start = time.perf_counter()
            cast(source, target, getattr(torch, dtype))
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case ["load", seconds, *sources]:
            start = time.perf_counter()
            load(sources)
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case ["statistics", seconds, source]:
            start = time.perf_counter()
            statistics(source)
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case ["distance", seconds, source, other]:
            start = time.perf_counter()
            distance(source, other)
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case ["average", seconds, target, *sources]:
            start = time.perf_counter()
            average(sources, target)
            Path(seconds).write_text(repr(time.perf_counter() - start))
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
