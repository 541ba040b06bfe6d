"""Each rank's log file in the run, and rank 0's warnings on the screen."""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

from ddptrain.place import Place

FLUSH_SECONDS = 2.0


class Beside(logging.Handler):
    """A log file that a thread writes to: its disk may hang, or take no line, and nobody waits."""

    def __init__(self, file: Path) -> None:
        """Raises ``OSError`` if it cannot be opened."""
        super().__init__()
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.lines: SimpleQueue[str | threading.Event] = SimpleQueue()
        self.process = os.getpid()
        threading.Thread(target=self._work, name="log", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Have a line written; a process forked from this one, which has no thread, does so."""
        try:
            line = f"{self.format(record)}\n"
        except Exception:  # a wrong argument
            self.handleError(record)
            return
        if os.getpid() == self.process:
            self.lines.put(line)
        else:
            self._write(line)

    def flush(self) -> None:
        """Wait until all is written, but not for ever."""
        if os.getpid() == self.process:
            done = threading.Event()
            self.lines.put(done)
            done.wait(FLUSH_SECONDS)

    def _work(self) -> None:
        while True:
            line = self.lines.get()
            if isinstance(line, str):
                self._write(line)
            else:
                line.set()

    def _write(self, line: str) -> None:
        with suppress(OSError):  # the checkpoints and the metrics tell of the same disk
            os.write(self.descriptor, line.encode(errors="replace"))


def open_log(folder: Path, place: Place) -> Path:
    """Send this rank's log to ``<folder>/rank-<rank>.<host>.log``; a restart appends to it."""
    file = folder / f"rank-{place.rank}.{socket.gethostname()}.log"
    to_file: logging.Handler = logging.NullHandler()
    with suppress(OSError):  # a disk that is away: training goes on without its log
        folder.mkdir(parents=True, exist_ok=True)
        to_file = Beside(file)
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
