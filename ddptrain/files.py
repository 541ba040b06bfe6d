"""Writing files so that a crash at any instant leaves the old content or the new, whole."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from typing import Any

from ddptrain.errors import Refused

LOCK_SECONDS = 5.0
"""How long a process that was just killed may take to be gone."""

_held: list[object] = []

logger = logging.getLogger(__name__)


def lock(folder: Path) -> None:
    """Claim a run's directory for this process, as long as it lives. Raises ``Refused``.

    A POSIX record lock: loading workers that outlive a killed process do not inherit it, and
    network file systems know it. Where there are no locks there is no claim.
    """
    file = (folder / ".lock").open("a+")
    until = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if time.monotonic() > until:
                file.seek(0)
                raise Refused(
                    f"{folder} is in use by {file.read().strip() or 'another process'}; "
                    "end that one, or name another run.dir"
                ) from None
            time.sleep(0.1)
        except OSError:
            return
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    _held.append(file)  # closing it would give up the claim


def replace_text(file: Path, text: str) -> None:
    """Give ``file`` a new content that is on disk before the old one is gone."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(text)
    flush(temporary)
    temporary.replace(file)
    flush(file.parent)


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
