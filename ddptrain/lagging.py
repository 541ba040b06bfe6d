"""Brings numbers of each step to the host without waiting for the device."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
from torch import Tensor

STEPS = 2
"""By how many steps a GPU's numbers lag: by then they have arrived, and nobody waits for them."""


class Lagging:
    """A few numbers a step, read on the host: at once on the CPU, ``STEPS`` later on a GPU.

    So much later on every rank, whatever the ranks' speeds, so that they may act on it alike.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.on_gpu = device.type == "cuda"
        self.pending: deque[tuple[int, Tensor, Any]] = deque()
        self.slots: deque[tuple[Tensor, Any]] = deque()
        if self.on_gpu:
            event: Any = torch.cuda.Event
            for _ in range(STEPS + 1):
                self.slots.append((torch.zeros(size, pin_memory=True), event()))

    def put(self, step: int, numbers: Tensor) -> None:
        """Take the numbers of ``step``."""
        copied: Any = None
        if self.on_gpu:
            host, copied = self.slots[0]
            self.slots.rotate(-1)
            host.copy_(numbers.detach(), non_blocking=True)
            copied.record()
            numbers = host
        self.pending.append((step, numbers, copied))

    def take(self, wait: bool) -> list[tuple[int, list[float]]]:
        """The numbers by step that every rank has by now; with ``wait``, of all steps so far."""
        arrived = []
        while self.pending and (wait or len(self.pending) > (STEPS if self.on_gpu else 0)):
            step, numbers, copied = self.pending.popleft()
            if copied is not None:
                copied.synchronize()
            arrived.append((step, numbers.tolist()))
        return arrived

    def forget(self) -> None:
        """Drop what has not been taken: those steps are taken again."""
        self.pending.clear()
