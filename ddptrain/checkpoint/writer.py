"""Makes snapshots durable beside training: checksums in one thread, the copy in another."""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ddptrain import pulse
from ddptrain.checkpoint.memory import Memory, Slot
from ddptrain.checkpoint.store import Store
from ddptrain.errors import CheckpointError, Superseded

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 30.0
"""Seconds between tries to write what could not be written, doubled each time."""
POLL_SECONDS = 1.0
PATIENCE = 10.0
"""Seconds that the end of a run waits for a store that cannot be written to."""
SLOW_SECONDS = 60.0
"""So long a step waits at most for a checkpoint on its way to the store."""
LOUD_SECONDS = 600.0
"""A store that has failed for so long is told of again, and then after twice as long each time."""
HUNG_SECONDS = 1800.0
"""So long the end of a run waits for one that neither takes a checkpoint nor fails."""
NICENESS = 10
"""The threads give way to the step, which needs the same cores."""

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """A filled slot, what to write beside it, and whether it is to outlive the node."""

    slot: Slot
    manifest: dict[str, Any]
    durable: bool

    @property
    def step(self) -> int:
        return int(self.manifest["step"])


class Writer:
    """Two threads: one makes checkpoints of what was copied, the other takes them to the store.

    So a slow store holds up no snapshot, and one that cannot be written to never stops training:
    what is owed to it is kept in memory and tried again, and each cause is said once. ``settle``
    is where a run that ends learns what is not durable.
    """

    def __init__(self, memory: Memory, store: Store, after: Callable[[int], None]) -> None:
        self.memory = memory
        self.store = store
        self.after = after
        self.changed = threading.Condition()
        self.next: Job | None = None
        self.sealing: Job | None = None
        self.owed: deque[Job] = deque()
        self.storing: Job | None = None
        self.storing_since = 0.0
        self.resting = False
        self.pause = FIRST_PAUSE
        self.problem: Exception | None = None
        self.told: set[str] = set()
        self.failing_since: float | None = None
        self.patience = LOUD_SECONDS
        self.threads: list[threading.Thread] = []

    def slot(self, durable: bool) -> Slot:
        """A slot that may be filled; waits for the snapshot before the last.

        A ``durable`` one also for the checkpoint before the last to reach the store, if that is
        slow, for ``SLOW_SECONDS`` of its way; one that fails holds up nobody.
        """
        pulse.enter(pulse.SAVING)
        with self.changed:
            while True:
                too_many = durable and len(self.owed) > 1 and not self._is_behind()
                free = None if self.next is not None or too_many else self.memory.free()
                if free is not None:
                    free.busy = True
                    if durable and self.storing is not None and self._lasting() > SLOW_SECONDS:
                        self._tell_of_delay(self.storing)
                    return free
                self.changed.wait(POLL_SECONDS)

    def submit(self, job: Job) -> None:
        """Hand over a filled slot. Raises what must end the run."""
        with self.changed:
            self._raise_if_superseded()
            self.next = job
            self.changed.notify_all()
        if not self.threads:
            for work, name in ((self._seal, "snapshots"), (self._store, "checkpoints")):
                self.threads.append(threading.Thread(target=work, name=name, daemon=True))
                self.threads[-1].start()

    def pending(self) -> Job | None:
        """The newest durable job that is not done yet, if there is one."""
        with self.changed:
            jobs = [self.next, self.sealing, *reversed(self.owed)]
            return next((job for job in jobs if job is not None and job.durable), None)

    def rest(self) -> Slot | None:
        """Begin no more jobs; return a slot that may be filled now, if there is one."""
        with self.changed:
            self.resting = True
            free = self.memory.free()
            if free is not None:
                free.busy = True
            return free

    def has_ended(self, until: float) -> bool:
        """Whether nothing is on its way to the store, at latest at ``until`` (monotonic)."""
        with self.changed:
            while self.storing is not None and (left := until - time.monotonic()) > 0:
                self.changed.wait(left)
            return self.storing is None

    def settle(self, seconds: float = PATIENCE) -> None:
        """Wait until all is durable. Raises ``CheckpointError`` if it is not in time.

        A store that works takes the time it needs, up to ``HUNG_SECONDS``; ``seconds`` bound how
        long one that fails is tried again.
        """
        pulse.enter(pulse.SAVING)
        with self.changed:
            began = time.monotonic()
            while self.next is not None or self.sealing is not None or self.owed:
                limit = seconds if self.problem is not None else HUNG_SECONDS
                left = began + limit - time.monotonic()
                if left <= 0 and self.next is None and self.sealing is None:
                    break
                self.pause = min(self.pause, POLL_SECONDS)
                self.changed.notify_all()
                self.changed.wait(min(max(left, 0.1), POLL_SECONDS))
            self._raise_if_superseded()
            if self.owed:
                owed = self.owed[-1]
                why = self.problem or f"one is on its way there for {self._lasting():.0f} s"
                raise CheckpointError(
                    f"the checkpoint of step {owed.step} is not in "
                    f"{self.store.medium.where('')}: {why}; it is in memory at "
                    f"{owed.slot.folder}: mend the cause and start the run again on this "
                    "machine, which goes on from there"
                )

    def _lasting(self) -> float:
        """For how many seconds a checkpoint is on its way to the store; 0 if none is."""
        return 0.0 if self.storing is None else max(0.0, time.monotonic() - self.storing_since)

    def _is_behind(self) -> bool:
        """Whether the newest checkpoint is enough: the store fails, or takes too long."""
        return self.problem is not None or self._lasting() > SLOW_SECONDS

    def _raise_if_superseded(self) -> None:
        if isinstance(self.problem, Superseded):
            raise self.problem

    def _seal(self) -> None:
        """The thread that makes snapshots checkpoints."""
        give_way()
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.next is not None and not self.resting)
                job, self.next = self.next, None
                assert job is not None
                self.sealing = job
                self.changed.notify_all()
            try:
                self._seal_one(job)
            except Exception as error:
                self._say_once(f"the snapshot of step {job.step} is not whole", error)
            with self.changed:
                self.sealing = None
                if job.durable and "files" in job.manifest:
                    self._owe(job)
                else:
                    job.slot.busy = False
                self.changed.notify_all()

    def _seal_one(self, job: Job) -> None:
        job.manifest = self.memory.describe(job.slot, job.manifest)
        with self.memory.alone(time.monotonic() + PATIENCE):
            self.memory.seal(job.slot, job.manifest)
            self.memory.prune()

    def _owe(self, job: Job) -> None:
        """Each that waits holds a slot."""
        while self._is_behind() and self.owed and self.owed[-1] is not self.storing:
            self.owed.pop().slot.busy = False
        self.owed.append(job)

    def _store(self) -> None:
        """The thread that takes checkpoints to the store, and tries again what failed."""
        give_way()
        while True:
            job = self._take()
            try:
                self.store.write(job.step, job.slot.paths(), job.manifest)
                self.storing_since = math.inf  # what follows holds up no checkpoint
                self._prune(job.step)
            except Superseded as error:
                self.problem = error
                self._end(job)
            except Exception as error:
                self._tell(job, error)
                self._end(job if self.owed[-1] is not job else None)
            else:
                self._recover(job)
                self._end(job)

    def _take(self) -> Job:
        """The next job, after a pause if it is one that failed."""
        with self.changed:
            while not self.owed or self.resting or isinstance(self.problem, Superseded):
                self.changed.wait()
            if self.problem is not None:
                self.changed.wait(self.pause)
                self.pause = min(2 * self.pause, LONGEST_PAUSE)
            self.storing, self.storing_since = self.owed[0], time.monotonic()
            self.changed.notify_all()
            return self.storing

    def _end(self, done: Job | None) -> None:
        """Let others use the slot of a job that is ``done``."""
        with self.changed:
            self.storing = None
            if done is not None:
                self.owed.remove(done)
                done.slot.busy = False
            self.changed.notify_all()

    def _prune(self, step: int) -> None:
        """Delete what need not be kept; if that fails, the checkpoint is written all the same."""
        try:
            self.after(step)
        except Superseded:
            raise
        except Exception as error:
            self._say_once("old checkpoints could not be deleted", error)

    def _recover(self, job: Job) -> None:
        self.pause = FIRST_PAUSE
        self.failing_since, self.patience = None, LOUD_SECONDS
        if self.problem is not None:
            logger.warning("checkpoints can be written again: step %s is safe", job.step)
        self.problem = None

    def _tell(self, job: Job, error: Exception) -> None:
        self.problem = error
        now = time.monotonic()
        self.failing_since = self.failing_since or now
        self._say_loudly(job, now - self.failing_since, error)
        self._say_once(
            f"the checkpoint of step {job.step} could not be written",
            error,
            "; training goes on, the one before stands, and it is tried again",
        )

    def _tell_of_delay(self, job: Job) -> None:
        error = TimeoutError(f"it is on its way for {self._lasting():.0f} s")
        self._say_loudly(job, self._lasting(), error)
        self._say_once(
            f"the checkpoint of step {job.step} is not yet written",
            error,
            "; training goes on, the one before stands, and of those that follow the newest counts",
        )

    def _say_loudly(self, job: Job, seconds: float, error: Exception) -> None:
        if seconds > self.patience:
            self.patience *= 2
            logger.warning(
                "nothing has become durable for %.0f min: if this node is lost now, what was done "
                "since is lost; the checkpoint of step %s is in memory only: %s",
                seconds / 60,
                job.step,
                error,
            )

    def _say_once(self, what: str, error: Exception, then: str = "") -> None:
        cause = (
            f"{what.rpartition(' step ')[0]} {type(error).__name__} {getattr(error, 'errno', '')}"
        )
        if cause not in self.told:
            self.told.add(cause)
            logger.warning("%s: %s%s", what, error, then)


def give_way() -> None:
    """Let this thread run where the step leaves time."""
    if hasattr(os, "setpriority"):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICENESS)
