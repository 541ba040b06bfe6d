"""THE training loop: restore; step by step, log, evaluate and save when due; finish."""

from __future__ import annotations

from dataclasses import dataclass, field

from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.config import Config
from ddptrain.data.fetch import Fetcher
from ddptrain.errors import NonFiniteError
from ddptrain.evaluate import Evaluation
from ddptrain.observe.clock import StepClock
from ddptrain.observe.observer import Observer
from ddptrain.parallel.ranks import Ranks
from ddptrain.resilience.divergence import Replicas
from ddptrain.resilience.sanity import explain
from ddptrain.step import Step
from ddptrain.tasks.task import Task


@dataclass
class Trainer:
    """The parts of a run by name, and the order in which they work; ``build.py`` makes one."""

    config: Config
    ranks: Ranks
    task: Task
    fetcher: Fetcher
    step: Step
    evaluations: dict[str, Evaluation]
    checkpoints: Checkpoints
    observer: Observer
    replicas: Replicas
    total_steps: int
    done: int = 0  # optimiser steps; with weights and optimiser state, all the state there is
    logged: int = 0
    metric_is_known: bool = False
    metrics: dict[str, float] = field(default_factory=dict)  # of evaluations at this very step
    clock: StepClock = field(default_factory=StepClock)

    def train(self) -> dict[str, float]:
        """Take every step that is left; return the final metrics by name."""
        first = self.restore()
        batches = self.fetcher.steps(
            first, self.total_steps, self.ranks.rank, self.ranks.world_size
        )
        self.clock.restart()
        for step in range(first, self.total_steps):
            self.step(step, batches)
            self.advance(step + 1)
            self.observer.fingerprint(self.step.fingerprints.take(step))
            if step == first:
                self.warm_up()
            if self.is_due(self.config.parallel.check_every_steps):
                self.replicas.compare(self.done)
            if self.is_due(self.config.log.every_steps):
                self.log()
            if self.is_due(self.config.eval.every_steps):
                self.validate()
            if self.is_due(self.config.checkpoint.every_steps):
                self.save()
        return self.finish()

    def is_due(self, every: int | None) -> bool:
        """Whether it is time, but for the last step: what is due then, ``finish`` does."""
        return every is not None and self.done % every == 0 and self.done < self.total_steps

    def advance(self, done: int) -> None:
        self.done = done
        self.metrics = {}
        self.observer.at(done)

    def restore(self) -> int:
        """Load the newest whole checkpoint, if there is one; return the steps already done."""
        found = self.ranks.from_first(self.checkpoints.newest() if self.ranks.is_first else None)
        if found is not None:
            self.done, manifest = found
            self.checkpoints.restore(self.done, manifest, self.task, self.step.optimizer)
            self.step.load_numbers(manifest["step_numbers"])
            self.metrics = manifest["metrics"]
        self.logged = self.done
        self.observer.open(self.done, self.total_steps)
        if self.config.log.fingerprint_every is not None:
            self.observer.begin_fingerprints(self.step.fingerprints.header(self.done))
        return self.done

    def warm_up(self) -> None:
        """Begin, once the first step is out, what is needed later."""
        with self.clock.paused():
            for evaluation in self.evaluations.values():
                evaluation.prepare()
            fetchers = [self.fetcher, *(e.fetcher for e in self.evaluations.values())]
            data = {fetcher.source.name: fetcher.digest() for fetcher in fetchers}
            self.ranks.agree(data, "reads other data than", "give all nodes the same files")
            if self.ranks.is_first:
                self.observer.first_step_done(data)

    def log(self) -> None:
        """Reduce what the steps since the last line recorded, and write it down."""
        self.stop_if_not_finite()  # waits for the device, so the clock is right from here on
        with self.clock.paused():
            plan = self.fetcher.source.plan
            samples = plan.samples_before(self.done)
            seconds = self.clock.end_window(self.done - self.logged)
            speed = (samples - plan.samples_before(self.logged)) / seconds
            progress = {"samples_per_second": speed, "samples": samples,
                        "epoch": samples / plan.samples}  # fmt: skip
            self.observer.log(self.done, "train", self.step.read() | progress)
            self.logged = self.done
            self.check_metric()

    def check_metric(self) -> None:
        """Stop early if ``checkpoint.metric`` names none that an evaluation will give."""
        if self.config.eval.every_steps is not None and not self.metric_is_known:
            names = self.evaluations["val"].names()
            if names is not None:
                self.checkpoints.check_metric([f"val/{name}" for name in names])
                self.metric_is_known = True

    def validate(self) -> None:
        """Evaluate the validation split; save if that makes this one of the best checkpoints."""
        self.evaluate("val")
        is_best = self.ranks.is_first and self.checkpoints.is_among_best(self.done, self.metrics)
        if self.ranks.from_first(is_best):
            self.save()

    def evaluate(self, split: str) -> None:
        self.stop_if_not_finite()
        with self.clock.paused():
            metrics = self.evaluations[split].run()
            self.metrics |= {f"{split}/{name}": value for name, value in metrics.items()}
            self.observer.log(self.done, split, metrics)

    def save(self) -> None:
        """Write a checkpoint of this step, with the metrics of evaluations at this step."""
        self.stop_if_not_finite()
        with self.clock.paused():
            self.write()

    def write(self) -> None:
        """Write the checkpoint, once the replicas are known to be equal."""
        self.replicas.compare(self.done)
        self.replicas.settle()
        numbers = self.step.numbers()
        if self.ranks.is_first:
            self.checkpoints.save(self.done, self.task, self.step.optimizer, numbers, self.metrics)

    def stop_if_not_finite(self) -> None:
        """Stop the run if a step's numbers were not finite; the weights are those before it."""
        fault = self.step.first_fault(self.done)
        if fault is None:
            return
        self.done = fault
        self.metrics = {}
        what = explain(fault, self.step.module, self.fetcher.source, self.ranks, self.step.buffers)
        self.write()
        raise NonFiniteError(
            f"{what}; stopped, the weights before that step are saved as its checkpoint; "
            "train.nonfinite=skip passes over such steps"
        )

    def finish(self) -> dict[str, float]:
        """Log and evaluate what is not yet, save, and return the final metrics."""
        if self.done > self.logged:
            self.log()
        for split in self.evaluations:
            if not any(name.startswith(f"{split}/") for name in self.metrics):
                self.evaluate(split)
        self.save()
        if self.ranks.is_first:
            self.observer.finish(self.done, self.metrics, self.checkpoints.best_metrics())
        return self.metrics
