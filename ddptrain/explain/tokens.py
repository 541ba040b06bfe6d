"""Of token ids: which tokens speak for the class, in samples of text and over all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddptrain.explain.attribution import INTEGRATED, Attributions
from ddptrain.explain.report import Report
from ddptrain.observe.loggers import Picture
from ddptrain.observe.pictures import render_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXTS, EACH = 8, 2
"""So many texts are drawn at most, and of each class."""
ACROSS, LINES = 80, 4
"""Letters of a line, and lines of a text."""
LETTER, LINE = 0.12, 0.24
"""Inches of a letter across, and of a line down."""

Name = Callable[[int], str]


def report(found: Attributions, class_name: Name, token_name: Name) -> Report:
    """A row for each token that there is, the one to which most is attributed in all first."""
    values = found.by_method[INTEGRATED].double()
    total = values.abs().sum().item() or 1.0
    rows: list[Any] = []
    for token in sorted(set(found.inputs.flatten().tolist())):
        of_token = values[found.inputs == token]
        size = of_token.abs().sum().item()
        mean = of_token.mean().item()
        rows.append((token_name(token), len(of_token), size / total, size / len(of_token), mean))
    rows.sort(key=lambda row: -row[2])
    header = ["token", "times", "share", "mean |attribution|", "mean attribution"]
    return Report(header, rows, {"samples": _draw(found, class_name, token_name)})


def _draw(found: Attributions, class_name: Name, token_name: Name) -> Picture:
    """Some texts of each class, each token on the colour of what is attributed to it."""
    some = [int(s) for samples in found.by_class().values() for s in samples[:EACH]][:TEXTS]
    titles = [found.title(sample, class_name) for sample in some]
    texts = [_lines(found, sample, token_name) for sample in some]
    heights = [LINE * (len(values) + 1.5) for _, values in texts]

    def draw(figure: Figure) -> None:
        grid = figure.subplots(len(some), 1, squeeze=False, height_ratios=heights)[:, 0]
        for axes, title, (names, values) in zip(grid, titles, texts, strict=True):
            axes.set_title(title.replace("$", r"\$"), fontsize=9, loc="left")
            _draw_text(axes, names, values)

    return render_figure(draw, ACROSS * LETTER + 0.5, sum(heights))


def _lines(found: Attributions, sample: int, token_name: Name) -> tuple[list[str], Tensor]:
    """The names of a text's first tokens, and what is attributed to them in lines, 0 at the end."""
    values = found.by_method[INTEGRATED][sample]
    used = int(values.nonzero().max()) + 1 if values.any() else 1  # what fills up has none
    names = [token_name(int(token)) for token in found.inputs[sample, : LINES * ACROSS]]
    longest = max(map(len, names[:used])) or 1  # a vocabulary may have an empty name
    across = max(1, ACROSS // longest)
    kept = min(used, len(names), LINES * across)
    filled = torch.zeros(-(-kept // across) * across)
    filled[:kept] = values[:kept]
    return names[:kept], filled.view(-1, across)


def _draw_text(axes: Axes, names: list[str], values: Tensor) -> None:
    """Red speaks for the class, blue against it."""
    largest = values.abs().max().item() or 1.0
    axes.imshow(values.numpy(), cmap="bwr", vmin=-largest, vmax=largest, aspect="auto", alpha=0.6)
    for place, name in enumerate(names):
        row, column = divmod(place, values.shape[1])
        shown = name.replace("$", r"\$")
        axes.text(column, row, shown, ha="center", va="center", size=8, family="monospace")
    axes.axis("off")
