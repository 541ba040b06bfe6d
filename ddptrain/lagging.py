"""Brings a number of each step to the host without waiting for the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

STEPS = 2
"""By how many steps a GPU's numbers lag: by then they have arrived, and nobody waits for them."""


class Lagging:
    """A scalar a step, read on the host: at once on the CPU, ``STEPS`` later on a GPU.

    So much later on every rank, whatever the ranks' speeds, so that they may act on it alike.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.count = 0
        self.newest = torch.zeros(())
        if self.on_gpu:
            self.hosts = [torch.zeros((), pin_memory=True) for _ in range(STEPS + 1)]
            event: Any = torch.cuda.Event
            self.copied = [event() for _ in range(STEPS + 1)]

    def put(self, number: Tensor) -> None:
        """Take the number of this step."""
        self.newest = number
        if self.on_gpu:
            place = self.count % (STEPS + 1)
            self.hosts[place].copy_(number.detach(), non_blocking=True)
            self.copied[place].record()
        self.count += 1

    def take(self) -> float:
        """The newest number that every rank has; 0 if there is none yet."""
        if not self.on_gpu:
            return self.newest.item()
        if self.count <= STEPS:
            return 0.0
        place = self.count % (STEPS + 1)  # the oldest
        self.copied[place].synchronize()
        return self.hosts[place].item()
