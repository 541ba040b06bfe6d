"""The mean of a loss over a split, by sums: what is not finite shows, and no count is lost."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Σ sums ÷ Σ counts in float64. torchmetrics' own leaves NaN out, and so hides it."""

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        zero = torch.zeros((), dtype=torch.float64)
        self.add_state("total", zero, dist_reduce_fx="sum")
        self.add_state("count", zero.clone(), dist_reduce_fx="sum")

    def update(self, total: Tensor, count: Tensor | float) -> None:
        self.total += total.detach()
        self.count += count

    def compute(self) -> Tensor:
        return self.total / self.count
