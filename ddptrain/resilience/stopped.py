"""Ends a rank that something has stopped (SIGSTOP) and nobody continues; run as a script.

A stopped process cannot watch over itself, and neither can the others if all are stopped, or are
on other machines. torch's agent waits for it forever. So each rank that an agent has started has
a small process beside it, which imports nothing. It looks at the agent's other ranks as well,
which may have been stopped before they had one, and when its own rank has gone at those that the
agent starts in its place, until they have had time to start a process of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

POLL_SECONDS = 0.5
KEPT = ("LD_LIBRARY_PATH",)
"""Of the environment, what Python itself may need."""
START_SECONDS = 30.0
"""In which a rank that is started again will have such a process of its own."""
AFTER_WATCHDOG_SECONDS = 3.0
"""The other ranks' watchdogs come first: they say why."""


def end_if_stopped(hang_seconds: float | None) -> None:
    """Have this process killed once it has been stopped for so long, if an agent started it.

    Without one it may have been a person, with Ctrl-Z.
    """
    if hang_seconds is None or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    seconds = str(hang_seconds + AFTER_WATCHDOG_SECONDS)
    # Without site packages, and in a session of its own: a signal to the ranks is not for it.
    subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), str(os.getppid()), seconds],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={name: os.environ[name] for name in KEPT if name in os.environ},
        start_new_session=True,
    )


def watch(rank: int, agent: int, seconds: float) -> None:
    """Kill ``rank``, our parent, or another child of its ``agent`` that was stopped for so long.

    Without its agent at once: it was told to end, which it will not hear of before it goes on.
    """
    since: dict[int, float] = {}
    born = _born(agent)
    until = time.monotonic() + START_SECONDS
    while True:
        now = time.monotonic()
        is_there = os.getppid() == rank
        has_agent = bool(born) and _born(agent) == born
        watched = {*(_children(agent) if has_agent else []), *([rank] if is_there else [])}
        stopped = [pid for pid in watched if _is_stopped(pid)]
        if is_there or stopped:
            until = now + START_SECONDS
        elif not has_agent or now > until:
            return
        since = {pid: since.get(pid, now) for pid in stopped}
        for pid, when in since.items():
            if now - when > seconds or not has_agent:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def _children(pid: int) -> list[int]:
    """What a process has started, where the kernel says so."""
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as stream:
            return [int(child) for child in stream.read().split()]
    except OSError:
        return []


def _is_stopped(pid: int) -> bool:
    return _stat(pid)[:1] == ["T"]


def _born(pid: int) -> list[str]:
    """What tells a process from a later one of that number; nothing of one that is over."""
    stat = _stat(pid)
    return [] if stat[:1] == ["Z"] else stat[19:20]


def _stat(pid: int) -> list[str]:
    """What the kernel says of a process, from its state on; nothing if it is gone."""
    try:
        with open(f"/proc/{pid}/stat") as stream:
            return stream.read().rpartition(")")[2].split()
    except OSError:
        return []


if __name__ == "__main__":
    watch(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
