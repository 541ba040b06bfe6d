"""What is done about a step at fault: it is named, noted, and passed over; or the run ends."""

from __future__ import annotations

import logging
import math
from dataclasses import replace
from itertools import chain
from typing import Any

from ddptrain.checkpoint.saved import MODEL, OPTIMIZER, Saved
from ddptrain.config import Remedy, TrainConfig
from ddptrain.data.fetch import Source
from ddptrain.errors import NonFiniteError
from ddptrain.observe.observer import Observer
from ddptrain.optim.guard import IN_A_ROW, NONFINITE, SPIKE, Verdict
from ddptrain.parallel.ranks import Ranks
from ddptrain.resilience.sanity import Explainer
from ddptrain.state import State, load_model, load_optimizer, on_host
from ddptrain.step import Step

ANCHOR = "anchor-"
FAULTS = {NONFINITE: "nonfinite", SPIKE: "spike"}
"""What `anomalies.jsonl` calls what is wrong with a step."""
NUMBERS = ("step_numbers", "optimizer_numbers")

logger = logging.getLogger(__name__)


class Setbacks:
    """Faces steps at fault, and keeps the state to rewind to.

    That is the state after the last multiple of ``train.rewind_every_steps``, the *anchor*. Where
    it lies, and so what a run becomes, is a matter of the config and not of when anybody noticed
    or crashed: checkpoints between two anchors hold the one before.
    """

    def __init__(
        self, train: TrainConfig, step: Step, source: Source, ranks: Ranks, observer: Observer
    ) -> None:
        self.nonfinite = train.nonfinite
        self.spike = train.spike.action
        self.every = (
            train.rewind_every_steps if Remedy.rewind in (train.nonfinite, self.spike) else None
        )
        self.step = step
        self.source = source
        self.ranks = ranks
        self.observer = observer
        self.anchor: State | None = None
        self.explainer = Explainer(step.module, source, ranks, step.buffers, ranks.world_size)

    def is_due(self, done: int) -> bool:
        """Whether the state after ``done`` steps is one to rewind to."""
        return self.every is not None and done % self.every == 0

    def keep(self, state: State) -> None:
        """Copy ``state``, to rewind to it."""
        numbers = {name: state.numbers[name] for name in NUMBERS}
        self.anchor = replace(on_host(state), numbers=numbers)

    def with_anchor(self, state: State) -> State:
        """What a checkpoint of ``state`` must hold for a fault behind it."""
        if self.anchor is None or self.anchor.step == state.step:
            return state
        files = {f"{ANCHOR}{name}": tensors for name, tensors in self.anchor.files.items()}
        anchor = {"step": self.anchor.step, **self.anchor.numbers}
        return replace(
            state, files=state.files | files, numbers={**state.numbers, "anchor": anchor}
        )

    def restore(self, saved: Saved | None, state: State) -> None:
        """Take the anchor from a checkpoint that has one, or else the ``state`` gone on from."""
        if self.every is None:
            return
        if saved is None or "anchor" not in saved.manifest:
            self.keep(state)
            return
        numbers = dict(saved.manifest["anchor"])
        files = {name: saved.tensors(f"{ANCHOR}{name}") for name in (MODEL, OPTIMIZER)}
        self.anchor = State(numbers.pop("step"), files, numbers)

    def face(self, verdict: Verdict) -> int:
        """Name and note a step at fault; return how many steps are done afterwards.

        Every rank must call it. Raises ``NonFiniteError`` if the fault ends the run; the weights
        are those before it then.
        """
        remedy = self._remedy(verdict)
        line: dict[str, Any] = {
            "step": verdict.step,
            "fault": FAULTS[verdict.kind],
            "action": remedy.name,
            "loss": verdict.loss if math.isfinite(verdict.loss) else None,
            "samples": self._samples(verdict.step),
        }
        if remedy is Remedy.skip:
            self._note(line, f"step {verdict.step}: {describe(verdict)}; passed over")
            return verdict.step + 1
        report = self.explain(verdict)
        if remedy is Remedy.stop:
            self._note(line, report)
            raise NonFiniteError(f"{report}; {self._advice(verdict)}")
        return self._rewind(verdict, line, report)

    def explain(self, verdict: Verdict) -> str:
        """Take the step again, to name culprits; of one that was fine, where its loss is largest.

        Every rank must call it, with the weights before the step. A rescue meanwhile has the
        buffers before it.
        """
        with self.step.gate:
            self.step.buffers.begin()
            self.step.marks.begun += 1  # and stays so if this raises: buffers may have moved
        if verdict.kind == NONFINITE:
            report = self.explainer.nonfinite(verdict.step)
        else:
            limit = verdict.limit if verdict.kind == SPIKE else math.inf
            report = f"{self.explainer.largest_losses(verdict.step, limit)}; {describe(verdict)}"
        self.step.marks.begun -= 1
        return report

    def _remedy(self, verdict: Verdict) -> Remedy:
        wanted = self.nonfinite if verdict.kind == NONFINITE else self.spike
        assert wanted is not None
        return Remedy.stop if verdict.in_a_row >= IN_A_ROW else wanted

    def _advice(self, verdict: Verdict) -> str:
        if verdict.in_a_row >= IN_A_ROW:
            return (
                f"the {verdict.in_a_row}th step at fault in a row, so the run is stopped; its "
                "weights are saved, but a model that learns has others: lower optim.lr, or go on "
                "from an earlier checkpoint"
            )
        key = "train.nonfinite" if verdict.kind == NONFINITE else "train.spike.action"
        return (
            "stopped, the weights before that step are saved as its checkpoint; "
            f"{key}=skip passes over such steps, {key}=rewind goes back as well: another config, "
            "so in another run.dir"
        )

    def _rewind(self, verdict: Verdict, line: dict[str, Any], report: str) -> int:
        anchor = self.anchor
        assert anchor is not None
        step = self.step
        with step.gate:
            step.marks.void()
            load_model(step.module.task, anchor.files[MODEL])
            numbers = anchor.numbers["optimizer_numbers"]
            load_optimizer(step.module.task, step.optimizer, anchor.files[OPTIMIZER], numbers)
            step.rewind(anchor.numbers["step_numbers"], verdict.step + 1)
        self._note(
            {**line, "back_to": anchor.step},
            f"{report}; back to the weights after {anchor.step} steps, and on behind this one",
        )
        return verdict.step + 1

    def _note(self, line: dict[str, Any], report: str) -> None:
        self.observer.anomaly({**line, "report": report})
        if self.ranks.is_first:
            logger.warning("%s", report)

    def _samples(self, step: int) -> list[int]:
        plan = self.source.plan
        indices = (plan.indices(batch).tolist() for batch in plan.micro_batches(step))
        return list(chain.from_iterable(indices))


def describe(verdict: Verdict) -> str:
    """What is wrong with a step, if anything is."""
    if verdict.kind == NONFINITE:
        return f"loss or gradient is not finite (loss {verdict.loss:.4g})"
    too_large = f", above {verdict.limit:.4g}" if verdict.kind == SPIKE else ""
    return f"the loss of the step is {verdict.loss:.4g}{too_large}"
