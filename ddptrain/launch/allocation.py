"""A job of Slurm: which nodes and GPUs it has, how long it has them, and which run is its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from ddptrain.claim import outwait
from ddptrain.config import Config, Resume
from ddptrain.errors import Refused, TrainingError
from ddptrain.place import refuse_tasks
from ddptrain.screen import say

FIRST_PSEUDO_STEP = 0xFFFFFFF0
"""From here on are batch scripts, interactive shells and the like, which no srun has started."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, on which this process is to start ranks. ``name`` tells it from others.

    Of an array's tasks each has a name of its own.
    """

    job: str
    name: str
    nodes: int
    is_batch: bool

    @classmethod
    def here(cls) -> Allocation | None:
        """That of a batch script or of salloc; None for a single process and outside of Slurm.

        Raises ``Refused`` if srun has started several of this process, or for a heterogeneous job.
        """
        found = os.environ
        job = found.get("SLURM_JOB_ID")
        if job is None:
            return None
        if int(found.get("SLURM_STEP_ID", FIRST_PSEUDO_STEP)) < FIRST_PSEUDO_STEP:
            refuse_tasks()
            return None
        if int(found.get("SLURM_HET_SIZE", "1")) > 1:
            raise Refused(
                f"job {job} is a heterogeneous one of {found['SLURM_HET_SIZE']} components, and it "
                "would train on the first alone: ask for the nodes as one job, without `:` and "
                "`#SBATCH hetjob`"
            )
        array = found.get("SLURM_ARRAY_JOB_ID")
        name = f"{array}_{found['SLURM_ARRAY_TASK_ID']}" if array else job
        nodes = int(found.get("SLURM_JOB_NUM_NODES", "1"))
        return cls(job, name, nodes, found.get("ENVIRONMENT") == "BATCH")

    def find_itself(self, config: Config) -> None:
        """Have a batch job come back to its run, for whatever reason Slurm starts it again."""
        if self.is_batch and config.run.dir is None:
            config.run.dir = str(Path("runs") / str(config.run.name) / f"slurm-{self.name}")
        if int(os.environ.get("SLURM_RESTART_COUNT", "0")):
            config.run.resume = Resume.auto  # it was held against what there was at first
            outwait(Path(str(config.run.dir)))

    def addresses(self) -> dict[str, str]:
        """The nodes by name, with the address at which Slurm reaches each: it need not resolve."""
        told = ask("scontrol", "--oneliner", "show", "node", os.environ["SLURM_JOB_NODELIST"])
        found = re.findall(r"^NodeName=(\S+)(?:.*? NodeAddr=(\S+))?", told, re.MULTILINE)
        return {name: address or name for name, address in found}

    def gpus(self) -> int:
        """How many GPUs the job has, if it was asked for them by the task; 0 if not.

        Slurm would hold an agent to the share of one task, unless it is told to give all.
        """
        asked = os.environ.get("SLURM_GPUS_PER_TASK", "")
        asked = asked or ",".join(
            re.findall(r"\bgpu\b[^,]*", os.environ.get("SLURM_TRES_PER_TASK", ""))
        )
        per_task = sum(map(int, re.findall(r"\d+(?=,|$)", asked)))
        tasks = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_TASKS_PER_NODE", "1"))
        return per_task * sum(int(count) * int(nodes or 1) for count, nodes in tasks)

    def seconds_left(self) -> float | None:
        """Until the job's time is up; None if it has no limit, or that cannot be told."""
        if end := os.environ.get("SLURM_JOB_END_TIME"):
            return float(end) - time.time()
        try:
            told = ask("squeue", "--noheader", f"--jobs={self.job}", "--format=%e")
            return datetime.fromisoformat(told.strip()).timestamp() - time.time()
        except (TrainingError, ValueError):
            return None

    def was_too_short(self, seconds: float) -> bool:
        """Whether it was the job's time limit that stopped it, ``seconds`` after the start.

        For a run that was stopped before its first step: the next start would come no further.
        """
        left = self.seconds_left()
        if left is None or left > seconds:
            return False
        say(
            f"ddptrain: job {self.job}: its time was nearly up after {seconds:.0f} s, before the "
            "first step, so it is not started again; give it more time (--time=…)",
            sys.stderr,
        )
        return True


def ask(*command: str) -> str:
    """What a command of Slurm's prints. Raises ``TrainingError``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise TrainingError(f"{command[0]} is not there: load Slurm's module") from None
    except subprocess.CalledProcessError as error:
        raise TrainingError(f"{' '.join(command)}: {error.stderr.strip()}") from None
    return done.stdout
