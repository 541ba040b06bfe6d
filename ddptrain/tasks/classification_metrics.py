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
    binary_precision_recall_curve,
    binary_roc,
)

from ddptrain.tasks.calibration_metrics import CalibrationError, Reliability
from ddptrain.tasks.pictures import Curves, Picture, draw_curves, draw_matrix
from ddptrain.tasks.scores import Scores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NAMED = 8
"""So many classes are named in a warning."""


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
        labels = "false positive rate", "true positive rate"
        draw_curves(ax, value, labels, "lower right", self.class_names)


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
        draw_curves(ax, value, ("recall", "precision"), "lower left", self.class_names)


class BinaryConfusionMatrix(Picture, of.BinaryConfusionMatrix):
    """How many of each true class (rows) are predicted to be of each (columns)."""

    def plot(self, value: Tensor, ax: Axes) -> None:  # type: ignore[override]
        draw_matrix(ax, value, self.class_names)


class MulticlassConfusionMatrix(Picture, of.MulticlassConfusionMatrix):
    """How many of each true class (rows) are predicted to be of each (columns)."""

    def plot(self, value: Tensor, ax: Axes) -> None:  # type: ignore[override]
        draw_matrix(ax, value, self.class_names)


OF_SCORES: dict[str, Callable[[], Metric]] = {
    "auroc": AUROC,
    "average_precision": AveragePrecision,
    "calibration_error": CalibrationError,
    "roc": ROC,
    "pr": PrecisionRecall,
    "reliability": Reliability,
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
