"""What a user may write by mistake: data, models and tasks that depend on where they run."""

from __future__ import annotations

import os
import random

import numpy as np
import torch
from ragged import Network, Sentences, Tagging
from torch import Tensor, nn

from ddptrain import Loss


class OwnGenerator(Sentences):
    """Augmentation from a generator made in ``__init__``: what it draws depends on the order."""

    def __init__(self, samples: int = 86) -> None:
        super().__init__(samples)
        self.rng = np.random.default_rng(0)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        sample = super().__getitem__(index)
        return sample | {"tokens": sample["tokens"] + float(self.rng.standard_normal())}


class Warming(nn.Module):
    """Grows its output with each call, counted in a Python attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, values: Tensor) -> Tensor:
        self.calls += 1
        return values * (1 - 0.5**self.calls)


class Normalising(nn.Module):
    """Keeps a running mean in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = torch.zeros(())

    def forward(self, values: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * values.detach().mean()
        return values - self.mean


class Noisy(nn.Module):
    """Draws from a generator of its own, two objects deep."""

    def __init__(self) -> None:
        super().__init__()
        self.tools = [random.Random(0)]

    def forward(self, values: Tensor) -> Tensor:
        return values * self.tools[0].random()


class Ranked(nn.Module):
    """Scales by the rank."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = 1.0 + float(os.environ.get("RANK", "0"))

    def forward(self, values: Tensor) -> Tensor:
        return values * self.scale


class With(Network):
    """The network with one of the modules above, by name, in its midst."""

    def __init__(self, lawless: str, synchronised: bool = False) -> None:
        super().__init__()
        self.norm = nn.SyncBatchNorm(8) if synchronised else nn.Sequential(globals()[lawless]())


class Averaging(Tagging):
    """Divides the loss by the number of tokens that a micro-batch happens to hold."""

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        loss = super().forward(batch)
        return Loss(loss.sum / loss.count, loss.count, loss.logs)


class Contrasting(Tagging):
    """Compares the samples of a micro-batch with each other."""

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        logits = self.model(batch["tokens"]).flatten(1)
        return Loss((logits @ logits.T).sum(), len(logits))
