"""Compares a step's gradient with the reference's: in its bits, and against what was added up."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddptrain.step import Step
from ddptrain.verify.trace import Recorder, digest

ROUNDINGS = 84
"""Relative difference allowed, in units of the last place: 1e-5 in float32.

A sum of M terms is off by at most M - 1 roundings of the sum of their magnitudes; the magnitudes,
and not the sum, are what a difference is divided by, so that terms which cancel raise no alarm.
"""


class Distance(NamedTuple):
    """How far a parameter's gradient is from the reference's, and how far it may be."""

    found: float
    allowed: float


class Gradients:
    """Looks at the gradient just before the optimiser takes it, divided and clipped.

    The reference leaves its gradients in ``folder``; with ``measures``, others are compared there.
    """

    def __init__(
        self, leaves: bool, measures: bool, recorder: Recorder, step: Step, folder: Path
    ) -> None:
        self.leaves = leaves
        self.measures = measures and step.ranks.is_first
        self.recorder = recorder
        self.step = step
        self.folder = folder
        self.number = 0
        self.digests: dict[int, dict[str, str]] = {}
        self.distances: dict[int, dict[str, Distance]] = {}
        step.optimizer.register_step_pre_hook(self._look)

    def expect(self, number: int) -> None:
        """The next gradient is that of step ``number``."""
        self.number = number

    def _look(self, *_: Any) -> None:
        step = self.step
        gradients = {
            name: parameter.grad
            for name, parameter in zip(step.names, step.parameters, strict=True)
            if parameter.grad is not None
        }
        self.digests[self.number] = {name: digest(g) for name, g in gradients.items()}
        file = self.folder / f"gradients-{self.number}.pt"
        if self.leaves:
            torch.save((gradients, self._magnitudes(gradients)), file)
        elif self.measures and file.exists():
            expected, magnitudes = torch.load(file, map_location=step.ranks.device)
            self.distances[self.number] = {
                name: _distance(gradient, expected[name], magnitudes[name])
                for name, gradient in gradients.items()
            }

    def _magnitudes(self, gradients: dict[str, Tensor]) -> dict[str, float]:
        """The norms of all micro-batches' gradients, divided as their sum has been."""
        account = self.step.module.account.grad
        assert account is not None
        added = (self.step.norm * account[0]).item()
        norms = [gradient.double().norm() for gradient in gradients.values()]
        factor = torch.stack(norms).norm().item() / added if added else 1 / account[0].item()
        of_step = self.recorder.magnitudes[self.number]
        return {name: of_step[name] * factor for name in gradients}


def _distance(gradient: Tensor, expected: Tensor, magnitude: float) -> Distance:
    allowed = ROUNDINGS * torch.finfo(gradient.dtype).eps
    finite = expected.isfinite()
    if not torch.equal(gradient.isfinite(), finite):
        return Distance(float("inf"), allowed)
    if not finite.all():  # a step that is skipped, by both
        return Distance(0.0, allowed)
    difference = (gradient.double() - expected.double()).norm().item()
    # Not finite where another parameter's gradient is not: that step is skipped, too.
    is_number = 0 < magnitude < float("inf")
    return Distance(difference / magnitude if is_number else difference, allowed)
