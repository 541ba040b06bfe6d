"""THE training loop: restore; step by step, log, evaluate and save when due; finish."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ddptrain import pulse
from ddptrain.checkpoint.checkpoints import MODEL, Checkpoints, capture
from ddptrain.checkpoint.progress import Progress
from ddptrain.checkpoint.recovery import recover
from ddptrain.config import Config
from ddptrain.data.fetch import Fetcher
from ddptrain.errors import NonFiniteError, Stopped
from ddptrain.evaluate import Evaluation
from ddptrain.fingerprints import Record
from ddptrain.observe.clock import StepClock
from ddptrain.observe.observer import Observer
from ddptrain.parallel.ranks import Ranks
from ddptrain.resilience.divergence import Replicas
from ddptrain.resilience.preemption import StopRequest
from ddptrain.resilience.sanity import explain
from ddptrain.state import State
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
    stop_request: StopRequest
    total_steps: int
    started_at: int = 0
    done: int = 0  # optimiser steps; with weights and optimiser state, all the state there is
    logged: int = 0
    metric_is_known: bool = False
    metrics: dict[str, float] = field(default_factory=dict)  # of evaluations at this very step
    line: dict[str, float] = field(default_factory=dict)  # that was logged after this very step
    record: Record | None = None  # its fingerprint
    clock: StepClock = field(default_factory=StepClock)

    def train(self) -> dict[str, float]:
        """Take every step that is left; return the final metrics by name."""
        first = self.restore()
        if first:
            self.tend()  # to what was due when the run was stopped
        batches = self.fetcher.steps(
            first, self.total_steps, self.ranks.rank, self.ranks.world_size
        )
        self.clock.restart()
        for step in range(first, self.total_steps):
            self.step(step, batches)
            self.record = self.step.fingerprints.take(step)
            self.advance(step + 1)
            self.observer.fingerprint(self.record)
            if step == first:
                self.warm_up()
            if self.step.stop_is_agreed(self.stop_request.came) and self.done < self.total_steps:
                self.stop()
            self.tend()
        return self.finish()

    def tend(self) -> None:
        """Do what is due after the steps that are done."""
        if self.is_due(self.config.parallel.check_every_steps):
            self.replicas.compare(self.done)
        if self.is_due(self.config.log.every_steps) and not self.line:
            self.log()
        durable = self.is_due(self.config.checkpoint.every_steps)
        if self.is_due(self.config.eval.every_steps):
            durable |= self.validate()
        if durable:
            self.save()
        elif self.is_due(self.config.checkpoint.memory_every_steps):
            self.snapshot()

    @property
    def progress(self) -> Progress:
        return self.checkpoints.memory.progress

    def is_due(self, every: int | None) -> bool:
        """Whether it is time, but for the last step: what is due then, ``finish`` does."""
        return every is not None and self.done % every == 0 and self.done < self.total_steps

    def advance(self, done: int) -> None:
        self.metrics, self.line = {}, {}
        self.done = done
        self.observer.at(done)
        self.progress.mark(done)

    def restore(self) -> int:
        """Load the newest whole checkpoint, if there is one; return the steps already done."""
        saved = recover(self.checkpoints, self.ranks)
        if saved is not None:
            self.done = saved.step
            saved.put_back(self.task, self.step.optimizer)
            self.step.taken.fill_(self.done)
            self.step.load_numbers(saved.manifest["step_numbers"])
            self.metrics = saved.manifest["metrics"]
            self.line = saved.manifest.get("line", {})
            self.record = saved.manifest.get("record")
        self.logged = self.done
        self.started_at = self.done
        self.observer.open(self.done, self.total_steps, self.progress.read())
        if self.ranks.is_first:
            self.progress.open()
            self.progress.mark(self.done)  # or the next start counts again what this one lost
        self.tell()
        if self.config.log.fingerprint_every is not None:
            self.observer.begin_fingerprints(self.step.fingerprints.header(self.done), self.record)
        return self.done

    def tell(self) -> None:
        """Write down what is known of the step that the run goes on from, if nobody has."""
        if self.line:
            self.observer.log(self.done, "train", self.line)
        for split in self.evaluations:
            if metrics := self.metrics_of(split):
                self.observer.log(self.done, split, metrics)

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
        pulse.enter("log line")
        self.stop_if_not_finite()  # waits for the device, so the clock is right from here on
        with self.clock.paused():
            plan = self.fetcher.source.plan
            samples = plan.samples_before(self.done)
            line = self.step.read() | {"samples": samples, "epoch": samples / plan.samples}
            with self.step.gate:
                self.line = line
                self.step.module.window.clear()
            speed = {}
            if self.done > self.logged:  # or it is the line that was due when the run was stopped
                seconds = self.clock.end_window(self.done - self.logged)
                taken = samples - plan.samples_before(self.logged)
                speed = {"samples_per_second": taken / seconds}
            self.observer.log(self.done, "train", self.line | speed)
            self.logged = self.done
            self.check_metric()

    def check_metric(self) -> None:
        """Stop early if ``checkpoint.metric`` names none that an evaluation will give."""
        if self.config.eval.every_steps is not None and not self.metric_is_known:
            names = self.evaluations["val"].names()
            if names is not None:
                self.checkpoints.check_metric([f"val/{name}" for name in names])
                self.metric_is_known = True

    def validate(self) -> bool:
        """Evaluate the validation split; return whether that makes this one of the best."""
        if not self.metrics_of("val"):
            self.evaluate("val")
        is_best = self.ranks.is_first and self.checkpoints.is_among_best(self.done, self.metrics)
        return self.ranks.from_first(is_best)

    def metrics_of(self, split: str) -> dict[str, float]:
        """The metrics of an evaluation at this very step, if there was one."""
        prefix = f"{split}/"
        return {n[len(prefix) :]: v for n, v in self.metrics.items() if n.startswith(prefix)}

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
        """Begin to write the checkpoint, once the replicas are known to be equal."""
        pulse.enter("checkpoint")
        self.replicas.compare(self.done)
        self.replicas.settle()
        numbers = self.step.numbers()
        if self.checkpoints.keeps_memory:
            self.checkpoints.save(self.state(self.done, numbers), durable=self.ranks.is_first)

    def snapshot(self) -> None:
        """Keep the state in memory that outlives the process; one rank of a node does."""
        if self.checkpoints.keeps_memory:
            pulse.enter("snapshot")
            with self.clock.paused():
                numbers = self.step.numbers(alone=True)
                if self.step.finished() == self.done:  # or the run is about to be stopped
                    self.checkpoints.save(self.state(self.done, numbers), durable=False)

    def state(self, done: int, numbers: dict[str, Any]) -> State:
        return capture(
            done, self.task, self.step.optimizer, numbers, self.metrics, self.line, self.record
        )

    def rescue(self, until: float, durable: bool) -> str | None:
        """Save the last finished step before ``until``, in whichever thread finds it necessary.

        For a rank that ends afterwards: its main thread, if it still runs, takes no further step.
        Returns where it is, None if there is nothing to save.
        """
        if not self.step.gate.acquire(timeout=max(0.0, until - time.monotonic())):
            return None
        done = self.step.finished()
        if self.step.is_updating or done == 0:
            return None
        if done != self.done:
            self.metrics, self.line = {}, {}
            self.record = self.step.fingerprints.take(done - 1)
        state = self.state(done, self.step.numbers(alone=True))
        model = state.files[MODEL]
        before = self.step.buffers.before_step()
        model.update({name: before[name] for name in model.keys() & before.keys()})
        return self.checkpoints.rescue(state, until, durable)

    def stop(self) -> None:
        """Save, and leave what else is due to the start that goes on. Raises ``Stopped``."""
        self.save()
        self.checkpoints.settle()
        self.ranks.barrier()  # nobody leaves before it is on disk
        raise Stopped(
            f"stopped after step {self.done} of {self.total_steps} with a checkpoint, on "
            f"{self.stop_request.signal or 'the wish of another rank'}; started again with the "
            "same run.dir, it goes on"
        )

    def stop_if_not_finite(self) -> None:
        """Stop the run if a step's numbers were not finite; the weights are those before it."""
        fault = self.step.first_fault(self.done)
        if fault is None:
            return
        self.done = fault
        self.metrics = {}
        what = explain(fault, self.step.module, self.fetcher.source, self.ranks, self.step.buffers)
        self.write()
        self.checkpoints.settle()
        raise NonFiniteError(
            f"{what}; stopped, the weights before that step are saved as its checkpoint; "
            "train.nonfinite=skip passes over such steps"
        )

    def finish(self) -> dict[str, float]:
        """Log and evaluate what is not yet, save, and return the final metrics."""
        if self.done > self.logged:
            self.log()
        for split in self.evaluations:
            if not self.metrics_of(split):
                self.evaluate(split)
        self.save()
        self.checkpoints.settle()
        if self.ranks.is_first:
            self.observer.finish(self.done, self.metrics, self.checkpoints.best_metrics())
        return self.metrics
