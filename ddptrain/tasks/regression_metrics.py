"""Metrics of regression, in float64."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric


class R2(Metric):
    """The coefficient of determination of outputs (N,) for targets (N,).

    1 - Σ (target - output)² ÷ Σ (target - mean)². NaN for less than two samples; for targets that
    are all the same 1 if the outputs are that, else 0. torchmetrics' own adds up squares, which
    cancel where the mean is large, and takes sums below 10⁻⁴ for zero.
    """

    outputs: list[Tensor]
    targets: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("outputs", [], dist_reduce_fx="cat")
        self.add_state("targets", [], dist_reduce_fx="cat")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.outputs.append(outputs)
        self.targets.append(targets)

    def compute(self) -> Tensor:
        outputs, targets = torch.cat(self.outputs).double(), torch.cat(self.targets).double()
        if len(targets) < 2:
            warnings.warn("not defined for less than two samples; it is NaN", stacklevel=2)
            return torch.tensor(torch.nan)
        left = (targets - outputs).square().sum()
        spread = (targets - targets.mean()).square().sum()
        if spread == 0:
            return (left == 0).double()
        return 1 - left / spread


def regression(name: str) -> Metric:
    """Make a metric that is updated with outputs and targets, float64, (B,)."""
    if name == "r2":
        return R2()
    if name == "mae":
        return MeanAbsoluteError().set_dtype(torch.float64)
    return MeanSquaredError(squared=False).set_dtype(torch.float64)
