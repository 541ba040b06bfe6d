"""What comes of evaluations that get no better: a lower learning rate, or the end of a run."""

from __future__ import annotations

import math
from typing import Any, Protocol, runtime_checkable

from ddptrain.optim.schedules import Constant


@runtime_checkable
class Heedful(Protocol):
    """What goes by a metric of the evaluations, alike on every rank. Its numbers are saved.

    ``metric`` is the name of one, such as ``val/loss``.
    """

    metric: str

    def heed(self, value: float) -> None: ...

    def numbers(self) -> dict[str, Any]: ...

    def load(self, numbers: dict[str, Any]) -> None: ...


class Patience:
    """Runs out when ``metric`` has got no better in ``patience`` evaluations, one after another.

    Better is by more than ``threshold``, in units of the metric; one that is NaN is not better.
    """

    def __init__(self, metric: str, mode: str, patience: int, threshold: float) -> None:
        """Raises ``ValueError`` if one of them cannot be; ``mode`` is ``min`` or ``max``."""
        if mode not in ("min", "max"):
            raise ValueError(f"mode={mode}: expected min or max")
        if patience < 1:
            raise ValueError(f"patience={patience}: expected a number of evaluations above 0")
        if threshold < 0:
            raise ValueError(f"threshold={threshold}: expected 0 or more")
        self.metric = metric
        self.sign = 1.0 if mode == "max" else -1.0
        self.patience = patience
        self.threshold = threshold
        self.best: float | None = None
        self.waited = 0
        self.ran_out = 0

    def heed(self, value: float) -> None:
        """Take the value of the next evaluation."""
        value *= self.sign
        is_first = self.best is None and not math.isnan(value)
        if is_first or (self.best is not None and value > self.best + self.threshold):
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited == self.patience:
            self.ran_out += 1
            self.waited = 0

    @property
    def why(self) -> str:
        """What it means that it has run out."""
        best = "it never was a number" if self.best is None else f"best {self.best * self.sign:.4g}"
        return f"{self.metric} has got no better in {self.patience} evaluations ({best})"

    def numbers(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited, "ran_out": self.ran_out}

    def load(self, numbers: dict[str, Any]) -> None:
        """Put back what ``numbers`` returned."""
        self.best, self.waited = numbers["best"], numbers["waited"]
        self.ran_out = numbers["ran_out"]


class Plateau(Patience):
    """A schedule: times ``factor`` whenever ``metric`` has got no better; not below ``final``.

    Unlike the others it goes by what was measured, so what it has seen is a part of a checkpoint.
    """

    def __init__(
        self,
        warmup: float = 0.0,
        metric: str = "val/loss",
        mode: str = "min",
        patience: int = 2,
        threshold: float = 1e-4,
        factor: float = 0.1,
        final: float = 0.0,
    ) -> None:
        super().__init__(metric, mode, patience, threshold)
        if not 0 < factor < 1:
            raise ValueError(f"factor={factor}: expected a number between 0 and 1")
        self.warmup = Constant(warmup)
        self.factor = factor
        self.final = final

    def __call__(self, step: int, total_steps: int) -> float:
        reduced = max(float(self.factor**self.ran_out), self.final)
        return self.warmup(step, total_steps) * reduced
