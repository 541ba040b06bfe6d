"""A model with all that a restart can get wrong, and a task that notes each step it begins."""

from __future__ import annotations

import time

import torch
from notes import RANK, Trace, claim
from torch import Tensor, nn
from torch.nn import functional

from ddptrain import Loss, Task

DECAY = 0.9


def _hoard() -> None:
    """Take memory until there is none."""
    hoard: list[bytes] = []
    while True:
        hoard.append(b"x" * 2**24)


class Network(nn.Module):
    """Convolutions, BatchNorm and dropout, over images of one channel."""

    def __init__(self, channels: int = 8, classes: int = 4, dropout: float = 0.2) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(dropout),
            nn.Linear(4 * channels, classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Averaged(Task):
    """Classification with an exponential average of the weights (Polyak averaging) in buffers.

    A step takes at least ``seconds``. With ``perturb``, a process that goes on where another has
    left off changes the weights a little, as a framework that restores badly would.
    """

    def __init__(self, model: nn.Module, seconds: float = 0.03, perturb: bool = False) -> None:
        super().__init__()
        self.model = model
        self.seconds = seconds
        self.perturb = perturb
        self.names = {name: name.replace(".", "/") for name, _ in model.named_parameters()}
        self.average = nn.Module()
        for name, parameter in model.named_parameters():
            self.average.register_buffer(self.names[name], parameter.detach().clone())
        self.steps: Tensor
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.begun = -1
        self.trace = Trace()
        self.trace.note("start")

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        if self.training:
            self._begin(int(self.steps))
            self._move_average()
        images, labels = batch
        logits = self.model(images)
        total = functional.cross_entropy(logits, labels, reduction="sum")
        right = (logits.argmax(1) == labels).sum()
        return Loss(total, len(labels), {"accuracy": (right, len(labels))})

    def _begin(self, step: int) -> None:
        """Of a step's micro-batches on this rank, only the first does anything here."""
        if step == self.begun:
            return
        if self.perturb and self.begun < 0 < step:
            with torch.no_grad():
                next(self.model.parameters()).mul_(1.001)
        self.begun = step
        self.trace.note("step", step)
        if claim(f"grow-{RANK}"):
            _hoard()
        time.sleep(self.seconds)

    @torch.no_grad()
    def _move_average(self) -> None:
        self.steps += 1
        for name, parameter in self.model.named_parameters():
            average = self.average.get_buffer(self.names[name])
            average.lerp_(parameter, 1 - DECAY)
