"""Named instants between two file operations, at which a test can have the process killed."""

from __future__ import annotations

import os
import signal

VARIABLE = "DDPTRAIN_FAILPOINT"
POINTS = (
    "memory: manifest removed",
    "memory: slot taken back",
    "memory: taken",
    "memory: one file filled",
    "memory: filled",
    "memory: manifest written",
    "memory: room made",
    "memory: sealed",
    "memory: pruned",
    "save: begun",
    "save: old manifest removed",
    "save: old folder removed",
    "save: folder made",
    "save: folder's parent flushed",
    "save: file copied",
    "save: file flushed",
    "save: folder flushed",
    "save: verified",
    "save: manifest written beside",
    "save: manifest renamed",
    "save: manifest's folder flushed",
    "save: latest moved",
    "prune: begun",
    "prune: manifest removed",
    "prune: manifest's folder flushed",
    "prune: one file removed",
    "prune: folder removed",
    "prune: ended",
    "remote: file put",
    "remote: manifest written",
    "remote: manifest removed",
    "remote: one file removed",
    "restore: offers gathered",
    "restore: verified",
    "restore: read",
    "restore: sent",
    "restore: put back",
)
_armed, _, _hits = os.environ.get(VARIABLE, "").partition("@")
_left = int(_hits or 1)


def reach(point: str) -> None:
    """SIGKILL this process if ``DDPTRAIN_FAILPOINT`` is ``point``, or ``point@n`` the n-th time."""
    global _left
    if not _armed:
        return
    assert point in POINTS, point
    if point == _armed:
        _left -= 1
        if _left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
