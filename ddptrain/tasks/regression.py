"""Regression: one number from each sample."""

from __future__ import annotations

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

Name = Literal["mae", "rmse", "r2"]
LossName = Literal["squared", "absolute", "huber"]


class Regression(Task):
    """A squared, absolute or Huber (1964) loss; a batch is (inputs, targets), targets (B,).

    The model gives (B,) or (B, 1). ``huber_delta`` is the error from which Huber's loss is no more
    squared. ``metrics`` are names, or mappings of names to other torchmetrics; these are updated
    with outputs and targets, float64, (B,). Raises ``Refused`` for a name that there is not, and
    ``TrainingError`` for another number of outputs than targets.
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

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        return self._loss(*self._outputs(batch))

    def _outputs(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The model's outputs, at least in float32, and the targets, both (B,)."""
        inputs, targets = batch
        outputs = self.model(inputs)
        if not outputs.numel() == targets.numel() == len(targets):
            raise TrainingError(
                f"task: the model gives {tuple(outputs.shape)} for targets of shape "
                f"{tuple(targets.shape)}; one number for each sample is expected"
            )
        outputs = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return outputs.flatten(), targets.flatten()

    def _loss(self, outputs: Tensor, targets: Tensor) -> Loss:
        targets = targets.to(outputs.dtype)
        if self.loss == "squared":
            total = functional.mse_loss(outputs, targets, reduction="sum")
        elif self.loss == "absolute":
            total = functional.l1_loss(outputs, targets, reduction="sum")
        else:
            total = functional.huber_loss(outputs, targets, "sum", self.huber_delta)
        return Loss(total, len(targets))

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.regression_metrics import regression

        return super().metrics() | make(self.chosen, regression)

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        outputs, targets = self._outputs(batch)
        self.update_loss(metrics, self._loss(outputs, targets))
        outputs, targets = outputs.double(), targets.double()
        for name in self.chosen:
            metrics[name].update(outputs, targets)
