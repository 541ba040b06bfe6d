"""What metrics of classification have in common: every score of a split, and its label."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric


class Scores(Metric):
    """Keeps the probabilities of a split, (N,) or (N, classes), and its labels, (N,).

    Several that are updated with the same tensors keep them once.
    """

    scores: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor) -> None:
        self.scores.append(scores)
        self.labels.append(labels)

    def whole(self) -> tuple[Tensor, Tensor]:
        """The scores and labels of the split, in its order; on the CPU, which adds up in one."""
        return torch.cat(self.scores).cpu(), torch.cat(self.labels).cpu()

    def one_against_rest(self) -> list[tuple[Tensor, Tensor]]:
        """Scores and yes or no for each class; for one alone if the scores are those of yes."""
        scores, labels = self.whole()
        if scores.ndim == 1:
            return [(scores, labels.long())]
        return [(scores[:, c], (labels == c).long()) for c in range(scores.shape[1])]
