"""Loss scaling for fp16: as large as gradients allow, found by trying, all on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

GROWTH_INTERVAL = 1000
LARGEST = 2.0**24
SMALLEST = 2.0**-24


class LossScale:
    """A power of two that doubles after 1,000 finite steps and halves after one that is not.

    Micikevicius et al., *Mixed Precision Training*, ICLR 2018. Scaling needs no undoing: the
    account of a step (see ``account.py``) carries the same factor as its gradients.
    """

    def __init__(self, device: torch.device, initial: float = 2.0**12) -> None:
        self.value = torch.tensor(initial, device=device)
        self.finite_steps = torch.zeros((), device=device)

    def update(self, bad: Tensor, hopeless: Tensor) -> Tensor:
        """Adapt to a step that was ``bad`` (non-finite); return whether that was no overflow.

        A loss is a sum over a micro-batch, which a scale far below 1 may be right for. At the
        smallest there is nothing left to lower: the numbers themselves are at fault, as they are
        if the step is ``hopeless``, bad at any scale, which then stays as it is.
        """
        fault = bad & (self.value <= SMALLEST) | hopeless
        finite_steps = torch.where(bad, 0.0, self.finite_steps + 1)
        grow = finite_steps >= GROWTH_INTERVAL
        self.finite_steps.copy_(torch.where(grow, 0.0, finite_steps))
        factor = torch.where(bad & ~hopeless, 0.5, torch.where(grow, 2.0, 1.0))
        self.value.mul_(factor).clamp_(SMALLEST, LARGEST)
        return fault

    def numbers(self) -> dict[str, Any]:
        """What the next steps are scaled by."""
        return {"loss_scale": self.value.item(), "finite_steps": self.finite_steps.item()}

    def load(self, numbers: dict[str, Any]) -> None:
        """Put back what ``numbers`` returned, if it is there."""
        if "loss_scale" in numbers:
            self.value.fill_(numbers["loss_scale"])
            self.finite_steps.fill_(numbers["finite_steps"])
