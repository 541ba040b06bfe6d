"""Reads a GPU whose stream may never end, being in a collective that waits for a dead rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

STUCK_SECONDS = 2.0
"""What a stream has not done after so long, it waits for a rank that will not come."""
PAUSE = 0.01


@contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Do what the block does with ``device`` after all that was asked of it, in any thread.

    Or beside what it does, if that does not end: what follows there has not touched the weights.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):  # each thread has a current device of its own
        asked: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        asked.record()
        until = time.monotonic() + STUCK_SECONDS
        while not asked.query() and time.monotonic() < until:
            time.sleep(PAUSE)
        stream = None if asked.query() else torch.cuda.Stream()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield
