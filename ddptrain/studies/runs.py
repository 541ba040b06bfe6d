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
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace

from torch._C._distributed_c10d import PrefixStore

from ddptrain import pulse
from ddptrain.errors import NonFiniteError, Stopped
from ddptrain.launch.agreement import agree_on_code, agree_on_config, agree_on_directory
from ddptrain.launch.binding import bind_cpus
from ddptrain.launch.patience import meeting_seconds
from ddptrain.launch.worker import Attempt
from ddptrain.observe.logs import open_log
from ddptrain.observe.phases import Phases
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.resilience import flight
from ddptrain.resilience.failure import leave_now
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
    if device.type == "cuda" and first.resilience.hang_seconds is not None:
        flight.arm()
    met = Ranks(place, device, None)
    met.meet(meeting_seconds(first))
    agree_on_code(first, met)
    if first.launch.check:
        from ddptrain.launch.doctor import refuse_unfit

        refuse_unfit(met, first)
    if first.launch.bind_cpus:
        bind_cpus(place, device)
    make_deterministic(device)
    for number, each in enumerate(planned, start=1):
        made = study.made(each)
        study.check(made)
        told = f"[{number}/{len(planned)}] {each.name:<22}"
        if made.is_over:
            if place.rank == 0:
                say(f"{told} {made.ended} before")
            continue
        began = time.monotonic()
        _make(study, made, met, stop_request)
        if place.rank == 0:
            now = study.made(each)
            why = f": {now.why}" if now.why else ""
            say(f"{told} {now.ended} in {time.monotonic() - began:.1f} s{why[:160]}")


def _make(study: Study, made: Made, met: Ranks, stop_request: StopRequest) -> None:
    """Make a run on as many of the ranks as its steps have work for; the others wait.

    A run whose loss is no number any more is one that the study tells of, and all its ranks know of
    it. Any other error ends the study, told by the rank that met it.
    """
    name, size = made.planned.name, min(met.world_size, made.micro_batches)
    if met.rank >= size:
        _await(met, f"over/{name}", stop_request)
        return
    attempt = _attempt(made, met, size, stop_request)
    with _quiet():
        try:
            pulse.enter(pulse.START_UP, step=-1)  # and not where the run before has ended
            attempt.watch(attempt.ranks)
            _train(attempt, made)
        except (NonFiniteError, Stopped) as error:
            attempt.conclude(error, "", is_cause=True)
            if isinstance(error, Stopped):
                raise
        except Exception as error:
            code = attempt.fail(error, on_screen=False)  # but by who has started it
            if met.world_size > 1:
                leave_now(code)
            raise
        finally:
            stop_request.rescue = None
            # DDP's hold on the process group must go before the group does: see run_rank.
            attempt.trainer = None
            gc.collect()
            gc.freeze()  # what is left was imported: the next collection need not look at it
            attempt.ranks.leave()
            if attempt.watchdog is not None:
                attempt.watchdog.has_ended()
    if met.store is not None and met.rank == 0:
        met.store.set(f"over/{name}", "1")


def _attempt(made: Made, met: Ranks, size: int, stop_request: StopRequest) -> Attempt:
    """The start of a run on the first ``size`` ranks, whose messages are its own."""
    name = made.planned.name
    ranks = Ranks(Place(met.rank, size, met.place.local_rank), met.device, None)
    if size > 1:
        assert met.store is not None
        ranks.store = PrefixStore(f"run/{name}", met.store)
        ranks.attempt = replace(met.attempt, name=f"{met.attempt.name}-{name}")
    attempt = Attempt(made.config, ranks.place, stop_request)
    attempt.ranks = ranks
    return attempt


def _train(attempt: Attempt, made: Made) -> None:
    """What `run_rank` does of it, in ranks that have met."""
    config, ranks = attempt.config, attempt.ranks
    agree_on_config(config, ranks)
    attempt.run, attempt.claim = agree_on_directory(config, ranks, made.arguments)
    open_log(attempt.run.logs, ranks.place)
    attempt.train(Phases())


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
