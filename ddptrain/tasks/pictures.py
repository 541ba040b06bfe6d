"""Metrics to look at: what a curve and a confusion matrix look like."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Curves = list[tuple[Tensor, Tensor]]
"""One for each class, or one alone: x and y of its points, NaN where it is not defined."""
Corner = Literal["lower left", "lower right"]
NAMED_CLASSES = 10
"""So many colours can be told apart; of more classes none is named."""
WRITTEN_CLASSES = 20
"""A matrix of more classes has no room for its numbers."""
POINTS = 2000
"""A curve has no more pixels."""
LONGEST_NAME = 20
"""Letters of a class's name that are shown."""


class Picture(ABC):
    """Marks a metric whose value is drawn, and is no number.

    So is that of any other metric that is not one number and has torchmetrics' ``plot(value, ax)``;
    marked, ``checkpoint.metric`` cannot name it. An evaluation gives it the ``class_names``
    that its data set has, if that has any.
    """

    class_names: Sequence[str] = ()

    @abstractmethod
    def plot(self, value: Any, ax: Axes) -> None:
        """Draw what ``compute`` gave."""


def name_of(label: int, class_names: Sequence[str]) -> str:
    """The name of a class as it is drawn; its number if there is none."""
    name = class_names[label] if label < len(class_names) else ""
    return drawable(name, LONGEST_NAME) if name else str(label)


def drawable(name: str, longest: int) -> str:
    """A name as matplotlib can draw it; of a long one the two ends, for names may begin alike."""
    half = longest // 2
    short = name if len(name) <= longest else f"{name[: half - 1]}…{name[-half:]}"
    drawn = "".join(letter if letter.isprintable() else "?" for letter in short)
    return drawn.replace("$", r"\$")  # which would begin a formula


def draw_curves(
    axes: Axes,
    curves: Curves,
    labels: tuple[str, str],
    corner: Corner,
    class_names: Sequence[str] = (),
) -> None:
    """Lines over the unit square, with a legend in a ``corner`` if it has room for the classes."""
    is_one = len(curves) == 1
    for number, (x, y) in enumerate(curves):
        some = torch.linspace(0, len(x) - 1, min(len(x), POINTS)).round().long()
        is_defined = not torch.isnan(x + y).any()
        name = name_of(number, class_names)
        # Of a bare number nobody knows what it counts, and a legend leaves out what begins with _.
        is_clear = name != str(number) and not name.startswith("_")
        names = [] if is_one else [name if is_clear else f"class {name}"]
        label = ", ".join(names if is_defined else [*names, "not defined"])
        axes.plot(x[some].tolist(), y[some].tolist(), label=label or None, linewidth=1.5)
    if len(curves) <= NAMED_CLASSES and axes.get_legend_handles_labels()[1]:
        axes.legend(loc=corner, fontsize=8)
    axes.set_xlim(-0.01, 1.01)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel(labels[0])
    axes.set_ylabel(labels[1])
    axes.grid(alpha=0.3)


def draw_reliability(axes: Axes, bins: Tensor) -> None:
    """Accuracy against confidence of each bin (bins, 3), with its share of the samples as a bar."""
    confidence, accuracy, share = bins.T.tolist()
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="as sure as right")
    axes.bar(confidence, share, width=0.02, color="lightgrey", label="share of the samples")
    axes.plot(confidence, accuracy, marker="o", linewidth=1.5)
    axes.legend(loc="best", fontsize=8)
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("confidence")
    axes.set_ylabel("how often it is so")
    axes.grid(alpha=0.3)


def draw_coverage(axes: Axes, shares: Tensor) -> None:
    """The share of targets inside each interval against its level (levels, 2)."""
    axes.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1, label="as said")
    draw_curves(axes, [(shares[:, 0], shares[:, 1])], ("level", "share inside"), "lower right")


def draw_matrix(axes: Axes, counts: Tensor, class_names: Sequence[str] = ()) -> None:
    """Counts (true class, predicted class), coloured by their share of the true class."""
    shares = (counts / counts.sum(1, keepdim=True).clamp(min=1)).tolist()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, label="share of the true class")
    classes = range(len(shares))
    if len(classes) <= WRITTEN_CLASSES:
        names = [name_of(label, class_names) for label in classes]
        axes.set_xticks(classes, names)
        axes.set_yticks(classes, names)
        if max(map(len, names)) > 2:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="right", rotation_mode="anchor")
        size = 12 if len(classes) <= 5 else 7
        for row, of_row in enumerate(counts.tolist()):
            for column, count in enumerate(of_row):
                color = "white" if shares[row][column] > 0.5 else "black"
                axes.text(
                    column, row, f"{count:.0f}", ha="center", va="center", size=size, color=color
                )
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
