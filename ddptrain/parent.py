"""A process ends with the one that started it, so that no orphan goes on writing to a run."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
OF_SWEEP = "DDPTRAIN_OF_SWEEP"
"""The variable that tells a trial which process runs it, and ends it."""
sweep: int | None = None
"""That process, if this one is a trial."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Those that ask a run to stop, and come to its whole process group: a child leaves them to it."""


def end_with_sweep() -> None:
    """Have a trial be told to stop when what runs it is gone; who goes on waits until it has."""
    global sweep
    if told := os.environ.pop(OF_SWEEP, None):
        sweep = int(told)
        end_with_parent(signal.SIGTERM, sweep)


def end_with_parent(number: signal.Signals = signal.SIGKILL, parent: int | None = None) -> None:
    """Have the kernel send ``number`` to this process when its parent is gone, however that ended.

    For a rank under an agent, and a loading worker under its rank: torchrun's agent, if killed,
    leaves its ranks training. ``parent`` is its process, if that is known to be another one than
    whoever has taken over its children by now. On Linux alone; see prctl(2).
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid() if parent is None else parent
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)
