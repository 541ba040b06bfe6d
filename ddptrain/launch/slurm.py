"""In a job of Slurm: starts an agent on each node, stops in time, and has the job go on later."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from socket import create_server

from ddptrain.claim import LAUNCH_LOCK, LOCK, Lock
from ddptrain.compose import to_plain
from ddptrain.config import Config, Resume
from ddptrain.errors import (
    EXIT_COMPLETED,
    EXIT_FAILED,
    EXIT_REFUSED,
    EXIT_STOPPED,
    Refused,
    TrainingError,
)
from ddptrain.launch.agent import DDPTRAIN, POLL_SECONDS, Store, heard
from ddptrain.launch.node import ADDRESSES, ENDPOINT, FIRST_ERROR, MAYBE_OF_PEER, WARNED
from ddptrain.place import refuse_tasks
from ddptrain.remembered import LAUNCHED
from ddptrain.resilience.crashes import LAUNCH, Crashes
from ddptrain.run_directory import RunDirectory
from ddptrain.screen import say

FIRST_PSEUDO_STEP = 0xFFFFFFF0
"""From here on are batch scripts, interactive shells and the like, which no srun has started."""
MARGIN_SECONDS = 60.0
"""So long before its end a job should have saved, besides the time that saving takes."""
REQUEUE_SECONDS = 60.0
"""So long Slurm takes at most to end what it starts again."""
LOST_NODE_SECONDS = 600.0
"""So long a node that Slurm has lost may take to notice, and a disk to give up its locks."""
OF_TASKS = (
    "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_CPUS_PER_", "SRUN_CPUS_PER_TASK", "SLURM_GPUS_PER_TASK",
    "SLURM_TRES_PER_TASK", "SLURM_MEM_PER_", "SLURM_DIST", "SLURM_EXACT", "SLURM_CPU_BIND",
    "SLURM_GPU_BIND", "SLURM_MEM_BIND", "SLURM_TRES_BIND",
)  # fmt: skip
"""How variables begin that tell srun of tasks and their share of a node, as sbatch was asked, or as
a shell has inherited them: for one agent on a whole node they are wrong, or contradict each other.
"""


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
            _outwait(Path(str(config.run.dir)))

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


def _outwait(folder: Path) -> None:
    """Give the start before time to leave the run: on a node that Slurm has lost it may live on."""
    until = time.monotonic() + LOST_NODE_SECONDS
    locks = [Lock(folder / name) for name in (LAUNCH_LOCK, LOCK)]
    said = ""
    while time.monotonic() < until and (taken := [lock for lock in locks if lock.is_taken()]):
        if not said:
            said = f"{folder} is in use by {taken[0].holder() or 'a start before'}; waiting for it"
            say(said, sys.stderr)
        time.sleep(1)


def launch_on(allocation: Allocation, run: RunDirectory, config: Config) -> int:
    """Train on all nodes of a job; return the exit code.

    A batch job that was stopped before its time was up, or by a signal to its steps, is requeued,
    and goes on in its next start; one that failed is not, nor one that was cancelled.
    """
    began = time.time()
    os.environ[LAUNCH] = f"slurm-{allocation.name}"  # over requeues, too
    store = Store(create_server(("", 0)))
    store.thread.start()
    before = _written(run)
    with heard() as signals:
        process = _start_agents(allocation, config, store.port)
        asked = _wait(process, allocation, config.resilience.grace_seconds, signals)
        code = process.returncode
        if code == 0:
            return EXIT_COMPLETED
        if _written(run) == before or run.outcome().get("status") != "stopped":
            if code not in WARNED:
                _tell_cause(store, run, began)
                return EXIT_REFUSED if code == EXIT_REFUSED else EXIT_FAILED
            if allocation.was_too_short(time.time() - began):
                return EXIT_FAILED
        if allocation.is_batch and not {signal.SIGTERM, signal.SIGINT} & asked:
            _requeue(allocation, run, signals)
    return EXIT_STOPPED


def _start_agents(allocation: Allocation, config: Config, port: int) -> subprocess.Popen[bytes]:
    """Start one agent on each node, all of which meet at ``port`` of this one."""
    addresses = allocation.addresses()
    here = addresses.get(os.environ.get("SLURMD_NODENAME", ""), "")
    variables = {k: v for k, v in os.environ.items() if not k.startswith(OF_TASKS)}
    variables[ENDPOINT], variables[ADDRESSES] = f"{here}:{port}", json.dumps(addresses)
    variables[LAUNCHED] = json.dumps(to_plain(config))
    # Not --cpus-per-task: it would take no more of any node than the smallest has.
    srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", "--ntasks-per-node=1"]
    srun += [f"--nodes={allocation.nodes}", f"--ntasks={allocation.nodes}"]
    srun += [f"--gpus={gpus}"] if (gpus := allocation.gpus()) else []
    command = [*srun, *config.slurm.srun, *DDPTRAIN, "node"]
    # A session of its own: Ctrl-C is for the ranks, and srun would ask for a second one.
    return subprocess.Popen(command, env=variables, start_new_session=True)


def _tell_cause(store: Store, run: RunDirectory, began: float) -> None:
    """Repeat the first error after all that agents and srun say, if a rank could still tell it."""
    told = dict.fromkeys((FIRST_ERROR, MAYBE_OF_PEER), "")
    if store.store is not None:  # srun may have failed before there was one
        told = {k: store.store.get(k).decode() for k in told if store.store.check([k])}
    noted = [crash for crash in Crashes(run.crashes).of_launch()[-1:] if crash.time > began]
    lines = [told.get(FIRST_ERROR), *(f"rank {crash.rank}: {crash.error}" for crash in noted)]
    for line in [line for line in [*lines, told.get(MAYBE_OF_PEER)] if line][:1]:
        say(f"ddptrain: {line}", sys.stderr)


def _written(run: RunDirectory) -> int:
    return run.result.stat().st_mtime_ns if run.result.exists() else 0


def _wait(
    process: subprocess.Popen[bytes],
    allocation: Allocation,
    grace_seconds: float,
    signals: deque[signal.Signals],
) -> set[signal.Signals]:
    """Wait for the ranks to end; hand on signals to them, and in time one of our own.

    Returns the signals that came. Slurm sends its own (``--signal``) to steps, not to who waits.
    """
    asked: set[signal.Signals] = set()
    tellers: list[subprocess.Popen[bytes]] = []
    left = allocation.seconds_left()
    at = math.inf
    if left is not None:
        at = time.monotonic() + left - min(grace_seconds + MARGIN_SECONDS, left / 4)
    while process.poll() is None:
        told = [signals.popleft() for _ in range(len(signals))]
        asked |= set(told)
        if time.monotonic() > at:
            say("the job's time is nearly up: it stops, to go on later", sys.stderr)
            told, at = [*told, signal.SIGUSR1], math.inf
        for number in told:
            # Quietly, for Slurm may have ended the job itself, and told the steps.
            command = ["scancel", "--quiet", f"--signal={int(number)}", allocation.job]
            tellers.append(subprocess.Popen(command))
        time.sleep(POLL_SECONDS)
    for teller in tellers:  # of a job that Slurm itself ends it tries for half a minute
        teller.kill()
        teller.wait()
    return asked


def _requeue(allocation: Allocation, run: RunDirectory, signals: deque[signal.Signals]) -> None:
    """Have Slurm start the job again, which ends this process."""
    try:
        ask("scontrol", "requeue", allocation.job)
    except TrainingError as error:
        say(
            f"ddptrain: job {allocation.job} is not started again ({error}); the run goes on in "
            f"another job, with run.dir={run.path}",
            sys.stderr,
        )
    else:
        # Before that its own end could be taken for that of the next start.
        until = time.monotonic() + REQUEUE_SECONDS
        while signal.SIGTERM not in signals and time.monotonic() < until:
            time.sleep(POLL_SECONDS)


def ask(*command: str) -> str:
    """What a command of Slurm's prints. Raises ``TrainingError``."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise TrainingError(f"{command[0]} is not there: load Slurm's module") from None
    except subprocess.CalledProcessError as error:
        raise TrainingError(f"{' '.join(command)}: {error.stderr.strip()}") from None
    return done.stdout
