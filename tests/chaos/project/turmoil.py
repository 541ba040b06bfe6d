"""What chaos is let loose on: all kinds of state that a crash could spoil, in a small model."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from ddptrain import Loss, Task

SIDE = 8
CLASSES = 5


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Patterns of five kinds, shifted and blurred anew each time they are drawn.

    ``sleep_at`` is a sample that takes forever, once: until the file ``once`` is there.
    """

    def __init__(
        self, samples: int = 240, sleep_at: int | None = None, once: str | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(samples)
        self.kinds = torch.randn(CLASSES, SIDE, SIDE, generator=generator)
        self.samples = samples
        self.sleep_at = sleep_at
        self.once = once

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.sleep_at and self.once and not Path(self.once).exists():
            Path(self.once).touch()
            time.sleep(10_000)
        kind = index % CLASSES
        shift = int(torch.randint(-2, 3, ()).item())
        image = self.kinds[kind].roll(shift, 1) + 0.5 * torch.randn(SIDE, SIDE)
        return image.unsqueeze(0), torch.tensor(kind)


class Averaged(nn.Module):
    """A convolutional network that keeps an exponential average of its weights in buffers."""

    def __init__(self, width: int = 8, decay: float = 0.9) -> None:
        super().__init__()
        self.decay = decay
        self.body = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout(0.2),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, CLASSES),
        )
        for name, parameter in self.body.named_parameters():
            self.register_buffer(f"average_{name.replace('.', '_')}", parameter.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                for name, parameter in self.body.named_parameters():
                    average = self.get_buffer(f"average_{name.replace('.', '_')}")
                    average.lerp_(parameter, 1 - self.decay)
        logits: Tensor = self.body(images)
        return logits


class Turmoil(Task):
    """Classification whose micro-batches take ``seconds``; ``spoils`` breaks what is restored."""

    def __init__(self, model: nn.Module, seconds: float = 0.0, spoils: bool = False) -> None:
        super().__init__()
        self.model = model
        self.seconds = seconds
        self.spoils = spoils and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0

    def forward(self, batch: tuple[Tensor, Tensor]) -> Loss:
        images, labels = batch
        time.sleep(self.seconds)
        if self.spoils:
            images = images + 1e-3
        total = functional.cross_entropy(self.model(images), labels, reduction="sum")
        return Loss(total, len(labels))


class Traced(torch.optim.AdamW):
    """AdamW that notes when each step was finished, and by which process, in a file of its own."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
        trace: str | None = None,
    ) -> None:
        super().__init__(params, lr=lr, betas=betas, weight_decay=weight_decay)
        self.file = Path(f"{trace}.{os.environ.get('RANK', '0')}") if trace else None

    def step(self, closure: Any = None) -> Any:
        outcome = super().step(closure)
        if self.file is not None:
            number = int(next(iter(self.state.values()))["step"])
            with self.file.open("a") as stream:
                stream.write(f"{number} {os.getpid()} {time.time():.6f}\n")
        return outcome
