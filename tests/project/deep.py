"""Models whose gradients or outputs go wrong with depth, and data of a known gradient noise."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from ddptrain import Loss, Task


class Deep(nn.Module):
    """Maps (B, 1, 8, 8) to (B, 10) through ``layers`` layers of one ``activation``.

    Weights have ``gain`` times the deviation that keeps the outputs of a linear layer as they are;
    ``spoilt`` is a layer whose outputs are not finite.
    """

    def __init__(
        self,
        layers: int = 20,
        width: int = 16,
        activation: str = "Identity",
        gain: float = 1.0,
        bias: float = 0.0,
        spoilt: int | None = None,
    ) -> None:
        super().__init__()
        widths = [64, *[width] * (layers - 1), 10]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.activations = nn.ModuleList(getattr(nn, activation)() for _ in range(layers - 1))
        self.spoilt = spoilt
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
            nn.init.constant_(layer.bias, bias)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.activations):
                x = self.activations[number](x)
            if number == self.spoilt:
                x = x / 0
        return x


class Scattered(TensorDataset):
    """Points around ``centre`` with deviation ``spread`` in each of its dimensions."""

    def __init__(self, samples: int, centre: list[float], spread: float) -> None:
        generator = torch.Generator().manual_seed(3)
        noise = torch.randn(samples, len(centre), generator=generator)
        super().__init__(torch.tensor(centre) + spread * noise)


class Centring(Task):
    """Half the squared distance to a point, which begins at zero: so G is minus the centre.

    A sample counts as one, or with ``uneven`` those whose first number is above 0 as three.
    """

    def __init__(self, dimensions: int, uneven: bool = False) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.zeros(dimensions))
        self.uneven = uneven

    def forward(self, batch: Any) -> Loss:
        (points,) = batch
        counts = 1 + 2 * (points[:, 0] > 0) if self.uneven else torch.ones(len(points))
        losses = counts.detach() * (points - self.point).square().sum(1) / 2
        return Loss(losses.sum(), counts.sum())
