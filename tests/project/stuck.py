"""A task whose GPU waits for something that will not come, as in a collective of a dead rank."""

from __future__ import annotations

from typing import Any

import torch
from ragged import Tagging, is_first
from torch import nn

CYCLES = int(60e9)
"""Of a GPU's clock: half a minute."""


class Stuck(Tagging):
    """Within the forward of number ``stick_at`` the GPU goes no further; once, as ``once`` says."""

    def __init__(self, model: nn.Module, stick_at: int, once: str) -> None:
        super().__init__(model)
        self.stick_at = stick_at
        self.file = once

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        loss = super().forward(batch)
        if self.forwards == self.stick_at and is_first(self.file):
            torch.cuda._sleep(CYCLES)
        return loss
