"""Makes snapshots durable beside training: checksums, the copy to the store, what goes for it."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddptrain import pulse
from ddptrain.checkpoint.memory import Memory, Slot
from ddptrain.checkpoint.store import Store
from ddptrain.errors import CheckpointError, Superseded

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between tries to write what could not be written, doubled each time."""
PATIENCE = 10.0
"""Seconds that the end of a run waits for a store that cannot be written to."""
LOUD_SECONDS = 600.0
"""A store that has failed for so long is told of again, and then after twice as long each time."""
NICENESS = 10
"""The thread gives way to the step, which needs the same cores."""

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A filled slot, what to write beside it, and whether it is to outlive the node."""

    slot: Slot
    manifest: dict[str, Any]
    durable: bool
    is_sealed: bool = False

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


class Writer:
    """A thread that does one job at a time, and tries again what failed.

    A store that cannot be written to never stops training: the newest checkpoint that is owed to
    it is kept in memory and tried again, and each cause is said once. ``settle`` is where a run
    that ends learns what is not durable.
    """

    def __init__(self, memory: Memory, store: Store, after: Callable[[int], None]) -> None:
        self.memory = memory
        self.store = store
        self.after = after
        self.changed = threading.Condition()
        self.next: Job | None = None
        self.working = False
        self.resting = False
        self.owed: Job | None = None
        self.pause = FIRST_PAUSE
        self.problem: Exception | None = None
        self.told: set[str] = set()
        self.failing_since: float | None = None
        self.patience = LOUD_SECONDS
        self.thread: threading.Thread | None = None

    def slot(self) -> Slot:
        """A slot that may be filled; waits for the job before the last, unless jobs fail now."""
        pulse.enter(pulse.SAVING)
        with self.changed:
            while self.next is not None or (free := self.memory.free()) is None:
                if self.next is not None and self.problem is not None:
                    self.next.slot.busy = False  # a store that fails holds up nobody
                    self.next = None
                else:
                    self.changed.wait()
            free.busy = True
            return free

    def submit(self, job: Job) -> None:
        """Hand over a filled slot. Raises what must end the run."""
        with self.changed:
            self._raise_if_superseded()
            self.next = job
            self.changed.notify_all()
        if self.thread is None:
            self.thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
            self.thread.start()

    def pending(self) -> Job | None:
        """The durable job that is not done yet, if there is one."""
        with self.changed:
            jobs = [job for job in (self.next, self.owed) if job is not None and job.durable]
            return jobs[0] if jobs else None

    def rest(self) -> Slot | None:
        """Begin no more jobs; return a slot that may be filled now, if there is one."""
        with self.changed:
            self.resting = True
            free = self.memory.free()
            if free is not None:
                free.busy = True
            return free

    def has_ended(self, until: float) -> bool:
        """Whether the job at work has ended before ``until`` (monotonic)."""
        with self.changed:
            while self.working and (left := until - time.monotonic()) > 0:
                self.changed.wait(left)
            return not self.working

    def settle(self, seconds: float = PATIENCE) -> None:
        """Wait until all is durable. Raises ``CheckpointError`` if it is not in time.

        A store that works takes the time it needs; ``seconds`` bound how long one that fails is
        tried again.
        """
        pulse.enter(pulse.SAVING)
        with self.changed:
            until = time.monotonic() + seconds
            while self.next is not None or self.working or self.owed is not None:
                failing = self.problem is not None and not self.working
                if failing and (left := until - time.monotonic()) <= 0:
                    break
                self.pause = min(self.pause, 1.0)
                self.changed.notify_all()
                self.changed.wait(left if failing else None)
            self._raise_if_superseded()
            if self.owed is not None:
                raise CheckpointError(
                    f"the checkpoint of step {self.owed.step} is not in "
                    f"{self.store.medium.where('')}: {self.problem}; it is in memory at "
                    f"{self.owed.slot.folder}: mend the cause and start the run again on this "
                    "machine, which goes on from there"
                )

    def _raise_if_superseded(self) -> None:
        if isinstance(self.problem, Superseded):
            raise self.problem

    def _work(self) -> None:
        if hasattr(os, "setpriority"):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
        while True:
            job = self._take()
            try:
                self._do(job)
            except Superseded as error:
                self.problem = error
                self.owed = None
            except Exception as error:
                self._tell(job, error)
            finally:
                with self.changed:
                    self.working = False
                    job.slot.busy = self.owed is job
                    self.changed.notify_all()

    def _take(self) -> Job:
        """The next job, or after a pause the one that failed."""
        with self.changed:
            while self.next is None or self.resting:
                pause = self.pause if self.owed is not None else None
                if not self.changed.wait(pause) and self.owed is not None and not self.resting:
                    break
            job, self.next = self.next, None
            if job is None:
                assert self.owed is not None
                job = self.owed
                self.pause = min(2 * self.pause, LONGEST_PAUSE)
            self.working = True
            self.changed.notify_all()
            return job

    def _do(self, job: Job) -> None:
        if job.durable and job is not self.owed:
            with self.changed:
                if self.owed is not None:
                    self.owed.slot.busy = False
                self.owed = job
        if not job.is_sealed:
            with self.memory.alone(time.monotonic() + PATIENCE):
                job.manifest = self.memory.seal(job.slot, job.manifest)
                job.is_sealed = True
                self.memory.prune()
        if not job.durable:
            return
        self.store.write(job.step, job.slot.paths(), job.manifest)
        self.after(job.step)
        with self.changed:
            self.owed = None
            self.pause = FIRST_PAUSE
            self.failing_since, self.patience = None, LOUD_SECONDS
            if self.problem is not None:
                logger.warning("checkpoints can be written again: step %s is safe", job.step)
            self.problem = None

    def _tell(self, job: Job, error: Exception) -> None:
        self.problem = error
        cause = f"{type(error).__name__} {getattr(error, 'errno', '')}"
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        if now - self.failing_since > self.patience:
            self.patience *= 2
            logger.warning(
                "nothing has become durable for %.0f min: if this node is lost now, what was done "
                "since is lost; the checkpoint of step %s is in memory only: %s",
                (now - self.failing_since) / 60,
                job.step,
                error,
            )
        if cause not in self.told:
            self.told.add(cause)
            logger.warning(
                "the checkpoint of step %s could not be written: %s; training goes on, the one "
                "before stands, and it is tried again",
                job.step,
                error,
            )
