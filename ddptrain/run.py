"""A run as it stands: its parts, what it has done, and how that is saved and brought back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ddptrain import pulse
from ddptrain.beside import beside
from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.progress import Progress
from ddptrain.checkpoint.recovery import recover
from ddptrain.checkpoint.saved import MODEL, capture
from ddptrain.config import Config, Resume
from ddptrain.data.fetch import Fetcher
from ddptrain.errors import DivergenceError, Refused
from ddptrain.evaluate import Evaluation
from ddptrain.fingerprints import Record
from ddptrain.layers import Layers
from ddptrain.observe.clock import StepClock
from ddptrain.observe.observer import Observer
from ddptrain.optim.patience import Heedful, Patience
from ddptrain.optim.schedules import ByEpoch
from ddptrain.parallel.ranks import Ranks
from ddptrain.resilience.divergence import Replicas
from ddptrain.resilience.preemption import StopRequest
from ddptrain.setbacks import Setbacks
from ddptrain.state import State, load_model, load_optimizer, model_tensors, on_host
from ddptrain.step import Step
from ddptrain.tasks.task import Batch, Task

DIVERGENCES = 3
"""How often a run sets replicas right: after that a machine is at fault, not a stray particle."""


@dataclass
class Run:
    """The parts of a run by name, and what it has done."""

    config: Config
    ranks: Ranks
    task: Task
    fetcher: Fetcher
    step: Step
    evaluations: dict[str, Evaluation]
    checkpoints: Checkpoints
    observer: Observer
    replicas: Replicas
    setbacks: Setbacks
    layers: Layers
    stop_request: StopRequest
    rebuild: Callable[[], Task]
    total_steps: int
    early_stop: Patience | None = None
    begun: Callable[[], None] = lambda: None
    """Called when what the run goes on from is as it was asked for."""
    started_at: int = 0
    done: int = 0  # optimiser steps; with weights and optimiser state, all the state there is
    timed_from: int = 0
    metrics: dict[str, float] = field(default_factory=dict)  # of evaluations at this very step
    line: dict[str, float] = field(default_factory=dict)  # that was logged after this very step
    record: Record | None = None  # its fingerprint
    clock: StepClock = field(default_factory=StepClock)
    is_warm: bool = False
    beginning: State | None = None
    averaged: Task | None = None
    diverged: list[int] = field(default_factory=list)  # after which steps replicas differed
    batches: Iterator[Batch] = field(default_factory=lambda: iter(()))

    def __post_init__(self) -> None:
        schedule = self.step.schedule
        schedule = schedule.schedule if isinstance(schedule, ByEpoch) else schedule
        heedful = {"schedule": schedule, "train.early_stop": self.early_stop}
        goes_by = {key: each for key, each in heedful.items() if isinstance(each, Heedful)}
        self.heedful = list(goes_by.values())
        if goes_by and self.config.eval.every_steps is None:
            (key, each), *_ = goes_by.items()
            raise Refused(
                f"{key}.metric={each.metric} needs evaluations to go by, but eval.every_steps is "
                "null: set it, or choose another schedule"
            )
        self.metrics_needed = {f"{key}.metric": each.metric for key, each in goes_by.items()}
        if self.checkpoints.retention.keep_best or self.config.restarts > 1:
            self.metrics_needed["checkpoint.metric"] = self.checkpoints.metric

    @property
    def progress(self) -> Progress:
        return self.checkpoints.memory.progress

    def advance(self, done: int) -> None:
        self.metrics, self.line = {}, {}
        self.done = done
        self.observer.at(done)
        self.progress.mark(done)

    def restore(self) -> int:
        """Load the newest whole checkpoint, if there is one; return the steps already done."""
        with self.step.gate:
            self.step.marks.void()  # nothing of what is half loaded is to be rescued
        saved = recover(self.checkpoints, self.ranks)
        if self.beginning is None:
            self.check_resume(saved is not None)
            self.claim()
            self.beginning = self.state(0)
        if saved is None and self.done:
            self.begin_anew(self.beginning)
        if saved is not None:
            self.done = saved.step
            saved.put_back(self.task, self.step.optimizer)
            self.step.load_numbers(saved.manifest["step_numbers"], self.done)
            self.metrics = saved.manifest["metrics"]
            self.line = saved.manifest.get("line", {})
            self.record = saved.manifest.get("record")
            self.load_heeded(saved.manifest.get("heeded", []))
        self.timed_from = self.done
        self.started_at = self.done
        self.replicas.restart(self.done)
        self.setbacks.restore(saved, self.state(self.done))
        self.observer.open(self.done, self.total_steps, self.progress.read())
        if self.ranks.is_first:
            self.checkpoints.scrub()
            self.progress.open()
            self.progress.mark(self.done)  # or the next start counts again what this one lost
        self.step.marks.set(self.done)
        self.tell()
        if self.config.log.fingerprint_every is not None:
            self.observer.begin_fingerprints(self.step.fingerprints.header(self.done), self.record)
        self.layers.restore()
        return self.done

    def claim(self) -> None:
        """Have a store that is elsewhere for this start, on every rank."""
        store = self.checkpoints.store
        if store.token is not None:
            is_claimed = store.claim() if self.ranks.is_first else None
            store.is_claimed = self.ranks.from_first(is_claimed)

    def check_resume(self, is_found: bool) -> None:
        """Hold ``run.resume`` against what there is. Raises ``Refused``, on every rank.

        And ``CheckpointError`` if there is nothing, but the run is known to have had a checkpoint.
        """
        resume = self.ranks.from_first(self.config.run.resume)  # which knows of earlier starts
        where = f"run.resume={resume.name} but {self.checkpoints.store.medium.where('')}"
        if is_found and resume is Resume.never:
            raise Refused(
                f"{where} holds a checkpoint; name another checkpoint.dir, or continue it with "
                "run.resume=auto"
            )
        if not is_found and self.ranks.from_first(self.observer.has_saved()):
            raise self.checkpoints.none_is_whole(0)
        if not is_found and resume is Resume.must:
            raise Refused(f"{where} holds no checkpoint, and neither does run.dir")
        self.begun()

    def begin_anew(self, beginning: State) -> None:
        """Be again as before the first step: what the config says."""
        self.done = 0
        self.record = None
        self.metrics, self.line = {}, {}
        load_model(self.task, model_tensors(self.rebuild()))
        numbers = beginning.numbers
        load_optimizer(self.task, self.step.optimizer, {}, numbers["optimizer_numbers"])
        self.step.load_numbers(numbers["step_numbers"], 0)
        self.load_heeded(numbers["heeded"])

    def load_heeded(self, heeded: list[dict[str, Any]]) -> None:
        """Put back what those have seen that go by evaluations; the run may be over by that."""
        for each, numbers in zip(self.heedful, heeded, strict=True):
            each.load(numbers)
        if self.early_stop is not None and self.early_stop.ran_out:
            self.total_steps = self.done

    def set_right(self, error: DivergenceError) -> None:
        """Go back to where the replicas were last known to be equal, all of them from one state.

        Steps taken since then may have had a part of the wrong weights in their gradients. Raises
        ``error`` if it comes again.
        """
        with self.step.gate:
            self.step.marks.void()  # nothing of this is to be rescued
        if self.checkpoints.keeps_memory:
            self.checkpoints.memory.discard(self.replicas.agreed)
        self.checkpoints.settle()
        self.diverged.append(error.step)
        if len(self.diverged) > DIVERGENCES or self.diverged.count(error.step) > 1:
            raise error
        self.ranks.barrier()  # nobody reads what another rank is about to delete
        self.observer.close()
        self.restore()
        self.observer.divergence(self.done, str(error))

    def tell(self) -> None:
        """Write down what is known of the step that the run goes on from, if nobody has."""
        if self.line:
            self.observer.log(self.done, "train", self.line)
        for split in self.evaluations:
            if metrics := self.metrics_of(split):
                self.observer.log(self.done, split, metrics)

    def evaluated(self) -> Task:
        """What is evaluated: the averages of the weights in a task of their own, if there are any.

        The weights that are trained stay where they are, for who saves them meanwhile.
        """
        average = self.step.average
        if average is None:
            return self.task
        if self.averaged is None:
            self.averaged = self.rebuild()
        return self.averaged if average.put_into(self.task, self.averaged) else self.task

    def metrics_of(self, split: str) -> dict[str, float]:
        """The metrics of an evaluation at this very step, if there was one."""
        prefix = f"{split}/"
        return {n[len(prefix) :]: v for n, v in self.metrics.items() if n.startswith(prefix)}

    def save(self) -> None:
        """Write a checkpoint of this step, with the metrics of evaluations at this step."""
        with self.clock.paused():
            self.write()

    def write(self) -> None:
        """Begin to write the checkpoint, once the replicas are known to be equal."""
        pulse.enter("checkpoint")
        self.replicas.compare(self.done)
        self.replicas.settle()
        numbers = self.step.numbers()
        if self.checkpoints.keeps_memory:
            state = self.setbacks.with_anchor(self.state(self.done, numbers))
            self.checkpoints.save(state, durable=self.ranks.is_first)

    def snapshot(self) -> None:
        """Keep the state in memory that outlives the process; one rank of a node does."""
        if self.checkpoints.keeps_memory:
            pulse.enter("snapshot")
            with self.clock.paused():
                state = self.setbacks.with_anchor(self.state(self.done))
                self.checkpoints.save(state, durable=False)

    def state(self, done: int, numbers: dict[str, Any] | None = None) -> State:
        numbers = self.step.numbers(alone=True) if numbers is None else numbers
        told = self.metrics, self.line, self.record, [each.numbers() for each in self.heedful]
        return capture(done, self.task, self.step.optimizer, numbers, *told)

    def rescue(self, until: float, copy_until: float, may_write: Callable[[], bool]) -> str | None:
        """Save the last finished step before ``until``, in whichever thread finds it necessary.

        For a rank that ends afterwards: its main thread, if it still runs, takes no further step.
        Returns where it is, None if there is nothing to save.
        """
        with beside(self.ranks.device, self.step.gate, until) as is_behind:
            state = None if is_behind is None else self._last_finished(is_behind, until)
            if state is None:
                return None
            return self.checkpoints.rescue(state, until, copy_until, may_write)

    def _last_finished(self, is_behind: bool, until: float) -> State | None:
        """The state after the last finished step, whatever the host and the device do next.

        None before the first, or if an update was begun and is not going to end. A device that
        ``is_behind`` may go on while it is read, and is read again then.
        """
        while True:
            marks = self.step.marks.read()
            _, updating, taken = marks
            if updating == taken:
                state = self._finished(marks)
                if state is None or not is_behind:
                    return state
                state = on_host(state)
                if marks == self.step.marks.read():
                    return state
            if not is_behind or time.monotonic() > until:
                return None
            self.step.gate.acquire(timeout=0.01)  # if the host does go on, it goes no further

    def _finished(self, marks: tuple[int, int, int]) -> State | None:
        done = self.step.finished()
        if done == 0:
            return None
        if done != self.done:
            self.metrics, self.line = {}, {}
            self.record = self.step.fingerprints.take(done - 1)
        state = self.setbacks.with_anchor(self.state(done))
        model = state.files[MODEL]
        begun, _, taken = marks
        before = self.step.buffers.before_step() if begun > taken else {}
        model.update({name: before[name] for name in model.keys() & before.keys()})
        return state
