"""Which of several restarts is the best: an evaluation of each."""

from __future__ import annotations

import math
from statistics import fmean
from typing import Any

from ddptrain.evaluate import Evaluation
from ddptrain.tasks.restarts import Restarts


class Contest(Evaluation):
    """Evaluates every copy of ``task``, and has the best by ``metric`` chosen, in it and elsewhere.

    What is best is said by a metric's name without its split; of equals it is the first, and NaN
    is never better.
    """

    def __init__(self, task: Restarts, *parts: Any, metric: str, is_larger_better: bool) -> None:
        super().__init__(task, *parts)
        self.trained = task
        self.metric = metric
        self.is_larger_better = is_larger_better

    def run(self) -> dict[str, float]:
        """Return the metrics of the best; its number, and how all did."""
        task = self.task  # maybe another: that of averaged weights
        assert isinstance(task, Restarts)
        of_copies, pictures = [], []
        for number in range(len(task.copies)):
            task.shown = number
            of_copies.append(super().run())
            pictures.append(self.pictures)
        scores = [metrics[self.metric] for metrics in of_copies]
        ranked = sorted(range(len(scores)), key=lambda number: self._badness(scores[number]))
        best, worst = ranked[0], ranked[-1]
        middle = {ranked[(len(ranked) - 1) // 2], ranked[len(ranked) // 2]}
        task.shown = None
        for each in (task, self.trained):
            each.choose(best)
        self.pictures = pictures[best]
        spread = {"median": fmean(scores[number] for number in middle), "worst": scores[worst]}
        told = {f"{self.metric}_{name}": score for name, score in spread.items()}
        return of_copies[best] | {"restart": float(best)} | told

    def _badness(self, score: float) -> float:
        if math.isnan(score):
            return math.inf
        return -score if self.is_larger_better else score
