"""A trial beside the reference: where the two part, and how far apart they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ddptrain.verify.trace import Difference, Moment, Trace, first_difference
from ddptrain.verify.trial import Outcome, Trial

METRICS = 1e-6
"""Relative difference allowed between metrics: some add up in float32, in an order of their own."""


@dataclass(frozen=True)
class Result:
    """A trial beside the reference; ``outcomes`` are those of its ranks."""

    trial: Trial
    outcomes: list[Outcome]
    reference: Outcome

    @cached_property
    def parting(self) -> Difference | None:
        """What first differs in the steps."""
        for step in range(self.outcomes[0].first, self.outcomes[0].last):
            moments = {m for m in self.reference.trace if m.split == "train" and m.step == step}
            if found := self._in_trace(moments) or self._in_gradient(step) or self._in_state(step):
                return found
        return None

    @cached_property
    def parting_of_evaluation(self) -> Difference | None:
        """What first differs in the evaluations."""
        moments = {m for m in self.reference.trace if m.split != "train"}
        if found := self._in_trace(moments):
            return found
        distance, name = self.metric_distance
        return Difference(Moment(name, 0, 0), "metric", "") if distance > METRICS else None

    @property
    def has_same_samples(self) -> bool:
        return all(
            work.forward[0] == self.reference.trace[moment].forward[0]
            for outcome in self.outcomes
            for moment, work in outcome.trace.items()
            if moment.split == "train"
        )

    @property
    def gradient_distance(self) -> float:
        """The largest relative difference of a gradient, where gradients are measured."""
        of_steps = self.outcomes[0].distances.values()
        return max((d.found for step in of_steps for d in step.values()), default=0.0)

    @property
    def metric_distance(self) -> tuple[float, str]:
        """The largest relative difference of a metric, and its name."""
        distances = [(0.0, "")]
        for split, expected in self.reference.metrics.items():
            for name, value in expected.items():
                found = self.outcomes[0].metrics[split][name]
                both_nan = found != found and value != value
                size = max(abs(found), abs(value), 1e-30)
                distance = 0.0 if both_nan or found == value else abs(found - value) / size
                distances.append((distance, f"{split}/{name}"))
        return max(distances, key=lambda pair: (pair[0] != pair[0], pair[0]))

    def rank_of(self, moment: Moment) -> int:
        return next((r for r, o in enumerate(self.outcomes) if moment in o.trace), 0)

    def _in_trace(self, moments: set[Moment]) -> Difference | None:
        trace: Trace = {}
        for outcome in self.outcomes:
            trace |= {m: work for m, work in outcome.trace.items() if m in moments}
        return first_difference(self.reference.trace, trace)

    def _in_gradient(self, step: int) -> Difference | None:
        """All ranks hold the same sum, so rank 0 tells; where ranks differ, the state tells."""
        mine = self.outcomes[0]
        expected = self.reference.gradients.get(step, {})
        if self.trial.reloads:
            distances = mine.distances.get(step, {})
            near = {name for name, (found, allowed) in distances.items() if found <= allowed}
            wrong = [name for name in expected if name not in near]
        else:
            found = mine.gradients.get(step, {})
            wrong = [name for name in expected if found.get(name) != expected[name]]
        if not wrong:
            return None
        return Difference(Moment("train", step, 0), "sum", wrong[0])

    def _in_state(self, step: int) -> Difference | None:
        expected = (self.outcomes[0] if self.trial.reloads else self.reference).states[step + 1]
        for outcome in self.outcomes:
            found = outcome.states[step + 1]
            for name in {**expected, **found}:
                if expected.get(name) != found.get(name):
                    return Difference(Moment("train", step, 0), "state", name)
        return None
