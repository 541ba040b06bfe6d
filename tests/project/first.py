"""The first few samples of a built-in data set, and a task that counts those it sees."""

from __future__ import annotations

from typing import Any

from torch.utils.data import TensorDataset
from torchmetrics import Metric, SumMetric

from ddptrain.data import sets
from ddptrain.tasks import Classification


class First(TensorDataset):
    """The first ``count`` samples of a split of the built-in set called ``of``."""

    def __init__(self, split: str, count: int, of: str) -> None:
        whole = getattr(sets, of)(split)
        super().__init__(*(tensor[:count] for tensor in whole.tensors))


class Counting(Classification):
    """Classification that also counts the samples of an evaluation."""

    def metrics(self) -> dict[str, Metric]:
        return super().metrics() | {"samples": SumMetric()}

    def update(self, metrics: dict[str, Metric], batch: Any) -> None:
        super().update(metrics, batch)
        metrics["samples"].update(len(batch[1]))
