"""Metrics of regression, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import NormalDist
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import MeanAbsoluteError, MeanSquaredError, Metric

from ddptrain.tasks.pictures import Picture, draw_coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVEL = 0.9
LEVELS = tuple(step / 20 for step in range(1, 20))


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


class RelativeMAE(Metric):
    """Σ |target - output| ÷ Σ |target|: below 1 is better than to say 0 of each.

    Of changes, as ``ddptrain.data.Series`` has them, 0 is the naive forecast, that all stays as it
    is, and this the relative mean absolute error of Hyndman and Koehler (International Journal of
    Forecasting 22, 2006). NaN if all targets are 0.
    """

    errors: Tensor
    naive: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("errors", "naive"):
            self.add_state(state, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        self.errors += (targets - outputs).abs().sum()
        self.naive += targets.abs().sum()

    def compute(self) -> Tensor:
        if self.naive == 0:
            warnings.warn("not defined, for all targets are 0; it is NaN", stacklevel=2)
            return torch.tensor(torch.nan)
        return self.errors / self.naive


class Coverage(Metric):
    """The share of targets (N,) in the central 90 % intervals of normal distributions."""

    inside: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for state in ("inside", "count"):
            self.add_state(state, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, means: Tensor, deviations: Tensor, targets: Tensor) -> None:
        self.inside += ((targets - means).abs() <= _reach(LEVEL) * deviations).sum()
        self.count += len(targets)

    def compute(self) -> Tensor:
        return self.inside.double() / self.count


class CoverageCurve(Picture, Metric):
    """Levels, and the share of targets in the central interval of each (Kuleshov et al. 2018)."""

    distances: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("distances", [], dist_reduce_fx="cat")

    def update(self, means: Tensor, deviations: Tensor, targets: Tensor) -> None:
        self.distances.append((targets - means).abs() / deviations)

    def compute(self) -> Tensor:
        """Shape (levels, 2)."""
        distances = torch.cat(self.distances).cpu()
        shares = [(distances <= _reach(level)).double().mean().item() for level in LEVELS]
        return torch.tensor([LEVELS, shares], dtype=torch.float64).T

    def plot(self, value: Tensor, ax: Axes) -> None:
        draw_coverage(ax, value)


def _reach(level: float) -> float:
    """To how many deviations from the mean the central interval of this level reaches."""
    return NormalDist().inv_cdf((1 + level) / 2)


def regression(name: str) -> Metric:
    """Make a metric that is updated with outputs and targets, float64, (B,).

    Those of intervals are updated with means, deviations and targets.
    """
    if name == "mae":
        return MeanAbsoluteError().set_dtype(torch.float64)
    if name == "rmse":
        return MeanSquaredError(squared=False).set_dtype(torch.float64)
    own: dict[str, Callable[[], Metric]] = {
        "r2": R2,
        "relative_mae": RelativeMAE,
        "coverage": Coverage,
        "coverage_curve": CoverageCurve,
    }
    return own[name]()
