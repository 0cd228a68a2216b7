"""A small network in the manner of GhostNet: half of each layer's maps are made of the other half.

Its head is named `classifier`, as GhostNet's is, whatever the number of classes.
"""

from __future__ import annotations

import torch
from torch import nn


class GhostModule(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        half = outputs // 2
        self.primary = nn.Sequential(
            nn.Conv2d(inputs, half, 3, stride, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(True)
        )
        self.cheap = nn.Sequential(
            nn.Conv2d(half, half, 3, 1, 1, groups=half, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(True),
        )

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        primary = self.primary(maps)
        return torch.cat([primary, self.cheap(primary)], 1)


class GhostNet(nn.Module):
    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            GhostModule(3, width, 2),
            GhostModule(width, 2 * width, 2),
            GhostModule(2 * width, width),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.pool(self.features(pictures)).flatten(1))


def ghost_net(num_classes: int = 1000, width: int = 16) -> GhostNet:
    """Make a network with one output for each class."""
    return GhostNet(num_classes, width)
