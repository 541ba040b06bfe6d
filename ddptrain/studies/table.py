"""Tables of a comparison: a row for each run, its cells read from what the run left."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from ddptrain.data.sets import PURCHASE
from ddptrain.studies.outcome import Made, Point
from ddptrain.studies.plan import Comparison

NONE = "–"
ROUNDING = 1e-7
"""A smaller gap is what single precision leaves, and may as well be below zero."""


def _number(value: float | None, form: str = ".4f") -> str:
    """A number as text; a dash if there is none."""
    return NONE if value is None or math.isnan(value) else format(value, form)


def _label(made: Made) -> str:
    return made.planned.label


def _within(gap: float, of: Callable[[Point], int]) -> Callable[[Made], str]:
    def tell(made: Made) -> str:
        point = made.first_within(gap)
        return (
            f"{of(point):,}" if point else f"not in {of(made.curve[-1]):,}" if made.curve else NONE
        )

    return tell


def _gap(made: Made, step: int | None = None) -> str:
    """How far a run was above the minimum after so many steps, or at its end."""
    points = [point for point in made.curve if step in (None, point.step)]
    if not points:
        return NONE
    gap = made.gap(points[-1])
    return _number(gap, ".1e") if math.isnan(gap) or gap >= ROUNDING else f"< {ROUNDING:.0e}"


def _metric(name: str) -> Callable[[Made], str]:
    return lambda made: _number(made.result.get("metrics", {}).get(name))


def _weight(place: int) -> Callable[[Made], str]:
    return lambda made: _number(made.weights[place] if made.weights else None, ".3f")


def _of_noise(made: Made) -> str:
    noise = [abs(weight) for weight in made.weights[len(PURCHASE) :]]
    return _number(max(noise, default=None), ".3f")


def _zeros(made: Made) -> str:
    weights = made.weights
    return f"{sum(weight == 0 for weight in weights)} of {len(weights)}" if weights else NONE


def _steps(made: Made) -> str:
    return f"{made.result['step']:,}" if made.result else NONE


def _samples(made: Made) -> str:
    return f"{made.result['samples']:,}" if made.result else NONE


def _ended(made: Made) -> str:
    return made.ended if made.status == "completed" else f"{made.ended} after {_steps(made)}"


def _seconds(made: Made) -> str:
    return _number(made.result.get("wall_seconds"), ".1f")


COLUMNS: dict[str, Callable[[Made], str]] = {
    **dict.fromkeys(("rate", "batch", "optimiser", "penalty"), _label),
    "iterations to 0.001": _within(0.001, lambda point: point.step),
    "samples to 0.01": _within(0.01, lambda point: point.samples),
    "gap": _gap,
    "gap after 50": partial(_gap, step=50),
    "steps": _steps,
    "samples": _samples,
    "ranks": lambda made: str(made.result.get("world_size", NONE)),
    "training loss": _metric("val/loss"),  # a study evaluates the training split in its place
    "test loss": _metric("test/loss"),
    "seconds": _seconds,
    "ended": _ended,
    **{name: _weight(place) for place, name in enumerate(PURCHASE)},
    "largest of noise": _of_noise,
    "zeros": _zeros,
}
"""What a table may show of a run, by the heading."""


def rows(comparison: Comparison, made: list[Made]) -> list[list[str]]:
    """The headings, and a row for each run."""
    headings = list(comparison.columns)
    if "ended" not in headings and any(each.status != "completed" for each in made):
        headings.append("ended")
    return [headings, *([COLUMNS[heading](each) for heading in headings] for each in made)]


def plain(table: list[list[str]]) -> str:
    """A table for the screen."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        first, *others = zip(row, widths, strict=True)
        cells = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
