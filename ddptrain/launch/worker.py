"""One rank from start to end: joins the others, agrees on the run's directory, trains, reports."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from ddptrain.build import build_trainer
from ddptrain.compose import flatten, to_plain
from ddptrain.config import Config, Reduction, Resume
from ddptrain.errors import EXIT_COMPLETED, DivergenceError, NonFiniteError
from ddptrain.files import lock
from ddptrain.loop import Trainer
from ddptrain.observe.console import say
from ddptrain.observe.logs import open_log
from ddptrain.observe.phases import Phases
from ddptrain.observe.result import summarise, write_result
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place
from ddptrain.resilience.failure import exit_with, leave_now
from ddptrain.run_directory import RunDirectory, open_directory
from ddptrain.state import fingerprint
from ddptrain.tasks.task import Task

logger = logging.getLogger(__name__)
TIMEOUT = timedelta(minutes=30)
RUN_KEY = "ddptrain/run.dir"


def run_rank(
    config: Config,
    place: Place,
    phases: Phases,
    *,
    overrides: list[str],
    errors_on_screen: bool = True,
) -> int:
    """Train as the rank at ``place``; return the process's exit code, its error reported."""
    phases.mark("imports")
    began = time.monotonic()
    trainer: Trainer | None = None
    try:
        ranks = Ranks(place, choose_device(config.train.device.name, place), TIMEOUT)
        remedy = "start all ranks with the same arguments"
        ranks.agree(_common(config), "was started with another config than", remedy)
        run = _agree_on_directory(config, ranks, overrides)
        open_log(run.logs, place)
        phases.mark("joining")
        if config.parallel.reduction is Reduction.exact:
            make_deterministic(ranks.device)
        trainer = build_trainer(config, ranks, run, phases)
        phases.mark("building")
        _train(trainer, run, began)
        # DDP's hold on the process group must go before the group does: the group would end it
        # with Python's lock held, for which one of its threads may be waiting.
        trainer = None
        gc.collect()
        ranks.leave()
    except BaseException as error:
        context = ""
        if trainer is not None:
            trainer.observer.close()
            context = _where(trainer, error)
        if trainer is not None and place.rank == 0:
            with contextlib.suppress(Exception):  # the error to show is the first one
                write_result(run, _result(trainer, "failed", began))
        code = exit_with(error, place, context, errors_on_screen)
        if place.world_size > 1:
            leave_now(code)
        return code
    return EXIT_COMPLETED


def _train(trainer: Trainer, run: RunDirectory, began: float) -> None:
    trainer.train()
    if trainer.ranks.is_first:
        result = _result(trainer, "completed", began)
        write_result(run, result)
        say(summarise(run, result, _example(trainer.task)))
    trainer.ranks.barrier()


def _example(task: Task) -> str | None:
    """What the model does, to show; it is none of the run, so its errors are not the run's."""
    task.eval()
    try:
        return task.example()
    except Exception:
        logger.exception("%s.example() failed", type(task).__name__)
        return None


def _result(trainer: Trainer, status: str, began: float) -> dict[str, Any]:
    plan = trainer.fetcher.source.plan
    samples = plan.samples_before(trainer.done)
    return {
        "status": status,
        "step": trainer.done,
        "samples": samples,
        "epochs": samples / plan.samples,
        "metrics": trainer.metrics,
        "weights_sha256": fingerprint(trainer.task),
        "wall_seconds": time.monotonic() - began,
        "step_ms_median": trainer.clock.median_ms,
        "world_size": trainer.ranks.world_size,
        **trainer.observer.history.totals(),
    }


def _common(config: Config) -> dict[str, Any]:
    """What must be alike on all ranks: more than is computed, for logging is a collective too."""
    own = ("run.", "launch.", "data.workers")
    return {k: v for k, v in flatten(to_plain(config)).items() if not k.startswith(own)}


def _agree_on_directory(config: Config, ranks: Ranks, overrides: list[str]) -> RunDirectory:
    """Let rank 0 create or open the run's directory; after a restart it is the same one.

    The store of the agent outlives the ranks, so that a run without ``run.dir`` finds itself.
    """
    path: str | None = None
    if ranks.is_first:
        store = ranks.store
        if store is not None and store.check([RUN_KEY]):
            config.run.dir = store.get(RUN_KEY).decode()
            config.run.resume = Resume.auto
        run = open_directory(config, overrides)
        lock(run.path)
        path = str(run.path)
        if store is not None:
            store.set(RUN_KEY, path)
    return RunDirectory(Path(ranks.from_first(path)))


def _where(trainer: Trainer, error: BaseException) -> str:
    """The step, and where one was under way its samples on this rank."""
    current = trainer.step.current
    if isinstance(error, NonFiniteError | DivergenceError):
        return ""  # it says itself where it happened, which is not where it was noticed
    if current is None:
        return f"after step {trainer.done}: "
    samples = trainer.fetcher.source.plan.indices(current).tolist()
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return f"step {trainer.done}, samples {shown}: "
