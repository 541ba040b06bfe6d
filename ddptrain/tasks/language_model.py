"""Language modelling over bytes: predict the next one at every position."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddptrain.tasks.metrics import choose, make
from ddptrain.tasks.task import Loss, Task

if TYPE_CHECKING:
    from torchmetrics import Metric

Name = Literal["bits_per_byte", "perplexity"]


class LanguageModel(Task):
    """Next-byte cross-entropy; a batch is windows of bytes, int64, shape (B, context + 1).

    ``model`` maps (B, T) bytes to (B, T, vocabulary) logits, and may offer ``context``, the
    longest T it takes. ``metrics`` are names, or mappings of names to other torchmetrics; these are
    updated with logits, (B, T, vocabulary), and the bytes that follow, (B, T). Raises ``Refused``
    for a name that there is not.
    """

    def __init__(
        self,
        model: nn.Module,
        metrics: Sequence[Name | Mapping[str, Metric]] = ("bits_per_byte",),
    ) -> None:
        super().__init__()
        self.model = model
        self.chosen = choose(metrics, get_args(Name))

    def forward(self, batch: Tensor) -> Loss:
        return self._loss(self.model(batch[:, :-1]), batch[:, 1:])

    def _loss(self, logits: Tensor, targets: Tensor) -> Loss:
        total = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        return Loss(total, targets.numel())

    def metrics(self) -> dict[str, Metric]:
        from ddptrain.tasks.mean import BitsPerByte, Perplexity

        known = {"bits_per_byte": BitsPerByte, "perplexity": Perplexity}
        return super().metrics() | make(self.chosen, lambda name: known[name]())

    def update(self, metrics: dict[str, Metric], batch: Tensor) -> None:
        logits, targets = self.model(batch[:, :-1]), batch[:, 1:]
        loss = self._loss(logits, targets)
        self.update_loss(metrics, loss)
        for name, own in self.chosen.items():
            if own is None:
                metrics[name].update(loss.sum, loss.count)
            else:
                metrics[name].update(logits, targets)

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
