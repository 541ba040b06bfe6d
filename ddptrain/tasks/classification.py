"""Classification: one of several classes, or yes and no."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class Classification(Task):
    """Cross-entropy over ``classes``; a batch is (inputs, labels), labels int64, shape (B,)."""

    def __init__(self, model: nn.Module, classes: int, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.model = model
        self.classes = classes
        self.label_smoothing = label_smoothing

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, labels = batch
        return self._loss(self.model(inputs), labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Loss:
        total = functional.cross_entropy(
            logits, labels, reduction="sum", label_smoothing=self.label_smoothing
        )
        return Loss(total, len(labels))

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

        return super().metrics() | {
            "accuracy": MulticlassAccuracy(self.classes, average="micro"),
            "f1": MulticlassF1Score(self.classes, average="macro"),
        }

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self.model(inputs)
        self.update_loss(metrics, self._loss(logits, labels))
        metrics["accuracy"].update(logits, labels)
        metrics["f1"].update(logits, labels)


class BinaryClassification(Task):
    """Yes or no from one logit; a batch is (inputs, labels), labels 0 or 1, shape (B,)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        inputs, labels = batch
        return self._loss(self.model(inputs).squeeze(-1), labels)

    def _loss(self, logits: Tensor, labels: Tensor) -> Loss:
        total = functional.binary_cross_entropy_with_logits(
            logits, labels.to(logits.dtype), reduction="sum"
        )
        return Loss(total, len(labels))

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics.classification import BinaryAccuracy, BinaryAUROC, BinaryF1Score

        return super().metrics() | {
            "accuracy": BinaryAccuracy(),
            "f1": BinaryF1Score(),
            "auroc": BinaryAUROC(),
        }

    def update(self, metrics: dict[str, Metric], batch: tuple[Tensor, Tensor]) -> None:
        inputs, labels = batch
        logits = self.model(inputs).squeeze(-1)
        self.update_loss(metrics, self._loss(logits, labels))
        for name in ("accuracy", "f1", "auroc"):
            metrics[name].update(logits.float().sigmoid(), labels.int())
