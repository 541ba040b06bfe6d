"""The loss of a step, as often as an optimiser asks that searches along a line, such as L-BFGS."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from ddptrain.account import Accounted, Window
from ddptrain.data.plan import MicroBatch
from ddptrain.fingerprints import Fingerprints
from ddptrain.optim.penalty import Penalty
from ddptrain.parallel.buffers import Buffers
from ddptrain.tasks.task import Batch


class Evaluated(Protocol):
    """What of a step is needed to evaluate it again."""

    module: Accounted
    fingerprints: Fingerprints
    buffers: Buffers
    penalty: Penalty | None

    def accumulate(self, step: int, mine: list[MicroBatch], batches: Iterator[Batch]) -> None: ...

    def gradients(self) -> tuple[list[Tensor], Tensor]: ...


class Closure:
    """Gives the mean loss over a step's global batch, and its gradient, at the weights as they are.

    The samples and random numbers are the step's, so it is one function that is searched; and both
    are reduced over all ranks, so that all of them search alike. The first time it gives what is
    there already.
    """

    def __init__(
        self,
        step: Evaluated,
        number: int,
        mine: list[MicroBatch],
        batches: list[Batch],
        micro_batches: int,
        loss: Tensor,
    ) -> None:
        """``batches`` are those of ``mine``, of so many ``micro_batches``; ``loss`` is known."""
        self.step = step
        self.number = number
        self.mine = mine
        self.batches = batches
        self.micro_batches = micro_batches
        self.penalty = step.penalty
        self.loss: Tensor | None = loss + self._penalty()

    def __call__(self) -> Tensor:
        if self.loss is not None:
            known, self.loss = self.loss, None
            return known
        step = self.step
        window, step.module.window = step.module.window, Window(step.module.account.device)
        was_active, step.fingerprints.active = step.fingerprints.active, False
        step.module.zero_grad()
        step.buffers.begin()
        step.accumulate(self.number, self.mine, iter(self.batches))
        gradients, account = step.gradients()
        step.buffers.arrive(self.micro_batches)
        if self.penalty is not None:
            self.penalty.add(account[0])
        torch._foreach_mul_(gradients, account[0].reciprocal())
        step.module.window, step.fingerprints.active = window, was_active
        return account[1] / account[0] + self._penalty()

    def _penalty(self) -> Tensor | float:
        return 0.0 if self.penalty is None else self.penalty.value()
