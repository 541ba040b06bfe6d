"""The starts of a run, a line each: how often it was resumed, and what that cost."""

from __future__ import annotations

import sys
import time
from typing import Any

from ddptrain.observe.loggers import JsonLines, read_json_lines
from ddptrain.run_directory import RunDirectory


class History:
    """The starts of a run: how often it was resumed, and which steps had to be done again."""

    def __init__(self, run: RunDirectory) -> None:
        self.run = run
        self.file: JsonLines | None = None
        self.starts: list[dict[str, Any]] = []

    def ranks_before(self) -> int | None:
        """The number of ranks of the last start, if there was one."""
        if self.file is None:
            spill = self.run.memories()[0] / self.run.attempts.name
            self.file = JsonLines(self.run.attempts, sys.maxsize, spill)
            self.starts = read_json_lines(self.run.attempts)
            self.starts += [start for start in read_json_lines(spill) if start not in self.starts]
        return self.starts[-1].get("world_size") if self.starts else None

    def begin(self, resumed_at: int, world_size: int, known: int) -> None:
        """Note a start. Steps that the last one is known to have taken past it are lost.

        Raises ``OSError`` if that cannot be written now.
        """
        lines = read_json_lines(self.run.metrics)
        last = max((line.get("step", 0) for line in lines), default=0)
        # If the last start failed, it could still say where.
        last = max(last, self.run.outcome().get("step", 0), known)
        start = {
            "time": time.time(),
            "step": resumed_at,
            "lost_steps": max(0, last - resumed_at),
            "world_size": world_size,
        }
        self.starts.append(start)
        assert self.file is not None
        self.file.write(start)

    def write(self) -> None:
        """Write what could not be written yet. Raises ``OSError`` if it still cannot."""
        if self.file is not None and self.file.waiting:
            self.file.flush()

    def close(self) -> None:
        """Write what could not be written yet, for the last time unless there is another start."""
        if self.file is not None:
            self.file.close()

    def totals(self) -> dict[str, int]:
        """How often the run was started again, and how many steps that cost."""
        return {
            "restarts": max(0, len(self.starts) - 1),
            "lost_steps": sum(start.get("lost_steps", 0) for start in self.starts),
        }
