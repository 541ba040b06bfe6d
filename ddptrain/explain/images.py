"""Of images: which pixels speak for the class, in samples and on average."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ddptrain.explain.attribution import INTEGRATED, Attributions
from ddptrain.explain.report import Report
from ddptrain.observe.loggers import Picture
from ddptrain.observe.pictures import render_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASSES, EACH = 10, 2
"""A grid has so many classes at most, and samples of each."""
REGIONS = [f"{down} {across}" for down in ("top", "middle", "bottom")
           for across in ("left", "centre", "right")]  # fmt: skip
INCHES, GAP = 1.3, 0.24
"""Of an image in a grid, and the share of it above it, which its title has."""

Panel = tuple[str, str, Tensor]
"""A title, how it is coloured, and (H, W) or (H, W, 3)."""


def report(found: Attributions, class_name: Callable[[int], str]) -> Report:
    """A row for each class and method: where in the image, of nine regions, how much lies."""
    by_class = found.by_class()
    rows: list[Any] = []
    for label, samples in by_class.items():
        for method, maps in found.by_method.items():
            mean = maps[samples].double().abs().mean(0)
            rows.append((class_name(label), len(samples), method, *_shares(mean)))
    shown = dict(list(by_class.items())[:CLASSES])
    some = [
        [panel for sample in samples[:EACH] for panel in _of_sample(found, int(sample), class_name)]
        for samples in shown.values()
    ]
    means = [_of_class(found, samples, class_name(label)) for label, samples in shown.items()]
    left_out = len(by_class) - len(shown)
    more = f"{CLASSES} of {len(by_class)} classes" if left_out else ""
    pictures = {"samples": _grid(some, more), "classes": _grid(means, more)}
    return Report(["class", "samples", "method", *REGIONS], rows, pictures)


def _shares(mean: Tensor) -> list[float]:
    """How much of a map, (H, W), lies in each of nine regions, row by row; 0 where all of it is."""
    parts = [part for row in mean.tensor_split(3) for part in row.tensor_split(3, dim=1)]
    total = mean.sum().item() or 1.0
    return [part.sum().item() / total for part in parts]


def _of_sample(found: Attributions, sample: int, class_name: Callable[[int], str]) -> list[Panel]:
    image = (found.title(sample, class_name), "image", _shown(found.inputs[sample]))
    return [image, *((m, m, maps[sample]) for m, maps in found.by_method.items())]


def _of_class(found: Attributions, samples: Tensor, name: str) -> list[Panel]:
    mean = _shown(found.inputs[samples].mean(0))
    sizes = {method: maps[samples].abs().mean(0) for method, maps in found.by_method.items()}
    return [(f"{name}, mean", "image", mean), *((f"|{m}|", "size", a) for m, a in sizes.items())]


def _shown(image: Tensor) -> Tensor:
    """An image, (C, H, W), as (H, W, 3) if it is in colour, else (H, W), from 0 to 1."""
    image = image.float()
    plain = image.permute(1, 2, 0) if len(image) == 3 else image.mean(0)
    low, high = plain.min(), plain.max()
    if low >= 0 and high <= 1:
        return plain
    return (plain - low) / (high - low).clamp(min=1e-12)


def _grid(rows: list[list[Panel]], title: str) -> Picture:
    """All in one system of axes, an image one wide: a system for each would take seconds."""
    columns = max(map(len, rows))
    height, width = rows[0][0][2].shape[:2]
    pitch = height / width + GAP

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for row, panels in enumerate(rows):
            for column, panel in enumerate(panels):
                left, top = column * (1 + GAP / 2), row * pitch + GAP
                _draw(axes, panel, (left, left + 1, top + height / width, top))
        axes.set_xlim(-GAP / 2, columns * (1 + GAP / 2))
        axes.set_ylim(len(rows) * pitch + GAP / 2, 0)
        axes.set_title(title, fontsize=10, loc="left")
        axes.axis("off")

    size = INCHES * columns * (1 + GAP / 2), INCHES * (len(rows) * pitch + GAP)
    return render_figure(draw, *size)


def _draw(axes: Axes, panel: Panel, extent: tuple[float, float, float, float]) -> None:
    title, kind, values = panel
    largest = values.abs().max().item() or 1.0
    if kind == "image":
        axes.imshow(values.numpy(), cmap="gray", vmin=0, vmax=1, extent=extent)
    elif kind == INTEGRATED:  # red speaks for the class, blue against it
        axes.imshow(values.numpy(), cmap="bwr", vmin=-largest, vmax=largest, extent=extent)
    else:
        axes.imshow(values.numpy(), cmap="magma", vmin=0, vmax=largest, extent=extent)
    middle, top = (extent[0] + extent[1]) / 2, extent[3] - GAP / 8
    axes.text(middle, top, title.replace("$", r"\$"), size=7, ha="center", va="bottom")
