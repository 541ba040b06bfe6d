"""The picture of a minimisation: the path over contour lines, or curves over the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from torch import Tensor

GRID = 100
"""So many points along each axis are asked for the function's value."""
LEVELS, LOWEST = 24, 0.15
"""So many contour lines; the lowest would only show how coarse the grid is."""
MARGIN = 0.25
NAMED = 12
"""So many curves can be told apart by a legend."""


def draw_path(
    lines: list[dict[str, Any]],
    start: dict[str, float],
    end: dict[str, float],
    function: Callable[[tuple[float, float]], Tensor],
) -> Figure:
    """The way of two numbers from ``start`` to ``end`` by the logged ``lines``.

    ``function`` gives the height of a point, shape (). A line's point is the mean over its steps.
    """
    names = list(start)
    told = [[line.get(name) for name in names] for line in _training(lines)]
    path = np.array([list(start.values()), *told, list(end.values())], dtype=float)
    path = path[np.isfinite(path).all(axis=1)]
    low, high = path.min(axis=0), path.max(axis=0)
    margin = np.maximum(MARGIN * (high - low), 0.1 * (high - low).max() + 1e-6)
    across, up = (np.linspace(low[i] - margin[i], high[i] + margin[i], GRID) for i in (0, 1))
    heights = torch.stack([function((x, y)) for y in up for x in across]).double().cpu().numpy()
    figure, axes = _figure()
    _draw_heights(axes, across, up, heights.reshape(GRID, GRID))
    axes.plot(*path.T, color="black", linewidth=1, marker="o", markersize=2)
    axes.plot(*path[0], color="tab:blue", marker="s", linestyle="", label="start")
    axes.plot(*path[-1], color="tab:red", marker="*", markersize=12, linestyle="", label="end")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.legend()
    return figure


def _draw_heights(axes: Any, across: Any, up: Any, heights: Any) -> None:
    """Contour lines by quantiles of the grid's heights, for any range; closer where it is low."""
    finite = heights[np.isfinite(heights)]
    if not finite.size or finite.min() == finite.max():
        return
    levels = np.unique(np.quantile(finite, np.linspace(LOWEST, 1, LEVELS) ** 2))
    colors = colormaps["viridis"](np.linspace(0, 0.95, len(levels)))
    shown = np.ma.masked_invalid(heights)
    axes.contour(across, up, shown, levels=levels, colors=colors, linewidths=0.8)


def draw_curves(lines: list[dict[str, Any]], start: dict[str, float]) -> Figure:
    """The loss, and the parameters that have a ``start``, over the optimiser steps."""
    training = _training(lines)
    steps = [line["step"] for line in training]
    figure, axes = _figure(rows=2 if start else 1)
    panels = np.atleast_1d(axes)
    panels[0].plot(steps, _values(training, "loss"), color="black")
    panels[0].set_ylabel("loss")
    for name, value in start.items():
        panels[1].plot([0, *steps], [value, *_values(training, name)], linewidth=1, label=name)
        panels[1].set_ylabel("parameters")
    if 0 < len(start) <= NAMED:
        panels[1].legend()
    panels[-1].set_xlabel("optimiser step")
    for panel in panels:
        panel.grid(alpha=0.3)
    return figure


def _figure(rows: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(7, 6), dpi=100, layout="constrained")
    return figure, figure.subplots(rows, sharex=True)


def _training(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("split") == "train"]


def _values(lines: list[dict[str, Any]], name: str) -> Any:
    """A value that is not finite is null in a line, and leaves a gap."""
    return np.array([line.get(name) for line in lines], dtype=float)
