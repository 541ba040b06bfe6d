"""How long those wait for each other who are started at once: ranks, and the agents of nodes."""

from __future__ import annotations

from ddptrain.config import Config

MEETING_SECONDS = 30.0
"""Ranks that start at once may come so far apart, on a busy machine with a slow disk."""


def meeting_seconds(config: Config) -> float | None:
    """How long ranks, and the agents of nodes, wait for each other at a start."""
    if config.launch.timeout is not None or config.resilience.hang_seconds is None:
        return config.launch.timeout
    return max(config.resilience.hang_seconds, MEETING_SECONDS)
