"""The processes of a story, whoever their parent is by now: all carry its mark."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

MARK = "CHAOS_STORY"


@dataclass(frozen=True)
class Process:
    """One process. ``rank`` is None for an agent; ``leads`` tells a rank from what it started."""

    pid: int
    rank: int | None
    leads: bool
    command: str

    @property
    def is_rank(self) -> bool:
        return self.rank is not None and self.leads

    @property
    def is_loading(self) -> bool:
        """Whether it is a rank's child, but for the one in which Python keeps track of files."""
        return self.rank is not None and not self.leads and "tracker" not in self.command


def of_story(mark: str) -> list[Process]:
    """All living processes of a story; those that ended and were not waited for do not count."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            if f"{MARK}={mark}".encode() not in environ:
                continue
            pid = int(folder.name)
            rank = next((int(v[5:]) for v in environ if v.startswith(b"RANK=")), None)
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode().strip()
            found.append(Process(pid, rank, os.getsid(pid) == pid, command))
        except OSError:
            continue  # it has ended since it was listed
    return sorted(found, key=lambda process: process.pid)


def is_alive(pid: int) -> bool:
    """Whether a process is there that has not ended, be it waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def command_of(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    return "(gone)"


def send(number: signal.Signals, processes: Iterable[Process]) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)


def wait_for_none(mark: str, seconds: float) -> list[Process]:
    """Wait until no process of a story is left; return those that are, after ``seconds``."""
    until = time.monotonic() + seconds
    while (left := of_story(mark)) and time.monotonic() < until:
        time.sleep(0.02)
    return left


def kill_all(mark: str) -> None:
    """SIGKILL until none is left: one that was being forked is not in the first list."""
    until = time.monotonic() + 20
    while (left := of_story(mark)) and time.monotonic() < until:
        send(signal.SIGKILL, left)
        time.sleep(0.02)
