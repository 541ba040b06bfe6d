"""A user's model that takes a known amount of memory for each sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddptrain import Loss, Task

FLOATS = 1 << 20
"""Numbers that are kept of each sample for the backward: 4 MiB."""


class Numbers(Dataset[Tensor]):
    def __init__(self, samples: int = 4096) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Tensor:
        return torch.tensor(index / self.samples)


class Kept(nn.Module):
    def __init__(self, floats: int = FLOATS) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.floats = floats

    def forward(self, numbers: Tensor) -> Tensor:
        return (numbers.new_ones(len(numbers), self.floats) * self.weight).square().mean(1)


class Squares(Task):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Loss:
        return Loss((self.model(batch) - batch).square().sum(), len(batch))
