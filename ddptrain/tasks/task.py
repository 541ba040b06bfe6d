"""The contract between a user's task and the trainer: a loss is a sum and a count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from ddptrain.errors import Refused

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torchmetrics import Metric

Batch: TypeAlias = Any
"""What the data set's samples collate to: a tensor, or tuples, lists and dicts of tensors."""
Key: TypeAlias = int | str
"""Where a part of a batch is: its number in a tuple, or its key in a mapping."""


@dataclass(slots=True)
class Loss:
    """The loss of one micro-batch, unreduced: the trainer divides Σ sums by Σ counts.

    ``sum`` is a scalar tensor with gradient; ``count`` says over how many items it runs (samples,
    tokens). ``logs`` are further values by name: a scalar is taken as a mean over ``count`` items,
    a pair ``(sum, count)`` as it is; what reaches the logs is the mean over all ranks and steps
    since the last line.
    """

    sum: Tensor
    count: int | float | Tensor
    logs: Mapping[str, Any] = field(default_factory=dict)


class Task(nn.Module):
    """Base of every task. A subclass must write ``forward``; the rest has defaults."""

    def forward(self, batch: Batch) -> Loss:
        """Return the loss of one micro-batch."""
        raise TypeError(f"{type(self).__name__} has no forward(batch) that returns a Loss")

    def check_data(self, dataset: object) -> None:
        """Refuse a data set that does not fit, before training; by default any will do.

        Called once for each split, on every rank. Raises ``Refused``.
        """

    def project(self) -> None:
        """Move parameters, in place, to where they are allowed; by default they may be anywhere.

        Called after every update, without gradients, on every rank alike. A GPU should not have to
        wait for it.
        """

    @property
    def is_projected(self) -> bool:
        """Whether there is a projection to call."""
        return type(self).project is not Task.project

    def metrics(self) -> dict[str, Metric]:
        """Return fresh torchmetrics by name, for one evaluation."""
        from ddptrain.tasks.mean import Mean

        return {"loss": Mean()}

    def update(self, metrics: dict[str, Metric], batch: Batch) -> None:
        """Add one micro-batch to the metrics; called in eval mode, without gradients."""
        self.update_loss(metrics, self(batch))

    def update_loss(self, metrics: dict[str, Metric], loss: Loss) -> None:
        """Add a micro-batch's loss to ``metrics["loss"]``, weighted by its count."""
        metrics["loss"].update(loss.sum, loss.count)

    def explained_at(self, batch: Batch) -> tuple[Key, Key | None]:
        """Return where ``batch`` has the inputs that `ddptrain explain` explains, and the targets.

        Places in a tuple or a list, or keys of a mapping; None for targets that are no classes. By
        default 0 and 1. Raises ``Refused`` for a task whose inputs cannot be explained.
        """
        return 0, 1

    def explained_of(self, batch: Batch) -> Tensor:
        """Return the scores of ``batch`` that are traced to its inputs, as ``explained`` does.

        `ddptrain explain` puts other inputs in, and leaves the rest of the batch as it is. By
        default the rest does not count: they are ``explained(inputs)``.
        """
        inputs, _ = self.explained_at(batch)
        return self.explained(batch[inputs])

    def explained(self, inputs: Tensor) -> Tensor:
        """Return scores, (B,) or (B, classes), which `ddptrain explain` traces to ``inputs``.

        A sample's scores depend on that sample alone. Of several scores the largest is explained.
        By default they are what ``model`` gives. Raises ``Refused`` if there is none.
        """
        model = getattr(self, "model", None)
        if not isinstance(model, nn.Module):
            name = type(self).__name__
            raise Refused(
                f"task: {name} has no model whose outputs could be explained; give {name} a method "
                "explained(inputs) that returns scores, (B,) or (B, classes)"
            )
        scores: Tensor = model(inputs)
        return scores

    def baseline(self, inputs: Tensor) -> Tensor:
        """Return what `ddptrain explain` holds ``inputs`` against, in their shape.

        By default zeros: the mean of features that are standardised, a black image, and in a text
        the token that fills up.
        """
        return torch.zeros_like(inputs)

    def example(self) -> str | None:
        """Return a piece of what the model does, to show at the end of a run, or None."""
        return None

    def figures(self, lines: list[dict[str, Any]]) -> dict[str, Figure]:
        """Return pictures of a run that is over, by the names that their files are to have.

        Called on rank 0; ``lines`` are those of ``metrics.jsonl``, in the order of their steps.
        """
        return {}
