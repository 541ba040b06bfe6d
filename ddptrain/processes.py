"""What the kernel says of processes: when one began, whether it lives, or is stopped."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import suppress
from pathlib import Path


def _fields(pid: int | str) -> list[str]:
    """``/proc/<pid>/stat`` from its third field on, which is the state; empty if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def parent_of(pid: int) -> int:
    """The number of the process that a process is a child of; 0 if it is gone, or has none."""
    fields = _fields(pid)
    return int(fields[1]) if fields else 0


def born(pid: int) -> str:
    """When a process started, in ticks since boot: with its number, its name for good."""
    fields = _fields(pid)
    return fields[19] if fields else ""


def space() -> str:
    """Where the numbers of processes are those of this one: a machine, or a container of it."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def is_gone(pid: int, start: str) -> bool:
    """Whether that process has ended, also if nobody has looked after it yet."""
    fields = _fields(pid)
    return not fields or fields[19] != start or fields[0] in "ZX"


def kill_if_stopped(pid: int, start: str) -> bool:
    """SIGKILL a process that is stopped, which would ignore anything gentler."""
    fields = _fields(pid)
    if not fields or fields[19] != start or fields[0] not in "Tt":
        return False
    with suppress(ProcessLookupError):  # others have been faster
        os.kill(pid, signal.SIGKILL)
    return True
