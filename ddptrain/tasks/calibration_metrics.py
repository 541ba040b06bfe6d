"""Whether a classifier is as often right as it is sure: a number, and a diagram."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddptrain.tasks.pictures import Picture, draw_reliability
from ddptrain.tasks.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15


class Calibration(Scores):
    """Samples by their confidence, in ``BINS`` bins of one width, [a, b), the last with 1.

    Of yes and no it is the probability of yes against how often it is yes, of several classes that
    of the predicted one against how often it is right.
    """

    def bins(self) -> Tensor:
        """Mean confidence, accuracy and share of the samples of each bin that has any, (bins, 3).

        torchmetrics has the sum over bins alone, and puts a confidence of 1 into a bin of its own.
        """
        confidence, labels = self.whole()
        if confidence.ndim == 2:
            confidence, predicted = confidence.max(1)
            labels = predicted == labels
        columns = torch.stack([confidence, labels, torch.ones_like(confidence)], dim=1).double()
        edges = torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
        which = torch.bucketize(columns[:, 0].contiguous(), edges[1:-1], right=True)
        sums = torch.zeros(BINS, 3, dtype=torch.float64).index_add_(0, which, columns)
        counts = sums[:, 2:]
        return torch.cat([sums[:, :2] / counts, counts / len(columns)], 1)[counts[:, 0] > 0]


class CalibrationError(Calibration):
    """The expected calibration error, Σ share of a bin × |accuracy - confidence|.

    Guo et al., On Calibration of Modern Neural Networks, ICML 2017.
    """

    def compute(self) -> Tensor:
        confidence, accuracy, share = self.bins().unbind(1)
        return (share * (accuracy - confidence).abs()).sum()


class Reliability(Picture, Calibration):
    """The reliability diagram (DeGroot and Fienberg 1983): accuracy against confidence."""

    def compute(self) -> Tensor:
        return self.bins()

    def plot(self, value: Tensor, ax: Axes) -> None:
        draw_reliability(ax, value)
