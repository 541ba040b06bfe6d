"""How long steps take, measured between log lines and never inside a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median


class StepClock:
    """Times windows of steps; what is done under ``paused`` does not count."""

    def __init__(self) -> None:
        self.windows: list[float] = []
        self.seconds = 0.0
        self.since = time.perf_counter()
        self.pauses = 0

    def restart(self) -> None:
        """Begin the first window now."""
        self.seconds = 0.0
        self.since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out what is no step: an evaluation, a save, a log line."""
        if self.pauses == 0:
            self.seconds += time.perf_counter() - self.since
        self.pauses += 1
        try:
            yield
        finally:
            self.pauses -= 1
            self.since = time.perf_counter()

    def end_window(self, steps: int) -> float:
        """End a window of ``steps`` steps, while paused; return its seconds."""
        seconds, self.seconds = self.seconds, 0.0
        self.windows.append(1000 * seconds / steps)
        return seconds

    @property
    def median_ms(self) -> float | None:
        """The median over windows of the milliseconds a step took."""
        return median(self.windows) if self.windows else None
