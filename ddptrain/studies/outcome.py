"""What came of a run of a study, read from its directory: curves, weights, how it ended."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ddptrain.config import ALL, Config
from ddptrain.data.splits import split_indices
from ddptrain.observe.loggers import read_json_lines
from ddptrain.run_directory import RunDirectory
from ddptrain.studies.plan import Planned


@dataclass(frozen=True)
class Point:
    """The objective over the training set after so many steps, which took so many samples."""

    step: int
    samples: int
    objective: float


@dataclass(frozen=True)
class Made:
    """A run of a study, as far as it has come."""

    planned: Planned
    run: RunDirectory
    config: Config
    arguments: list[str]

    @property
    def command(self) -> str:
        """What makes the same weights again, in a directory of its own."""
        return f"ddptrain train {shlex.join(self.arguments)}"

    @cached_property
    def result(self) -> dict[str, Any]:
        return self.run.outcome()

    @cached_property
    def failure(self) -> dict[str, Any] | None:
        """The newest crash that some rank knew the cause of; None if the run did not fail."""
        if self.status == "completed":
            return None
        causes = [line for line in read_json_lines(self.run.crashes) if line.get("is_cause")]
        return causes[-1] if causes else None

    @property
    def status(self) -> str:
        """``completed``, ``failed``, ``stopped`` or ``not made``."""
        status = self.result.get("status")
        if status is None:
            return "failed" if self.run.crashes.exists() else "not made"
        return str(status)

    @property
    def is_over(self) -> bool:
        """Whether to make it again would come to the same end."""
        failure = self.failure
        return self.status == "completed" or (failure is not None and bool(failure.get("is_final")))

    @property
    def ended(self) -> str:
        """``status``, in the words of a report: only what diverged fails for good."""
        return "diverged" if self.is_over and self.status != "completed" else self.status

    @property
    def why(self) -> str:
        """What the framework said of its failure; empty if it did not fail."""
        return "" if self.failure is None else str(self.failure["error"])

    @cached_property
    def curve(self) -> list[Point]:
        """The objective after each step that is known of; one that is not finite is NaN.

        Where a step takes all samples, its own loss is that of the weights before it; elsewhere the
        training set has been evaluated.
        """
        lines = read_json_lines(self.run.metrics)
        steps = {line["step"]: line for line in lines if line["split"] == "train"}
        penalties = {step: line.get("penalty", 0.0) for step, line in steps.items()}
        losses = {line["step"]: line["loss"] for line in lines if line["split"] == "val"}
        if self.config.train.global_batch_size == ALL:
            begun = {step - 1: line["loss"] for step, line in steps.items() if step - 1 in steps}
            losses = begun | losses
        return [
            Point(step, self.samples(step), _total(loss, penalties.get(step, 0.0)))
            for step, loss in losses.items()
        ]

    @property
    def micro_batches(self) -> int:
        """How many the first step has, as many as any: so many ranks have work in it."""
        whole = self._whole()
        size, micro = self.config.train.sizes(whole)
        return math.ceil(min(size, whole) / micro)

    def _whole(self) -> int:
        return len(split_indices(self.config.data.train["samples"], "train"))

    def samples(self, step: int) -> int:
        """How many samples ``step`` steps take; an epoch's last one takes what is left."""
        whole = self._whole()
        size, _ = self.config.train.sizes(whole)
        steps = math.ceil(whole / size)
        return step // steps * whole + step % steps * size

    @cached_property
    def weights(self) -> list[float]:
        """The coefficients of the last checkpoint; empty if there is none."""
        from safetensors.torch import load_file

        files = sorted(self.run.checkpoints.glob("step-*/model.safetensors"))
        if not files:
            return []
        tensors = load_file(files[-1])
        matrices = [tensor for tensor in tensors.values() if tensor.dim() == 2]
        return [float(number) for number in matrices[0].flatten()] if len(matrices) == 1 else []

    @cached_property
    def minimum(self) -> float | None:
        """The least objective that there is, as scikit-learn finds it; None with an L1 penalty."""
        from ddptrain.studies.minimum import minimum

        penalty = self.config.train.penalty
        return None if penalty.l1 else minimum(self.config.data.train, penalty.l2)

    def gap(self, point: Point) -> float:
        """How far a point is above the minimum; NaN if that is not known."""
        return math.nan if self.minimum is None else point.objective - self.minimum

    def first_within(self, gap: float) -> Point | None:
        """The first point that is no farther than that above the minimum."""
        return next((point for point in self.curve if self.gap(point) <= gap), None)


def _total(loss: float | None, penalty: float | None) -> float:
    return math.nan if loss is None or penalty is None else loss + penalty
