"""Of feature vectors: how much each feature moves the output, and how much the metric needs it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ddptrain.explain.attribution import INTEGRATED, Attributions
from ddptrain.explain.importance import Importance
from ddptrain.explain.report import Report
from ddptrain.observe.loggers import Picture
from ddptrain.observe.pictures import render_figure
from ddptrain.tasks.pictures import drawable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DRAWN = 30
"""Bars of a picture."""
LONGEST_NAME = 32
"""Letters of a feature's name beside its bar."""


def report(names: list[str], found: Attributions | None, importance: Importance | None) -> Report:
    """A row for each feature, the most important first; names in the order of the features."""
    header, columns = ["feature"], []
    if importance is not None:
        header += [f"{importance.metric.name} worse by", "deviation"]
        columns += [importance.means, importance.deviations]
    if found is not None:
        values = found.by_method[INTEGRATED].flatten(1).double()
        header += ["mean |attribution|", "mean attribution"]
        columns += [values.abs().mean(0).tolist(), values.mean(0).tolist()]
    rows = list(zip(names, *columns, strict=True))
    # What says nothing is NaN, such as the AUROC of one class, and comes last.
    rows.sort(key=lambda row: math.inf if math.isnan(row[1]) else -row[1])
    return Report(header, [*rows], {"features": draw(header, rows)})


def draw(header: list[str], rows: list[Any]) -> Picture:
    """A panel of bars for each method, in the order of the rows."""
    shown = rows[:DRAWN]
    panels = [
        place for place, name in enumerate(header) if name.endswith(("worse by", "|attribution|"))
    ]
    places = range(len(shown))

    def draw_bars(figure: Figure) -> None:
        grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, place in zip(grid, panels, strict=True):
            widths, name = [row[place] for row in shown], header[place]
            errors = [row[place + 1] for row in shown] if name.endswith("worse by") else None
            axes.barh(places, widths, xerr=errors, color="C0", error_kw={"elinewidth": 1})
            axes.set_xlabel(name.replace("$", r"\$"))
            axes.axvline(0, color="black", linewidth=0.8)
            axes.grid(axis="x", alpha=0.3)
        grid[0].set_yticks(places, [drawable(row[0], LONGEST_NAME) for row in shown], fontsize=8)
        grid[0].invert_yaxis()
        if len(rows) > len(shown):
            figure.suptitle(f"the first {len(shown)} of {len(rows)} features", fontsize=10)

    return render_figure(draw_bars, 2.5 + 4 * len(panels), 1.2 + 0.22 * len(shown))
