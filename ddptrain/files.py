"""Writing files so that a crash at any instant leaves the old content or the new, whole."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO
from uuid import uuid4

from ddptrain.errors import Refused, Superseded

LOCK_SECONDS = 1.0
"""So long a process that was just killed may take to be gone, after a start has read its config."""
OWNER = ".owner"
LOCK = ".lock"

logger = logging.getLogger(__name__)


class Claim:
    """The right of one start of a run to write to its directory.

    A POSIX record lock, which dies with its process; loading workers that outlive that do not
    inherit it, and network file systems know it. And a token, new with each start: who was cut off
    from the file system, lost the lock to another start and comes back, finds another token.
    Where there are no locks the token alone has to do.
    """

    def __init__(self, folder: Path, token: str | None = None) -> None:
        """With the ``token`` of a start that has the claim, this process is a part of it."""
        self.folder = folder
        self.token = token or uuid4().hex
        self.file: TextIO | None = None

    def take(self) -> None:
        """Claim the directory as a new start of the run. Raises ``Refused`` as ``try_out`` does."""
        self._wait()
        owner = self.folder / OWNER
        try:
            write_over(owner, self.token)
        except OSError as error:
            if not owner.exists():
                raise
            logger.warning("%s: %s; going on, for this run was begun before", owner, error)
            self.token = owner.read_text()

    def try_out(self) -> None:
        """Raise ``Refused``, after ``LOCK_SECONDS``, if another process has the directory."""
        self._wait()
        self._release()

    def is_taken(self) -> bool:
        """Whether another process has the directory; this one must not."""
        if not (self.folder / LOCK).exists():
            return False
        is_taken = not self.lock()
        self._release()
        return is_taken

    def _release(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _wait(self, seconds: float = LOCK_SECONDS) -> None:
        until = time.monotonic() + seconds
        while not self.lock():
            if time.monotonic() > until:
                raise Refused(
                    f"{self.folder} is in use by {self._holder() or 'another process'}; "
                    "end that one, or name another run.dir"
                )
            time.sleep(0.05)

    def lock(self) -> bool:
        """Whether this process has the lock, or could have it now, or there are no locks here."""
        if self.file is not None:
            return True
        try:
            file = (self.folder / LOCK).open("a+")
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
        self.file = file  # closing it would give up the claim
        with suppress(OSError):  # who has it is for people to read
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        return True

    def holds(self) -> bool:
        """Whether this process may write now: it has the lock, and no other start has taken over.

        False where the folder is not the one that was claimed, but another node's of that name.
        """
        try:
            return (self.folder / OWNER).read_text() == self.token and self.lock()
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
                f"off ({self._holder() or 'its process is not known'}); this one writes no more"
            )

    def _holder(self) -> str:
        try:
            return (self.folder / LOCK).read_text().strip()
        except OSError:
            return ""


def replace_text(file: Path, text: str) -> None:
    """Give ``file`` a new content that is on disk before the old one is gone."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(file)
    flush(file.parent)


def write_over(file: Path, text: str) -> None:
    """Give ``file`` a content of the same length in place, which a full disk allows as well."""
    if not file.exists() or file.stat().st_size != len(text.encode()):
        replace_text(file, text)
        return
    descriptor = os.open(file, os.O_WRONLY)
    try:
        os.pwrite(descriptor, text.encode(), 0)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush(path: Path) -> None:
    """Wait until a file's content, or a folder's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(file: Path) -> dict[str, Any]:
    """The object in ``file``; empty if there is none, or, with a warning, if it is damaged."""
    if not file.exists():
        return {}
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError) as error:
        logger.warning("%s is damaged, and passed over: %s", file, error)
        return {}
