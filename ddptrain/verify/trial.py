"""Takes a few steps in one way (ranks, loading workers, a resume) and records what came of it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch.nn import SyncBatchNorm

from ddptrain.build import build_trainer
from ddptrain.config import Config
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.phases import Phases
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory
from ddptrain.state import optimizer_tensors
from ddptrain.verify.attributes import Attributes, observe
from ddptrain.verify.gradients import Distance, Gradients
from ddptrain.verify.trace import Recorder, Trace, digest

EVALUATED = 8
"""How many micro-batches of each split are evaluated."""


@dataclass(frozen=True)
class Trial:
    """How the same steps are taken; trial 0 is the reference, whose checkpoints the others use.

    A trial that ``reloads`` begins each step from the reference's state, so that differences in
    rounding do not grow.
    """

    number: int = 0
    world_size: int = 1
    workers: int = 0
    resumed: bool = False
    reloads: bool = False

    @property
    def is_reference(self) -> bool:
        return self.number == 0

    def __str__(self) -> str:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        workers = f", {self.workers} loading workers" if self.workers else ""
        return f"{ranks}{workers}{', resumed' if self.resumed else ''}"


@dataclass
class Outcome:
    """What one rank saw of a trial; digests by step and name."""

    first: int
    last: int
    labels: dict[str, str]
    before: dict[str, Attributes]
    after: dict[str, Attributes] = field(default_factory=dict)
    synchronised: list[str] = field(default_factory=list)
    trace: Trace = field(default_factory=dict)
    gradients: dict[int, dict[str, str]] = field(default_factory=dict)
    distances: dict[int, dict[str, Distance]] = field(default_factory=dict)
    states: dict[int, dict[str, str]] = field(default_factory=dict)
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)


def run_trial(
    trial: Trial,
    config: Config,
    steps: int,
    place: Place,
    folder: Path,
    look: Callable[[Trainer], None] | None = None,
) -> list[Outcome]:
    """Run ``trial``, ``look`` at its trainer in the end; return the outcomes of all its ranks.

    The ranks form a group of their own, and everything is built anew, as after a real start.
    """
    os.environ["WORLD_SIZE"] = os.environ["LOCAL_WORLD_SIZE"] = str(trial.world_size)
    its_place = replace(place, world_size=trial.world_size)
    ranks = Ranks(its_place, choose_device(config.train.device.name, place), TIMEOUT)
    outcome = _run(trial, config, steps, ranks, folder, look)
    # What DDP holds of the group must go before the group: it would end it with Python's lock
    # held, for which a thread of the group may be waiting. Loading workers end here, too.
    gc.collect()
    outcomes = ranks.gather(outcome)
    ranks.leave()
    return outcomes


def _run(
    trial: Trial,
    config: Config,
    steps: int,
    ranks: Ranks,
    folder: Path,
    look: Callable[[Trainer], None] | None,
) -> Outcome:
    config = deepcopy(config)
    config.data.workers = trial.workers
    trainer = build_trainer(config, ranks, RunDirectory(folder / "run"), Phases())
    last = min(steps, trainer.total_steps)
    outcome = Outcome(last // 2 if trial.resumed else 0, last, _labels(trainer), _observe(trainer))
    outcome.synchronised = [
        f"module/{name}"
        for name, module in trainer.task.named_modules()
        if isinstance(module, SyncBatchNorm)
    ]
    recorder = Recorder(trainer.task)
    outcome.trace = recorder.trace
    _take_steps(trial, trainer, recorder, outcome, folder)
    _evaluate(trainer, recorder, outcome)
    outcome.after = _observe(trainer)
    if look is not None:
        look(trainer)
    return outcome


def _take_steps(
    trial: Trial, trainer: Trainer, recorder: Recorder, outcome: Outcome, folder: Path
) -> None:
    ranks, step = trainer.ranks, trainer.step
    batches = trainer.fetcher.steps(outcome.first, outcome.last, ranks.rank, ranks.world_size)
    traced = recorder.training(step, batches)
    gradients = Gradients(trial.is_reference, trial.reloads, recorder, step, folder)
    trainer.setbacks.restore(None, trainer.state(outcome.first))
    for number in range(outcome.first, outcome.last):
        if number and (trial.reloads or number == outcome.first):
            _restore(trainer, number)
        recorder.rest()
        gradients.expect(number)
        step(number, traced)
        trainer.done = number + 1
        trainer.heed(wait=True)
        outcome.states[number + 1] = _state(trainer)
        if trial.is_reference:
            trainer.checkpoints.save(trainer.state(number + 1, step.numbers()), durable=True)
            trainer.checkpoints.settle()
    outcome.gradients, outcome.distances = gradients.digests, gradients.distances


def _restore(trainer: Trainer, number: int) -> None:
    saved = trainer.checkpoints.read(number)
    saved.put_back(trainer.task, trainer.step.optimizer)
    trainer.step.load_numbers(saved.manifest["step_numbers"], saved.step)


def _evaluate(trainer: Trainer, recorder: Recorder, outcome: Outcome) -> None:
    """Evaluate the beginning of each split with the reference's last weights."""
    _restore(trainer, outcome.last)
    ranks = trainer.ranks
    for split, evaluation in trainer.evaluations.items():
        source = evaluation.fetcher.source
        few = min(source.plan.samples, EVALUATED * source.plan.micro_batch_size)
        source.plan = replace(source.plan, samples=few, global_batch_size=few)
        mine = source.plan.micro_batches(0, ranks.rank, ranks.world_size)
        recorder.rest()
        evaluation.batches = recorder.evaluating(split, mine, evaluation.fetcher.fetch(mine))
        outcome.metrics[split] = evaluation.run()
    recorder.rest()


def _state(trainer: Trainer) -> dict[str, str]:
    """Digests of all that an update may change; buffers that no checkpoint holds as well."""
    task = trainer.task
    tensors, numbers = optimizer_tensors(task, trainer.step.optimizer)
    return {
        **{f"parameter/{name}": digest(tensor) for name, tensor in task.named_parameters()},
        **{f"buffer/{name}": digest(tensor) for name, tensor in task.named_buffers()},
        **{f"optimizer/{name}": digest(value) for name, value in {**tensors, **numbers}.items()},
    }


def _objects(trainer: Trainer) -> dict[str, tuple[object, str]]:
    """The user's objects, with how to call them, by what the checks know them by."""
    objects: dict[str, tuple[object, str]] = {
        f"module/{name}": (module, f"{name or 'task'} ({type(module).__name__})")
        for name, module in trainer.task.named_modules()
    }
    for fetcher in (trainer.fetcher, *(e.fetcher for e in trainer.evaluations.values())):
        source = fetcher.source
        objects[f"data/{source.name}"] = source.dataset, source.label
    optimizer = trainer.step.optimizer
    objects["optim/"] = optimizer, f"optim ({type(optimizer).__name__})"
    return objects


def _labels(trainer: Trainer) -> dict[str, str]:
    return {key: label for key, (_, label) in _objects(trainer).items()}


def _observe(trainer: Trainer) -> dict[str, Attributes]:
    return {key: observe(thing) for key, (thing, _) in _objects(trainer).items()}
