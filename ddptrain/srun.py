"""What srun has started: whether this process is in a step of it, and how many are beside it."""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from pathlib import Path
from uuid import UUID

from ddptrain.errors import EXIT_REFUSED, Refused
from ddptrain.processes import parent_of

FIRST_PSEUDO_STEP = 0xFFFFFFF0
"""From here on are batch scripts, interactive shells and the like, which no srun has started."""


def in_step() -> bool:
    """Whether srun has started this process; not a batch script, nor a shell of salloc.

    Slurm's variables say so, but a job that is submitted from within a step inherits those of that
    step: the process that Slurm has above each of its own knows better, where it can be seen.
    """
    job = os.environ.get("SLURM_JOB_ID")
    pid = os.getpid()
    while (pid := parent_of(pid)) > 1:
        with suppress(OSError):
            title = Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
            if keeper := re.match(r"slurmstepd: \[(\d+)\.(\w+)\]", title):
                return keeper[1] == job and keeper[2].isdecimal()
    step = int(os.environ.get("SLURM_STEP_ID", FIRST_PSEUDO_STEP))
    return job is not None and step < FIRST_PSEUDO_STEP


def refuse_tasks() -> None:
    """Refuse to be one of several processes of srun, each of which would be a run of its own.

    The first of them says so, for all.
    """
    if (tasks := _tasks()) > 1:
        if os.environ.get("SLURM_PROCID", "0") != "0":
            sys.exit(EXIT_REFUSED)
        raise Refused(
            f"srun has started {tasks} of these, and each would be a run of its own: leave srun "
            "out, for in a batch script or under salloc `ddptrain train` starts the ranks on all "
            "nodes; or have srun start one (--ntasks=1), for the ranks of one node"
        )


def refuse_torchruns() -> None:
    """Refuse to be a rank of one of several torchruns that know nothing of each other."""
    if os.environ.get("GROUP_WORLD_SIZE") == "1" and _is_of_its_own() and (tasks := _tasks()) > 1:
        raise Refused(
            f"srun has started {tasks} torchruns, and each would be a run of its own: give them "
            "--nnodes, and one --rdzv-id and --rdzv-endpoint; or leave both out, for in a batch "
            "script or under salloc `ddptrain train` starts the ranks on all nodes"
        )


def _is_of_its_own() -> bool:
    """Whether a torchrun has no others to meet: one that is --standalone, or was told nothing."""
    name = os.environ.get("TORCHELASTIC_RUN_ID", "")
    with suppress(ValueError):
        return UUID(name).version == 4  # --standalone has drawn it
    meets = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return name == "none" and not meets and "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in os.environ


def _tasks() -> int:
    """How many processes srun has started of which this may be a run of its own.

    But one if it has given this one a terminal: there sits a person, and the others, such as
    shells, find nothing to read.
    """
    is_at_terminal = "SLURM_PTY_PORT" in os.environ and os.environ.get("SLURM_PROCID") == "0"
    if is_at_terminal or not in_step():
        return 1
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))
