"""What this process is doing at this moment, for its watchdog to tell when it stops doing it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START_UP = "start-up"
LOADING = "data loading"
FORWARD = "forward and backward"
REDUCING = "backward and all-reduce"
UPDATE = "update"
COMPILING = "compiling"
SAVING = "waiting for the disk"
COMPUTING = "computing metrics"
TOGETHER = "waiting for the other ranks"
"""The phases of a step, and those that are not like others."""


@dataclass(frozen=True, slots=True)
class Beat:
    """One thing that a rank began to do, ``since`` when (``time.monotonic``)."""

    count: int
    phase: str
    step: int
    since: float


now = Beat(0, START_UP, -1, time.monotonic())
"""A process is one rank, which does one thing at a time; read it, and change it with ``enter``."""


def enter(phase: str, step: int | None = None) -> None:
    """Say that this process has begun to do something else, or the same once more."""
    global now
    now = Beat(now.count + 1, phase, now.step if step is None else step, time.monotonic())


@contextmanager
def together() -> Iterator[None]:
    """While this process waits for the other ranks, in a collective of no step."""
    before = now.phase
    enter(TOGETHER)
    yield
    enter(before)
