"""A model, a data set and a task of your own: replace what is in here with yours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ddptrain import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Sample = tuple[Tensor, Tensor]


class Spirals(Dataset[Sample]):
    """Points on two arms of a spiral, shape (2,), and which arm each is on: 0 or 1."""

    def __init__(self, samples: int, seed: int, noise: float = 0.05) -> None:
        generator = torch.Generator().manual_seed(seed)
        turn = torch.rand(samples, generator=generator) * 6
        self.arm = torch.randint(0, 2, (samples,), generator=generator)
        angle = turn + self.arm * torch.pi
        self.points = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1)
        self.points += noise * torch.randn(samples, 2, generator=generator)

    def __len__(self) -> int:
        return len(self.arm)

    def __getitem__(self, index: int) -> Sample:
        # What is drawn at random in here is the same on any rank, and in any worker.
        return self.points[index], self.arm[index].float()


class Network(nn.Module):
    """Maps points (B, 2) to logits (B,)."""

    def __init__(self, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(2, width), nn.Tanh(), nn.Dropout(dropout)),
            *(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)),
        )

    def forward(self, points: Tensor) -> Tensor:
        logits: Tensor = self.layers(points)
        return logits.squeeze(-1)


class Arms(Task):
    """What is trained: the loss of a batch, as a sum and a count, and the metrics of a split."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Sample) -> Loss:
        points, arm = batch
        total = nn.functional.binary_cross_entropy_with_logits(
            self.model(points), arm, reduction="sum"
        )
        return Loss(total, count=len(arm))

    def metrics(self) -> dict[str, Metric]:
        from torchmetrics.classification import BinaryAccuracy

        return super().metrics() | {"accuracy": BinaryAccuracy()}

    def update(self, metrics: dict[str, Metric], batch: Sample) -> None:
        points, arm = batch
        self.update_loss(metrics, self(batch))
        metrics["accuracy"].update(self.model(points).sigmoid(), arm.int())
