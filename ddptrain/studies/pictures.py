"""Pictures of a study's comparisons, on no ground of their own: for light pages and for dark."""

from __future__ import annotations

import math
from collections.abc import Callable
from io import BytesIO
from typing import TYPE_CHECKING

from ddptrain.data.sets import PURCHASE
from ddptrain.studies.outcome import Made
from ddptrain.studies.table import ROUNDING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY = "#808080"
"""Text and lines in it can be read on white and on black."""
COLORS = (
    "#3b82f6", "#e8590c", "#2f9e44", "#e03131", "#9c5fd6", "#a5673f", "#e64980", "#12a3b8"
)  # fmt: skip
WIDTH, HEIGHT, DOTS_PER_INCH = 9.0, 4.2, 100


def draw(picture: str, made: list[Made]) -> bytes:
    """Draw one of ``PICTURES``, as PNG."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    grey = {
        key: GREY
        for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    }
    with style.context(["default", {**grey, "legend.frameon": False, "font.size": 9}]):
        size = (WIDTH, HEIGHT)
        figure = Figure(size, DOTS_PER_INCH, layout=ConstrainedLayoutEngine())
        FigureCanvasAgg(figure)
        PICTURES[picture](figure, made)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH, transparent=True)
    return _smaller(file)


def _smaller(png: BytesIO) -> bytes:
    """The picture in the few colours that it has, a third of the size."""
    from PIL import Image

    file = BytesIO()
    Image.open(png).quantize(128).save(file, format="png", optimize=True)
    return file.getvalue()


def _curves(
    axes: Axes, made: list[Made], x: str, xlabel: str, *, gap: bool = True, wide: bool = True
) -> None:
    for each, color in zip(made, COLORS, strict=False):
        curve = each.curve
        places = [getattr(point, x) for point in curve]
        heights = [each.gap(point) if gap else point.objective for point in curve]
        heights = [max(height, ROUNDING) if gap else height for height in heights]
        axes.plot(places, heights, color=color, linewidth=1.4, label=each.planned.label)
        if each.status == "failed" and places:
            axes.plot(places[-1:], heights[-1:], "x", color=color, markersize=8)
    if wide:
        axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel(xlabel)
    axes.grid(alpha=0.25, color=GREY)


def _rates(figure: Figure, made: list[Made]) -> None:
    axes = figure.add_subplot()
    _curves(axes, made, "step", "iterations")
    heights = [each.gap(point) for each in made for point in each.curve[:1]]
    known = [height for height in heights if math.isfinite(height)]
    if known:
        axes.set_ylim(ROUNDING / 2, 1e4 * max(known))
    axes.axhline(0.001, color=GREY, linewidth=0.8, linestyle="--")
    axes.set_ylabel("objective − minimum")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="rate")


def _batches(figure: Figure, made: list[Made]) -> None:
    left, right = figure.subplots(1, 2, sharey=True)
    _curves(left, made, "samples", "samples seen")
    _curves(right, made, "step", "steps")
    left.set_ylabel("training loss − minimum")
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=len(made))


def _optimisers(figure: Figure, made: list[Made]) -> None:
    axes = figure.add_subplot()
    _curves(axes, made, "step", "steps, all samples in each", wide=False)
    axes.set_ylim(bottom=ROUNDING / 2)
    axes.set_ylabel("training loss − minimum")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper")


def _weights(figure: Figure, made: list[Made]) -> None:
    axes = figure.add_subplot()
    most = max((len(each.weights) for each in made), default=0)
    for place, (each, color) in enumerate(zip(made, COLORS, strict=False)):
        shift = 0.18 * (place - (len(made) - 1) / 2)
        places = [number + shift for number in range(len(each.weights))]
        axes.bar(places, each.weights, 0.16, color=color, label=each.planned.label)
        zeros = [x for x, weight in zip(places, each.weights, strict=True) if weight == 0]
        axes.plot(zeros, [0] * len(zeros), "o", color=color, markersize=3.5)
    names = [*PURCHASE, *(f"noise {number}" for number in range(1, most - len(PURCHASE) + 1))]
    axes.set_xticks(range(most), names[:most], rotation=35, ha="right")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_ylabel("coefficient (a dot: exactly 0)")
    axes.grid(alpha=0.25, color=GREY, axis="y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", title="penalty")


PICTURES: dict[str, Callable[[Figure, list[Made]], None]] = {
    "rates": _rates,
    "batches": _batches,
    "optimisers": _optimisers,
    "weights": _weights,
}
