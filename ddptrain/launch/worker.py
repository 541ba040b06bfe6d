"""One rank from start to end: joins the others, agrees on the run's directory, trains, reports."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import logging
import os
import time
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial

from ddptrain import pulse
from ddptrain.build import build_trainer
from ddptrain.claim import Claim
from ddptrain.config import Config, Reduction
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    CheckpointError,
    DivergenceError,
    NonFiniteError,
    Refused,
    Stopped,
    Superseded,
)
from ddptrain.launch.agreement import (
    agree_on_code,
    agree_on_config,
    agree_on_directory,
    tell_of_beginning,
)
from ddptrain.launch.binding import bind_cpus
from ddptrain.launch.ending import example_of, result_of, where
from ddptrain.launch.patience import meeting_seconds
from ddptrain.loop import Trainer
from ddptrain.observe.logs import open_log
from ddptrain.observe.phases import Phases
from ddptrain.observe.result import summarise, write_result
from ddptrain.parallel.exact import make_deterministic
from ddptrain.parallel.ranks import Ranks, choose_device
from ddptrain.place import Place, choose_interface
from ddptrain.resilience import flight
from ddptrain.resilience.crashes import Crashes
from ddptrain.resilience.failure import (
    exit_with,
    ignore_children,
    is_of_peer,
    leave_now,
    note,
    summary,
    tell_agent,
)
from ddptrain.resilience.preemption import StopRequest
from ddptrain.resilience.verdict import PATIENCE
from ddptrain.resilience.watchdog import Watchdog
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say

logger = logging.getLogger(__name__)
TIMEOUT, NEVER = timedelta(minutes=30), timedelta(days=7)
NOTHING_TO_RESCUE = (
    NonFiniteError, DivergenceError, Stopped, Refused, CheckpointError, Superseded
)  # fmt: skip
"""Errors that come with a checkpoint, or without a state that could be trusted."""
OF_ALL_RANKS = (NonFiniteError, DivergenceError, Stopped)
"""Errors that every rank raises by itself, rank 0 once it has saved what there is to save."""
COPY_SECONDS = 5.0
"""So long it also copies what it has saved in memory to the store."""
LAST_RESORT_SECONDS = 5.0
RESCUE_SECONDS = 25.0
"""torchrun's agent gives survivors 30 s, whatever it is told."""


def run_rank(
    config: Config,
    place: Place,
    phases: Phases,
    *,
    overrides: list[str],
    stop_request: StopRequest,
    errors_on_screen: bool = True,
) -> int:
    """Train as the rank at ``place``; return the process's exit code, its error reported."""
    phases.mark("imports")
    stop_request.grace_seconds = config.resilience.grace_seconds
    attempt = Attempt(config, place, stop_request)
    try:
        ranks = attempt.join(overrides)
        phases.mark("joining")
        if config.parallel.reduction is Reduction.exact:
            make_deterministic(ranks.device)
        attempt.train(phases)
        # DDP's hold on the process group must go before the group does: the group would end it
        # with Python's lock held, for which one of its threads may be waiting.
        attempt.trainer = None
        gc.collect()
        ranks.leave()
        if attempt.watchdog is not None and not attempt.watchdog.has_ended():
            leave_now(EXIT_COMPLETED)
    except BaseException as error:
        code = attempt.fail(error, errors_on_screen)
        if place.world_size > 1:
            leave_now(code)
        return code
    return EXIT_COMPLETED


@dataclass
class Attempt:
    """One start of a run on one rank, and what is done about its end."""

    config: Config
    place: Place
    stop_request: StopRequest
    began: float = field(default_factory=time.monotonic)
    run: RunDirectory | None = None
    claim: Claim | None = None
    watchdog: Watchdog | None = None
    trainer: Trainer | None = None
    has_told: bool = False

    def join(self, overrides: list[str]) -> Ranks:
        """Meet the other ranks, agree on the run and its directory, and watch over it."""
        config, place = self.config, self.place
        device = choose_device(config.train.device.name, place)
        choose_interface(config.launch.interface)
        hang_seconds = config.resilience.hang_seconds
        if device.type == "cuda" and hang_seconds is not None:
            flight.arm()
        ranks = Ranks(place, device, None)
        ranks.meet(meeting_seconds(config))
        agree_on_code(config, ranks)
        agree_on_config(config, ranks)
        if config.launch.check:
            from ddptrain.launch.doctor import refuse_unfit

            refuse_unfit(ranks, config)
        self.watch(ranks)
        self.run, self.claim = agree_on_directory(config, ranks, overrides)
        open_log(self.run.logs, place)
        if config.launch.bind_cpus:
            bind_cpus(place, device)
        Crashes(self.run.crashes).refuse_loop()
        self.ranks = ranks
        return ranks

    def watch(self, ranks: Ranks) -> None:
        """Form the process group of ``ranks``, which have met; from here on none hangs unseen."""
        hang_seconds = self.config.resilience.hang_seconds
        if hang_seconds is not None:
            processes = ranks.attempt.processes
            self.watchdog = Watchdog(self.place, ranks.board(), processes, hang_seconds, self.leave)
            self.watchdog.start()
        ranks.join(_timeout(hang_seconds))

    def train(self, phases: Phases) -> None:
        """Build the trainer, and train to the end."""
        assert self.run is not None
        trainer = build_trainer(
            self.config, self.ranks, self.run, phases, self.claim, self.stop_request
        )
        self.trainer = trainer
        trainer.begun = partial(tell_of_beginning, self.ranks)
        self.stop_request.begin(self.rescue)
        checkpoints = trainer.checkpoints
        if checkpoints.keeps_memory:
            checkpoints.memory.sign(self.run.path, self.run.known_identity())
        phases.mark("building")
        trainer.train()
        if self.ranks.is_first:
            result = self.run.outcome()
            if trainer.started_at < trainer.total_steps or result.get("status") != "completed":
                result = result_of(trainer, "completed", time.monotonic() - self.began)
                write_result(self.run, result)
            say(summarise(self.run, result, example_of(trainer.task)))
        self.ranks.barrier()
        self.stop_request.rescue = None
        if checkpoints.keeps_memory:
            checkpoints.memory.forget()
        if self.watchdog is not None:
            self.watchdog.end()

    def rescue(self, until: float, copy_until: float) -> str | None:
        """Save the last finished step; to the store if nobody else of this attempt can."""
        if self.trainer is None or self.claim is None:
            return None
        place = self.trainer.rescue(until, copy_until, self.claim.holds)
        if place is not None:
            logger.info("the last finished step is saved in %s", place)
        return place

    def rescue_soon(self) -> None:
        """Save in time for the next attempt, which waits for this rank to leave."""
        now = time.monotonic()
        self.rescue(now + RESCUE_SECONDS, now + COPY_SECONDS)

    def leave(self, why: str, speaks: bool) -> None:
        """End this rank from the side, its main thread being stuck; the last step is saved.

        What is written to the run's disk comes last, for that may be what hangs.
        """
        line = f"{self.place.name}: {why}"
        if not self.has_told:
            tell_agent(line, may_pass=True)
        if speaks:
            with contextlib.suppress(OSError):
                os.write(2, f"{line}\n".encode())
        with contextlib.suppress(Exception):
            self.rescue_soon()
        faulthandler.dump_traceback_later(LAST_RESORT_SECONDS, exit=True)
        logger.info("%s", why)
        with contextlib.suppress(Exception):
            self.note(why, is_cause=False)
        leave_now(EXIT_FAILED)

    def fail(self, error: BaseException, on_screen: bool) -> int:
        """Report, and save what can be saved; return the exit code."""
        faulthandler.dump_traceback_later(RESCUE_SECONDS + LAST_RESORT_SECONDS, exit=True)
        ignore_children()
        note(error)
        context = "" if self.trainer is None else where(self.trainer, error)
        told = error, self.place, context, on_screen, self.stop_request.heard
        waits = is_of_peer(error)  # for the rank with the cause to speak first
        code = EXIT_FAILED if waits else exit_with(*told)
        self.has_told = not waits
        self.conclude(error, context, is_cause=not waits)
        faulthandler.cancel_dump_traceback_later()
        return exit_with(*told) if waits else code

    def conclude(self, error: BaseException, context: str, is_cause: bool) -> None:
        """Watch no more, save what can be saved, and leave on record how this rank ended."""
        if self.watchdog is not None:
            self.watchdog.end(failed=not isinstance(error, OF_ALL_RANKS))
        if self.trainer is not None:
            if not isinstance(error, NOTHING_TO_RESCUE):
                with contextlib.suppress(Exception):  # the error to show is the first one
                    self.rescue_soon()
            if self.may_write():
                self.trainer.observer.close()
            if not isinstance(error, Stopped):
                with contextlib.suppress(Exception):
                    is_final = isinstance(error, NonFiniteError | Superseded)
                    self.note(f"{context}{summary(error)}", is_cause, is_final)
            if self.place.rank == 0 and self.run is not None:
                status = "stopped" if isinstance(error, Stopped) else "failed"
                with contextlib.suppress(Exception):
                    if self.may_write():
                        seconds = time.monotonic() - self.began
                        write_result(self.run, result_of(self.trainer, status, seconds))

    def may_write(self) -> bool:
        """Whether no other start has taken over, for all that can be known."""
        try:
            if self.claim is not None:
                self.claim.check()
        except Superseded:
            return False
        return True

    def note(self, why: str, is_cause: bool, is_final: bool = False) -> None:
        """Put on record in which step this rank failed."""
        if self.run is None or self.claim is None or self.trainer is None:
            return
        self.claim.check()
        done = self.trainer.done
        if not is_cause and pulse.now.step < done:
            return  # another rank has gone between two steps, or while this start began
        finished = done - self.trainer.started_at
        rank = self.place.rank
        crashes = Crashes(self.run.crashes)
        crashes.add(self.claim.token, rank, done, finished, is_cause, why, is_final)


def _timeout(hang_seconds: float | None) -> timedelta:
    """Of a collective: longer than the watchdog's longest patience, which says more."""
    if hang_seconds is None:
        return NEVER
    return max(TIMEOUT, timedelta(seconds=PATIENCE * hang_seconds + 60))
