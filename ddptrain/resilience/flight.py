"""NCCL's flight recorder: which collectives a rank had begun and not finished."""

from __future__ import annotations

import json
import os
from typing import Any

ENTRIES = "2000"


def arm() -> None:
    """Have NCCL record its collectives; before the process group is formed.

    NCCL's own answer to a lost peer is to abort the process, and with it what it alone still has.
    The watchdog answers instead.
    """
    for name in ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE"):
        os.environ.setdefault(name, ENTRIES)
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"


def unfinished() -> str:
    """What this rank's recorder says, as the end of a sentence; empty where there is none."""
    from torch._C import _distributed_c10d as c10d

    dump = getattr(c10d, "_dump_nccl_trace_json", None)
    if dump is None or "TORCH_FR_BUFFER_SIZE" not in os.environ:
        return ""
    try:
        return describe(json.loads(dump()))
    except Exception:  # a report must not fail for want of a detail
        return ""


def describe(recorded: dict[str, Any]) -> str:
    """The first collective of a dump that was begun and not completed."""
    for entry in recorded.get("entries", []):
        if entry.get("state") != "completed":
            name = entry.get("profiling_name", "a collective")
            number = entry.get("collective_seq_id", "?")
            return f"; on this rank {name}, the {number}th collective, is {entry.get('state')}"
    return ""
