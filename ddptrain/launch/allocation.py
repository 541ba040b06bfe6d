"""A job of Slurm: which nodes and GPUs it has, how long it has them, and which run is its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from shutil import which

from ddptrain.claim import outwait
from ddptrain.config import Config, Resume
from ddptrain.errors import Refused, TrainingError
from ddptrain.screen import say
from ddptrain.srun import in_step, refuse_tasks

OWN, KEPT = ("SLURM_", "SLURMD_", "SRUN_", "ENVIRONMENT"), ("SLURM_CONF",)
"""How variables begin that tell of the job in which they are found, and one that does not."""


@dataclass(frozen=True)
class Allocation:
    """The nodes of a job, on which this process is to start ranks. ``name`` tells it from others.

    Of an array's tasks each has a name of its own.
    """

    job: str
    name: str
    nodes: int
    is_batch: bool
    has_been_requeued: bool = False

    @classmethod
    def here(cls) -> Allocation | None:
        """That of a batch script or of salloc; None for a process of srun and outside of Slurm.

        Raises ``Refused`` if srun has started several of this process, for a heterogeneous job, and
        where it could start none.
        """
        found = os.environ
        job = found.get("SLURM_JOB_ID")
        if job is None:
            return None
        if in_step():
            refuse_tasks()
            return None
        if int(found.get("SLURM_HET_SIZE", "1")) > 1:
            raise Refused(
                f"job {job} is a heterogeneous one of {found['SLURM_HET_SIZE']} components, and it "
                "would train on the first alone: ask for the nodes as one job, without `:` and "
                "`#SBATCH hetjob`"
            )
        if missing := [name for name in ("srun", "scontrol") if which(name) is None]:
            raise Refused(
                f"{' and '.join(missing)} cannot be found, by which job {job} starts ranks on its "
                "nodes: load Slurm's module; a container has to be started by srun (--ntasks=1), "
                "for the ranks of one node"
            )
        is_of_array, was_requeued = _is_of_array_and_requeued(job)
        array = f"{found.get('SLURM_ARRAY_JOB_ID')}_{found.get('SLURM_ARRAY_TASK_ID')}"
        nodes = int(found.get("SLURM_JOB_NUM_NODES", "1"))
        is_batch = found.get("ENVIRONMENT") == "BATCH"
        return cls(job, array if is_of_array else job, nodes, is_batch, was_requeued)

    def find_itself(self, config: Config) -> None:
        """Have a batch job come back to its run, for whatever reason Slurm starts it again."""
        if self.is_batch and config.run.dir is None:
            config.run.dir = str(Path("runs") / str(config.run.name) / f"slurm-{self.name}")
        if self.has_been_requeued:
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


def _is_of_array_and_requeued(job: str) -> tuple[bool, bool]:
    """As the variables say, unless the job has inherited them of one that submitted it."""
    is_of_array = "SLURM_ARRAY_JOB_ID" in os.environ
    was_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    if is_of_array or was_requeued:
        asked = f"--jobs={job}", "--states=all", "--Format=ArrayTaskID:30,RestartCnt:30"
        with suppress(TrainingError):  # of the first of an array it tells about all of them
            told = [line.split() for line in ask("squeue", "--noheader", *asked).splitlines()]
            is_of_array &= any(task != "N/A" for task, _ in told)
            was_requeued &= any(count != "0" for _, count in told)
    return is_of_array, was_requeued


def ask(*command: str, of_job: bool = True) -> str:
    """What a command of Slurm's prints. Raises ``TrainingError``.

    If not ``of_job``, it hears nothing of the job that this process is in.
    """
    heard = {k: v for k, v in os.environ.items() if of_job or k in KEPT or not k.startswith(OWN)}
    try:
        done = subprocess.run(command, env=heard, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise TrainingError(f"{command[0]} is not there: load Slurm's module") from None
    except subprocess.CalledProcessError as error:
        told = " ".join(error.stderr.split())
        raise TrainingError(told if command[0] in told else f"{command[0]}: {told}") from None
    return done.stdout
