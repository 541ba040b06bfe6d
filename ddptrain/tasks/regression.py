"""Regression: one number from each sample, and with a Gaussian loss how sure the model is of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.errors import Refused, TrainingError
from ddptrain.tasks.metrics import choose, make
from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Name = Literal["mae", "rmse", "r2", "relative_mae", "coverage", "coverage_curve"]
LossName = Literal["squared", "absolute", "huber", "gaussian"]
OF_INTERVALS = ("coverage", "coverage_curve")
EXPECTED = {1: "one number", 2: "a mean and the logarithm of a variance, (B, 2),"}


class Regression(Task):
    """A squared, absolute, Huber (1964) or Gaussian loss; a batch is (inputs, targets (B,)).

    The model gives (B,) or (B, 1). ``huber_delta`` is the error from which Huber's loss is no more
    squared. With ``loss="gaussian"`` the model gives (B, 2), a mean and the logarithm of a
    variance; the loss is the negative logarithm of the density (Nix and Weigend, ICNN 1994).

    ``metrics`` are names, or mappings of names to other torchmetrics; these are updated with
    outputs (or means) and targets, float64, (B,). Raises ``Refused`` for a name that there is not,
    or that another loss is needed for, and ``TrainingError`` for another number of outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: LossName = "squared",
        huber_delta: float = 1.0,
        metrics: Sequence[Name | Mapping[str, Metric]] = ("mae", "rmse", "r2"),
    ) -> None:
        super().__init__()
        if loss not in get_args(LossName):
            raise Refused(f"loss: expected one of {', '.join(get_args(LossName))}, got {loss!r}")
        self.model = model
        self.loss = loss
        self.huber_delta = huber_delta
        self.chosen = choose(metrics, get_args(Name))
        self.of_intervals = [n for n in OF_INTERVALS if n in self.chosen and not self.chosen[n]]
        if self.of_intervals and loss != "gaussian":
            raise Refused(
                f"metrics: {self.of_intervals[0]} needs a model that says how sure it is; set "
                "loss=gaussian and give the model 2 outputs, or leave it out"
            )

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        return self._loss(*self._outputs(batch))

    def _outputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's outputs, at least in float32, (B, 1) or (B, 2), and the targets, (B,)."""
        inputs, targets = batch
        outputs = self.model(inputs)
        count = 2 if self.loss == "gaussian" else 1
        fits = outputs.numel() == count * len(targets) and (count == 1 or outputs.ndim == 2)
        if not fits or targets.numel() != len(targets):
            raise TrainingError(
                f"task: the model gives {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}; {EXPECTED[count]} for each sample is expected"
            )
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return outputs.view(len(targets), count), targets.flatten()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Loss:
        targets, means = targets.to(outputs.dtype), outputs[:, 0]
        if self.loss == "squared":
            total = functional.mse_loss(means, targets, reduction="sum")
        elif self.loss == "absolute":
            total = functional.l1_loss(means, targets, reduction="sum")
        elif self.loss == "huber":
            total = functional.huber_loss(means, targets, "sum", self.huber_delta)
        else:
            # torch's gaussian_nll_loss looks whether a variance is below 0: a GPU has to wait.
            log_variances = outputs[:, 1]
            squares = (targets - means).square() * torch.exp(-log_variances)
            total = (squares + log_variances + math.log(2 * math.pi)).sum() / 2
        return Loss(total, len(targets))

    def explained(self, inputs: Tensor) -> Tensor:
        """Return the number that is predicted, (B,) or (B, 1): of a Gaussian the mean."""
        outputs = super().explained(inputs)
        return outputs[:, :1] if self.loss == "gaussian" else outputs

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.regression_metrics import regression

        return super().metrics() | make(self.chosen, regression)

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        outputs, targets = self._outputs(batch)
        self.update_loss(metrics, self._loss(outputs, targets))
        outputs, targets = outputs.double(), targets.double()
        means, deviations = outputs[:, 0], torch.exp(outputs[:, -1] / 2)
        for name in self.chosen:
            if name in self.of_intervals:
                metrics[name].update(means, deviations, targets)
            else:
                metrics[name].update(means, targets)
