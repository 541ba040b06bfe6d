"""One rank of a study: makes the runs one after another, in a process that was started once.

Starting a process costs seconds, most of a small run's time. Each run has a process group, a
directory and a claim of its own, and what it draws is keyed: it is the run that its command makes.
"""

from __future__ import annotations

import gc
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress

from torch._C._distributed_c10d import PrefixStore

from ddptrain.errors import NonFiniteError, Stopped, TrainingError
from ddptrain.launch.agreement import agree_on_code, agree_on_config, agree_on_directory
from ddptrain.launch.ending import result_of, where
from ddptrain.launch.patience import meeting_seconds
from ddptrain.launch.worker import TIMEOUT, Attempt
from ddptrain.observe.logs import open_log
from ddptrain.observe.phases import Phases
from ddptrain.observe.result import write_result
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.resilience.crashes import Crashes
from ddptrain.resilience.failure import summary
from ddptrain.resilience.preemption import StopRequest
from ddptrain.screen import say
from ddptrain.studies.outcome import Made
from ddptrain.studies.study import Study

POLL_SECONDS = 0.05


def make_runs(study: Study, place: Place, stop_request: StopRequest) -> None:
    """Be one rank: make the runs that are not over yet. Raises ``Stopped`` if it was asked to."""
    planned = list(study.plan.runs())
    first = study.config(planned[0])
    device = choose_device(first.train.device.name, place)
    choose_interface(first.launch.interface)
    stop_request.grace_seconds = first.resilience.grace_seconds
    met = Ranks(place, device, None)
    met.meet(meeting_seconds(first))
    agree_on_code(first, met)
    make_deterministic(device)
    for number, each in enumerate(planned, start=1):
        made = study.made(each)
        study.check(made)
        told = f"[{number}/{len(planned)}] {each.name:<22}"
        if made.is_over:
            if place.rank == 0:
                say(f"{told} {made.status} before")
            continue
        began = time.monotonic()
        _make(study, made, met, stop_request)
        if place.rank == 0:
            now = study.made(each)
            why = f": {now.why}" if now.why else ""
            say(f"{told} {now.status} in {time.monotonic() - began:.1f} s{why[:160]}")


def _make(study: Study, made: Made, met: Ranks, stop_request: StopRequest) -> None:
    """Make a run on as many of the ranks as its steps have work for; the others wait."""
    micro_batches = made.config.train.micro_batches()
    size = min(met.world_size, micro_batches or met.world_size)
    name = made.planned.name
    if met.rank >= size:
        _await(met, f"over/{name}", stop_request)
        return
    ranks = Ranks(Place(met.rank, size, met.place.local_rank), met.device, None)
    if size > 1:
        assert met.store is not None
        ranks.store, ranks.attempt = PrefixStore(f"run/{name}", met.store), met.attempt
    attempt = Attempt(made.config, ranks.place, stop_request)
    attempt.ranks = ranks
    with _quiet():
        try:
            ranks.join(TIMEOUT)
            _train(attempt, made)
        except Exception as error:
            if not _face(attempt, error) or isinstance(error, Stopped):
                raise
        finally:
            stop_request.rescue = None
            # DDP's hold on the process group must go before the group does: see run_rank.
            attempt.trainer = None
            gc.collect()
            gc.freeze()  # what is left was imported: the next collection need not look at it
            ranks.leave()
    if met.store is not None and met.rank == 0:
        met.store.set(f"over/{name}", "1")


def _train(attempt: Attempt, made: Made) -> None:
    """What `run_rank` does of it, in ranks that have met."""
    config, ranks = attempt.config, attempt.ranks
    agree_on_config(config, ranks)
    attempt.run, attempt.claim = agree_on_directory(config, ranks, made.arguments)
    open_log(attempt.run.logs, ranks.place)
    attempt.train(Phases())


def _face(attempt: Attempt, error: Exception) -> bool:
    """Leave in the run's directory how it failed; return whether the study can go on.

    It can after what the framework itself ends a run for, which all ranks meet alike. Of an error
    of one rank alone the others hear that it has left, and end.
    """
    run, claim, trainer = attempt.run, attempt.claim, attempt.trainer
    is_stopped = isinstance(error, Stopped)
    if trainer is not None:
        with suppress(Exception):  # the error to tell is the first one
            trainer.observer.close()
    if run is None or claim is None:
        return attempt.place.world_size == 1 and isinstance(error, TrainingError)
    context = "" if trainer is None else where(trainer, error)
    if attempt.place.rank == 0:
        status, seconds = "stopped" if is_stopped else "failed", time.monotonic() - attempt.began
        if trainer is not None:
            write_result(run, result_of(trainer, status, seconds))
        if not is_stopped:
            step, is_final = trainer.done if trainer else 0, isinstance(error, NonFiniteError)
            finished = step - trainer.started_at if trainer else 0
            told = f"{context}{summary(error)}"
            Crashes(run.crashes).add(claim.token, 0, step, finished, True, told, is_final)
    return isinstance(error, TrainingError)


def _await(met: Ranks, key: str, stop_request: StopRequest) -> None:
    """Wait until ranks that have work are done with a run."""
    assert met.store is not None
    while not met.store.check([key]):
        if stop_request.came:
            raise Stopped(f"{stop_request.signal}: stopped while others made a run")
        time.sleep(POLL_SECONDS)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a run tells to its own logs, and take those back afterwards."""
    loggers = [logging.getLogger(name) for name in ("ddptrain", "py.warnings")]
    before = [list(each.handlers) for each in loggers]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            yield
        finally:
            for each, handlers in zip(loggers, before, strict=True):
                for handler in each.handlers:
                    handler.flush()
                each.handlers = handlers
