"""Draws what an evaluation gives to look at, as PNG files."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddptrain.files import replace_bytes
from ddptrain.observe.loggers import Picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Draw = Callable[["Axes"], Any]
WIDTH, HEIGHT, DOTS_PER_INCH = 6, 5, 100
logger = logging.getLogger(__name__)


class Plots:
    """The newest picture of each kind, in a folder of the run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failed: set[str] = set()

    def draw(self, name: str, step: int, draw: Draw) -> Picture | None:
        """Draw ``<split>/<metric>``; None if that fails, of which is told once.

        Whatever it fails with: a ``plot()`` may be anybody's, and is no reason to stop.
        """
        try:
            return render(draw, f"{name} after {step} steps")
        except Exception as error:
            if name not in self.failed:
                self.failed.add(name)
                logger.warning("%s cannot be drawn: %r; training goes on", name, error)
            return None

    def keep(self, name: str, picture: Picture) -> None:
        """Have it take the place of the last one. Raises ``OSError``."""
        self.folder.mkdir(exist_ok=True)
        replace_bytes(self.folder / f"{name.replace('/', '-')}.png", picture.png)


def render(draw: Draw, title: str) -> Picture:
    """Have ``draw`` draw on the axes of a picture. Raises what it raises."""

    def draw_alone(figure: Figure) -> None:
        axes = figure.add_subplot()
        draw(axes)
        axes.set_title(title.replace("$", r"\$"), fontsize=10, loc="left")

    return render_figure(draw_alone, WIDTH, HEIGHT)


def render_figure(draw: Callable[[Figure], Any], width: float, height: float) -> Picture:
    """Have ``draw`` draw on a figure of so many inches. Raises what it raises."""
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with warnings.catch_warnings(), style.context("default"):
        warnings.simplefilter("ignore")  # letters that the font lacks
        figure = Figure((width, height), DOTS_PER_INCH, layout=ConstrainedLayoutEngine())
        FigureCanvasAgg(figure)
        draw(figure)
        file = BytesIO()
        figure.savefig(file, format="png", dpi=DOTS_PER_INCH)
    return Picture(file.getvalue(), round(width * DOTS_PER_INCH), round(height * DOTS_PER_INCH))
