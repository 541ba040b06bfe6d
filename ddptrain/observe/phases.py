"""Where the time before the first step went."""

from __future__ import annotations

import time


class Phases:
    """Marks the ends of a start's phases; prints as ``first step after 3.1 s: imports 1.9, …``."""

    def __init__(self) -> None:
        self.marks = [("start", time.monotonic())]

    def mark(self, name: str) -> None:
        """End the phase that is called ``name``."""
        self.marks.append((name, time.monotonic()))

    def __str__(self) -> str:
        times = [when for _, when in self.marks]
        spans = [
            f"{name} {end - begin:.2f}"
            for (name, end), begin in zip(self.marks[1:], times, strict=False)
        ]
        return f"first step after {times[-1] - times[0]:.2f} s: {', '.join(spans)}"
