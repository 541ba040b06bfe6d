"""Metrics of classification, exact: no thresholds but those that the scores have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics import classification as of
from torchmetrics.functional.classification import (
    binary_auroc,
    binary_average_precision,
    binary_calibration_error,
    binary_precision_recall_curve,
    binary_roc,
)

from ddptrain.tasks.pictures import Curves, Picture, draw_curves, draw_matrix

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BINS = 15
NAMED = 8
"""So many classes are named in a warning."""


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


def _classes(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:NAMED])) + (", …" if len(numbers) > NAMED else "")


class AUROC(Scores):
    """The area under the ROC curve, the mean over classes; NaN if one has no sample, or all."""

    def compute(self) -> Tensor:
        cases = self.one_against_rest()
        lacking = [c for c, (_, yes) in enumerate(cases) if yes.min() == yes.max()]
        if lacking:
            why = "all samples are of one class"
            if len(cases) > 1:
                why = f"no sample, or every one, is of class {_classes(lacking)}"
            warnings.warn(f"not defined, for {why}; it is NaN", stacklevel=2)
            return torch.tensor(torch.nan)
        return torch.stack([binary_auroc(*case, validate_args=False) for case in cases]).mean()


class AveragePrecision(Scores):
    """The sum of precision × gain in recall, the mean over classes; 0 for one without a sample."""

    def compute(self) -> Tensor:
        cases = self.one_against_rest()
        lacking = [c for c, (_, yes) in enumerate(cases) if not yes.any()]
        if lacking:
            which = "positive" if len(cases) == 1 else f"of class {_classes(lacking)}"
            why = f"no sample is {which}"
            warnings.warn(f"not defined, for {why}; that counts as 0", stacklevel=2)
        values = [
            yes.new_zeros((), dtype=torch.float32)
            if c in lacking
            else binary_average_precision(score, yes, validate_args=False)
            for c, (score, yes) in enumerate(cases)
        ]
        return torch.stack(values).mean()


class CalibrationError(Scores):
    """The expected calibration error (Guo et al. 2017): Σ share of a bin × |accuracy - confidence|.

    Of yes and no it is the probability of yes against how often it is yes, of several classes that
    of the predicted one against how often it is right; in ``BINS`` bins of one width, [a, b), the
    last with 1.
    """

    def compute(self) -> Tensor:
        scores, labels = self.whole()
        if scores.ndim == 2:
            scores, predicted = scores.max(1)
            labels = predicted == labels
        below_one = 1 - torch.finfo(scores.dtype).eps  # or 1 would be in a bin of its own
        return binary_calibration_error(
            scores.clamp(max=below_one), labels.long(), n_bins=BINS, norm="l1", validate_args=False
        )


class ROC(Picture, Scores):
    """The false positive rate and the true positive rate at each threshold, for each class."""

    def compute(self) -> Curves:
        curves = []
        for score, yes in self.one_against_rest():
            if yes.min() == yes.max():
                curves.append((torch.full((2,), torch.nan), torch.full((2,), torch.nan)))
            else:
                x, y, _ = binary_roc(score, yes, validate_args=False)
                curves.append((x, y))
        return curves

    def plot(self, value: Curves, ax: Axes) -> None:
        ax.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="chance")
        draw_curves(ax, value, "false positive rate", "true positive rate", "lower right")


class PrecisionRecall(Picture, Scores):
    """Recall and precision at each threshold, for each class."""

    def compute(self) -> Curves:
        curves = []
        for score, yes in self.one_against_rest():
            if not yes.any():
                curves.append((torch.full((2,), torch.nan), torch.full((2,), torch.nan)))
            else:
                precision, recall, _ = binary_precision_recall_curve(
                    score, yes, validate_args=False
                )
                curves.append((recall, precision))
        return curves

    def plot(self, value: Curves, ax: Axes) -> None:
        draw_curves(ax, value, "recall", "precision", "lower left")


class BinaryConfusionMatrix(Picture, of.BinaryConfusionMatrix):
    """How many of each true class (rows) are predicted to be of each (columns)."""

    def plot(self, value: Tensor, ax: Axes) -> None:  # type: ignore[override]
        draw_matrix(ax, value)


class MulticlassConfusionMatrix(Picture, of.MulticlassConfusionMatrix):
    """How many of each true class (rows) are predicted to be of each (columns)."""

    def plot(self, value: Tensor, ax: Axes) -> None:  # type: ignore[override]
        draw_matrix(ax, value)


OF_SCORES: dict[str, Callable[[], Metric]] = {
    "auroc": AUROC,
    "average_precision": AveragePrecision,
    "calibration_error": CalibrationError,
    "roc": ROC,
    "pr": PrecisionRecall,
}


def binary(name: str) -> Metric:
    """Make a metric that is updated with the probabilities of yes, (B,), and labels 0 or 1."""
    makers: dict[str, Callable[[], Metric]] = OF_SCORES | {
        "accuracy": of.BinaryAccuracy,
        "precision": of.BinaryPrecision,
        "recall": of.BinaryRecall,
        "f1": of.BinaryF1Score,
        "confusion_matrix": BinaryConfusionMatrix,
    }
    return makers[name]()


def multiclass(name: str, classes: int) -> Metric:
    """Make a metric that is updated with probabilities, (B, classes), and labels."""
    makers: dict[str, Callable[[], Metric]] = OF_SCORES | {
        "accuracy": partial(of.MulticlassAccuracy, classes, average="micro"),
        "precision": partial(of.MulticlassPrecision, classes, average="macro"),
        "recall": partial(of.MulticlassRecall, classes, average="macro"),
        "f1": partial(of.MulticlassF1Score, classes, average="macro"),
        "confusion_matrix": partial(MulticlassConfusionMatrix, classes),
    }
    return makers[name]()
