"""Learning-rate schedules: pure functions of the step, so nothing needs saving."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Schedule(Protocol):
    """Maps optimiser step s (from 0) of a run of ``total_steps`` to a factor on each group's lr.

    With ``train.schedule_by=epoch`` it is asked once an epoch, and both are numbers of epochs.
    """

    def __call__(self, step: int, total_steps: int) -> float: ...


@dataclass(frozen=True)
class ByEpoch:
    """A ``schedule`` that counts epochs of so many steps, where others count steps."""

    schedule: Schedule
    steps: int

    def __call__(self, step: int, total_steps: int) -> float:
        return self.schedule(step // self.steps, -(-total_steps // self.steps))


def steps_of(amount: float, total: int) -> int:
    """Below 1 ``amount`` is a fraction of ``total`` steps, from 1 on a number of them."""
    return round(amount * total) if amount < 1 else int(amount)


@dataclass(frozen=True)
class Warmup:
    """Linear from near 0 to 1 over ``warmup``: below 1 a fraction of the run, else steps.

    What follows is in ``then``, or in ``after`` where only its share of the run matters.
    """

    warmup: float = 0.0

    def __post_init__(self) -> None:
        """Raises ``ValueError`` if a number cannot be."""
        _refuse(self.warmup < 0, f"warmup={self.warmup}: expected 0 or more")

    def __call__(self, step: int, total_steps: int) -> float:
        warm = steps_of(self.warmup, total_steps)
        if step < warm:
            return (step + 1) / warm
        return self.then(step, warm, total_steps)

    def then(self, step: int, warm: int, total: int) -> float:
        """The factor at ``step``, which is not below ``warm``."""
        return self.after((step - warm) / max(1, total - warm))

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
class Polynomial(Warmup):
    """What is left of the run, to the ``power``, down to ``final``; 1 is a straight line."""

    power: float = 2.0
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.power <= 0, f"power={self.power}: expected a number above 0")

    def after(self, progress: float) -> float:
        return self.final + (1 - self.final) * float((1 - progress) ** self.power)


@dataclass(frozen=True)
class Exponential(Warmup):
    """Divided by the same number in each step, down to ``final`` at the end of the run."""

    final: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.final <= 0, f"final={self.final}: expected a number above 0")

    def after(self, progress: float) -> float:
        return float(self.final**progress)


@dataclass(frozen=True)
class Cosine(Warmup):
    """Half a cosine down to ``final`` (Loshchilov and Hutter, *SGDR*, ICLR 2017, no restarts)."""

    final: float = 0.0

    def after(self, progress: float) -> float:
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class CosineRestarts(Warmup):
    """Half cosines down to ``final``, one after another (Loshchilov and Hutter, ICLR 2017).

    The first takes ``period``, below 1 a fraction of the run, else steps; each further one
    ``growth`` times as long as the one before it.
    """

    period: float = 0.25
    growth: float = 1.0
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.period <= 0, f"period={self.period}: expected a number above 0")
        _refuse(self.growth < 1, f"growth={self.growth}: expected 1 or more")

    def then(self, step: int, warm: int, total: int) -> float:
        period = float(max(1, steps_of(self.period, total)))
        since = float(step - warm)
        if self.growth == 1:
            since %= period
        else:  # the sum of the periods before is a geometric one
            restarts = int(math.log(1 + since / period * (self.growth - 1), self.growth) + 1e-9)
            since -= period * (self.growth**restarts - 1) / (self.growth - 1)
            period *= self.growth**restarts
        cosine = math.cos(math.pi * max(0.0, since) / period)
        return self.final + (1 - self.final) * 0.5 * (1 + cosine)


@dataclass(frozen=True)
class StepDecay(Warmup):
    """Times ``factor`` after ``every``, again and again: below 1 a fraction of the run, else steps.

    ``every=1`` is what torch calls exponential, with ``factor`` as its gamma.
    """

    every: float = 0.3
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.every <= 0, f"every={self.every}: expected a number above 0")
        _refuse(self.factor <= 0, f"factor={self.factor}: expected a number above 0")

    def then(self, step: int, warm: int, total: int) -> float:
        return float(self.factor ** ((step - warm) // max(1, steps_of(self.every, total))))


@dataclass(frozen=True)
class MultiStep(Warmup):
    """Times ``factor`` at each of the ``milestones``: below 1 fractions of the run, else steps."""

    milestones: Sequence[float] = (0.5, 0.75)
    factor: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.factor <= 0, f"factor={self.factor}: expected a number above 0")
        _refuse(
            any(milestone <= 0 for milestone in self.milestones),
            f"milestones={list(self.milestones)}: expected numbers above 0",
        )

    def then(self, step: int, warm: int, total: int) -> float:
        passed = sum(step >= steps_of(milestone, total) for milestone in self.milestones)
        return float(self.factor**passed)


@dataclass(frozen=True)
class OneCycle(Warmup):
    """Half a cosine up from ``start``, for ``rise`` of the run, and half a one down to ``final``.

    Smith and Topin, *Super-Convergence*, 2018, without the cycle of momentum.
    """

    rise: float = 0.3
    start: float = 0.04
    final: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(not 0 < self.rise < 1, f"rise={self.rise}: expected a fraction of the run")

    def after(self, progress: float) -> float:
        if progress < self.rise:
            return 1 - (1 - self.start) * 0.5 * (1 + math.cos(math.pi * progress / self.rise))
        down = (progress - self.rise) / (1 - self.rise)
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * down))


class Shape(Enum):
    """How a rate comes down."""

    linear = "linear"
    sqrt = "sqrt"
    cosine = "cosine"


@dataclass(frozen=True)
class WarmupStableDecay(Warmup):
    """As it is until ``decay`` before the end (a fraction of the run, or steps); then to ``final``.

    Hu et al., *MiniCPM*, 2024. The ``shape`` of the end: ``linear``, ``cosine``, or ``sqrt``, which
    is 1 − √progress (Hägele et al., *Scaling Laws and Compute-Optimal Training Beyond Fixed
    Training Durations*, NeurIPS 2024).
    """

    decay: float = 0.2
    final: float = 0.0
    shape: str = "sqrt"

    def __post_init__(self) -> None:
        super().__post_init__()
        _refuse(self.decay < 0, f"decay={self.decay}: expected 0 or more")
        known = [shape.name for shape in Shape]
        _refuse(self.shape not in known, f"shape={self.shape}: there is {', '.join(known)}")

    def then(self, step: int, warm: int, total: int) -> float:
        steps = min(steps_of(self.decay, total), total - warm)
        since = step - (total - steps)
        if since < 0 or steps == 0:
            return 1.0
        down = since / steps
        left = {
            Shape.linear: 1 - down,
            Shape.sqrt: 1 - math.sqrt(down),
            Shape.cosine: 0.5 * (1 + math.cos(math.pi * down)),
        }[Shape[self.shape]]
        return self.final + (1 - self.final) * left


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise ValueError(why)
