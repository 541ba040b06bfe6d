"""What a rank reports of its run when it ends, one way or the other."""

from __future__ import annotations

import logging
from typing import Any

from ddptrain.errors import DivergenceError, NonFiniteError, Stopped
from ddptrain.loop import Trainer
from ddptrain.state import fingerprint
from ddptrain.tasks.task import Task

logger = logging.getLogger(__name__)


def result_of(trainer: Trainer, status: str, seconds: float) -> dict[str, Any]:
    """What goes into ``result.json`` of a start that took ``seconds``."""
    plan = trainer.fetcher.source.plan
    samples = plan.samples_before(trainer.done)
    is_stuck = status == "failed" and trainer.ranks.device.type == "cuda"
    return {
        "status": status,
        "step": trainer.done,
        "samples": samples,
        "epochs": samples / plan.samples,
        "metrics": trainer.metrics,
        # Of a GPU that waits for a rank that has gone, nothing can be read any more.
        "weights_sha256": None if is_stuck else fingerprint(trainer.task),
        "wall_seconds": seconds,
        "step_ms_median": trainer.clock.median_ms,
        "world_size": trainer.ranks.world_size,
        **trainer.observer.history.totals(),
    }


def example_of(task: Task) -> str | None:
    """What the model does, to show; it is none of the run, so its errors are not the run's."""
    task.eval()
    try:
        return task.example()
    except Exception:
        logger.exception("%s.example() failed", type(task).__name__)
        return None


def where(trainer: Trainer, error: BaseException) -> str:
    """The step, and where one was under way its samples on this rank."""
    current = trainer.step.current
    if isinstance(error, NonFiniteError | DivergenceError | Stopped):
        return ""  # it says itself where it happened, which is not where it was noticed
    if current is None:
        return f"after step {trainer.done}: "
    samples = trainer.fetcher.source.plan.indices(current).tolist()
    shown = ", ".join(map(str, samples[:8])) + (", …" if len(samples) > 8 else "")
    return f"step {trainer.done}, samples {shown}: "
