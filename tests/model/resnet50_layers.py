"""The rows of torchsummaryX 1.3.0 for torchvision's resnet50: kernel and output shapes, parameters.

Recorded from its hooks (`pip install torchsummaryX`; what it prints needs pandas 1); the blocks of
a stage are alike, so they are written as a rule. It shows 158 rows, numbered from 0 to 157.
"""

from __future__ import annotations

from collections.abc import Iterator

Row = tuple[str, list[int], list[int], int]  # name, kernel ([] for none), output, parameters


def rows() -> Iterator[Row]:
    yield from _normed("conv1", "bn1", [3, 64, 7, 7], 112)
    yield "relu", [], [1, 64, 112, 112], 0
    yield "maxpool", [], [1, 64, 56, 56], 0
    channels, size = 64, 56
    for stage, (width, blocks) in enumerate(((64, 3), (128, 4), (256, 6), (512, 3)), start=1):
        for block in range(blocks):
            inside = size
            if block == 0 and stage > 1:
                size //= 2
            yield from _block(f"layer{stage}.{block}", channels, width, inside, size, block == 0)
            channels = 4 * width
    yield "avgpool", [], [1, 2048, 1, 1], 0
    yield "fc", [2048, 1000], [1, 1000], 2_049_000


def _block(
    name: str, channels: int, width: int, inside: int, size: int, first: bool
) -> Iterator[Row]:
    yield from _normed(f"{name}.conv1", f"{name}.bn1", [channels, width, 1, 1], inside)
    yield f"{name}.relu", [], [1, width, inside, inside], 0
    yield from _normed(f"{name}.conv2", f"{name}.bn2", [width, width, 3, 3], size)
    yield f"{name}.relu", [], [1, width, size, size], 0
    yield from _normed(f"{name}.conv3", f"{name}.bn3", [width, 4 * width, 1, 1], size)
    if first:
        short = f"{name}.downsample"
        yield from _normed(f"{short}.0", f"{short}.1", [channels, 4 * width, 1, 1], size)
    yield f"{name}.relu", [], [1, 4 * width, size, size], 0


def _normed(conv: str, norm: str, kernel: list[int], size: int) -> Iterator[Row]:
    taken, given, *field = kernel
    output = [1, given, size, size]
    yield conv, kernel, output, taken * given * field[0] * field[1]
    yield norm, [given], output, 2 * given
