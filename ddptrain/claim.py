"""Who may write to a run's directory: one start of one launch, found out without asking anybody."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO
from uuid import uuid4

from ddptrain.errors import Refused, Superseded
from ddptrain.files import write_over
from ddptrain.screen import say

WAIT_SECONDS = 1.0
"""So long a process that was just killed may take to be gone, after a start has read its config."""
OWNER, LOCK, LAUNCH_LOCK = ".owner", ".lock", ".launch.lock"
LOST_NODE_SECONDS = 600.0
"""So long a node that was lost may take to notice, and a disk to give up its locks."""

logger = logging.getLogger(__name__)


class Lock:
    """A POSIX record lock, which dies with its process.

    Loading workers that outlive that do not inherit it, and network file systems know it. Where
    there are no locks, or a disk cannot be written to at all, it is as if it were there.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.held: TextIO | None = None

    def take(self, seconds: float = WAIT_SECONDS) -> None:
        """Take it for as long as this process lives. Raises ``Refused`` if another one has it."""
        until = time.monotonic() + seconds
        while not self.is_ours():
            if time.monotonic() > until:
                raise Refused(
                    f"{self.file.parent} is in use by {self.holder() or 'another process'}; "
                    "end that one, or name another run.dir"
                )
            time.sleep(0.05)

    def try_out(self) -> None:
        """Raise ``Refused`` as ``take`` does, without taking it."""
        if self.is_taken():
            self.take()
            self.give_up()

    def is_taken(self) -> bool:
        """Whether another process has it; this one must not."""
        if not self.file.exists():
            return False
        is_taken = not self.is_ours()
        self.give_up()
        return is_taken

    def is_ours(self) -> bool:
        """Whether this process has it, or has taken it now, or there are no locks here."""
        if self.held is not None:
            return True
        try:
            file = self.file.open("a+")
        except OSError:  # a disk that cannot be written to: nobody else can, either
            return True
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return False
        except OSError:
            file.close()
            return True
        self.held = file  # closing it would give up the lock
        with suppress(OSError):  # who has it is for people to read
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        return True

    def give_up(self) -> None:
        """Let others have it."""
        if self.held is not None:
            self.held.close()
            self.held = None

    def holder(self) -> str:
        """Which process has it, or had it last; empty if that cannot be told."""
        try:
            return self.file.read_text().strip()
        except OSError:
            return ""


class Claim:
    """The right of one start of a run to write to its directory.

    A lock; and a token, new with each start: who was cut off from the file system, lost the lock to
    another start and comes back, finds another token. Where there are no locks the token alone has
    to do.
    """

    def __init__(self, folder: Path, token: str | None = None) -> None:
        """With the ``token`` of a start that has the claim, this process is a part of it."""
        self.folder = folder
        self.token = token or uuid4().hex
        self.lock = Lock(folder / LOCK)

    def take(self) -> None:
        """Claim the directory as a new start of the run. Raises ``Refused`` as the lock does."""
        self.lock.take()
        owner = self.folder / OWNER
        try:
            write_over(owner, self.token)
        except OSError as error:
            if not owner.exists():
                raise
            logger.warning("%s: %s; going on, for this run was begun before", owner, error)
            self.token = owner.read_text()

    def holds(self) -> bool:
        """Whether this process may write now: it has the lock, and no other start has taken over.

        False where the folder is not the one that was claimed, but another node's of that name.
        """
        try:
            return (self.folder / OWNER).read_text() == self.token and self.lock.is_ours()
        except OSError:
            return False

    def check(self) -> None:
        """Raise ``Superseded`` if another start of the run has the claim now."""
        try:
            owner = (self.folder / OWNER).read_text()
        except OSError:  # what cannot be read cannot be written to either, and says so itself
            return
        if owner != self.token:
            raise Superseded(
                f"{self.folder}: another start of this run has taken over while this one was cut "
                f"off ({self.lock.holder() or 'its process is not known'}); this one writes no more"
            )


def outwait(folder: Path) -> None:
    """Give the start before time to leave the run: on a node that was lost it may live on."""
    until = time.monotonic() + LOST_NODE_SECONDS
    locks = [Lock(folder / name) for name in (LAUNCH_LOCK, LOCK)]
    said = ""
    while time.monotonic() < until and (taken := [lock for lock in locks if lock.is_taken()]):
        if not said:
            said = f"{folder} is in use by {taken[0].holder() or 'a start before'}; waiting for it"
            say(said, sys.stderr)
        time.sleep(0.5)


@contextmanager
def launching(folder: Path) -> Iterator[None]:
    """Have ``folder`` for a launch, also between two of its starts.

    Raises ``Refused`` if another launch has it.
    """
    lock = Lock(folder / LAUNCH_LOCK)
    lock.take()
    try:
        yield
    finally:
        lock.give_up()
