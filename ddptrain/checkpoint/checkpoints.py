"""The checkpoints of a run: takes snapshots, has them made durable, keeps those that count."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load
from torch import nn
from torch.optim import Optimizer

from ddptrain.checkpoint.memory import Memory
from ddptrain.checkpoint.retention import Entry, Retention
from ddptrain.checkpoint.store import Store
from ddptrain.checkpoint.writer import Job, Writer
from ddptrain.errors import CheckpointError, DamagedError, TrainingError
from ddptrain.state import (
    State,
    Tensors,
    load_model,
    load_optimizer,
    model_tensors,
    optimizer_tensors,
)

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"

logger = logging.getLogger(__name__)


def capture(
    step: int,
    task: nn.Module,
    optimizer: Optimizer,
    step_numbers: dict[str, Any],
    metrics: dict[str, float],
    line: dict[str, float] | None = None,
    record: dict[str, Any] | None = None,
) -> State:
    """The state of a run after ``step`` steps, as it is now: no tensor is copied.

    ``metrics``, ``line`` and ``record`` are what evaluations, the log line and the fingerprint of
    this very step say, for who goes on from here to write down if nobody else has.
    """
    tensors, numbers = optimizer_tensors(task, optimizer)
    return State(
        step,
        {MODEL: model_tensors(task), OPTIMIZER: tensors},
        {
            "metrics": dict(metrics),
            "line": dict(line or {}),
            "record": record,
            "step_numbers": step_numbers,
            "optimizer_numbers": numbers,
        },
    )


@dataclass(frozen=True)
class Saved:
    """A checkpoint as it was read: its manifest, and the verified content of its files."""

    manifest: dict[str, Any]
    contents: dict[str, bytes]
    origin: str

    @property
    def step(self) -> int:
        return int(self.manifest["step"])

    def tensors(self, name: str) -> Tensors:
        """The tensors of a file. Raises ``CheckpointError``."""
        try:
            return load(self.contents[name])
        except KeyError:
            raise CheckpointError(f"{self.origin}: it has no {name}") from None
        except SafetensorError as error:
            raise _refusal(f"{self.origin}/{name}", self.contents[name], error) from error

    def put_back(self, task: nn.Module, optimizer: Optimizer | None) -> None:
        """Load it into a task and, for training, its optimiser. Raises ``CheckpointError``."""
        load_model(task, self.tensors(MODEL))
        if optimizer is not None:
            numbers = self.manifest["optimizer_numbers"]
            load_optimizer(task, optimizer, self.tensors(OPTIMIZER), numbers)


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
        self.keeps_memory = True  # False where another rank keeps the memory that this one shares
        self.index: dict[int, dict[str, float]] | None = None

    def save(self, state: State, durable: bool) -> None:
        """Copy ``state``; the caller may go on while the rest is done.

        ``durable`` says whether it goes to the store as well, or stays in memory. Raises
        ``Superseded`` if this job has lost the run to another.
        """
        slot = self.writer.slot()
        try:
            self.memory.take(slot, state)
        except OSError as error:
            self._make_do(state, durable, error)
            return
        if durable:
            self.unsaved = None
        self.writer.submit(Job(slot, self._manifest(state), durable))

    def _make_do(self, state: State, durable: bool, error: OSError) -> None:
        """Take a snapshot elsewhere, or go on without."""
        full, where = self.memory.root, self.memory.root
        if self.memory.falls_back():
            where = self.memory.root
            logger.warning("snapshots go to %s, for there is no room in %s: %s", where, full, error)
            self.save(state, durable)
            return
        if self.unsaved is None:
            logger.warning("no snapshot: %s: %s; training goes on without", where, error)
        if durable or self.unsaved is None:
            what = f"the checkpoint of step {state.step} could not be taken: {where}: {error}"
            self.unsaved = CheckpointError(f"{what}; make room there and start the run again")

    def rescue(self, state: State, until: float, durable: bool) -> str | None:
        """Save ``state`` at once, in memory first; return where it is, None if nowhere.

        For a rank that is about to leave, in any thread. ``until`` is the ``time.monotonic`` at
        which to have ended; ``durable`` says whether this rank may write to the store.
        """
        idle = self.writer.rest(until)
        steps = self.memory.store.steps()
        if steps and steps[-1] >= state.step:
            return self.memory.store.where(steps[-1])  # by another rank of this node, or just now
        slot = self.memory.free()
        if slot is None:
            return None
        self.memory.take(slot, state)
        manifest = self.memory.seal(slot, self._manifest(state))
        if durable and idle and time.monotonic() < until:
            try:
                self.store.write(state.step, slot.paths(), manifest)
            except (OSError, TrainingError) as error:
                logger.warning("step %s is in memory only: %s", state.step, error)
            else:
                return self.store.where(state.step)
        return self.memory.store.where(state.step)

    def _manifest(self, state: State) -> dict[str, Any]:
        return {"step": state.step, **state.numbers, **self.facts}

    def settle(self) -> None:
        """Wait until every checkpoint is durable. Raises ``CheckpointError`` if one is not."""
        self.writer.settle()
        if self.unsaved is not None:
            raise self.unsaved

    def _prune(self, step: int) -> None:
        """Delete what need not be kept, now that the checkpoint of ``step`` is durable."""
        # One that cannot be read now is not deleted: its disk may be back tomorrow. Nor is a later
        # one: it was passed over when this attempt began, and is written again when its step comes.
        stored, damaged = self._stored()
        for other in damaged:
            if other < step:
                self.store.delete(other)
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
        self.check_metric(list(metrics))
        entries = [e for e in self._entries() if e.step != step]
        best = self.retention.best([*entries, Entry(step, metrics[self.metric])])
        return any(e.step == step for e in best)

    def check_metric(self, names: list[str]) -> None:
        """Raise ``CheckpointError`` if the metric to keep the best by is not among ``names``."""
        if self.retention.keep_best and self.metric not in names:
            close = get_close_matches(self.metric, names, 1)
            hint = f"did you mean {close[0]}?" if close else "name one, or checkpoint.keep_best=0"
            there_are = f"the task's metrics are {', '.join(names)}"
            raise CheckpointError(f"checkpoint.metric={self.metric}: {there_are}; {hint}")

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
        return CheckpointError(
            f"{self.store.medium.where('')}: none of the {count} checkpoints is whole; "
            "set run.dir to a new folder to start from the beginning"
        )

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
            self.index, _ = self._stored()
        job = self.writer.pending()
        return self.index if job is None else {**self.index, job.step: job.manifest["metrics"]}

    def _stored(self) -> tuple[dict[int, dict[str, float]], list[int]]:
        """The metrics by step of the checkpoints that can be read, and which are damaged.

        Warns of those that cannot be read, whether they ever will be.
        """
        found = {}
        damaged = []
        for step in self.store.steps():
            try:
                found[step] = dict(self.store.manifest(step)["metrics"])
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)
                if isinstance(error, DamagedError):
                    damaged.append(step)
        return found, damaged


def _refusal(file: str, content: bytes, error: Exception) -> CheckpointError:
    """Why a file is not loaded: damaged, or never one of safetensors."""
    if content[8:9] == b"{":
        return CheckpointError(f"{file}: {error}; train on from an earlier checkpoint")
    # How pickles begin: of protocol 2 and later, as torch.save writes them, and of the first.
    looks = "; it looks like a pickle" if content.startswith((b"\x80", b"PK", b"c")) else ""
    return CheckpointError(
        f"{file}: no safetensors file{looks}. It was not loaded, because loading a pickle can run "
        "code; save its tensors with safetensors, or take another checkpoint"
    )
