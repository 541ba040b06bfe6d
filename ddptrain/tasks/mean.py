"""The mean of a loss over a split, in its order: the same bits on any number of ranks."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torchmetrics import Metric


class Mean(Metric):
    """Σ sums ÷ Σ counts in float64, with one sum and count kept per micro-batch.

    torchmetrics' own leaves NaN out, and so hides it; and it adds up each rank's part first.
    """

    totals: list[Tensor]
    counts: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("totals", [], dist_reduce_fx="cat")
        self.add_state("counts", [], dist_reduce_fx="cat")

    def update(self, total: Tensor, count: Tensor | float) -> None:
        self.totals.append(total.detach().double())
        self.counts.append(torch.as_tensor(count, dtype=torch.float64, device=total.device))

    def compute(self) -> Tensor:
        return torch.stack(self.totals).sum() / torch.stack(self.counts).sum()


class BitsPerByte(Mean):
    """The mean of a loss in nats per byte, in bits."""

    def compute(self) -> Tensor:
        return super().compute() / math.log(2)


class Perplexity(Mean):
    """e to the mean of a loss in nats per token."""

    def compute(self) -> Tensor:
        return super().compute().exp()
