"""What the ranks of a story say they did, and what follows: steps lost, time that counted."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from statistics import median

LONGEST = 5
"""A step that takes so many times what others take has stood still: the rest does not count."""


@dataclass
class Attempt:
    """One process of a rank: when it began each of its steps (seconds of the monotonic clock)."""

    pid: int
    started: float
    begun: list[tuple[int, float]] = field(default_factory=list)
    ended: float | None = None
    """When the process was seen to have gone."""


class Reader:
    """Follows the trace of one rank while it grows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.read = 0
        self.attempts: list[Attempt] = []

    def update(self) -> bool:
        """Take in what is new; return whether anything was. A line without its end waits."""
        if not self.file.exists():
            return False
        with self.file.open("rb") as stream:
            stream.seek(self.read)
            whole = stream.read().rpartition(b"\n")[0]
        if not whole:
            return False
        self.read += len(whole) + 1
        for line in whole.decode().splitlines():
            what, pid, step, seconds = line.split()
            if what == "start":
                self.attempts.append(Attempt(int(pid), float(seconds)))
            else:
                attempt = next(a for a in reversed(self.attempts) if a.pid == int(pid))
                attempt.begun.append((int(step), float(seconds)))
        return True

    @property
    def frontier(self) -> int:
        """The last step that was ever begun, -1 before the first."""
        return max((step for a in self.attempts for step, _ in a.begun), default=-1)

    @property
    def last_begun(self) -> float:
        """When the last step was begun, 0 before the first."""
        return max((a.begun[-1][1] for a in self.attempts if a.begun), default=0.0)


@dataclass(frozen=True)
class Work:
    """What a rank did in all its starts: bounds on the steps lost, and seconds that counted.

    A step that was begun last before a death may have been finished or not: that is the width.
    """

    lost_least: int
    lost_most: int
    starts_with_steps: int
    starts: int
    counted_seconds: float
    step_seconds: float


def work(attempts: Iterable[Attempt]) -> Work:
    """Add up the attempts of rank 0 in the order of their starts."""
    attempts = list(attempts)
    with_steps = [a for a in attempts if a.begun]
    least = most = 0
    for before, after in pairwise(with_steps):
        first, last = after.begun[0][0], before.begun[-1][0]
        least += max(0, last - first)
        most += max(0, last + 1 - first)
    took: dict[int, float | None] = {}
    for attempt in with_steps:
        moments = [t for _, t in attempt.begun]
        ends = [*moments[1:], None]
        for (step, begin), end in zip(attempt.begun, ends, strict=True):
            took[step] = None if end is None else end - begin  # the last time is what counted
    known = [seconds for seconds in took.values() if seconds is not None]
    usual = median(known) if known else 0.0
    longest = LONGEST * usual
    counted = sum(usual if seconds is None else min(seconds, longest) for seconds in took.values())
    return Work(least, most, len(with_steps), len(attempts), counted, usual)
