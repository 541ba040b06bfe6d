"""Learning-rate schedules: pure functions of the step, so nothing needs saving."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """Maps optimiser step s (from 0) of a run of ``total_steps`` to a factor on each group's lr."""

    def __call__(self, step: int, total_steps: int) -> float: ...


@dataclass(frozen=True)
class Warmup:
    """Linear from near 0 to 1 over ``warmup``: below 1 a fraction of the run, else steps."""

    warmup: float = 0.0

    def __call__(self, step: int, total_steps: int) -> float:
        steps = round(self.warmup * total_steps) if self.warmup < 1 else int(self.warmup)
        if step < steps:
            return (step + 1) / steps
        return self.after((step - steps) / max(1, total_steps - steps))

    def after(self, progress: float) -> float:
        """The factor at ``progress`` in [0, 1) of what follows the warm-up."""
        return 1.0


@dataclass(frozen=True)
class Constant(Warmup):
    """The learning rate as it is."""


@dataclass(frozen=True)
class Linear(Warmup):
    """A straight line down to ``final``."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return 1 - (1 - self.final) * progress


@dataclass(frozen=True)
class Cosine(Warmup):
    """Half a cosine down to ``final`` (Loshchilov and Hutter, *SGDR*, ICLR 2017, no restarts)."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))
