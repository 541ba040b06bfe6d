"""Language modelling over bytes: predict the next one at every position."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric


class LanguageModel(Task):
    """Next-byte cross-entropy; a batch is windows of bytes, int64, shape (B, context + 1).

    ``model`` maps (B, T) bytes to (B, T, vocabulary) logits, and may offer ``context``, the
    longest T it takes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Tensor) -> Loss:
        inputs, targets = batch[:, :-1], batch[:, 1:]
        logits = self.model(inputs)
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(total, targets.numel())

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.mean import Mean

        return super().metrics() | {"bits_per_byte": Mean()}

    def update(self, metrics: dict[str, Metric], batch: Tensor) -> None:
        loss = self(batch)
        self.update_loss(metrics, loss)
        metrics["bits_per_byte"].update(loss.sum / math.log(2), loss.count)

    def example(self) -> str:
        return self.continue_text("def ")

    @torch.inference_mode()
    def continue_text(
        self, prompt: str, length: int = 200, temperature: float = 0.7, seed: int = 0
    ) -> str:
        """Return ``prompt`` and ``length`` bytes sampled after it, decoded as UTF-8."""
        device = next(self.parameters()).device
        generator = torch.Generator(device).manual_seed(seed)
        context = int(getattr(self.model, "context", 128))
        text = torch.tensor([list(prompt.encode())], dtype=torch.long, device=device)
        for _ in range(length):
            logits = self.model(text[:, -context:])[:, -1].float() / temperature
            following = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            text = torch.cat([text, following], dim=1)
        return bytes(text[0].tolist()).decode(errors="replace")
