"""How far the device has come with the steps, which may be less far than the host."""

from __future__ import annotations

import torch


class Marks:
    """Counts of the steps that were begun, whose update was begun, and that were taken.

    Each is counted where the device does it: in a step between ``begun`` and ``taken`` buffers are
    in between, and weights are between ``updating`` and ``taken``.
    """

    def __init__(self, device: torch.device) -> None:
        self.begun = torch.zeros((), dtype=torch.int64, device=device)
        self.updating = torch.zeros_like(self.begun)
        self.taken = torch.zeros_like(self.begun)

    def void(self) -> None:
        """What is there from now on is no state of the run, until ``set``."""
        self.updating.fill_(-1)

    def set(self, done: int) -> None:
        """Go on from ``done`` steps."""
        for mark in (self.begun, self.updating, self.taken):
            mark.fill_(done)

    def read(self) -> tuple[int, int, int]:
        """All three; reads the device."""
        return int(self.begun.item()), int(self.updating.item()), int(self.taken.item())
