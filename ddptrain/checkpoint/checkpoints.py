"""Saves and restores the state of a run, and prunes what its retention does not keep."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from ddptrain.checkpoint.retention import Entry, Retention
from ddptrain.checkpoint.store import Store, Writer
from ddptrain.errors import CheckpointError
from ddptrain.state import load_model, load_optimizer, model_tensors, optimizer_tensors, unshared

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"

logger = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints of one run. Only rank 0 saves; every rank restores.

    ``facts`` (config, versions) go into every manifest, so that a checkpoint explains itself.
    """

    def __init__(
        self, store: Store, retention: Retention, metric: str, facts: dict[str, Any]
    ) -> None:
        self.store = store
        self.retention = retention
        self.metric = metric
        self.facts = facts

    def save(
        self,
        step: int,
        task: nn.Module,
        optimizer: Optimizer,
        step_numbers: dict[str, Any],
        metrics: dict[str, float],
    ) -> None:
        """Write the checkpoint of ``step``, then delete those that need not be kept."""
        tensors, numbers = optimizer_tensors(task, optimizer)
        writers = {MODEL: _writer(model_tensors(task)), OPTIMIZER: _writer(tensors)}
        manifest = {
            "metrics": metrics,
            "step_numbers": step_numbers,
            "optimizer_numbers": numbers,
            **self.facts,
        }
        self.store.write(step, writers, manifest)
        # One that cannot be read now is not deleted: its disk may be back tomorrow. Nor is a later
        # one: it was passed over when this attempt began, and is written again when its step comes.
        entries = [e for e in self._entries() if e.step <= step]
        for other in {e.step for e in entries} - self.retention.keep(entries) - {step}:
            self.store.delete(other)

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
        return {} if step is None else dict(self.store.manifest(step)["metrics"])

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """Step and manifest of the newest whole checkpoint; warns of damaged ones it passes over.

        Raises ``CheckpointError`` if there are checkpoints but none is whole: a run never starts
        again from zero without being told to.
        """
        steps = self.store.steps()
        for step in reversed(steps):
            try:
                return step, self.store.verify(step)
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)
        if steps:
            raise CheckpointError(
                f"{self.store.root}: none of the {len(steps)} checkpoints is whole; "
                "set run.dir to a new folder to start from the beginning"
            )
        return None

    def restore(
        self, step: int, manifest: dict[str, Any], task: nn.Module, optimizer: Optimizer | None
    ) -> None:
        """Load a checkpoint that ``newest`` found into a task and, for training, its optimiser."""
        folder = self.store.folder(step)
        load_model(task, _load(folder / MODEL))
        if optimizer is not None:
            numbers = manifest["optimizer_numbers"]
            load_optimizer(task, optimizer, _load(folder / OPTIMIZER), numbers)

    def _entries(self) -> Iterator[Entry]:
        for step in self.store.steps():
            try:
                yield Entry(step, self.store.manifest(step)["metrics"].get(self.metric))
            except CheckpointError as error:
                logger.warning("passing over a checkpoint: %s", error)


def _writer(tensors: dict[str, Tensor]) -> Writer:
    return lambda file: save_file(unshared(tensors), file)


def _load(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file}: {error}") from error
