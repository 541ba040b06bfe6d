"""Reads a GPU whose stream may never end, being in a collective that waits for a dead rank."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

PATIENCE = 0.5
"""What a stream has not done after so many seconds may wait for a rank that will not come."""
PAUSE = 0.01


@contextmanager
def beside(device: torch.device) -> Iterator[bool]:
    """Do what the block does with ``device`` after all that was asked of it, in any thread.

    Or beside that, if it does not end: the block gets True then, and has to see for itself that
    what it reads is not being written.
    """
    if device.type != "cuda":
        yield False
        return
    with torch.cuda.device(device):  # each thread has a current device of its own
        asked: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        asked.record()
        until = time.monotonic() + PATIENCE
        while not asked.query() and time.monotonic() < until:
            time.sleep(PAUSE)
        is_behind = not asked.query()
        stream = torch.cuda.Stream() if is_behind else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            yield is_behind
