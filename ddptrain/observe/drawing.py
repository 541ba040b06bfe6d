"""The picture of a comparison: a curve for each run, and its end against each key that differs."""

from __future__ import annotations

import math
import warnings
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator, NullLocator

from ddptrain.observe.comparison import Comparison, RunRecord
from ddptrain.observe.values import number, printable, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

Color = tuple[float, float, float, float]
WIDTH, DOTS_PER_INCH = 15, 100
NAMED_RUNS = 12
"""So many colours can be told apart; of more runs, a colour says the rank."""
PANELS = 12
WIDE_SPAN = 20
"""Values of a key that span more than this factor are on a logarithmic axis…"""
EXPLODED = 100
"""… and a metric's that span more than this."""
LABEL, HALF_LABEL = 64, 42
"""Letters of a legend's entry; of one that leaves room for another beside it."""


def draw(comparison: Comparison, file: Path) -> None:
    """Write the picture as a PNG. Raises ``OSError``."""
    with warnings.catch_warnings(), style.context("default"):
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure = _figure(comparison)
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)


def _figure(comparison: Comparison) -> Figure:
    keys = _keys_to_draw(comparison)
    panels = keys[:PANELS]
    columns = next(c for c, most in enumerate((0, 3, 8, PANELS)) if len(panels) <= most)
    rows = math.ceil(len(panels) / columns) if columns else 1
    height = max(2.8 * rows, 5 + 0.2 * min(len(comparison.records), NAMED_RUNS))
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08)
    figure = Figure(figsize=(WIDTH, height), dpi=DOTS_PER_INCH, layout=layout)
    FigureCanvasAgg(figure)
    colors = _colors(comparison)
    halves = figure.add_gridspec(1, 2 if panels else 1, width_ratios=_widths(columns))
    _draw_curves(figure.add_subfigure(halves[0, 0]), comparison, colors)
    if panels:
        right = figure.add_subfigure(halves[0, 1])
        grid = right.subplots(rows, columns, squeeze=False, sharey=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, key in zip(grid.flat, panels, strict=False):
            _draw_panel(axes, comparison, key, colors)
        finals = [r.metrics.get(_metric(comparison), math.nan) for r in comparison.records]
        _scale_metric(grid[0, 0], list(map(_drawn, finals)))
        right.supylabel(f"final {_escaped(_metric(comparison))}", fontsize=10)
        if len(keys) > len(panels):
            right.suptitle(f"{len(keys) - len(panels)} more keys differ", fontsize=10)
    return figure


def _widths(columns: int) -> list[float]:
    return [1.0, 0.35 + 0.35 * columns] if columns else [1.0]


def _metric(comparison: Comparison) -> str:
    """What is drawn: the metric that the runs are sorted by, or the first there is."""
    return comparison.metric or next(iter(comparison.metrics), "")


def _drawn(value: float) -> float:
    """A metric, or NaN, which leaves a gap, if it has no place on an axis."""
    return math.nan if number(value) is None else value


def _is_wide(values: list[float], span: float) -> bool:
    """Whether positive values are so far apart that only a logarithmic axis shows all of them."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > span * min(positive)


def _scale_metric(axes: Axes, values: list[float]) -> None:
    """A loss that exploded in one run must not flatten the others."""
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and _is_wide(finite, EXPLODED):
        axes.set_yscale("log")


def _keys_to_draw(comparison: Comparison) -> list[str]:
    """Keys of which some run has a final metric to show, numbers before anything else."""
    if not comparison.metrics:
        return []
    return sorted(comparison.changed, key=lambda key: not comparison.is_numeric(key))


def _colors(comparison: Comparison) -> list[Color]:
    """One for each run, in the order of the table."""
    count = len(comparison.records)
    if count > NAMED_RUNS:
        ranks = matplotlib.colormaps["viridis"]
        return [ranks(0.92 * place / (count - 1)) for place in range(count)]  # yellow is too pale
    named = matplotlib.colormaps["tab10"]
    return [*map(named, range(10)), (0.0, 0.0, 0.0, 1.0), (0.95, 0.8, 0.0, 1.0)][:count]


def _draw_curves(figure: SubFigure, comparison: Comparison, colors: list[Color]) -> None:
    axes, metric = figure.add_subplot(), _metric(comparison)
    if not metric:
        middle = axes.transAxes
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", transform=middle)
    for record, color in zip(comparison.records, colors, strict=True):
        curve = {step: _drawn(value) for step, value in record.curve(metric).items()}
        marker = "o" if len(curve) <= 30 else ""
        axes.plot(list(curve), list(curve.values()), color=color, marker=marker, markersize=4)
    curves = [record.curve(metric).values() for record in comparison.records]
    _scale_metric(axes, [_drawn(value) for curve in curves for value in curve])
    axes.set_title(_escaped(comparison.title), fontsize=10, loc="left")
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(_escaped(metric))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    if len(comparison.records) <= NAMED_RUNS:
        labels = _labels(comparison)
        columns = 2 if len(labels) > 3 and max(map(len, labels)) <= HALF_LABEL else 1
        figure.legend(axes.lines, labels, loc="outside lower center", ncols=columns, fontsize=9)
        return
    ranks = ScalarMappable(Normalize(1, len(colors)), ListedColormap(colors))
    what = f"rank by {metric}, 1 is the best" if comparison.metric else "place in the table"
    figure.colorbar(ranks, ax=axes, location="bottom", label=_escaped(what), aspect=40)


def _draw_panel(axes: Axes, comparison: Comparison, key: str, colors: list[Color]) -> None:
    """The final metric of every run that has both it and the key."""
    metric, is_numeric = _metric(comparison), comparison.is_numeric(key)
    places: dict[str, int] = {}
    for record, color in reversed(list(zip(comparison.records, colors, strict=True))):
        if metric not in record.metrics or (is_numeric and key not in record.config):
            continue
        text = shown(record.config, key)
        value = number(record.config[key]) if is_numeric else None
        at = places.setdefault(text, len(places)) if value is None else value
        end, is_best = _drawn(record.metrics[metric]), comparison.is_best(record)
        axes.plot(
            [at], [end], color=color, linestyle="", markeredgecolor="black",
            marker="*" if is_best else "o", markersize=14 if is_best else 6, markeredgewidth=0.5,
        )  # fmt: skip
    if is_numeric:
        _scale(axes, [record for record in comparison.records if key in record.config], key)
    else:
        axes.set_xlim(-0.5, len(places) - 0.5)
        axes.set_xticks(list(places.values()), [_escaped(_tail(text)) for text in places])
        if sum(map(len, places)) > 30:
            axes.tick_params("x", rotation=20 if len(places) <= 4 else 90)
    axes.set_xlabel(_escaped(key))
    axes.margins(0.1)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)


def _scale(axes: Axes, records: list[RunRecord], key: str) -> None:
    """Choose the axis of a key with numbers; zero has a place on it, too."""
    values = {
        value: _escaped(shown(record.config, key))
        for record in records
        if (value := number(record.config[key])) is not None
    }
    is_name = key.rpartition(".")[2] == "seed"  # whose size means nothing
    if is_name or min(values) < 0 or not _is_wide(list(values), WIDE_SPAN):
        is_whole = all(value.is_integer() for value in values)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=is_whole))
    elif min(values) > 0:
        axes.set_xscale("log")
    else:
        axes.set_xscale("symlog", linthresh=min(value for value in values if value > 0))
    places = sorted(float(axes.xaxis.get_transform().transform(value)) for value in values)
    gaps = [right - left for left, right in pairwise(places)]
    if all(gap >= sum(gaps) / 8 for gap in gaps):  # so few and so far apart that each has room
        axes.set_xticks(list(values), list(values.values()))
        axes.xaxis.set_minor_locator(NullLocator())


def _labels(comparison: Comparison) -> list[str]:
    """A run's values in the legend; or its name, if they are many."""
    names = _short_keys(comparison.changed)
    labels = []
    for record in comparison.records:
        pairs = [f"{names[key]}={shown(record.config, key)}" for key in comparison.changed]
        label = ", ".join(pairs)
        labels.append(label if 0 < len(label) <= LABEL else comparison.name(record))
    twice = {label for label in labels if labels.count(label) > 1}
    return [
        _escaped(f"{label} ({comparison.name(record)})" if label in twice else label)
        + (" (best)" if comparison.is_best(record) else "")
        for label, record in zip(labels, comparison.records, strict=True)
    ]


def _short_keys(keys: list[str]) -> dict[str, str]:
    """``lr`` for ``optim.lr``, where no other key ends so."""
    ends = [key.rpartition(".")[2] for key in keys]
    return {
        key: key if end.startswith("_") or ends.count(end) > 1 else end
        for key, end in zip(keys, ends, strict=True)
    }


def _tail(text: str) -> str:
    return text if len(text) <= 24 else f"…{text[-23:]}"


def _escaped(text: str) -> str:
    """Text as it is: ``$`` would begin a formula, and a label with ``_`` would be left out."""
    text = printable(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
