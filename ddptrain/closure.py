"""The loss of a step, as often as an optimiser asks that searches along a line, such as L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ddptrain.account import Accounted, Window
from ddptrain.fingerprints import Fingerprints
from ddptrain.parallel.buffers import Buffers
from ddptrain.tasks.task import Batch


class Evaluated(Protocol):
    """What of a step is needed to evaluate it again."""

    module: Accounted
    fingerprints: Fingerprints
    buffers: Buffers

    def clear_gradients(self) -> None: ...

    def accumulate(self, step: int, batches: Iterator[Batch]) -> None: ...

    def gradients(self) -> tuple[list[Tensor], Tensor]: ...


class Closure:
    """Gives the mean loss over a step's global batch, and its gradient, at the weights as they are.

    The samples and random numbers are the step's, so it is one function that is searched; and both
    are reduced over all ranks, so that all of them search alike. The first time it gives what is
    there already.
    """

    def __init__(
        self, step: Evaluated, number: int, micro_batches: int, batches: list[Batch], loss: Tensor
    ) -> None:
        """``batches`` are this rank's of the ``micro_batches``; ``loss`` is known already."""
        self.step = step
        self.number = number
        self.micro_batches = micro_batches
        self.batches = batches
        self.loss: Tensor | None = loss

    def __call__(self) -> Tensor:
        if self.loss is not None:
            known, self.loss = self.loss, None
            return known
        step = self.step
        window, step.module.window = step.module.window, Window(step.module.account.device)
        was_active, step.fingerprints.active = step.fingerprints.active, False
        step.clear_gradients()
        step.buffers.begin()
        step.accumulate(self.number, iter(self.batches))
        gradients, account = step.gradients()
        step.buffers.arrive(self.micro_batches)
        torch._foreach_mul_(gradients, account[0].reciprocal())
        step.module.window, step.fingerprints.active = window, was_active
        return account[1] / account[0]
