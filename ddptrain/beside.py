"""Reads a GPU whose stream may never end, being in a collective that waits for a dead rank."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATIENCE = 0.5
"""What a stream has not done after so many seconds may wait for a rank that will not come."""
PAUSE = 0.01


def make_ready(device: torch.device) -> None:
    """Have a stream to read through: the first that a process makes waits for the device."""
    if device.type == "cuda":
        torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


@contextmanager
def beside(device: torch.device, gate: threading.Lock, until: float) -> Iterator[bool | None]:
    """Do what the block does while nothing more is asked of ``device``, in any thread.

    The ``gate`` keeps the main thread from asking; it stays closed. Or beside what was asked, if
    that does not end: the block gets True then, and has to see for itself that what it reads is
    not being written. It gets None if neither can be had ``until`` then (monotonic).
    """
    if device.type != "cuda":
        yield False if _closes(gate, until) else None
        return
    with torch.cuda.device(device):  # each thread has a current device of its own
        # The main thread may hold the gate for ever: a stream that gets no further takes only so
        # much, then the host waits to be allowed to ask for more. So nothing is put into it here.
        stream = torch.cuda.current_stream()
        is_closed = gate.acquire(timeout=PATIENCE)
        is_behind = not _ends(stream)
        if not is_behind and not is_closed:
            is_closed = _closes(gate, until)
            is_behind = not _ends(stream)
        side = torch.cuda.Stream() if is_behind else None  # type: ignore[no-untyped-call]
        with torch.cuda.stream(side):
            yield is_behind if is_behind or is_closed else None


def _closes(gate: threading.Lock, until: float) -> bool:
    return gate.acquire(timeout=max(0.0, until - time.monotonic()))


def _ends(stream: torch.cuda.Stream) -> bool:
    """Whether the device has done all that it was asked to, or does so soon."""
    until = time.monotonic() + PATIENCE
    while not stream.query():
        if time.monotonic() > until:
            return False
        time.sleep(PAUSE)
    return True
