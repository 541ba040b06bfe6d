"""The checkpoints of a run: takes snapshots, has them made durable, keeps those that count."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ddptrain.checkpoint.media import Disk
from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.rescue import save_somewhere
from ddptrain.checkpoint.retention import Entry, Retention
from ddptrain.checkpoint.saved import Saved
from ddptrain.checkpoint.store import Store
from ddptrain.checkpoint.writer import Job, Writer, give_way
from ddptrain.errors import CheckpointError, DamagedError, TrainingError
from ddptrain.state import State

SCRUB_PAUSE = 0.1
NEIGHBOUR_SECONDS = 10.0
"""So long a rank that leaves waits for another of its node that is saving."""

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run, in a durable store and in the memory of this node.

    ``facts`` (config, versions) go into every manifest, so that a checkpoint explains itself;
    ``differences`` tells from them what another run's checkpoint was trained on.
    """

    def __init__(
        self,
        store: Store,
        memory: Memory,
        retention: Retention,
        metric: str,
        facts: dict[str, Any],
        differences: Callable[[dict[str, Any]], list[str]] = lambda _: [],
    ) -> None:
        self.store = store
        self.memory = memory
        self.retention = retention
        self.metric = metric
        self.facts = facts
        self.differences = differences
        self.writer = Writer(memory, store, self._prune)
        self.unsaved: CheckpointError | None = None
        self.told = False
        self.keeps_memory = True  # False where another rank keeps the memory that this one shares
        self.index: dict[int, dict[str, float]] | None = None
        self.scrubbing: threading.Thread | None = None
        self.is_in_a_hurry = False
        self.is_bare = False  # nothing in the store is whole: the next snapshot goes there as well
        self.damaged: set[int] = set()
        self.written: set[int] = set()

    def save(self, state: State, durable: bool) -> None:
        """Copy ``state``; the caller may go on while the rest is done.

        ``durable`` says whether it goes to the store as well, or stays in memory. Raises
        ``Superseded`` if this job has lost the run to another.
        """
        durable = durable or self.is_bare
        slot = self.writer.slot(durable)
        try:
            self.memory.take(slot, state)
        except OSError as error:
            self._make_do(state, durable, error)
            return
        if durable:
            self.unsaved, self.is_bare = None, False
        self.writer.submit(Job(slot, self._manifest(state), durable))

    def _make_do(self, state: State, durable: bool, error: OSError) -> None:
        """Take a snapshot elsewhere, or go on without."""
        full, where = self.memory.root, self.memory.root
        if self.memory.makes_room():
            self.save(state, durable)
            return
        if self.memory.falls_back():
            where = self.memory.root
            logger.warning("snapshots go to %s, for there is no room in %s: %s", where, full, error)
            self.save(state, durable)
            return
        if not self.told:
            self.told = True
            logger.warning("no snapshot: %s: %s; training goes on without", where, error)
        if durable:
            what = f"the checkpoint of step {state.step} could not be taken: {where}: {error}"
            self.unsaved = CheckpointError(f"{what}; make room there and start the run again")

    def rescue(
        self, state: State, until: float, copy_until: float, may_write: Callable[[], bool]
    ) -> str | None:
        """Save ``state`` at once, in memory first; return where it is, None if nowhere.

        For a rank that is about to leave, in any thread. ``until`` is the ``time.monotonic`` at
        which to have saved it in memory, ``copy_until`` that until which it is copied to the store,
        if this rank ``may_write`` there. Of the ranks of a node one at a time does it, and most
        find it done.
        """
        slot = self.writer.rest()
        with self.memory.alone(min(until, time.monotonic() + NEIGHBOUR_SECONDS)):
            store, step = save_somewhere(self.memory, slot, state, self._manifest(state))
        copied = threading.Event()
        # In a thread, for a store that takes too long must not keep this rank from leaving.
        copy = threading.Thread(
            target=self._make_durable,
            args=[store, step, copy_until, may_write, copied],
            daemon=True,
        )
        copy.start()
        copy.join(max(0.0, copy_until - time.monotonic()))
        return (self.store if copied.is_set() else store).where(step)

    def _make_durable(
        self,
        store: Store,
        step: int,
        until: float,
        may_write: Callable[[], bool],
        copied: threading.Event,
    ) -> None:
        """Copy the snapshot of ``step``, whoever has made it, from memory to the store."""
        try:
            if not may_write() or not self.writer.has_ended(until):
                return
            manifest = store.manifest(step)
            paths = {name: Path(store.where(step, name)) for name in manifest["files"]}
            self.store.write(step, paths, manifest)
        except (OSError, TrainingError) as error:
            logger.warning("step %s is in memory only: %s", step, error)
        else:
            copied.set()

    def _manifest(self, state: State) -> dict[str, Any]:
        return {"step": state.step, **state.numbers, **self.facts}

    def settle(self) -> None:
        """Wait until every checkpoint is durable. Raises ``CheckpointError`` if one is not."""
        self.writer.settle()
        if self.unsaved is not None:
            raise self.unsaved

    def _prune(self, step: int) -> None:
        """Delete what need not be kept, now that the checkpoint of ``step`` is durable."""
        while self.scrubbing is not None and self.scrubbing.is_alive():
            if self.is_in_a_hurry or self.writer.resting:
                return  # the next start does it
            self.scrubbing.join(SCRUB_PAUSE)
        # One that cannot be read now is not deleted: its disk may be back tomorrow. Nor is a later
        # one: it was passed over when this attempt began, and is written again when its step comes.
        self.written.add(step)
        self.damaged.discard(step)
        stored, damaged = self._stored()
        for other in (other for other in damaged if other < step):
            if self._is_damaged(other):
                self.store.delete(other)
            self.damaged.discard(other)
        entries = [self._entry(s, metrics) for s, metrics in stored.items() if s <= step]
        for other in {e.step for e in entries} - self.retention.keep(entries) - {step}:
            self.store.delete(other)
            del stored[other]
        self.store.tidy(but=step)
        self.index = stored

    def is_among_best(self, step: int, metrics: dict[str, float]) -> bool:
        """Whether a checkpoint with these metrics would be kept as one of the best."""
        if self.retention.keep_best == 0:
            return False
        entries = [e for e in self._entries() if e.step != step]
        best = self.retention.best([*entries, Entry(step, metrics[self.metric])])
        return any(e.step == step for e in best)

    def best_step(self) -> int | None:
        """The step of the best checkpoint, if any has the metric."""
        best = Retention(1, 1, self.retention.larger_is_better).best(self._entries())
        return best[0].step if best else None

    def best_metrics(self) -> dict[str, float]:
        """The metrics that the best checkpoint was saved with; empty if none has any."""
        step = self.best_step()
        return {} if step is None else dict(self._known()[step])

    def newest(self) -> Saved | None:
        """The newest whole checkpoint in the store; warns of damaged ones that it passes over.

        Raises ``CheckpointError`` if there are checkpoints but none is whole: a run never starts
        again from zero without being told to.
        """
        steps = self.store.steps()
        for step in reversed(steps):
            try:
                return self.read(step)
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)
        if steps:
            raise self.none_is_whole(len(steps))
        return None

    def none_is_whole(self, count: int) -> CheckpointError:
        told = f"none of the {count} checkpoints is whole" if count else "its checkpoints are gone"
        remedy = "set run.dir to a new folder to start from the beginning"
        return CheckpointError(f"{self.store.medium.where('')}: {told}; {remedy}")

    def read(self, step: int, store: Store | None = None) -> Saved:
        """Read and verify the checkpoint of ``step``. Raises ``CheckpointError``."""
        store = store or self.store
        manifest = store.manifest(step)
        contents = {n: store.read(step, n, digest) for n, digest in manifest["files"].items()}
        return Saved(manifest, contents, store.where(step))

    def _entries(self) -> list[Entry]:
        return [self._entry(step, metrics) for step, metrics in self._known().items()]

    def _entry(self, step: int, metrics: dict[str, float]) -> Entry:
        return Entry(step, metrics.get(self.metric))

    def _known(self) -> dict[int, dict[str, float]]:
        """The metrics by step of the checkpoints in the store, and of the one on its way there.

        From an index: a step does not wait for a store that may be far away.
        """
        if self.index is None:
            try:
                self.index, _ = self._stored()
            except OSError as error:
                logger.warning("which checkpoints are the best is not known now: %s", error)
                return {}
        job = self.writer.pending()
        return self.index if job is None else {**self.index, job.step: job.manifest["metrics"]}

    def scrub(self) -> None:
        """Read what earlier starts have written to the last bit, beside training.

        One that is damaged is not to be kept in place of one that is whole; nobody else may ever
        have to read it. Only on a disk of this machine's: an object store keeps its own checksums.
        """
        if isinstance(self.store.medium, Disk):
            self.scrubbing = threading.Thread(target=self._scrub, name="scrub", daemon=True)
            self.scrubbing.start()

    def hurry(self) -> None:
        """Wait for no more than what has to be saved: the run was asked to stop."""
        self.is_in_a_hurry = True

    def _scrub(self) -> None:
        give_way()
        with contextlib.suppress(OSError):
            for step in (steps := self.store.steps()):
                if step not in self.written and self._is_damaged(step):
                    self.damaged.add(step)
                    logger.warning("%s is damaged, and counts no more", self.store.where(step))
            self.is_bare = bool(steps) and self.damaged.issuperset(steps)

    def _is_damaged(self, step: int) -> bool:
        """Whether the checkpoint of ``step`` is there, can be read, and is not what was written."""
        try:
            self.store.verify(step)
        except DamagedError:
            return step in self.store.steps()  # and not just being written anew, or deleted
        except CheckpointError:
            pass
        return False

    def _stored(self) -> tuple[dict[int, dict[str, float]], list[int]]:
        """The metrics by step of the checkpoints that can be read, and which are damaged.

        Warns of those that cannot be read, whether they ever will be.
        """
        found = {}
        damaged = []
        for step in self.store.steps():
            if step in self.damaged:
                damaged.append(step)
                continue
            try:
                found[step] = dict(self.store.manifest(step)["metrics"])
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)
                if isinstance(error, DamagedError):
                    damaged.append(step)
        return found, damaged
