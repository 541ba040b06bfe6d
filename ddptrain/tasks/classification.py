"""Classification: one of several classes, or yes and no."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.errors import Refused
from ddptrain.tasks.metrics import choose, make
from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Name = Literal[
    "accuracy", "precision", "recall", "f1", "auroc", "average_precision", "calibration_error",
    "confusion_matrix", "roc", "pr", "reliability",
]  # fmt: skip


class Classification(Task):
    """Cross-entropy over ``classes``; a batch is (inputs, labels), labels int64, shape (B,).

    With ``mixup`` it trains on sums of two samples of a micro-batch, λ of one and 1 − λ of the
    other, where λ is drawn from Beta(``mixup``, ``mixup``) (Zhang et al., ICLR 2018).
    ``metrics`` are names, or mappings of names to other torchmetrics; these are updated with the
    probabilities, float64, (B, classes), and the labels. Raises ``Refused`` for a name that there
    is not.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: int,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        metrics: Sequence[Name | Mapping[str, Metric]] = ("accuracy", "f1"),
    ) -> None:
        super().__init__()
        self.model = model
        self.classes = classes
        self.label_smoothing = label_smoothing
        if mixup < 0:
            raise Refused(f"mixup={mixup}: expected 0 or more")
        self.mixup = mixup
        self.chosen = choose(metrics, get_args(Name))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, labels = batch
        if not self.mixup or not self.training:
            return self._loss(self.model(inputs), labels)
        concentration = inputs.new_full((2,), self.mixup)
        share = torch.distributions.Dirichlet(concentration).sample()[0]
        other = torch.randperm(len(labels), device=inputs.device)
        logits = self.model(share * inputs + (1 - share) * inputs[other])
        one, two = (self._loss(logits, each).sum for each in (labels, labels[other]))
        return Loss(share * one + (1 - share) * two, len(labels))

    def _loss(self, logits: Tensor, labels: Tensor) -> Loss:
        total = functional.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return Loss(total, len(labels))

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.classification_metrics import multiclass

        return super().metrics() | make(self.chosen, partial(multiclass, classes=self.classes))

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self.model(inputs)
        self.update_loss(metrics, self._loss(logits, labels))
        probabilities = logits.double().softmax(-1)  # float32 would make many of them 1
        for name in self.chosen:
            metrics[name].update(probabilities, labels)


class BinaryClassification(Task):
    """Yes or no from one logit; a batch is (inputs, labels), labels 0 or 1, shape (B,).

    ``metrics`` are names, or mappings of names to other torchmetrics; these are updated with the
    probabilities of yes, float64, (B,), and the labels, int. Raises ``Refused`` for a name that
    there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Sequence[Name | Mapping[str, Metric]] = ("accuracy", "f1", "auroc"),
    ) -> None:
        super().__init__()
        self.model = model
        self.chosen = choose(metrics, get_args(Name))

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, labels = batch
        return self._loss(self.model(inputs).squeeze(-1), labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Loss:
        total = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="sum"
        )
        return Loss(total, len(labels))

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.classification_metrics import binary

        return super().metrics() | make(self.chosen, binary)

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self.model(inputs).squeeze(-1)
        self.update_loss(metrics, self._loss(logits, labels))
        probabilities, labels = logits.double().sigmoid(), labels.int()
        for name in self.chosen:
            metrics[name].update(probabilities, labels)
