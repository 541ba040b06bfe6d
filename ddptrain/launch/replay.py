"""`ddptrain replay`: takes a step of a run again, names culprits, and keeps the state before it.

A run is a pure function of its config, so all that it needs is a checkpoint from before the step.
"""

from __future__ import annotations

import gc
import logging
import math
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree

from ddptrain.build import build_trainer
from ddptrain.checkpoint.checkpoints import Checkpoints
from ddptrain.checkpoint.saved import MODEL, Saved
from ddptrain.claim import LAUNCH_LOCK, launching
from ddptrain.config import Config, Reduction, Resume
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    CheckpointError,
    NonFiniteError,
    Refused,
    TrainingError,
)
from ddptrain.launch.past import DIFFERENT, Past
from ddptrain.launch.worker import TIMEOUT
from ddptrain.loop import Trainer
from ddptrain.observe.difference import since
from ddptrain.observe.phases import Phases
from ddptrain.optim.guard import FINE, Verdict
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.parts import build_checkpoints
from ddptrain.place import Place
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.screen import short
from ddptrain.setbacks import FAULTS, describe
from ddptrain.state import State, load_model, on_host

logger = logging.getLogger(__name__)


class Bundle(RunDirectory):
    """What a replay leaves: a run's directory, nothing of which lies elsewhere at any time."""

    def memories(self) -> list[Path]:
        return [self.path / ".memory" / "node"]

    def tidy(self) -> None:
        """Take away what a replay no longer needs; all of it, if nothing could be kept."""
        rmtree(self.path / ".memory", ignore_errors=True)
        with suppress(OSError):
            self.path.rmdir()


@dataclass(frozen=True)
class Found:
    """What a replay has found of its step."""

    verdict: Verdict
    report: str
    before: State

    @property
    def fault(self) -> str | None:
        return FAULTS.get(self.verdict.kind)

    @property
    def loss(self) -> float | None:
        return self.verdict.loss if math.isfinite(self.verdict.loss) else None


def replay(run: RunDirectory, config: Config, step: int) -> int:
    """Replay ``step`` (from 0) of a run, on several ranks under torchrun.

    Prints what is wrong with it and whether the run noted the same; returns 0 if it did, else 1.
    The state before the step is left as a checkpoint in ``replays`` of the run's directory.
    """
    checkpoints = build_checkpoints(config, run)
    past = Past.read(run, step, checkpoints.store.steps())
    place = Place.from_environment()
    ranks = Ranks(place, choose_device(config.train.device.name, place), TIMEOUT)
    is_exact = config.parallel.reduction is Reduction.exact
    if is_exact:
        make_deterministic(ranks.device)
    saved = ranks.from_first(_nearest(checkpoints, step) if ranks.is_first else None)
    bundle = Bundle((run.path / "replays" / f"step-{step:08d}").absolute())
    try:
        trainer = _build(config, ranks, bundle)
        if step >= trainer.total_steps:
            raise Refused(f"step {step}: {run.path} has steps 0 to {trainer.total_steps - 1}")
        trainer.setbacks.explainer.world_size = past.ranks_at(step)
        if ranks.is_first:
            _introduce(past, saved, trainer)
        found = _replay(trainer, saved, step)
        same, told = past.compare(found.fault, found.loss, is_exact)
        if ranks.is_first:
            print(found.report)
            print(told)
            print(_keep(bundle, run, trainer, found.before), flush=True)
        ranks.barrier()  # the first that leaves with an error ends the others under torchrun
    finally:
        if ranks.is_first:
            bundle.tidy()
    del trainer
    gc.collect()  # what holds the process group must go before the group
    ranks.leave()
    return EXIT_COMPLETED if same else EXIT_FAILED


def _nearest(checkpoints: Checkpoints, step: int) -> Saved | None:
    """The newest whole checkpoint that is not behind ``step``; None if there is none.

    The run may be saving, and deleting, at this moment: so one rank reads it for all.
    """
    for earlier in [s for s in checkpoints.store.steps() if s <= step][::-1]:
        try:
            return checkpoints.read(earlier)
        except CheckpointError as error:
            logger.warning("passing over a checkpoint: %s", error)
    return None


def _build(config: Config, ranks: Ranks, bundle: Bundle) -> Trainer:
    its_own = deepcopy(config)
    its_own.run.dir, its_own.run.resume = str(bundle.path), Resume.auto
    its_own.checkpoint.dir = None
    trainer = build_trainer(its_own, ranks, bundle, Phases())
    trainer.observer.speaks = False  # the run has noted all this
    return trainer


def _introduce(past: Past, saved: Saved | None, trainer: Trainer) -> None:
    """Say what is replayed from where, and why it might not come out as it was."""
    start = f"its checkpoint of step {saved.step}" if saved else "the beginning"
    told = f"replaying step {past.step} of {past.run.path}, which had {past.ranks}, from {start}"
    print(told, flush=True)
    data = {trainer.fetcher.source.name: trainer.fetcher.digest()}
    reduction, size = trainer.config.parallel.reduction, trainer.ranks.world_size
    warnings = past.warn(reduction, saved.step if saved else 0, size)
    for line in (*since(past.run, data), *warnings):
        print(f"  {line}", flush=True)


def _replay(trainer: Trainer, saved: Saved | None, step: int) -> Found:
    """Go to ``step``, take it, and explain it with the weights before it."""
    _go_to(trainer, saved, step)
    state = trainer.state(step, trainer.step.numbers())
    before = on_host(trainer.setbacks.with_anchor(state))
    scale = trainer.step.loss_scale
    scale_before = 0.0 if scale is None else scale.value.item()
    (verdict,) = _take(trainer, step)
    load_model(trainer.task, before.files[MODEL])
    report = trainer.setbacks.explain(verdict)
    if scale is not None and scale.value.item() < scale_before:
        report += f"; a gradient overflowed at a loss scale of {scale_before:g}: it was not taken"
    return Found(verdict, f"{'nothing at fault: ' * (verdict.kind == FINE)}{report}", before)


def _go_to(trainer: Trainer, saved: Saved | None, step: int) -> None:
    """Take the steps before ``step``, with what the run did about faults among them."""
    if saved is not None:
        saved.put_back(trainer.task, trainer.step.optimizer)
        trainer.step.load_numbers(saved.manifest["step_numbers"], saved.step)
        trainer.done = saved.step
    trainer.setbacks.restore(saved, trainer.state(trainer.done))
    trainer.total_steps = step + 1  # of what is fetched: the schedule is the run's
    trainer.fetch()
    for earlier in range(trainer.done, step):
        for verdict in _take(trainer, earlier):
            if verdict.kind:
                _face(trainer, verdict)
        if trainer.setbacks.is_due(earlier + 1):
            trainer.setbacks.keep(trainer.state(earlier + 1))


def _face(trainer: Trainer, verdict: Verdict) -> None:
    """Do what the run did about a step at fault. Raises ``TrainingError`` if that ends it."""
    try:
        trainer.setbacks.face(verdict)
    except NonFiniteError:
        told = f"step {verdict.step}: {describe(verdict)}, and the run went on"
        raise TrainingError(f"{told}: {DIFFERENT}") from None


def _take(trainer: Trainer, step: int) -> list[Verdict]:
    trainer.step(step, trainer.batches)
    return trainer.step.heard(wants_stop=False, wait=True)


def _keep(bundle: Bundle, run: RunDirectory, trainer: Trainer, state: State) -> str:
    """Save the state before the step in place of what an earlier replay has left; say where."""
    try:
        bundle.path.mkdir(parents=True, exist_ok=True)
        with launching(bundle.path):
            for old in bundle.path.iterdir():
                if old.is_dir():
                    rmtree(old)
                elif old.name != LAUNCH_LOCK:
                    old.unlink()
            overrides = run.provenance().get("overrides", [])
            open_directory(trainer.config, overrides, rerun_of=str(run.path.absolute()))
            trainer.checkpoints.save(state, durable=True)
            trainer.checkpoints.settle()
    except (OSError, TrainingError) as error:
        return f"the state before it could not be kept: {error}"
    return f"the state before it: {short(bundle.path)}"
