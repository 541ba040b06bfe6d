"""What runs have left in a node's memory: whose it is, and when it may go."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path
from re import fullmatch

from ddptrain.claim import LOCK, Lock

OWNER = "run.json"
ABANDONED_SECONDS = 7 * 24 * 3600.0
GONE_SECONDS = 3600.0


def sign(memory: Path, run: Path, identity: str) -> None:
    """Say whose ``memory`` it is."""
    with contextlib.suppress(OSError):  # one that is full now need not stay so
        memory.mkdir(parents=True, exist_ok=True, mode=0o700)
        (memory / OWNER).write_text(json.dumps({"run": str(run), "identity": identity}))


def delete_abandoned(own: Path) -> None:
    """Delete the memories beside ``own`` that nobody needs any more."""
    for other in own.parent.iterdir() if own.parent.is_dir() else ():
        if other != own and _is_abandoned(other):
            shutil.rmtree(other, ignore_errors=True)


def _is_abandoned(folder: Path) -> bool:
    """Whether the run whose snapshots these are is gone, over, or was left for a week."""
    try:
        age = time.time() - folder.stat().st_mtime
    except OSError:
        return False
    is_old = age > ABANDONED_SECONDS
    try:
        owner = json.loads((folder / OWNER).read_text())
        run = Path(owner["run"])
        if (run / ".identity").read_text() != owner["identity"]:
            return True
        if Lock(run / LOCK).is_taken():  # whatever the clock says
            return False
        result = json.loads((run / "result.json").read_text())
        return is_old or bool(result["status"] == "completed")
    except FileNotFoundError as error:
        is_gone = Path(str(error.filename)).name == ".identity"  # or its disk is, for a while
        return is_old or (is_gone and age > GONE_SECONDS)
    except (OSError, ValueError, KeyError, TypeError):
        return is_old


def is_being_filled(name: str) -> bool:
    """Whether a folder is a slot of a process that lives: a rank that rescues."""
    slot = fullmatch(r"\.slot-(\d+)-\d+", name)
    return slot is not None and Path(f"/proc/{slot[1]}").exists()
