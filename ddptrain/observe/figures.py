"""Pictures that a task makes of its run; they are none of it, so their errors are not the run's."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddptrain.observe.loggers import read_json_lines

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[list[dict[str, Any]]], "dict[str, Figure]"]
logger = logging.getLogger(__name__)


def drawn(draw: Draw, metrics: Path) -> dict[str, Figure]:
    """What ``draw`` makes of the lines in ``metrics``; nothing if it fails, which is logged."""
    try:
        return draw(read_json_lines(metrics))
    except Exception:
        logger.exception("the pictures of the run could not be drawn")
        return {}


def save_figure(figure: Figure, file: Path) -> None:
    """Write a PNG. Raises ``OSError``."""
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, format="png")
