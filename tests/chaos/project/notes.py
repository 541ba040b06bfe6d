"""What the harness reads and says through files: a trace of each rank, and faults to commit once.

The folder is named by the environment, so that a run with faults has the config of one without.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

FOLDER = Path(os.environ["CHAOS_NOTES"])
RANK = os.environ.get("RANK", "0")


class Trace:
    """Lines ``what pid step seconds`` of one rank over all its starts, appended in one write."""

    def __init__(self) -> None:
        file = FOLDER / f"rank-{RANK}.trace"
        self.descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def note(self, what: str, step: int = 0) -> None:
        line = f"{what} {os.getpid()} {step} {time.monotonic():.6f}\n"
        os.write(self.descriptor, line.encode())


def claim(fault: str) -> bool:
    """Whether this process, and no other, is to commit a fault that the harness has ordered."""
    order = FOLDER / fault
    if not order.exists():
        return False
    try:
        order.rename(FOLDER / f"{fault}-by-{os.getpid()}")
    except FileNotFoundError:
        return False
    return True
