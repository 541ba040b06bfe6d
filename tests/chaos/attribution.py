"""What each fault has cost, once the story is over: steps done again, seconds until it went on."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from chaos.events import Event
from chaos.trace import Attempt


def attribute(events: Sequence[Event], attempts: Sequence[Attempt], over: float) -> None:
    """Tell each event what it has cost; the run was over, or given up, at the moment ``over``.

    A run that is asked to stop goes on for a step or two, and one that hangs or has no memory left
    ends later: so what counts is who was the last to come before an attempt of rank 0 ended.
    """
    for number, event in enumerate(events):
        until = events[number + 1].at if number + 1 < len(events) else inf
        hit = next((a for a in reversed(attempts) if a.started < event.at), None)
        frontier, since = event.frontier, event.at
        if hit is not None and hit.ended is not None and event.at <= hit.ended < until:
            frontier = max([frontier, *(step for step, _ in hit.begun)])
            since = hit.ended
        later = [(step, t) for a in attempts for step, t in a.begun if t > since]
        passed = min((t for step, t in later if step > frontier), default=over)
        event.regained = passed - event.at
        event.lost = sum(step < frontier for step, t in later if t < passed)
