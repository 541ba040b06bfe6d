"""Each rank's log file in the run, and rank 0's warnings on the screen."""

from __future__ import annotations

import logging
import socket
import sys
from contextlib import suppress
from pathlib import Path

from ddptrain.place import Place


class _Patient(logging.FileHandler):
    """A log file that says nothing of its own on the screen when the disk does not take a line."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Leave the line out: the checkpoints and the metrics tell of the same disk."""


def open_log(folder: Path, place: Place) -> Path:
    """Send this rank's log to ``<folder>/rank-<rank>.<host>.log``; a restart appends to it."""
    file = folder / f"rank-{place.rank}.{socket.gethostname()}.log"
    to_file: logging.Handler = logging.NullHandler()
    with suppress(OSError):  # a disk that is away: training goes on without its log
        folder.mkdir(parents=True, exist_ok=True)
        to_file = _Patient(file)
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("ddptrain")
    root.setLevel(logging.DEBUG)
    root.addHandler(to_file)
    if place.rank == 0:
        to_screen = logging.StreamHandler(sys.stderr)
        to_screen.setLevel(logging.WARNING)
        to_screen.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        root.addHandler(to_screen)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").addHandler(to_file)
    return file
